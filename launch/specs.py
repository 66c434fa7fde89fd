"""The spec, shared by all places: what to run, on what, where its files go.

`launch/pod.yaml` explains each field. It is read strictly: an unknown field, a
wrong type or an impossible value is a ConfigError before anything is run.
"""

import dataclasses
import re
from collections.abc import Sequence

import yaml

from launch import accelerators
from lm import schema


@dataclasses.dataclass
class LocalConfig:
  processes: int = 2
  # CPU devices of a process.
  devices: int = 1


@dataclasses.dataclass
class SlurmConfig:
  partition: str | None = None
  account: str | None = None
  # Time limit of one allocation; the job comes back until the run is complete.
  minutes: int = 1440


@dataclasses.dataclass
class Spec:
  name: str = "tiny"
  accelerator: str = "cpu"
  slices: int = 1
  zone: str | None = None
  spot: bool = True
  image: str | None = None
  install: str | None = None
  command: tuple[str, ...] = ()
  retries: int = 10
  bucket: str | None = None
  local: LocalConfig = dataclasses.field(default_factory=LocalConfig)
  slurm: SlurmConfig = dataclasses.field(default_factory=SlurmConfig)

  @property
  def workdir(self) -> str:
    return f"{(self.bucket or 'runs').rstrip('/')}/{self.name}"

  @property
  def argv(self) -> list[str]:
    """The command, with the run's directory in it."""
    return [word.replace("{workdir}", self.workdir) for word in self.command]


def load(
  path: str, overrides: Sequence[str] = (), command: Sequence[str] = ()
) -> Spec:
  """The spec of a YAML file, changed by arguments `--spec.FIELD=VALUE`.

  `command`, where there is one, takes the place of the file's.
  """
  spec = _parse(path)
  for argument in overrides:
    field, equals, text = argument.removeprefix("--").partition("=")
    if not equals:
      raise schema.ConfigError(f"{argument}: no value; write {argument}=VALUE")
    schema.override(spec, "spec", field.split(".")[1:], text)
  if command:
    spec.command = tuple(command)
  return validate(spec)


def _parse(path: str) -> Spec:
  try:
    with open(path, encoding="utf-8") as file:
      tree = yaml.load(file, _Loader)
  except OSError as error:
    raise schema.ConfigError(f"--spec={path}: {error.strerror}") from error
  # The last two: a number of 5000 digits, a date of month 13; brackets or
  # aliases without end.
  except (yaml.YAMLError, ValueError, RecursionError) as error:
    raise schema.ConfigError(f"--spec={path}: {error}") from error
  return schema.from_dict(Spec, {} if tree is None else tree, "spec")


class _Loader(yaml.SafeLoader):
  """YAML in which no key is said twice; PyYAML would take the last."""

  def construct_mapping(self, node, deep=False):
    keys = [self.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
      if keys.count(key) > 1:
        raise yaml.constructor.ConstructorError(
          None, None, f"{key!r} is said twice", node.start_mark
        )
    return super().construct_mapping(node, deep)


def validate(spec: Spec) -> Spec:
  """Returns `spec`, or raises ConfigError naming the first broken rule."""
  schema.check_types(spec, Spec, "spec")
  # The clouds' own rule, so that a spec moves from place to place.
  require(
    re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", spec.name) is not None,
    "name",
    spec.name,
    "must be 1 to 40 lower-case letters, digits and hyphens, from a letter to "
    "a letter or digit",
  )
  require(
    spec.zone is None or re.fullmatch(r"[a-z0-9*/-]+", spec.zone) is not None,
    "zone",
    spec.zone,
    "must be a zone such as us-west4-a, for sky also an infra such as aws",
  )
  accelerators.find(spec.accelerator)
  require(
    re.match(r"[^-=][^=]*$", (*spec.command, "")[0]) is not None,
    "command",
    spec.command,
    "names no program; set it, or give the command after --. Variables are set "
    "by env: -- env NAME=VALUE PROGRAM",
  )
  for path, value, least, most in (
    ("slices", spec.slices, 1, 100_000),
    ("retries", spec.retries, 0, 1_000_000),
    ("local.processes", spec.local.processes, 1, 1_000),
    ("local.devices", spec.local.devices, 1, 10_000),
    ("slurm.minutes", spec.slurm.minutes, 5, 10_000_000),
  ):
    require(value >= least, path, value, f"must be at least {least}")
    require(value <= most, path, value, f"must be at most {most}")
  return spec


def require(holds: bool, path: str, value: object, rule: str) -> None:
  if not holds:
    raise refusal(path, value, rule)


def refusal(path: str, value: object, rule: str) -> schema.ConfigError:
  return schema.ConfigError(f"spec.{path}={value!r}: {rule}")


def require_bucket(spec: Spec) -> None:
  """Machines that come and go keep nothing; every process must reach it."""
  require(
    re.match(r"\w+://[^/]", spec.bucket or "") is not None,
    "bucket",
    spec.bucket,
    "must be an object store such as gs://my-bucket/runs: these machines' "
    "disks do not outlive a preemption",
  )
