"""The device mesh of a run: its shape, the checks that it fits, its devices."""

import math
from collections.abc import Mapping

import jax
from jax.experimental import mesh_utils

from lm import chips, schema, sharding
from lm import config as config_lib


def shape_of(config: config_lib.Config, n_devices: int) -> tuple[int, ...]:
  """Devices along each of sharding.MESH_AXES, with an axis of None filled in.

  Raises ConfigError if the axes do not multiply to `n_devices`, or the mesh
  cannot shard the model or the batch evenly.
  """
  sizes = config.mesh.sizes()
  known = math.prod(size for size in sizes.values() if size is not None)
  filled = {
    axis: n_devices // known if size is None else size
    for axis, size in sizes.items()
  }
  if math.prod(filled.values()) != n_devices:
    raise schema.ConfigError(
      f"config.mesh={sizes}: does not multiply to the "
      f"{schema.counted(n_devices, 'device')} here; change an axis, "
      "or set one to None to take what is left"
    )
  t = config.train
  rows = t.batch_size // t.microbatches
  name = "config.train.batch_size / train.microbatches"
  _check_multiple(name, rows, "batch", filled)
  check_model(config.model, filled)
  return tuple(filled.values())


# Model field -> logical axis of that length.
_CUT = {
  "d_model": "embed",
  "n_heads": "heads",
  "n_kv_heads": "kv_heads",
  "d_mlp": "mlp",
  "vocab_size": "vocab",
}


def check_model(m: config_lib.ModelConfig, shape: Mapping[str, int]) -> None:
  """Raises ConfigError if a mesh of `shape` cannot shard the weights evenly."""
  for name, axis in _CUT.items():
    _check_multiple(f"config.model.{name}", getattr(m, name), axis, shape)


def _check_multiple(
  path: str, value: int, axis: str, shape: Mapping[str, int]
) -> None:
  names = sharding.mesh_axes(axis)
  parts = math.prod(shape[name] for name in names)
  if value % parts:
    raise schema.ConfigError(
      f"{path}={value}: must be a multiple of mesh {' * '.join(names)}={parts}"
    )


def make(config: config_lib.Config, devices=None) -> jax.sharding.Mesh:
  """Creates the run's mesh over `devices`, by default of all processes.

  With several TPU slices, only `data` crosses the network between slices, and
  each slice holds a contiguous part of `data`. On other platforms JAX calls
  hosts slices, and slices are ignored: devices of hosts need no order. In mode
  pmap the mesh axes are Auto: array types carry no sharding, and the mesh only
  says where rows are placed. Raises ConfigError if the slices do not divide
  `data`, if the devices cannot do `model.remat_offload`, and as `shape_of`.
  """
  devices = jax.devices() if devices is None else devices
  shape = shape_of(config, len(devices))
  chips.forgo_unsafe_cache(devices)
  if config.model.remat_offload:
    _check_host_memory(devices[0])
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
  # Lets a mesh axis take a part of a torus axis if no other layout fits.
  split = {"allow_split_physical_axes": True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, **split)
  else:
    within = (shape[0] // slices, *shape[1:])
    between = (slices, *(1,) * len(shape[1:]))
    grid = mesh_utils.create_hybrid_device_mesh(
      within, between, devices, **split
    )
  return jax.sharding.Mesh(grid, sharding.MESH_AXES, axis_types=kinds)


def _check_host_memory(device) -> None:
  kinds = sorted(memory.kind for memory in device.addressable_memories())
  if "pinned_host" not in kinds:
    raise schema.ConfigError(
      "config.model.remat_offload=True: needs devices with a part of the "
      f"host's memory, pinned_host; {device.device_kind} has {kinds}; set it "
      "to False, or a config.model.remat that keeps less"
    )
