"""Turns: each side of a benchmark runs in a process of its own, one at a time.

The benchmark starts itself once for each side, with a flag that names the side,
and asks it for one measurement after the other; a side that is not asked idles.
"""

import argparse
import atexit
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

# Before a measurement, so that the side before has come to rest.
IDLE_SECONDS = 0.5


class Ended(SystemExit):
  """A side ended before it answered; uncaught, it ends the benchmark too."""


class Side:
  """A child process that runs this script for one side, and answers `ask`.

  `environment` is added to the parent's; after `seconds` the child is killed.
  """

  def __init__(
    self,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
  ):
    self._arguments = " ".join(arguments)
    self._child = subprocess.Popen(
      [sys.executable, os.path.abspath(sys.argv[0]), *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, **(environment or {})},
      process_group=0,  # Ctrl-C ends this process, which then ends the child
    )
    atexit.register(self._child.kill)
    self._timer = None
    if seconds is not None:
      self._timer = threading.Timer(seconds, self._child.kill)
      self._timer.daemon = True
      self._timer.start()

  def ask(self, *arguments) -> Any:
    """The child's answer to `arguments`, all of it JSON. Raises Ended."""
    assert self._child.stdin is not None and self._child.stdout is not None
    time.sleep(IDLE_SECONDS)
    try:
      self._child.stdin.write(json.dumps(arguments) + "\n")
      self._child.stdin.flush()
      line = self._child.stdout.readline()
    except BrokenPipeError:
      line = ""
    if not line:
      code = self._child.wait()
      self.close()
      raise Ended(f"{self._arguments} ended with {code}")
    return json.loads(line)

  def close(self) -> None:
    assert self._child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # the child has ended
      self._child.stdin.close()
    self._child.wait()
    if self._timer is not None:
      self._timer.cancel()


def run(main: Callable[[], None]) -> None:
  """Calls `main`, and tells a mistake or Ctrl-C in a line, as commands do."""
  from lm import cli

  sys.exit(cli.guarded(main))


def at_least(least: int) -> Callable[[str], int]:
  """Makes argparse's type of a whole number that is not below `least`."""

  def number(text: str) -> int:
    if (n := int(text)) < least:
      raise argparse.ArgumentTypeError(f"{n}: must be at least {least}")
    return n

  return number


def serve(make: Callable[[], Callable]) -> None:
  """Runs a side in the child: answers the parent by the function that `make`
  returns. What `make` and the function print goes to stderr.
  """
  with os.fdopen(os.dup(1), "w") as answers:
    os.dup2(2, 1)
    try:
      answer = make()
    except ImportError as error:
      sys.exit(f"error: {error}: pip install -e '.[bench]'")
    for line in sys.stdin:
      print(json.dumps(answer(*json.loads(line))), file=answers, flush=True)


def missing(*packages: str) -> str | None:
  """Says which of `packages` are not installed; None if all are."""
  names = [p for p in packages if importlib.util.find_spec(p) is None]
  if not names:
    return None
  return f"no {' and no '.join(names)}: pip install -e '.[bench]'"


def ratios(
  ours: Sequence[float | None], theirs: Sequence[float | None]
) -> tuple[float | None, list[float] | None]:
  """Median and range of the turns' ratios, ours over theirs; None if none."""
  pairs = zip(ours, theirs, strict=True)
  found = sorted(a / b for a, b in pairs if a is not None and b is not None)
  return median(found), [found[0], found[-1]] if found else None


def compared(
  unit: str, ours: Sequence[float | None], theirs: Sequence[float | None]
) -> dict[str, Any]:
  """Medians of both sides' rates, and `ratios`; None is a turn without one."""
  ratio, span = ratios(ours, theirs)
  return {
    f"ours_{unit}": median(ours),
    f"torch_{unit}": median(theirs),
    "ratio": ratio,
    "ratio_range": span,
  }


def median(values: Sequence[float | None]) -> float | None:
  """The median of what is not None."""
  known = [value for value in values if value is not None]
  return statistics.median(known) if known else None


def described(ratio: float | None, span: list[float] | None) -> str:
  """The results of `ratios`, as text."""
  if ratio is None or span is None:
    return "-"
  return f"{ratio:.2f} ({span[0]:.2f} to {span[1]:.2f})"


def shown(value: Any, form: str = "{}") -> str:
  return "-" if value is None else form.format(value)


def machine(*packages: str) -> dict[str, Any]:
  """Cores, processor, and versions of Python and `packages`."""
  return {
    "cores": os.cpu_count(),
    "processor": platform.processor() or platform.machine(),
    "python": platform.python_version(),
    "versions": {name: _version(name) for name in packages},
  }


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def print_table(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
  """Prints columns as wide as their longest cell, in a pipe too."""
  cells = [columns, *rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  print(title)
  for row in cells:
    pairs = zip(row, widths, strict=True)
    print("  ".join(f"{cell:>{width}}" for cell, width in pairs))
