"""The mesh, and where each logical axis lies on it.

Meshes are Explicit: the layout is part of each array's type, and a layout
error is a trace error. Code names logical axes; this table alone knows the
mesh. Without a mesh in context (mode `pmap`, or a plain array on one device)
`spec` is None and every annotation falls away.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from lm import config as config_lib
from lm import schema

MESH_AXES = tuple(config_lib.MeshConfig().sizes())

# Logical axis -> mesh axes. Weights are cut along `embed` over fsdp and along
# `heads`, `kv_heads`, `mlp` or `vocab` over tensor; activations along `batch`.
# `length` (positions of a row) is whole on each device.
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
  """Whether the run's mesh is in context; that of `jax.pmap` is not it."""
  return bool(set(MESH_AXES) & set(jax.sharding.get_abstract_mesh().axis_names))


def partition(*axes: str | None) -> P:
  """PartitionSpec of an array whose dimensions have these logical names."""
  return P(*(None if axis is None else RULES[axis] for axis in axes))


def spec(*axes: str | None) -> P | None:
  """`partition` where there is a mesh in context, else None."""
  return partition(*axes) if has_mesh() else None


def mesh_axes(*axes: str) -> tuple[str, ...]:
  """Mesh axes that these logical axes are cut along."""
  found: list[str] = []
  for axis in axes:
    rule = RULES[axis]
    found += (rule,) if isinstance(rule, str) else rule or ()
  return tuple(found)


Axes = tuple[str | None, ...]


def per_shard(function: Callable, *in_axes: Axes, out_axes: Any) -> Callable:
  """`function` run by each device on its own part, where there is a mesh.

  Logical axes are of whole trees; `out_axes` is a tuple of them for several
  outputs.
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
  """Each array all-gathered along its dimensions of these logical names; None
  is a dimension that stays cut as it is.
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
  """`per_shard` over the batch axis; other axes are gathered."""
  if has_mesh():
    trees = jax.tree.map(
      lambda x: jax.sharding.reshard(x, partition("batch")), trees
    )
  rows = ("batch",)
  return per_shard(function, *[rows] * len(trees), out_axes=rows)(*trees)


def platform() -> str:
  """Platform that a program traced here is compiled for: cpu, gpu or tpu."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    return jax.default_backend()
  return mesh.abstract_device.platform


def mesh_shape(config: config_lib.Config, n_devices: int) -> tuple[int, ...]:
  """Devices along each of MESH_AXES, an axis of None filled in.

  Raises ConfigError where the model or the batch cannot be cut that way.
  """
  shape = config.mesh.sizes()
  known = math.prod(size for size in shape.values() if size is not None)
  filled = {
    axis: n_devices // known if size is None else size
    for axis, size in shape.items()
  }
  if math.prod(filled.values()) != n_devices:
    raise schema.ConfigError(
      f"config.mesh={shape}: does not multiply to the {n_devices} devices "
      "here; change an axis, or set one to None to take what is left"
    )
  t = config.train
  rows = t.batch_size // t.microbatches
  name = "config.train.batch_size / train.microbatches"
  _check_multiple(name, rows, "batch", filled)
  check_model(config.model, filled)
  return tuple(filled.values())


# Fields of the model and the logical axis whose length they are.
_CUT = {
  "d_model": "embed",
  "n_heads": "heads",
  "n_kv_heads": "kv_heads",
  "d_mlp": "mlp",
  "vocab_size": "vocab",
}


def check_model(m: config_lib.ModelConfig, shape: Mapping[str, int]) -> None:
  """Raises ConfigError where a mesh of this shape cannot cut the weights."""
  for name, axis in _CUT.items():
    _check_multiple(f"config.model.{name}", getattr(m, name), axis, shape)


def _check_multiple(
  path: str, value: int, axis: str, shape: Mapping[str, int]
) -> None:
  names = mesh_axes(axis)
  parts = math.prod(shape[name] for name in names)
  if value % parts:
    raise schema.ConfigError(
      f"{path}={value}: must be a multiple of mesh {' * '.join(names)}={parts}"
    )


def make_mesh(config: config_lib.Config, devices=None) -> jax.sharding.Mesh:
  """The run's mesh over `devices`, by default all of every process.

  Over several TPU slices only `data` crosses the network between them, each
  slice holding a contiguous part of it; elsewhere JAX calls hosts slices, whose
  devices need no such order. In mode pmap its axes are Auto: no layout is
  in any type, and the mesh only says where rows are placed.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(config, len(devices))
  slices = 1
  if devices[0].platform == "tpu":
    slices = len({getattr(device, "slice_index", 0) for device in devices})
  if shape[0] % slices:
    raise schema.ConfigError(
      f"config.mesh.data={shape[0]}: must be a multiple of the {slices} slices "
      "here, since only data runs over the network between them"
    )
  types = jax.sharding.AxisType
  kind = types.Explicit if config.mesh.mode == "jit" else types.Auto
  kinds = (kind,) * len(shape)
  # An axis may take a part of one of the torus where no other layout is left.
  split = {"allow_split_physical_axes": True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, **split)
  else:
    within = (shape[0] // slices, *shape[1:])
    between = (slices, *(1,) * len(shape[1:]))
    grid = mesh_utils.create_hybrid_device_mesh(
      within, between, devices, **split
    )
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=kinds)


def local_rows(sharding: NamedSharding, n_rows: int) -> tuple[int, int]:
  """[first, last) of the global batch's rows that this process must read."""
  rows = NamedSharding(sharding.mesh, P(*sharding.spec[:1]))
  indices = rows.addressable_devices_indices_map((n_rows,))
  slices = [index[0].indices(n_rows) for index in indices.values() if index]
  return min(s[0] for s in slices), max(s[1] for s in slices)


def place(rows: Any, sharding: NamedSharding, n_rows: int) -> Any:
  """A tree of global arrays [n_rows, ...] from NumPy arrays of this process's
  `local_rows`.
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
  """Shapes, dtypes and shardings of what `make(*args)` would return on `mesh`
  (None: whole, on the first device), computing nothing.
  """
  if mesh is None:
    shapes = jax.eval_shape(make, *args)
  else:
    with jax.set_mesh(mesh):
      shapes = jax.eval_shape(make, *args)

  def place(x):
    if mesh is None:
      where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:  # a constant has no layout: it is whole everywhere
      where = NamedSharding(
        mesh, P() if x.sharding is None else x.sharding.spec
      )
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(place, shapes)
