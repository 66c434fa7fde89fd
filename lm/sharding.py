"""Sharding: the mesh axes of each logical axis, and what runs on each shard.

Mesh axes are Explicit: the sharding is part of each array's type, and a
sharding error is a trace error. Other code names logical axes; only the table
here maps logical axes to mesh axes. Without a mesh in context (mode `pmap`, or
a plain array on a single device) `spec` is None and annotations do nothing.
lm/mesh.py makes the mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from lm import config as config_lib

MESH_AXES = tuple(config_lib.MeshConfig().sizes())

# Logical axis -> mesh axes. Weights are sharded along `embed` over fsdp, and
# along `heads`, `kv_heads`, `mlp` or `vocab` over tensor; activations along
# `batch`. `length` (positions of a row) is whole on each device.
RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "length": None,
  "embed": "fsdp",
  "mlp": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "vocab": "tensor",
}


def has_mesh() -> bool:
  """Whether the run's mesh is in context; the mesh of `jax.pmap` is ignored."""
  return bool(set(MESH_AXES) & set(jax.sharding.get_abstract_mesh().axis_names))


def partition(*axes: str | None) -> P:
  """PartitionSpec of an array from the logical axis of each dimension."""
  return P(*(None if axis is None else RULES[axis] for axis in axes))


def spec(*axes: str | None) -> P | None:
  """`partition` if a mesh is in context, else None."""
  return partition(*axes) if has_mesh() else None


def mesh_axes(*axes: str) -> tuple[str, ...]:
  """Mesh axes over which the logical `axes` are sharded."""
  found: list[str] = []
  for axis in axes:
    rule = RULES[axis]
    found += (rule,) if isinstance(rule, str) else rule or ()
  return tuple(found)


def shared_axes(*axes: str) -> tuple[str, ...]:
  """Those of `mesh_axes` along which the mesh in context has several devices:
  XLA copies the operand of a collective over one device.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(axis for axis in mesh_axes(*axes) if sizes.get(axis, 1) > 1)


Axes = tuple[str | None, ...]


def per_shard(function: Callable, *in_axes: Axes, out_axes: Any) -> Callable:
  """`jax.shard_map`: each device runs `function` on its shard. Returns
  `function` unchanged if no mesh is in context.

  `in_axes` has the logical axes of each argument, shared by all arrays of a
  tree; `out_axes` those of the output, or a tuple per output for several.
  """
  if not has_mesh():
    return function
  several = any(isinstance(axes, tuple) for axes in out_axes)
  return jax.shard_map(
    function,
    in_specs=tuple(partition(*axes) for axes in in_axes),
    out_specs=tuple(partition(*axes) for axes in out_axes)
    if several
    else partition(*out_axes),
    check_vma=False,
  )


def gather(tree: Any, *axes: str | None) -> Any:
  """All-gathers each array of `tree` along the dimensions named in `axes`, by
  logical axis; a dimension of None stays sharded.
  """
  whole = [axis is not None and bool(mesh_axes(axis)) for axis in axes]
  if not has_mesh() or not any(whole):
    return tree

  def one(x: Array) -> Array:
    cut = [*jax.typeof(x).sharding.spec]
    for dimension in np.flatnonzero(whole):
      cut[dimension] = None
    return jax.sharding.reshard(x, P(*cut))

  return jax.tree.map(one, tree)


def by_row(function: Callable, *trees: Any) -> Any:
  """`per_shard` over the batch axis, the first; other axes are all-gathered."""
  if has_mesh():
    trees = jax.tree.map(
      lambda x: jax.sharding.reshard(x, partition("batch")), trees
    )
  rows = ("batch",)
  return per_shard(function, *[rows] * len(trees), out_axes=rows)(*trees)


def spread(
  function: Callable, x: Array, rows: tuple[str, ...], columns: tuple[str, ...]
) -> Array:
  """`function(x)` for matrices x [N, m, n], each device with N / devices whole
  ones; N is filled up with zeros. `function` may not combine matrices.

  For code whose layout is left to the partitioner (`jax.sharding.auto_axes`).
  Before and after, m lies along the mesh axes `rows`, and n along `columns`.
  Each step moves a dimension, an all-to-all, so that no device has all of x.
  """
  if not has_mesh():
    return function(x)
  others = tuple(a for a in MESH_AXES if a not in rows + columns)
  steps = [
    P(None, rows, columns),
    P(rows, None, columns),
    P(rows + columns),
    P(rows + columns + others),
  ]
  n = x.shape[0]
  devices = jax.sharding.get_abstract_mesh().size
  x = jnp.pad(x, [(0, -n % devices), (0, 0), (0, 0)])
  for where in steps:
    x = jax.lax.with_sharding_constraint(x, where)
  x = function(x)
  for where in reversed(steps):
    x = jax.lax.with_sharding_constraint(x, where)
  return x[:n]


def platform() -> str:
  """Target platform of a program traced in this context: cpu, gpu or tpu."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    return jax.default_backend()
  return mesh.abstract_device.platform


def local_rows(sharding: NamedSharding, n_rows: int) -> tuple[int, int]:
  """[first, last): rows of the global batch to be read by this process."""
  rows = NamedSharding(sharding.mesh, P(*sharding.spec[:1]))
  indices = rows.addressable_devices_indices_map((n_rows,))
  slices = [index[0].indices(n_rows) for index in indices.values() if index]
  return min(s[0] for s in slices), max(s[1] for s in slices)


def place(rows: Any, sharding: NamedSharding, n_rows: int) -> Any:
  """Makes a tree of global arrays [n_rows, ...] from NumPy arrays of the
  `local_rows` of this process.
  """
  first, _ = local_rows(sharding, n_rows)

  def array(local: np.ndarray) -> jax.Array:
    def shard(index):
      start, stop, _ = index[0].indices(n_rows)
      return local[(slice(start - first, stop - first), *index[1:])]

    shape = (n_rows, *local.shape[1:])
    return jax.make_array_from_callback(shape, sharding, shard)

  return jax.tree.map(array, rows)


def abstract(make, *args, mesh: jax.sharding.Mesh | None):
  """Shapes, dtypes and shardings of the result of `make(*args)` on `mesh`
  (None: whole, on the first device), by `jax.eval_shape`: computes nothing.
  """
  if mesh is None:
    shapes = jax.eval_shape(make, *args)
  else:
    with jax.set_mesh(mesh):
      shapes = jax.eval_shape(make, *args)

  def place(x):
    if mesh is None:
      where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:  # a constant has no sharding: replicated
      where = NamedSharding(
        mesh, P() if x.sharding is None else x.sharding.spec
      )
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(place, shapes)
