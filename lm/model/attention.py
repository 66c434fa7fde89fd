"""Attention: the mask, queries, keys and values. Kernels are in kernels.py.

B batch, T query length, S key length, D model, N query heads, K kv heads,
G = N / K, H head.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lm import config as config_lib
from lm import sharding
from lm.model import kernels, layers, remat, rotary, weights


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["positions", "segments", "prefix"],
  meta_fields=[],
)
@dataclasses.dataclass
class Tokens:
  """Position, segment and prefix flag of each token; together they determine
  the attention mask.

  `prefix` None means a causal mask, known to the kernels at compile time.
  """

  positions: Int[Array, "B T"]
  segments: Int[Array, "B T"]
  prefix: Bool[Array, "B T"] | None


def visible(
  queries: Tokens, keys: Tokens, window: int | None
) -> Bool[Array, "B T S"]:
  """Attention mask: True where query and key are in the same document, fewer
  than `window` positions apart, and the key is not later or is in a prefix.

  Padding keys (segment 0) are always masked.
  """
  q_segment, k_segment = queries.segments[:, :, None], keys.segments[:, None]
  distance = queries.positions[:, :, None] - keys.positions[:, None]
  seen = distance >= 0
  if keys.prefix is not None:
    seen |= keys.prefix[:, None]
  if window is not None:
    seen &= jnp.abs(distance) < window
  return seen & (q_segment == k_segment) & (k_segment != 0)


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  queries: Tokens,
  keys: Tokens,
  *,
  scale: float,
  window: int | None,
  softcap: float | None,
  kernel: str,
) -> Float[Array, "B T N H"]:
  """softmax(scale q k) v over the visible keys of each query.

  A query without visible keys (padding) gets a finite, meaningless output.
  """
  # A query may attend to keys of the whole row: all-gather along the length.
  k, v, keys = sharding.gather((k, v, keys), None, "length")
  where = queries.segments, keys.prefix
  if kernel == "splash":
    return kernels.splash(q * scale, k, v, *where, window, softcap)
  if kernel == "mosaic":
    return kernels.mosaic(q, k, v, *where, window, softcap, scale)
  seen = visible(queries, keys, window)
  if kernel == "cudnn":
    return kernels.cudnn(q, k, v, seen, scale)
  # Within a document, places in a row and positions differ by a constant: if
  # queries and keys are the same tokens, and not gathered above, places tell
  # which keys are later.
  causal = queries is keys and keys.prefix is None
  return kernels.blocked(q * scale, k, v, seen, causal, window, softcap)


class Attention(nnx.Module):
  """Grouped-query attention (arXiv:2305.13245), with optional rotary positions,
  biases, and RMSNorm of queries and keys.
  """

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    D, N, K, H = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    self.cfg = cfg
    scale = cfg.init_scale
    q_axes, kv_axes = ("embed", "heads", None), ("embed", "kv_heads", None)
    self.q = weights.matrix(rngs, (D, N, H), q_axes, scale)
    self.k = weights.matrix(rngs, (D, K, H), kv_axes, scale)
    self.v = weights.matrix(rngs, (D, K, H), kv_axes, scale)
    out_scale = scale / (2 * cfg.n_layers) ** 0.5
    o_axes = ("heads", None, "embed")
    self.o = weights.matrix(rngs, (N, H, D), o_axes, out_scale, n_inputs=2)

    def bias(part, *shape_and_axes):
      shape, axes = zip(*shape_and_axes, strict=True)
      return weights.vector(0.0, shape, axes) if part in cfg.biases else None

    self.q_bias = bias("qkv", (N, "heads"), (H, None))
    self.k_bias = bias("qkv", (K, "kv_heads"), (H, None))
    self.v_bias = bias("qkv", (K, "kv_heads"), (H, None))
    self.o_bias = bias("o", (D, None))
    normed = cfg.qk_norm is not None
    self.q_norm = layers.QkNorm(N, "heads", cfg) if normed else None
    self.k_norm = layers.QkNorm(K, "kv_heads", cfg) if normed else None

  def __call__(
    self,
    x: Float[Array, "B T D"],
    tokens: Tokens,
    angles: tuple[Array, Array] | None,
    window: int | None,
    extend: Callable | None = None,
    adapters: Mapping[str, Callable] = types.MappingProxyType({}),
  ) -> tuple[Float[Array, "B T D"], Any]:
    """Returns the update to the residual, and the pair (keys, values).

    `extend`, if given, replaces `attend` by attention over the KV cache
    (lm/model/kv_cache.py); the pair is then the layer's updated cache.
    `adapters` has the updates of matrices by name (lm/model/lora.py).
    """
    cfg = self.cfg
    heads = ("batch", "length", "heads", None)
    kv_heads = ("batch", "length", "kv_heads", None)
    find = adapters.get
    q = weights.dot("BTD,DNH->BTNH", x, self.q, *heads, adapter=find("q"))
    k = weights.dot("BTD,DKH->BTKH", x, self.k, *kv_heads, adapter=find("k"))
    v = weights.dot("BTD,DKH->BTKH", x, self.v, *kv_heads, adapter=find("v"))
    q = layers.add_bias(q, self.q_bias)
    k = layers.add_bias(k, self.k_bias)
    v = layers.add_bias(v, self.v_bias)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    if angles is not None:
      q, k = rotary.rotate(q, angles), rotary.rotate(k, angles)
    q, k, v = remat.name(q, "q"), remat.name(k, "k"), remat.name(v, "v")
    how = {
      "scale": (cfg.query_scale_dim or cfg.d_head) ** -0.5,
      "window": window,
      "softcap": cfg.attention_softcap,
    }
    if extend is not None:
      out, kept = extend(q, k, v, **how)
    else:
      kernel = kernels.choose(cfg, length=x.shape[1])
      out, kept = attend(q, k, v, tokens, tokens, **how, kernel=kernel), (k, v)
    outer = ("batch", "length", None)
    y = weights.dot("BTNH,NHD->BTD", out, self.o, *outer, adapter=find("o"))
    return remat.name(layers.add_bias(y, self.o_bias), "out_proj"), kept
