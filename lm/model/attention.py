"""Attention: the mask, the plain implementation, queries, keys and values.

B batch, T query length, S key length, D model, N query heads, K kv heads,
G = N / K, H head.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lm import config as config_lib
from lm import sharding
from lm.model import kernels, layers, weights

# Score of a masked key: low enough for exp() to give 0, high enough for sums
# to stay finite.
MASKED = -1e30


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
  if kernel == "splash":
    return kernels.splash(q * scale, k, v, queries.segments, window, softcap)
  if kernel == "cudnn":
    return kernels.cudnn(q, k, v, visible(queries, keys, window), scale)
  return _reference(q * scale, k, v, visible(queries, keys, window), softcap)


def _reference(q, k, v, seen, softcap):
  """Plain attention, with heads moved first: each head is a matrix product.

  Normalises after the value product, on [T, H] instead of [T, S]: S / H times
  fewer divisions.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  heads = ("batch", "kv_heads", None, "length", None)
  q = jax.lax.reshape(
    q,
    (B, T, K, N // K, H),
    out_sharding=sharding.spec("batch", "length", "kv_heads", None, None),
  )
  q, k, v = jnp.moveaxis(q, 1, 3), k.swapaxes(1, 2), v.swapaxes(1, 2)
  scores = _contract("BKGTH,BKSH->BKGTS", heads, q, k)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(seen[:, None, None], scores, MASKED)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  shares = jnp.exp(scores - top)
  out = _contract("BKGTS,BKSH->BKGTH", heads, shares.astype(v.dtype), v)
  out /= jnp.sum(shares, axis=-1, keepdims=True)
  return jax.lax.reshape(
    jnp.moveaxis(out.astype(v.dtype), 3, 1),
    (B, T, N, H),
    out_sharding=sharding.spec("batch", "length", "heads", None),
  )


def _product(equation, axes, a, b) -> Array:
  """einsum of operands in the compute dtype, accumulated in float32.

  The custom VJP rounds the float32 cotangent to the compute dtype first: a
  float32 operand would make both backward products float32.
  """
  return jnp.einsum(
    equation,
    a,
    b,
    preferred_element_type=jnp.float32,
    out_sharding=sharding.spec(*axes),
  )


def _product_forward(equation, axes, a, b):
  return _product(equation, axes, a, b), (a, b)


def _product_backward(equation, axes, operands, cotangent):
  def narrow(a, b):
    where = sharding.spec(*axes)
    return jnp.einsum(equation, a, b, out_sharding=where)

  _, pull = jax.vjp(narrow, *operands)
  return pull(cotangent.astype(operands[0].dtype))


_contract = jax.custom_vjp(_product, nondiff_argnums=(0, 1))
_contract.defvjp(_product_forward, _product_backward)


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

    def bias(*shape_and_axes):
      shape, axes = zip(*shape_and_axes, strict=True)
      return weights.vector(0.0, shape, axes) if cfg.bias else None

    self.q_bias = bias((N, "heads"), (H, None))
    self.k_bias = bias((K, "kv_heads"), (H, None))
    self.v_bias = bias((K, "kv_heads"), (H, None))
    self.o_bias = bias((D, None))
    self.q_norm = layers.RMSNorm(H, cfg) if cfg.qk_norm else None
    self.k_norm = layers.RMSNorm(H, cfg) if cfg.qk_norm else None

  def __call__(
    self,
    x: Float[Array, "B T D"],
    tokens: Tokens,
    angles: tuple[Array, Array] | None,
    window: int | None,
    extend: Callable | None = None,
  ) -> tuple[Float[Array, "B T D"], Any]:
    """Returns the update to the residual, and the pair (keys, values).

    `extend`, if given, replaces `attend` by attention over the KV cache
    (lm/model/kv_cache.py); the pair is then the layer's updated cache.
    """
    cfg = self.cfg
    heads = ("batch", "length", "heads", None)
    kv_heads = ("batch", "length", "kv_heads", None)
    q = weights.dot("BTD,DNH->BTNH", x, self.q, *heads)
    k = weights.dot("BTD,DKH->BTKH", x, self.k, *kv_heads)
    v = weights.dot("BTD,DKH->BTKH", x, self.v, *kv_heads)
    q = layers.add_bias(q, self.q_bias)
    k = layers.add_bias(k, self.k_bias)
    v = layers.add_bias(v, self.v_bias)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    if angles is not None:
      q, k = layers.rotate(q, angles), layers.rotate(k, angles)
    how = {
      "scale": (cfg.query_scale_dim or cfg.d_head) ** -0.5,
      "window": window,
      "softcap": cfg.attention_softcap,
    }
    if extend is not None:
      out, kept = extend(q, k, v, **how)
    else:
      has_prefix = tokens.prefix is not None
      kernel = kernels.choose(cfg, length=x.shape[1], prefix=has_prefix)
      out, kept = attend(q, k, v, tokens, tokens, **how, kernel=kernel), (k, v)
    y = weights.dot("BTNH,NHD->BTD", out, self.o, "batch", "length", None)
    return layers.add_bias(y, self.o_bias), kept
