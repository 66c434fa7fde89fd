"""The decoder family once more, in plain float64 NumPy, for tests.

Written from the papers and from what the published checkpoints' modelling
code computes, apart from `lm.model`, so that the two can only agree by both
being right. One loop over layers, one over query heads; no speed.

Parameters are a nested dict of arrays, layers stacked on a leading axis L:

  embed [V, D], position_embed [context_length, D], head [D, V]
  layers:
    attention_norm, attention_post_norm, mlp_norm, mlp_post_norm:
      scale [L, D], bias [L, D]
    attention: q [L, D, N, H], k and v [L, D, K, H], o [L, N, H, D],
      q_bias [L, N, H], k_bias and v_bias [L, K, H], o_bias [L, D],
      q_norm and k_norm: scale [L, H], or [L, N, H] and [L, K, H]
    mlp: up and gate [L, D, F], down [L, F, D],
      up_bias and gate_bias [L, F], down_bias [L, D]
  embedding_norm, final_norm: scale [D], bias [D]
  head_transform: dense [D, D], dense_bias [D], norm: scale [D], bias [D]
  head_bias [V]

B batch, T query length, S key length, D model, F mlp, N query heads,
K kv heads, G = N / K, H head, V vocabulary, L layers.
"""

import math
from collections.abc import Callable

import numpy as np

from lm import batch as batch_lib
from lm import config as config_lib


def shapes(cfg: config_lib.ModelConfig) -> dict:
  """The parameter tree, each array by its shape."""
  L, D, F, V = cfg.n_layers, cfg.d_model, cfg.d_mlp, cfg.vocab_size
  N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head

  def norm(*lead: int) -> dict:
    biased = "norm" in cfg.biases
    return {"scale": (*lead, D)} | ({"bias": (*lead, D)} if biased else {})

  attention: dict = {
    "q": (L, D, N, H),
    "k": (L, D, K, H),
    "v": (L, D, K, H),
    "o": (L, N, H, D),
  }
  mlp: dict = {"up": (L, D, F), "down": (L, F, D)}
  if cfg.gated:
    mlp["gate"] = (L, D, F)
  if "qkv" in cfg.biases:
    attention |= {"q_bias": (L, N, H), "k_bias": (L, K, H)}
    attention |= {"v_bias": (L, K, H)}
  if "o" in cfg.biases:
    attention |= {"o_bias": (L, D)}
  if "mlp" in cfg.biases:
    mlp |= {"up_bias": (L, F), "down_bias": (L, D)}
    if cfg.gated:
      mlp["gate_bias"] = (L, F)
  if cfg.qk_norm == "head":
    attention |= {"q_norm": {"scale": (L, H)}, "k_norm": {"scale": (L, H)}}
  if cfg.qk_norm == "projection":
    attention |= {"q_norm": {"scale": (L, N, H)}}
    attention |= {"k_norm": {"scale": (L, K, H)}}
  layers: dict = {"attention": attention, "mlp": mlp}
  if cfg.norm_placement in ("pre", "both"):
    layers |= {"attention_norm": norm(L), "mlp_norm": norm(L)}
  if cfg.norm_placement != "pre":
    layers |= {"attention_post_norm": norm(L), "mlp_post_norm": norm(L)}
  tree = {"embed": (V, D), "layers": layers}
  if cfg.norm_placement != "residual":
    tree["final_norm"] = norm()
  if cfg.positions == "learned":
    tree["position_embed"] = (cfg.context_length, D)
  if not cfg.tied_embedding:
    tree["head"] = (D, V)
  if cfg.embedding_norm:
    tree["embedding_norm"] = norm()
  if cfg.head_transform:
    bias = {"dense_bias": (D,)} if "mlp" in cfg.biases else {}
    tree["head_transform"] = {"dense": (D, D), "norm": norm()} | bias
  if cfg.head_bias:
    tree["head_bias"] = (V,)
  return tree


