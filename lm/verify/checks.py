"""Registry of all checks by name, in the order of the result table."""

from collections.abc import Callable, Iterable, Iterator

from lm import config as config_lib
from lm import schema
from lm.verify import data, model, parallel
from lm.verify.result import Result

Check = Callable[[config_lib.Config], Iterable[Result]]

CHECKS: dict[str, Check] = {
  "causality": model.causality,
  "packing": model.packing,
  "padding": model.padding,
  "decode": model.decode,
  "accumulation": parallel.accumulation,
  "meshes": parallel.meshes,
  "layers": parallel.layers,
  "initial_loss": model.initial_loss,
  "dtypes": model.dtypes,
  "parameters": model.parameters,
  "shardings": parallel.shardings,
  "batches": data.batches,
  "checkpoint": data.checkpoints,
}
# Checks that only trace: they compute nothing and need no shrunk config.
TRACED = ("dtypes", "parameters")


def choose(only: list[str] | None) -> list[str]:
  """Names of the checks to run (None: all), in the table's order.

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
    said = " ".join(f"{type(error).__name__}: {error}".split())
    yield Result(name, "could not be finished", None, None, False, said)
