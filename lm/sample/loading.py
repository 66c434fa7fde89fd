"""Flags that select checkpoint, mesh, weight format and draft model."""

import math

import jax
from absl import flags

from lm import checkpoint, cli, schema, sharding
from lm.sample import sampler as sampler_lib

_WORKDIR = cli.define_path("workdir", "Run directory of lm.train.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default: the last.")
_MESH = flags.DEFINE_list(
  "mesh",
  None,
  "Devices along data, fsdp and tensor, such as 1,1,4; default: one device.",
)
_WEIGHTS = flags.DEFINE_enum(
  "weights",
  None,
  sampler_lib.WEIGHTS,
  "Keep the weights so; default: the model's own dtype.",
)
_INT8_CACHE = flags.DEFINE_bool(
  "int8_cache", False, "Keep keys and values in 8 bits."
)
_AHEAD = flags.DEFINE_integer(
  "ahead",
  0,
  "Tokens proposed at each step, by --draft or what the text repeats; no token "
  "depends on it.",
  lower_bound=0,
  upper_bound=sampler_lib.MAX_AHEAD,
)
_DRAFT = cli.define_path(
  "draft", "Run directory of a smaller model that proposes tokens."
)


def check() -> str:
  """Returns --workdir. Raises ConfigError on invalid flags.

  Does not initialize the devices.
  """
  if _WORKDIR.value is None:
    raise schema.ConfigError("--workdir: missing; write --workdir=RUN")
  if _MESH.value is not None:
    _shape(_MESH.value)
  if _DRAFT.value is not None and _AHEAD.value == 0:
    raise schema.ConfigError(
      f"--draft={_DRAFT.value}: proposes --ahead tokens; set that too"
    )
  return _WORKDIR.value


def meta() -> checkpoint.Meta:
  """Metadata of the checkpoint selected by the flags.

  Raises ConfigError on invalid flags, and if --mesh cannot shard the model or
  the draft model.
  """
  found = checkpoint.load_meta(check(), _STEP.value)
  if _MESH.value is not None:
    flags_said = f"--mesh={','.join(_MESH.value)}"
    shape = dict(zip(sharding.MESH_AXES, _shape(_MESH.value), strict=True))
    models = {flags_said: found.config.model}
    if _DRAFT.value is not None:
      draft = checkpoint.load_meta(_DRAFT.value)
      models[f"--draft={_DRAFT.value}, {flags_said}"] = draft.config.model
    for said, model in models.items():
      try:
        sharding.check_model(model, shape)
      except schema.ConfigError as error:
        raise schema.ConfigError(f"{said}: {error}") from error
  return found


def sampler(found: checkpoint.Meta | None = None) -> sampler_lib.Sampler:
  """Loads the model of `found` (default: `meta()`) and any draft model.

  Raises ConfigError, for example if --mesh needs more devices than exist.
  """
  mesh = None if _MESH.value is None else _mesh(_MESH.value)
  step = (found or meta()).step
  load = sampler_lib.Sampler.from_checkpoint
  options = {"weights": _WEIGHTS.value, "int8_cache": _INT8_CACHE.value}
  draft = None
  if _DRAFT.value is not None:
    draft = load(_DRAFT.value, None, mesh, **options)
  return load(check(), step, mesh, ahead=_AHEAD.value, draft=draft, **options)


def _mesh(numbers: list[str]) -> jax.sharding.Mesh:
  shape, found = _shape(numbers), jax.devices()
  n = math.prod(shape)
  if n > len(found):
    raise schema.ConfigError(
      f"--mesh={','.join(numbers)}: needs {n} devices; there are {len(found)}"
    )
  return jax.make_mesh(shape, sharding.MESH_AXES, devices=found[:n])


def _shape(numbers: list[str]) -> tuple[int, ...]:
  try:
    shape = tuple(map(int, numbers))
  except ValueError:
    shape = ()
  if len(shape) != len(sharding.MESH_AXES) or min(shape) < 1:
    raise schema.ConfigError(
      f"--mesh={','.join(numbers)}: must be {len(sharding.MESH_AXES)} numbers "
      f"of devices, along {', '.join(sharding.MESH_AXES)}, such as 1,1,4"
    )
  return shape
