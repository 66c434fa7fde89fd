"""LoRA: trainable low-rank updates of frozen matrices (arXiv:2106.09685).

With `ModelConfig.lora`, each target matrix W of a layer has two factors A and
B, and a product x W becomes x W + scale * x A B. The scale is alpha / rank, or
alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732). B starts at 0: the model first
equals the base. All other weights but those that `LoraConfig.full` names are
frozen (`decoder.declared`): no gradient, no optimizer state, no average.

L layers, B batch, T length, R rank.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from lm import config as config_lib
from lm import sharding
from lm.model import dropout, weights

# Name of the adapters in a layer's parameters: layers/lora/q/a.
NAME = "lora"
# Part of a layer that has each matrix: layers/attention/q.
_ROOMS = {
  **dict.fromkeys(("q", "k", "v", "o"), "attention"),
  **dict.fromkeys(("gate", "up", "down"), "mlp"),
}
# (equation, x, axes of the output) -> the update, shaped like the product.
Update = Callable[..., Float[Array, "..."]]


class Adapter(nnx.Module):
  """Factors A [*inputs, R] and B [R, *outputs] of the update of a matrix.

  A is normal with deviation 1 / sqrt(3 n), n inputs: the deviation of PEFT's
  uniform initialiser. The factors lie as their matrix does, with R whole.
  """

  def __init__(
    self, cfg: config_lib.LoraConfig, matrix: nnx.Param, rngs: nnx.Rngs
  ):
    self.cfg = cfg
    shape, declared = matrix[...].shape, weights.declared(matrix)
    n = declared.n_inputs
    size = math.prod(shape[:n])
    a, a_axes = (*shape[:n], cfg.rank), (*declared.axes[:n], None)
    b, b_axes = (cfg.rank, *shape[n:]), (None, *declared.axes[n:])
    self.a = weights.matrix(rngs, a, a_axes, (3 * size) ** -0.5, n_inputs=n)
    self.b = weights.matrix(rngs, b, b_axes, 0.0)

  def __call__(
    self,
    keys: Key[Array, "B"] | None,
    equation: str,
    x: Float[Array, "B T ..."],
    *axes: str | None,
  ) -> Float[Array, "B T ..."]:
    """scale * dropout(x) A B, for the product `equation` of x with the matrix.

    `axes` are logical names of the output's axes; `keys`, one per row, enable
    dropout.
    """
    x = dropout.dropout(x, self.cfg.dropout, keys)
    inputs, rest = equation.split(",")
    letters, outputs = rest.split("->")
    n = len(letters) - (len(outputs) - 2)
    down = f"{inputs},{letters[:n]}R->BTR"
    h = weights.dot(down, x, self.a, "batch", "length", None)
    h *= jnp.asarray(self.cfg.scale, h.dtype)
    return weights.dot(f"BTR,R{letters[n:]}->{outputs}", h, self.b, *axes)


class Adapters(nnx.Module):
  """The adapters of a layer: an attribute for each target, such as `q`."""

  def __init__(
    self,
    cfg: config_lib.ModelConfig,
    parts: Mapping[str, nnx.Module],
    rngs: nnx.Rngs,
  ):
    """`parts` holds the modules of the layer that have matrices, by name."""
    assert cfg.lora is not None
    self.targets = targets(cfg)
    for name in self.targets:
      matrix = getattr(parts[_ROOMS[name]], name)
      setattr(self, name, Adapter(cfg.lora, matrix, rngs))

  def updates(self, keys: Key[Array, "B"] | None) -> dict[str, Update]:
    """For each target the argument `adapter` of `weights.dot`. PRNG `keys`, one
    per row, enable dropout; each adapter draws its own mask.
    """
    found = {}
    for i, name in enumerate(self.targets):
      # 0 and 1 could give the keys of the layer's own dropout.
      own = dropout.fold_rows(keys, 2 + i)
      found[name] = functools.partial(getattr(self, name), own)
    return found


def targets(cfg: config_lib.ModelConfig) -> tuple[str, ...]:
  """Names of the adapted matrices; () without `cfg.lora`."""
  if cfg.lora is None:
    return ()
  there = [name for name in _ROOMS if name != "gate" or cfg.gated]
  return tuple(n for n in there if n in (cfg.lora.targets or there))


def base(cfg: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """The model config without adapters."""
  return dataclasses.replace(cfg, lora=None)


def is_adapter(path: tuple[Any, ...]) -> bool:
  """Whether a tree path of the parameters leads to a factor of an adapter."""
  return any(getattr(key, "key", None) == NAME for key in path)


def is_trained(cfg: config_lib.LoraConfig, path: tuple[Any, ...]) -> bool:
  """Whether the parameter at a tree path is trained: an adapter's, or whole."""
  return is_adapter(path) or path[0].key in cfg.full


def merge(cfg: config_lib.ModelConfig, params: Any) -> Any:
  """Plain parameters W + scale * A B of the config `base(cfg)`, in float32.

  `params` are those of a model with adapters; without adapters they are
  returned. Each matrix keeps its sharding.
  """
  if cfg.lora is None:
    return params
  merged = {**params, "layers": dict(params["layers"])}
  adapters = merged["layers"].pop(NAME)
  for name in targets(cfg):
    room, factors = _ROOMS[name], adapters[name]
    part = dict(merged["layers"][room])
    update = _product(factors["a"], factors["b"], part[name])
    part[name] = part[name] + cfg.lora.scale * update
    merged["layers"][room] = part
  return merged


def merge_on(
  mesh: jax.sharding.Mesh | None, cfg: config_lib.ModelConfig, params: Any
) -> tuple[config_lib.ModelConfig, Any]:
  """(`base(cfg)`, `merge` of arrays on `mesh`), compiled. The base weights are
  donated: a matrix is never held twice. Without a mesh their layout stays.
  """
  if cfg.lora is None:
    return cfg, params
  rest = {**params, "layers": dict(params["layers"])}
  adapters = {"layers": {NAME: rest["layers"].pop(NAME)}}

  def merged(rest, adapters):
    return merge(cfg, weights.join(rest, adapters))

  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    return base(cfg), jax.jit(merged, donate_argnums=0)(rest, adapters)


def _product(
  a: Float[Array, "L *inputs R"],
  b: Float[Array, "L R *outputs"],
  like: Float[Array, "L ..."],
) -> Float[Array, "L ..."]:
  ins, outs = "abcd"[: a.ndim - 2], "wxyz"[: b.ndim - 2]
  where = jax.typeof(like).sharding.spec if sharding.has_mesh() else None
  return jnp.einsum(
    f"L{ins}R,LR{outs}->L{ins}{outs}",
    a,
    b,
    precision="highest",
    out_sharding=where,
  )
