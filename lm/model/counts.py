"""Parameter counts and FLOPs (floating-point operations), in closed form."""

from lm import config as config_lib
from lm.model import lora


def parameter_count(cfg: config_lib.ModelConfig) -> int:
  """Number of parameters, embeddings and adapters included; a tied head counts
  once.
  """
  D = cfg.d_model
  norm = D * (2 if "norm" in cfg.biases else 1)
  norms = 4 if cfg.norm_placement == "both" else 2
  per_layer = _layer_matrices(cfg) + _layer_biases(cfg) + norms * norm
  per_layer += _layer_adapters(cfg)
  if cfg.qk_norm == "head":
    per_layer += 2 * cfg.d_head
  elif cfg.qk_norm == "projection":
    per_layer += cfg.d_head * (cfg.n_heads + cfg.n_kv_heads)
  total = cfg.vocab_size * D + cfg.n_layers * per_layer
  total += norm * (
    (cfg.norm_placement != "residual") + cfg.embedding_norm + cfg.head_transform
  )
  total += _head_transform(cfg)
  if cfg.head_transform and "mlp" in cfg.biases:
    total += D
  if cfg.head_bias:
    total += cfg.vocab_size
  if cfg.positions == "learned":
    total += cfg.context_length * D
  if not cfg.tied_embedding:
    total += D * cfg.vocab_size
  return total


def forward_flops(cfg: config_lib.ModelConfig, length: int) -> float:
  """Forward FLOPs per token of a sequence of `length`; a multiply-add is two.

  Counts matrix products only, and in attention only the unmasked (query, key)
  pairs (causal, windowed): a kernel gets no credit for work on masked pairs.
  """
  pairs = sum(
    _mean_visible(length, cfg.windows[i % len(cfg.windows)])
    for i in range(cfg.n_layers)
  )
  if not cfg.causal:  # as many keys after a query as before
    pairs = 2 * pairs - cfg.n_layers
  scores_and_sums = 2 * cfg.n_heads * cfg.d_head
  adapters = cfg.n_layers * _layer_adapters(cfg)
  return 2 * (_matrices(cfg) + adapters + scores_and_sums * pairs)


def train_flops(cfg: config_lib.ModelConfig, length: int) -> float:
  """Forward and backward FLOPs per token, without recomputation (remat).

  A frozen matrix (LoRA) has two products in place of three: its own gradient is
  not computed.
  """
  flops = 3 * forward_flops(cfg, length)
  if cfg.lora is None:
    return flops
  trained = ("embed" if cfg.tied_embedding else "head") in cfg.lora.full
  head = cfg.vocab_size * cfg.d_model if trained else 0
  return flops - 2 * (_matrices(cfg) - head)


def _matrices(cfg: config_lib.ModelConfig) -> int:
  head = cfg.vocab_size * cfg.d_model
  return cfg.n_layers * _layer_matrices(cfg) + _head_transform(cfg) + head


def _head_transform(cfg: config_lib.ModelConfig) -> int:
  return cfg.d_model**2 if cfg.head_transform else 0


def _layer_adapters(cfg: config_lib.ModelConfig) -> int:
  """Elements of the factors A and B of a layer's adapters (LoRA)."""
  if cfg.lora is None:
    return 0
  D, F = cfg.d_model, cfg.d_mlp
  heads = D + cfg.n_heads * cfg.d_head
  kv_heads = D + cfg.n_kv_heads * cfg.d_head
  sizes = {"q": heads, "k": kv_heads, "v": kv_heads, "o": heads}
  sizes |= dict.fromkeys(("gate", "up", "down"), D + F)
  return cfg.lora.rank * sum(sizes[name] for name in lora.targets(cfg))


def _layer_matrices(cfg: config_lib.ModelConfig) -> int:
  attention = cfg.d_model * cfg.d_head * 2 * (cfg.n_heads + cfg.n_kv_heads)
  return attention + cfg.d_model * cfg.d_mlp * (3 if cfg.gated else 2)


def _layer_biases(cfg: config_lib.ModelConfig) -> int:
  sizes = {
    "qkv": cfg.d_head * (cfg.n_heads + 2 * cfg.n_kv_heads),
    "o": cfg.d_model,
    "mlp": cfg.d_mlp * (2 if cfg.gated else 1) + cfg.d_model,
    "norm": 0,  # counted with the norms
  }
  return sum(sizes[part] for part in cfg.biases)


def _mean_visible(length: int, window: int | None) -> float:
  """Mean number of visible keys per query of a causal sequence of `length`."""
  w = length if window is None else min(window, length)
  return w - w * (w - 1) / (2 * length)
