"""Checks of a config: the registry of all checks by name, in the order of the
result table. The modules of this package hold the checks.
"""

from collections.abc import Callable, Iterable, Iterator

from lm import config as config_lib
from lm import schema
from lm.verify.checks import decoder, step, storage
from lm.verify.result import Result

Check = Callable[[config_lib.Config], Iterable[Result]]

CHECKS: dict[str, Check] = {
  "causality": decoder.causality,
  "packing": decoder.packing,
  "padding": decoder.padding,
  "decode": decoder.decode,
  "accumulation": step.accumulation,
  "meshes": step.meshes,
  "layers": step.layers,
  "initial_loss": decoder.initial_loss,
  "dtypes": decoder.dtypes,
  "parameters": decoder.parameters,
  "shardings": step.shardings,
  "batches": storage.batches,
  "checkpoint": storage.checkpoints,
}
# Checks that compute nothing, and therefore take configs of any size: shrinking
# is not needed.
TRACED = ("dtypes", "parameters")


def choose(only: list[str] | None) -> list[str]:
  """Names of the checks to run, in the order of the result table; `only` None
  names all.

  Raises ConfigError on an unknown name.
  """
  for name in only or ():
    if name not in CHECKS:
      raise schema.ConfigError(f"--only={name}: {schema.unknown(name, CHECKS)}")
  return [name for name in CHECKS if only is None or name in only]


def attempt(
  name: str, check: Check, config: config_lib.Config
) -> Iterator[Result]:
  """Yields the check's results; an exception becomes a failed result."""
  try:
    yield from check(config)
  except Exception as error:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    yield Result(name, "could not be finished", None, None, False, line)