def map_tree(function, tree: dict, path: tuple[str, ...] = ()) -> dict:
  """Applies `function(path, leaf)` throughout a nested dict."""
  return {
    name: map_tree(function, node, (*path, name))
    if isinstance(node, dict)
    else function((*path, name), node)
    for name, node in sorted(tree.items())
  }


def random_params(cfg: config_lib.ModelConfig, seed: int = 0) -> dict:
  """Float32 weights under which every array matters: no scale is 1, no bias 0.

  Matrices have standard deviation 1 / sqrt(fan in), so that attention is far
  from uniform and soft-caps bend. Values fit float16, so goldens compress.
  """
  rng = np.random.default_rng(seed)

  def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(shape)
    match path[-1]:
      case "scale":
        x = 0.3 * x + (0.0 if cfg.norm_unit_offset else 1.0)
      case "o":
        x = x / math.sqrt(cfg.n_heads * cfg.d_head)
      case "q" | "k" | "v" | "up" | "gate" | "down":
        x = x / math.sqrt(shape[1])
      case "head" | "dense":
        x = x / math.sqrt(shape[0])
      case "embed" | "position_embed":
        x = x / math.sqrt(shape[1])
      case name if name.endswith("bias"):
        x = 0.3 * x
    return x.astype(np.float16).astype(np.float32)

  return map_tree(draw, shapes(cfg))


# --- layers ------------------------------------------------------------------


def normalize(
  x: np.ndarray, p: dict, cfg: config_lib.ModelConfig
) -> np.ndarray:
  """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467)."""
  if cfg.norm == "layernorm":
    x = x - x.mean(-1, keepdims=True)
  y = x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.norm_epsilon)
  y = y * (p["scale"] + (1.0 if cfg.norm_unit_offset else 0.0))
  return y + p["bias"] if "bias" in p else y


def rms_normalize_heads(
  x: np.ndarray, scale: np.ndarray, cfg: config_lib.ModelConfig
) -> np.ndarray:
  """RMSNorm of [B, T, heads, H], whatever `cfg.norm` is: over H, or where the
  scale is of a whole projection, over heads and H.
  """
  axes = (-1,) if cfg.qk_norm == "head" else (-2, -1)
  y = x / np.sqrt((x * x).mean(axes, keepdims=True) + cfg.norm_epsilon)
  return y * (scale + (1.0 if cfg.norm_unit_offset else 0.0))


