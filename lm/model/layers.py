"""Norms, feed-forward (MLP), embedding look-up.

B batch, T query length, D model, F mlp, V vocabulary.
"""

import functools
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lm import config as config_lib
from lm import sharding
from lm.model import remat, weights


def add_bias(x: Array, bias: nnx.Param | None) -> Array:
  """x + bias over the last dimensions, in float32; x if bias is None."""
  if bias is None:
    return x
  lead = (None,) * (x.ndim - bias[...].ndim)
  return (x.astype(jnp.float32) + bias[...][(*lead, ...)]).astype(x.dtype)


class Norm(nnx.Module):
  """RMSNorm (arXiv:1910.07467) or LayerNorm over the dimensions of its scale,
  the last ones, in float32.

  `norm_unit_offset` multiplies by 1 + scale, as Gemma does.
  """

  def __init__(self, size: int, cfg: config_lib.ModelConfig):
    self.centred = cfg.norm == "layernorm"
    self.offset = 1.0 if cfg.norm_unit_offset else 0.0
    self.epsilon = cfg.norm_epsilon
    self.scale = weights.vector(1.0 - self.offset, (size,), (None,))
    has_bias = self.centred and "norm" in cfg.biases
    self.bias = weights.vector(0.0, (size,), (None,)) if has_bias else None

  def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
    scale = self.scale[...] + self.offset
    bias = None if self.bias is None else self.bias[...]
    return self._normalise(x, scale, bias)

  @functools.partial(jax.checkpoint, static_argnums=0)
  def _normalise(self, x, scale, bias):
    y = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - scale.ndim, x.ndim))
    if self.centred:
      y -= jnp.mean(y, axis=axes, keepdims=True)
    y *= jax.lax.rsqrt(
      jnp.mean(jnp.square(y), axis=axes, keepdims=True) + self.epsilon
    )
    lead = (None,) * (x.ndim - scale.ndim)
    y *= scale[(*lead, ...)]
    if bias is not None:
      y += bias[(*lead, ...)]
    return y.astype(x.dtype)


class QkNorm(Norm):
  """RMSNorm of queries or keys, whatever `cfg.norm` is: of each head, or of all
  heads together (the sum of squares then crosses the devices that share them).
  """

  def __init__(self, heads: int, axis: str, cfg: config_lib.ModelConfig):
    super().__init__(cfg.d_head, cfg)
    self.centred, self.bias = False, None
    if cfg.qk_norm == "projection":
      shape, axes = (heads, cfg.d_head), (axis, None)
      self.scale = weights.vector(1.0 - self.offset, shape, axes)


class MLP(nnx.Module):
  """Feed-forward: down(act(up x)), or gated, down(act(gate x) * up x)
  (arXiv:2002.05202). `relu2` is arXiv:2109.08668's squared ReLU.
  """

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    D, F, scale = cfg.d_model, cfg.d_mlp, cfg.init_scale
    self.activation = cfg.mlp
    self.up = weights.matrix(rngs, (D, F), ("embed", "mlp"), scale)
    self.gate = (
      weights.matrix(rngs, (D, F), ("embed", "mlp"), scale)
      if cfg.gated
      else None
    )
    out_scale = scale / (2 * cfg.n_layers) ** 0.5
    self.down = weights.matrix(rngs, (F, D), ("mlp", "embed"), out_scale)

    def bias(size, axis):
      has = "mlp" in cfg.biases
      return weights.vector(0.0, (size,), (axis,)) if has else None

    self.up_bias = bias(F, "mlp")
    self.gate_bias = bias(F, "mlp") if cfg.gated else None
    self.down_bias = bias(D, None)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    adapters: Mapping[str, Callable] = types.MappingProxyType({}),
  ) -> Float[Array, "B T D"]:
    """`adapters` has the updates of matrices by name (lm/model/lora.py)."""
    inner, find = ("batch", "length", "mlp"), adapters.get
    h = weights.dot("BTD,DF->BTF", x, self.up, *inner, adapter=find("up"))
    h = remat.name(add_bias(h, self.up_bias), "up")
    gate = None
    if self.gate is not None:
      adapter = find("gate")
      gate = weights.dot("BTD,DF->BTF", x, self.gate, *inner, adapter=adapter)
      gate = remat.name(add_bias(gate, self.gate_bias), "gate")
    h = self._activate(h, gate)
    outer = ("batch", "length", None)
    y = weights.dot("BTF,FD->BTD", h, self.down, *outer, adapter=find("down"))
    return add_bias(y, self.down_bias)

  @functools.partial(jax.checkpoint, static_argnums=0)
  def _activate(self, up: Array, gate: Array | None) -> Array:
    x = (up if gate is None else gate).astype(jnp.float32)
    if self.activation == "swiglu":
      y = jax.nn.silu(x)
    elif self.activation == "relu2":
      y = jnp.square(jax.nn.relu(x))
    else:
      approximate = not self.activation.endswith("_exact")
      y = jax.nn.gelu(x, approximate=approximate)
    return (y if gate is None else y * up).astype(up.dtype)


class HeadTransform(nnx.Module):
  """norm(gelu(dense x)): between a masked LM and its head (BERT)."""

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    D, axes = cfg.d_model, ("embed", None)
    self.approximate = cfg.mlp in ("gelu", "geglu")
    self.dense = weights.matrix(rngs, (D, D), axes, cfg.init_scale)
    has_bias = "mlp" in cfg.biases
    self.dense_bias = weights.vector(0.0, (D,), (None,)) if has_bias else None
    self.norm = Norm(D, cfg)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    outer = ("batch", "length", None)
    y = add_bias(
      weights.dot("BTD,DE->BTE", x, self.dense, *outer), self.dense_bias
    )
    wide = jax.nn.gelu(y.astype(jnp.float32), approximate=self.approximate)
    return self.norm(wide.astype(y.dtype))


def look_up(
  table: Float[Array, "rows D"],
  ids: Int[Array, "B T"],
  axis: str | None,
  dtype: jnp.dtype,
) -> Float[Array, "B T D"]:
  """Embedding look-up in a table sharded along (axis, embed), cast to `dtype`.

  All-gathers the table over fsdp first: otherwise the partitioner may gather
  the far larger result.
  """
  table = table.astype(dtype)
  if sharding.has_mesh():
    table = jax.sharding.reshard(table, sharding.partition(axis, None))
  return table.at[ids].get(out_sharding=sharding.spec("batch", "length", None))
