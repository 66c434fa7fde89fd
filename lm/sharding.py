"""Start-up of processes, the mesh, and where each logical axis lies on it.

Meshes are Explicit: the layout is part of each array's type, and a layout
error is a trace error. Code names logical axes; this table alone knows the
mesh. Without a mesh in context (mode `pmap`, or a plain array on one device)
`spec` is None and every annotation falls away.
"""

import math
import os

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import config as config_lib

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Weights are cut along `embed` over fsdp and along
# `heads`, `kv_heads`, `mlp` or `vocab` over tensor; activations along `batch`.
RULES: dict[str, str | tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "embed": "fsdp",
  "mlp": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "vocab": "tensor",
}


def has_mesh() -> bool:
  """Whether the run's mesh is in context; that of `jax.pmap` is not it."""
  return set(MESH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def partition(*axes: str | None) -> P:
  """PartitionSpec of an array whose dimensions have these logical names."""
  return P(*(None if axis is None else RULES[axis] for axis in axes))


def spec(*axes: str | None) -> P | None:
  """`partition` where there is a mesh in context, else None."""
  return partition(*axes) if has_mesh() else None


def platform() -> str:
  """Platform that a program traced here is compiled for: cpu, gpu or tpu."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    return jax.default_backend()
  return mesh.abstract_device.platform


def start_processes() -> None:
  """Joins the other processes of a run, if the environment names any.

  Set by hand: COORDINATOR_ADDRESS, PROCESS_COUNT and PROCESS_INDEX.
  """
  if "COORDINATOR_ADDRESS" in os.environ:
    jax.distributed.initialize(
      coordinator_address=os.environ["COORDINATOR_ADDRESS"],
      num_processes=int(os.environ["PROCESS_COUNT"]),
      process_id=int(os.environ["PROCESS_INDEX"]),
    )


def mesh_shape(config: config_lib.Config, n_devices: int) -> tuple[int, ...]:
  """Devices along each of MESH_AXES, an axis of None filled in.

  Raises ConfigError where the model or the batch cannot be cut that way.
  """
  sizes = [getattr(config.mesh, axis) for axis in MESH_AXES]
  known = math.prod(size for size in sizes if size is not None)
  if None in sizes and n_devices % known == 0:
    sizes[sizes.index(None)] = n_devices // known
  shape = dict(zip(MESH_AXES, sizes, strict=True))
  if None in sizes or math.prod(sizes) != n_devices:
    raise config_lib.ConfigError(
      f"config.mesh={shape}: does not multiply to the {n_devices} devices "
      "here; change an axis, or set one to None to take what is left"
    )
  m, t = config.model, config.train
  ways = shape["data"] * shape["fsdp"]
  rows = t.batch_size // t.microbatches
  for path, value, axis, parts in (
    ("train.batch_size / train.microbatches", rows, "data * fsdp", ways),
    ("model.d_model", m.d_model, "fsdp", shape["fsdp"]),
    ("model.n_heads", m.n_heads, "tensor", shape["tensor"]),
    ("model.n_kv_heads", m.n_kv_heads, "tensor", shape["tensor"]),
    ("model.d_mlp", m.d_mlp, "tensor", shape["tensor"]),
    ("model.vocab_size", m.vocab_size, "tensor", shape["tensor"]),
  ):
    if value % parts:
      raise config_lib.ConfigError(
        f"config.{path}={value}: must be a multiple of mesh {axis}={parts}"
      )
  return tuple(sizes)


def make_mesh(config: config_lib.Config, devices=None) -> jax.sharding.Mesh:
  """The run's mesh over `devices`, by default all of every process.

  In mode pmap its axes are Auto: no layout is in any type, and the mesh only
  says where rows are placed.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(config, len(devices))
  types = jax.sharding.AxisType
  kind = types.Explicit if config.mesh.mode == "jit" else types.Auto
  return jax.make_mesh(
    shape, MESH_AXES, axis_types=(kind,) * len(shape), devices=devices
  )


def local_rows(sharding: NamedSharding, n_rows: int) -> tuple[int, int]:
  """[first, last) of the global batch's rows that this process must read."""
  indices = sharding.addressable_devices_indices_map((n_rows,))
  slices = [index[0].indices(n_rows) for index in indices.values() if index]
  return min(s[0] for s in slices), max(s[1] for s in slices)


def place(rows: dict[str, np.ndarray], sharding: NamedSharding, n_rows: int):
  """Global arrays [n_rows, ...] from this process's `local_rows`."""
  first, _ = local_rows(sharding, n_rows)

  def array(local: np.ndarray) -> jax.Array:
    def shard(index):
      start, stop, _ = index[0].indices(n_rows)
      return local[start - first : stop - first]

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