def inverse_frequencies(
  cfg: config_lib.ModelConfig, windowed: bool
) -> np.ndarray:
  """Radians per position of each of the planes that turn (arXiv:2104.09864).

  A base of their own exempts windowed layers from scaling (Gemma 3, OLMo 3).
  """
  own_base = windowed and cfg.rope_theta_windowed is not None
  theta = cfg.rope_theta_windowed if own_base else cfg.rope_theta
  rotary = round(cfg.rotary_fraction * cfg.d_head)
  planes = [theta ** (-2.0 * i / rotary) for i in range(rotary // 2)]
  scaling = None if own_base else cfg.rope_scaling
  if scaling is None:
    return np.array(planes)
  result = []
  for i, frequency in enumerate(planes):
    turns = scaling.original_length * frequency / (2 * math.pi)
    match scaling.kind:
      case "llama3":
        # Keeps planes that turn often in the original length, divides those
        # that turn little, and goes linearly between, in the number of turns.
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
      case "yarn":
        # The same, linearly in the number of the plane. A plane of n turns is
        # log(L / 2 pi n) / log(theta) of the way to the last.
        fast, slow = (
          rotary / 2 * math.log(scaling.original_length / (2 * math.pi * n))
          / math.log(theta)
          for n in (scaling.beta_fast, scaling.beta_slow)
        )  # fmt: skip
        if scaling.truncate:
          fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, rotary - 1)
        kept = 1 - min(max((i - fast) / (slow - fast), 0.0), 1.0)
      case "linear":
        kept = 0.0
      case "longrope":
        long = cfg.context_length > scaling.original_length
        divisors = scaling.long_factors if long else scaling.short_factors
        result.append(frequency / divisors[i])
        continue
    result.append(kept * frequency + (1 - kept) * frequency / scaling.factor)
  return np.array(result)


def rotary_scale(cfg: config_lib.ModelConfig, windowed: bool) -> float:
  """Factor of the rotated dimensions of queries and keys."""
  scaling = cfg.rope_scaling
  if scaling is None or windowed and cfg.rope_theta_windowed is not None:
    return 1.0
  match scaling.kind, scaling.attention_factor:
    case "yarn", None:
      return max(1.0, 1 + math.log(scaling.factor) / 10)
    case "longrope", None:
      log = math.log(max(1.0, scaling.factor))
      return math.sqrt(1 + log / math.log(scaling.original_length))
    case "yarn" | "longrope", given:
      return given
  return 1.0


def rotate(
  x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, scale: float
) -> np.ndarray:
  """Turns plane (i, i + R) of [B, T, heads, H] by position * frequency, for
  each of R frequencies, times `scale`; the rest of H passes.
  """
  R = len(frequencies)
  turn = scale * np.exp(1j * positions[:, :, None, None] * frequencies)
  plane = (x[..., :R] + 1j * x[..., R : 2 * R]) * turn
  return np.concatenate([plane.real, plane.imag, x[..., 2 * R :]], axis=-1)


def visible(
  segments: np.ndarray, prefix: np.ndarray, window: int | None
) -> np.ndarray:
  """[B, T, S] bool: may query t read key s?"""
  B, T = segments.shape
  mask = np.zeros((B, T, T), bool)
  for b in range(B):
    for t in range(T):
      for s in range(T):
        mask[b, t, s] = (
          segments[b, t] == segments[b, s] != 0
          and (s <= t or prefix[b, s])
          and (window is None or abs(t - s) < window)
        )
  return mask


def attention(
  x: np.ndarray,
  p: dict,
  cfg: config_lib.ModelConfig,
  mask: np.ndarray,
  turn: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
  """Grouped-query attention (arXiv:2305.13245); a query without keys adds 0."""
  q = np.einsum("BTD,DNH->BTNH", x, p["q"]) + p.get("q_bias", 0.0)
  k = np.einsum("BTD,DKH->BTKH", x, p["k"]) + p.get("k_bias", 0.0)
  v = np.einsum("BTD,DKH->BTKH", x, p["v"]) + p.get("v_bias", 0.0)
  if cfg.qk_norm:
    q = rms_normalize_heads(q, p["q_norm"]["scale"], cfg)
    k = rms_normalize_heads(k, p["k_norm"]["scale"], cfg)
  q, k = turn(q), turn(k)
  scale_dim = cfg.query_scale_dim or cfg.d_head
  group = cfg.n_heads // cfg.n_kv_heads
  out = np.zeros_like(x)
  for n in range(cfg.n_heads):
    keys, values = k[:, :, n // group], v[:, :, n // group]
    scores = q[:, :, n] @ keys.transpose(0, 2, 1) / math.sqrt(scale_dim)
    if cfg.attention_softcap is not None:
      cap = cfg.attention_softcap
      scores = cap * np.tanh(scores / cap)
    largest = scores.max(-1, keepdims=True)
    weights = np.where(mask, np.exp(scores - largest), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1.0, total)
    out += weights @ values @ p["o"][n]
  return out + p.get("o_bias", 0.0)


def gelu(x: np.ndarray) -> np.ndarray:
  """The tanh approximation (arXiv:1606.08415), as GPT-2 and Gemma use it."""
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


def gelu_exact(x: np.ndarray) -> np.ndarray:
  """x times the normal distribution's share below x, as BERT uses it."""
  return x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2


def mlp(x: np.ndarray, p: dict, cfg: config_lib.ModelConfig) -> np.ndarray:
  """Feed-forward: plain, or gated as in arXiv:2002.05202."""
  up = x @ p["up"] + p.get("up_bias", 0.0)
  if cfg.gated:
    gate = x @ p["gate"] + p.get("gate_bias", 0.0)
  match cfg.mlp:
    case "gelu":
      hidden = gelu(up)
    case "gelu_exact":
      hidden = gelu_exact(up)
    case "relu2":
      hidden = np.maximum(up, 0.0) ** 2
    case "swiglu":
      hidden = gate / (1 + np.exp(-gate)) * up
    case "geglu":
      hidden = gelu(gate) * up
    case "geglu_exact":
      hidden = gelu_exact(gate) * up
  return hidden @ p["down"] + p.get("down_bias", 0.0)


def turn_of(
  cfg: config_lib.ModelConfig, layer: int, positions: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
  """What positions do to the queries and keys of a layer."""
  rotary = cfg.rope_layers[layer % len(cfg.rope_layers)]
  if cfg.positions != "rope" or not rotary:
    return lambda x: x
  windowed = cfg.windows[layer % len(cfg.windows)] is not None
  frequencies = inverse_frequencies(cfg, windowed)
  scale = rotary_scale(cfg, windowed)
  return lambda x: rotate(x, positions, frequencies, scale)


def before(
  x: np.ndarray, name: str, p: dict, cfg: config_lib.ModelConfig
) -> np.ndarray:
  """What a sub-layer reads: the residual, normalised or as it is."""
  return normalize(x, p[name], cfg) if name in p else x


def after(
  x: np.ndarray, y: np.ndarray, name: str, p: dict, cfg: config_lib.ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
  """(The residual with a sub-layer's output y, what was added to it)."""
  if cfg.norm_placement == "residual":
    return normalize(x + y, p[name], cfg), y
  y = normalize(y, p[name], cfg) if name in p else y
  return x + y, y


def forward(
  params: dict,
  cfg: config_lib.ModelConfig,
  batch: batch_lib.Batch,
  seen: list[dict[str, np.ndarray]] | None = None,
) -> np.ndarray:
  """Float64 logits [B, T, V] of a batch, without dropout; appends to `seen`
  what the attention and the MLP of each layer add, and the residual after them.
  """
  prefix = batch.prefix
  if prefix is None or not cfg.causal:
    prefix = np.full(batch.inputs.shape, not cfg.causal)
  params = map_tree(lambda _, x: np.asarray(x, np.float64), params)
  x = params["embed"][batch.inputs]
  if cfg.scale_embedding:
    x = x * math.sqrt(cfg.d_model)
  if cfg.positions == "learned":
    x = x + params["position_embed"][batch.positions]
  if cfg.embedding_norm:
    x = normalize(x, params["embedding_norm"], cfg)
  for i in range(cfg.n_layers):
    p = map_tree(lambda _, a, i=i: a[i], params["layers"])
    window = cfg.windows[i % len(cfg.windows)]
    mask = visible(batch.segments, prefix, window)
    turn = turn_of(cfg, i, batch.positions)
    raw = i == 0 and not cfg.first_attention_norm
    y = x if raw else before(x, "attention_norm", p, cfg)
    y = attention(y, p["attention"], cfg, mask, turn)
    x, attended = after(x, y, "attention_post_norm", p, cfg)
    y = mlp(before(x, "mlp_norm", p, cfg), p["mlp"], cfg)
    x, fed = after(x, y, "mlp_post_norm", p, cfg)
    if seen is not None:
      seen.append({"residual": x, "attention": attended, "mlp": fed})
  if cfg.norm_placement != "residual":
    x = normalize(x, params["final_norm"], cfg)
  if cfg.head_transform:
    p = params["head_transform"]
    y = x @ p["dense"] + p.get("dense_bias", 0.0)
    y = gelu_exact(y) if cfg.mlp.endswith("_exact") else gelu(y)
    x = normalize(y, p["norm"], cfg)
  head = params["embed"].T if cfg.tied_embedding else params["head"]
  logits = x @ head + params.get("head_bias", 0.0)
  if cfg.logit_softcap is not None:
    logits = cfg.logit_softcap * np.tanh(logits / cfg.logit_softcap)
  return logits
