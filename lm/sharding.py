"""Start-up of processes, the mesh, and where each logical axis lies on it.

Meshes are Explicit: the layout is part of each array's type, and a layout
error is a trace error. Code names logical axes; this table alone knows the
mesh. Without a mesh in context (mode `pmap`, or a plain array on one device)
`spec` is None and every annotation falls away.
"""

import glob
import hashlib
import importlib.util
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from lm import config as config_lib

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


def start_processes(heartbeat_seconds: int) -> None:
  """Joins the other processes of a run, if the environment names any.

  COORDINATOR_ADDRESS (host:port of process 0), PROCESS_COUNT and PROCESS_INDEX
  say it by hand; the last two may come from SLURM or Open MPI. Without them
  JAX finds out from SLURM, Open MPI or a TPU's metadata. A process that has
  not been heard of for `heartbeat_seconds` is lost, and all others end.
  """
  names = ("COORDINATOR_ADDRESS", "PROCESS_COUNT", "PROCESS_INDEX")
  address, count, index = (_first_set(*_ALIASES[name]) for name in names)
  # Where the program is told to stop by SIGTERM is agreed in lm/train/stop.py;
  # JAX's own service would take the signal away from it.
  jax.config.update("jax_enable_preemption_service", False)
  # The only collectives that CPUs have between processes.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if address is None and not _in_cluster():
    return
  if address is not None and (count is None or index is None):
    raise config_lib.ConfigError(
      f"COORDINATOR_ADDRESS={address}: needs PROCESS_COUNT and PROCESS_INDEX "
      "beside it, in the environment or as flags"
    )
  try:
    jax.distributed.initialize(
      coordinator_address=address,
      num_processes=None if address is None else int(count or 0),
      process_id=None if address is None else int(index or 0),
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except ValueError as error:
    raise config_lib.ConfigError(
      f"COORDINATOR_ADDRESS={address}, PROCESS_COUNT={count}, "
      f"PROCESS_INDEX={index}: {error}"
    ) from error
  except jax.errors.JaxRuntimeError as error:
    raise config_lib.RunError(
      f"COORDINATOR_ADDRESS={address}: the other processes were not reached: "
      f"{str(error)[:200]}"
    ) from error


def wait_for_all(what: str) -> None:
  """Collective: returns once every process is here."""
  multihost_utils.sync_global_devices(what)


def check_agreement(facts: Mapping[str, str]) -> None:
  """Collective. Raises ConfigError on every process unless each fact has the
  same value on all of them; they all must have the same names.
  """
  if jax.process_count() == 1:
    return
  words = [
    np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.uint32)
    for value in facts.values()
  ]
  # [process, fact, 2]
  found = multihost_utils.process_allgather(np.stack(words))
  for i, (name, value) in enumerate(facts.items()):
    others = np.flatnonzero((found[:, i] != found[0, i]).any(axis=-1))
    if len(others):
      if jax.process_index() == 0:
        # The others are joined through this one: they are to end before it.
        time.sleep(1.0)
      raise config_lib.ConfigError(
        f"{name}: process(es) {others.tolist()} have another value than "
        f"process 0; on process {jax.process_index()} it is {value[:300]}. All "
        "processes of a run need the same config and the same data"
      )


_ALIASES = {
  "COORDINATOR_ADDRESS": ("COORDINATOR_ADDRESS",),
  "PROCESS_COUNT": ("PROCESS_COUNT", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"),
  "PROCESS_INDEX": ("PROCESS_INDEX", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"),
}


def _first_set(*names: str) -> str | None:
  return next((os.environ[n] for n in names if n in os.environ), None)


def _in_cluster() -> bool:
  """Whether JAX will find other processes without being told of them."""
  count = _first_set("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
  in_step = "SLURM_STEP_NODELIST" in os.environ  # else `sbatch` alone
  if count is not None and (in_step or "OMPI_COMM_WORLD_SIZE" in os.environ):
    return int(count) > 1
  if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
    return False
  if "TPU_WORKER_HOSTNAMES" in os.environ:  # GKE
    hosts = os.environ["TPU_WORKER_HOSTNAMES"].split(",")
    slices = int(os.environ.get("MEGASCALE_NUM_SLICES", 1))
    return len(hosts) * slices > 1
  if "TPU_SKIP_MDS_QUERY" in os.environ:  # no metadata server to ask
    return False
  has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(has_tpu) and importlib.util.find_spec("libtpu") is not None


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
    raise config_lib.ConfigError(
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
    raise config_lib.ConfigError(
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
    raise config_lib.ConfigError(
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


def digest(tree: Any, first_row: Array | int = 0) -> Array:
  """64 bits, as uint32 [2], of every array's bits and where in it they stand.

  Sums modulo 2^32 of mixed words, so it is the same on any mesh. Where an
  array is cut by hand (`jax.pmap`), `first_row` is the place of row 0 in the
  whole, and the parts' digests add up. Arrays are told apart by their paths.
  """
  total = jnp.zeros(2, jnp.uint32)
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = np.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
    total += _digest(x, name, jnp.asarray(first_row, jnp.uint32))
  return total


@jax.jit  # so that, outside of a program, arrays of one shape share one
def _digest(x: Array, name: Array, first_row: Array) -> Array:
  if x.ndim == 0:
    x = x[None]
  if x.dtype == bool:  # has no bits to cast
    x = x.astype(jnp.uint8)
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
  where = jax.typeof(x).sharding
  where = None if where.mesh.empty else where
  place = name
  for axis in range(x.ndim):
    i = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=where)
    if axis == 0:
      i += first_row
    place = place * np.uint32(0x01000193) + i
  # The finalizer of MurmurHash3 (A. Appleby, public domain), twice seeded.
  sums = []
  for seed in (0x9E3779B9, 0x85EBCA77):
    h = words ^ (place * np.uint32(seed))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    sums.append(jnp.sum(h ^ (h >> 16), dtype=jnp.uint32))
  return jnp.stack(sums)
