"""Converts between the tensors of a checkpoint and the parameters of a model.

A family has one table (lm/huggingface/tables.py), used in both directions.

L layers, D model, N heads, H head.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lm import config as config_lib
from lm import schema
from lm.huggingface import tables, tensors
from lm.model import decoder, weights

# Most lines of an error that lists tensors.
_MOST_LINES = 30
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter: the shape without the layer axis, and the declaration."""

  shape: tuple[int, ...]
  declared: weights.Weight

  def flat(self) -> tuple[int, ...]:
    """Shape: matrix [inputs, outputs], embedding [rows, D], vector [n]."""
    if self.declared.role == "vector":
      return (math.prod(self.shape),)
    if self.declared.role == "embedding":
      return self.shape
    n = self.declared.n_inputs
    return math.prod(self.shape[:n]), math.prod(self.shape[n:])


def _flat(tree: Any) -> dict[str, Any]:
  """Flattens nested dicts to {path: leaf}, as in layers/attention/q."""
  found: Any = traverse_util.flatten_dict(tree, sep="/")
  return found


@functools.lru_cache
def leaves(cfg: config_lib.ModelConfig) -> dict[str, Leaf]:
  """Returns the parameters of a model by path."""
  make = functools.partial(decoder.init_params, cfg)
  shapes = _flat(jax.eval_shape(make, jax.random.key(0)))
  declared = _flat(decoder.declared(cfg))
  return {
    name: Leaf(x.shape[declared[name].stacked :], declared[name])
    for name, x in shapes.items()
  }


@dataclasses.dataclass(frozen=True)
class Place:
  """A tensor of a checkpoint: a row of the table, in `layer` unless None."""

  row: tables.Row
  layer: int | None
  parts: tuple[Leaf, ...]

  @property
  def name(self) -> str:
    return self.row.theirs.format(self.layer)

  @property
  def shape(self) -> tuple[int, ...]:
    if self.row.folded:
      return (self.row.folded, self.parts[0].shape[-1])
    first, size = self.parts[0].flat(), sum(self._sizes())
    if len(first) == 1:
      return (size,)
    if self.parts[0].declared.role == "embedding":
      return first
    return (size, first[0]) if self.row.linear else (first[0], size)

  def _sizes(self) -> list[int]:
    """Lengths of the parameters along the axis of concatenation."""
    if self.parts[0].declared.role == "embedding":
      return [self.parts[0].shape[0]]
    return [part.flat()[-1] for part in self.parts]

  def _transposed(self) -> bool:
    return (
      self.row.linear
      and len(self.parts[0].flat()) == 2
      and (self.parts[0].declared.role != "embedding")
    )

  def ours(self, theirs: np.ndarray) -> dict[str, np.ndarray]:
    """Splits a tensor into parameters by path: views of the same dtype."""
    if self._transposed():
      theirs = theirs.T
    if self.parts[0].declared.role == "embedding":
      return {self.row.ours[0]: theirs}
    cuts = list(itertools.accumulate(self._sizes()))[:-1]
    pieces = np.split(theirs, cuts, axis=-1)
    return {
      path: piece.reshape(part.shape)
      for path, part, piece in zip(
        self.row.ours, self.parts, pieces, strict=True
      )
    }

  def rows(
    self, placed: Mapping[str, jax.sharding.Sharding]
  ) -> tuple[int, int]:
    """Returns [first, last): rows of the tensor that hold the shards of this
    process, of the parameters with shardings `placed`.
    """
    numbers = np.arange(self.shape[0]).reshape(-1, *[1] * len(self.shape[1:]))
    found = []
    for path, x in self.ours(np.broadcast_to(numbers, self.shape)).items():
      indices = placed[path].addressable_devices_indices_map(x.shape)
      found += [x[index] for index in indices.values()]
    # `ours` keeps the order of the rows along each axis.
    first, last = min(x.flat[0] for x in found), max(x.flat[-1] for x in found)
    return int(first), int(last) + 1

  def theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
    """Joins parameters into a tensor, the inverse of `ours`."""
    flat = [
      x.reshape(part.flat()) for x, part in zip(ours, self.parts, strict=True)
    ]
    whole = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
    return whole.T if self._transposed() else whole


def places(
  table: Sequence[tables.Row], cfg: config_lib.ModelConfig
) -> dict[str, Place]:
  """Returns every tensor of a checkpoint of `cfg`, by name.

  Raises ConfigError if the table has no row for a parameter.
  """
  there, found = leaves(cfg), {}
  for line in table:
    parts = tuple(there[path] for path in line.ours if path in there)
    if len(parts) != len(line.ours) or (line.untied and "head" not in there):
      continue
    stacked = parts[0].declared.stacked
    for layer in range(line.first, cfg.n_layers) if stacked else [None]:
      place = Place(line, layer, parts)
      found[place.name] = place
  held = {path for place in found.values() for path in place.row.ours}
  if rest := sorted(there.keys() - held):
    raise schema.ConfigError(
      f"config.model: has parameters that the family has no tensors for: {rest}"
    )
  return found


