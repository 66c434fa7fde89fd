"""Reports of a run: metrics.jsonl, TensorBoard and the progress line.

metrics.jsonl has a JSON object per report. `train/loss` is the mean over all
tokens scored since the last report, without steps of nonfinite loss;
`train/last_loss` is the last step's. A list has a number per layer, and is a
curve per layer in TensorBoard (`layers/residual_rms/0`). After a restart,
reports later than the checkpoint are dropped, since no step may appear twice.
Only process 0 writes.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console
import rich.progress
from etils import epath

from lm import files, schema


class Writer:
  """Appends reports to metrics.jsonl and TensorBoard event files; `last` is the
  last report. At the start, damaged lines move to a file of their own, with a
  message on stderr.
  """

  def __init__(self, workdir: str, start_step: int):
    self._writes = jax.process_index() == 0
    reports, rest = _parse(workdir)
    kept = [r for r in reports if r["step"] <= start_step]
    self.last: dict[str, Any] = kept[-1] if kept else {}
    if not self._writes:
      return
    self._path = epath.Path(workdir) / "metrics.jsonl"
    if rest:
      print(
        f"{self._path}: "
        f"{schema.counted(rest.count(_NEWLINE), 'damaged line')} moved to "
        f"{set_aside(self._path, rest)}; the other reports are kept",
        file=sys.stderr,
      )
    files.replace(self._path, "".join(_line(r) for r in kept))
    self._events = _Events(os.path.join(workdir, "tensorboard"), start_step + 1)

  def write(self, report: dict[str, Any]) -> None:
    self.last = report
    if not self._writes:
      return
    line = _line(report)
    with files.named(self._path):
      if files.is_local(self._path):
        with self._path.open("a") as file:
          file.write(line)
      else:  # object stores cannot append
        self._path.write_text(self._path.read_text() + line)
    self._events.add(
      {k: v for k, v in report.items() if k != "step"}, report["step"]
    )

  def amend(self, found: dict[str, Any]) -> None:
    """Adds the fields `found` to the last report."""
    self.last |= found
    if not self._writes:
      return
    reports = [*read(str(self._path.parent))[:-1], self.last]
    files.replace(self._path, "".join(_line(r) for r in reports))
    self._events.add(found, self.last["step"])

  def close(self) -> None:
    if self._writes:
      # A full disk was reported already; metrics.jsonl has every number.
      with contextlib.suppress(OSError):
        self._events.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """Hides PyTorch, if installed and not yet imported, from an import inside:
  tensorboardX imports it to know its tensors, for more than a second of CPU.
  """
  hidden: dict[str, Any] = {"torch": None} if "torch" not in sys.modules else {}
  modules: dict[str, Any] = sys.modules
  modules.update(hidden)
  try:
    yield
  finally:
    for name in hidden:
      modules.pop(name)


class _Events:
  """Writes TensorBoard scalars in the calling thread: a writer thread would
  outlive a stop, and print the disk's errors.
  """

  def __init__(self, directory: str, first_step: int):
    with _without_torch():
      from tensorboardX import event_file_writer, record_writer, summary
      from tensorboardX.proto import event_pb2

    # The generated protobuf module creates its classes at import.
    made: Any = vars(event_pb2)
    self._event, self._scalar = made["Event"], summary.scalar
    record_writer.directory_check(directory)
    self._directory = directory
    self._writer = event_file_writer.EventsWriter(
      os.path.join(directory, "events"), f".{os.getpid()}"
    )
    # Tells TensorBoard to hide the later steps of an earlier start.
    log = made["SessionLog"](status=made["SessionLog"].START)
    self._write(first_step, session_log=log)

  def add(self, values: dict[str, Any], step: int) -> None:
    for name, value in values.items():
      numbers = {name: value}
      if isinstance(value, list):
        numbers = {f"{name}/{i}": v for i, v in enumerate(value)}
      for curve, number in numbers.items():
        if isinstance(number, int | float) and math.isfinite(number):
          self._write(step, summary=self._scalar(curve, number))
    with files.named(self._directory):
      self._writer.flush()

  def _write(self, step: int, **content: Any) -> None:
    event = self._event(wall_time=time.time(), step=step, **content)
    self._writer.write_event(event)

  def close(self) -> None:
    self._writer.close()


_NEWLINE = b"\n"


def _line(report: dict[str, Any]) -> str:
  """A report as a line of JSON. JSON has no NaN and no infinity: such values
  are null, and `nonfinite` lists their names.
  """
  finite = {name: _finite(value) for name, value in report.items()}
  nonfinite = [name for name, value in report.items() if finite[name] != value]
  if nonfinite:  # beside those of a report that was read and is amended
    finite["nonfinite"] = [*report.get("nonfinite", ()), *nonfinite]
  return json.dumps(finite, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
  """`value`, or a list of values, with None in place of nonfinite floats."""
  if isinstance(value, list):
    return [_finite(x) for x in value]
  nonfinite = isinstance(value, float) and not math.isfinite(value)
  return None if nonfinite else value


def _parse(workdir: str) -> tuple[list[dict[str, Any]], bytes]:
  """(reports of a run in order, damaged lines as bytes). A last line cut short
  by a kill is in neither.
  """
  path = epath.Path(workdir) / "metrics.jsonl"
  content = path.read_bytes() if path.exists() else b""
  reports, rest = [], b""
  for line in content.split(_NEWLINE)[:-1]:
    try:
      report = json.loads(line)
      if type(report["step"]) is not int:
        raise TypeError
      reports.append(report)
    except (ValueError, TypeError, KeyError, RecursionError):
      rest += line + _NEWLINE
  return reports, rest


def read(workdir: str) -> list[dict[str, Any]]:
  """The reports of a run, without damaged lines."""
  return _parse(workdir)[0]


def set_aside(path: epath.Path, content: bytes) -> epath.Path:
  """Writes damaged content to a new file beside `path`; returns its path."""
  now = time.strftime("%Y%m%d-%H%M%S")
  where = path.with_name(f"{path.name}.damaged-{now}")
  where.write_bytes(content)
  return where


class Progress:
  """Live progress line in a terminal; elsewhere a plain line per report."""

  def __init__(self, steps: int, start_step: int):
    self._console = rich.console.Console(
      stderr=True, quiet=jax.process_index() != 0
    )
    self._steps = steps
    self._live = rich.progress.Progress(
      rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
      rich.progress.BarColumn(bar_width=24),
      rich.progress.TextColumn("{task.description}"),
      rich.progress.TimeRemainingColumn(),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._live.add_task("", total=steps, completed=start_step)
    self._live.start()

  def show(self, report: dict[str, Any]) -> None:
    step, text = report["step"], describe(report)
    self._live.update(self._task, completed=step, description=text)
    if "eval/loss" in report or not self._console.is_terminal:
      self.say(f"step {step:>6}/{self._steps}  {text}")

  def say(self, text: str) -> None:
    # Brackets and colons of a path or a source are no markup.
    self._console.print(
      text, highlight=False, soft_wrap=True, markup=False, emoji=False
    )

  def close(self) -> None:
    self._live.stop()


def describe(report: dict[str, Any]) -> str:
  """A report as a line of text."""
  parts = []
  for name, label, form in (
    ("train/loss", "loss", ".4f"),
    ("train/perplexity", "ppl", ".2f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("eval/loss", "eval loss", ".4f"),
    ("eval/perplexity", "eval ppl", ".2f"),
    ("eval/bits_per_byte", "eval bits/byte", ".4f"),
  ):
    if report.get(name) is not None:
      parts.append(f"{label} {report[name]:{form}}")
  return "  ".join(parts)