def compare(
  wanted: Mapping[str, Place], found: Mapping[str, list[tensors.Stored]]
) -> Iterator[str]:
  """Yields a line for each missing, unknown or repeated tensor, and for each
  tensor with a wrong shape or an unsupported dtype.
  """
  for name in sorted(wanted.keys() | found.keys()):
    if name not in found:
      yield f"{name}: missing, {list(wanted[name].shape)}"
      continue
    stored = found[name]
    if name not in wanted:
      yield f"{name}: unknown, {stored[0].dtype}{list(stored[0].shape)}"
      continue
    if len(stored) > 1:
      yield f"{name}: {len(stored)} times"
    for one in stored[:1]:
      if one.shape != wanted[name].shape:
        yield (
          f"{name}: shape {list(one.shape)}, must be {list(wanted[name].shape)}"
        )
      if one.dtype not in tensors.DTYPES:
        yield (
          f"{name}: dtype {one.dtype}, must be one of "
          f"{', '.join(tensors.DTYPES)}"
        )


def require_none(folder: str, lines: Sequence[str]) -> None:
  """Raises ConfigError with `lines` unless `lines` is empty."""
  if not lines:
    return
  more = len(lines) - _MOST_LINES
  said = [*lines[:_MOST_LINES], *([f"and {more} more"] if more > 0 else [])]
  raise schema.ConfigError(
    f"{folder}: config.json does not fit "
    f"{schema.counted(len(lines), 'tensor')}: {'; '.join(said)}"
  )


# --- parameters --------------------------------------------------------------


def load(
  wanted: Mapping[str, Place],
  found: Mapping[str, list[tensors.Stored]],
  like: decoder.Params,
) -> decoder.Params:
  """Returns parameters in float32, with the shardings of the tree `like`.

  The host holds one tensor at a time, of which it reads the rows that this
  process's devices hold, and the shards of it in float32: layers are written
  into the stacked arrays on the devices.
  """
  flat = _flat(like)
  arrays: dict[str, jax.Array] = {}
  for name, place in wanted.items():
    if place.row.folded:
      continue
    where = {path: flat[path].sharding for path in place.row.ours}
    if place.layer is not None:
      where = {path: _of_layer(x) for path, x in where.items()}
    parts = place.ours(found[name][0].read(*place.rows(where)))
    for path, value in parts.items():
      one = _placed(value, where[path])
      if place.layer is None:
        arrays[path] = one
        continue
      if path not in arrays:
        arrays[path] = _empty(flat[path])
      arrays[path] = _put(arrays[path], one, place.layer)
  for name, place in wanted.items():
    if place.row.folded:
      (path,) = place.row.ours
      first = np.broadcast_to(found[name][0].read()[0], flat[path].shape)
      arrays[path] = arrays[path] + _placed(first, flat[path].sharding)
  return traverse_util.unflatten_dict(arrays, sep="/")


def _placed(value: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
  shards: dict[str, np.ndarray] = {}

  def shard(index: Any) -> np.ndarray:
    key = str(index)  # replicas share a copy
    if key not in shards:
      shards[key] = _float32(value[index])
    return shards[key]

  return jax.make_array_from_callback(value.shape, where, shard)


def _float32(view: np.ndarray) -> np.ndarray:
  """Returns a row-major copy in float32. A transposed view is copied in blocks
  of cache size, in a third of NumPy's own time (benchmarks/convert.py).
  """
  out = np.empty(view.shape, np.float32)
  if view.ndim < 2 or view.flags.c_contiguous:
    out[...] = view
    return out
  for i in range(0, view.shape[0], _BLOCK):
    for j in range(0, view.shape[-1], _BLOCK):
      block = (slice(i, i + _BLOCK), ..., slice(j, j + _BLOCK))
      out[block] = view[block]
  return out


def _of_layer(where: Any) -> jax.sharding.Sharding:
  """Returns the sharding of one layer of an array with sharding `where`."""
  if not isinstance(where, jax.sharding.NamedSharding):
    return where
  spec = jax.sharding.PartitionSpec(*where.spec[1:])
  return jax.sharding.NamedSharding(where.mesh, spec)


def _empty(like: jax.ShapeDtypeStruct) -> jax.Array:
  make = functools.partial(jax.numpy.zeros, like.shape, like.dtype)
  return jax.jit(make, out_shardings=like.sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: jax.Array, layer: jax.Array, i: Any) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stacked, layer, i, 0)


def planned(
  wanted: Mapping[str, Place], params: decoder.Params
) -> list[tensors.Planned]:
  """Returns the tensors of `params`, to be written one at a time."""
  flat = _flat(params)

  def read(place: Place) -> np.ndarray:
    if place.row.folded:
      return np.zeros(place.shape, np.float32)
    ours = [
      np.asarray(flat[path] if place.layer is None else flat[path][place.layer])
      for path in place.row.ours
    ]
    return place.theirs(ours)

  return [
    tensors.Planned(name, place.shape, functools.partial(read, place))
    for name, place in wanted.items()
  ]
