"""What a run says while it runs: metrics.jsonl, TensorBoard, a line, a picture.

metrics.jsonl has an object per report. After a restart, reports later than the
checkpoint are dropped, so that no step stands twice. Processes other than the
first write nothing.
"""

import contextlib
import json
import math
import os
from typing import Any

import jax
import rich.console
import rich.progress
from etils import epath

from lm import config as config_lib
from lm.model import counts

# Dense bfloat16 matrix operations per second of one device, by the start of
# its `device_kind`; vendors' data sheets. Longer names come first.
_PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 2307e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


class Writer:
  """Appends reports to metrics.jsonl and TensorBoard event files; `last` is the
  last one.
  """

  def __init__(self, workdir: str, start_step: int):
    self._writes = jax.process_index() == 0
    kept = [r for r in read(workdir) if r["step"] <= start_step]
    self.last: dict[str, Any] = kept[-1] if kept else {}
    if not self._writes:
      return
    import tensorboardX

    self._path = epath.Path(workdir) / "metrics.jsonl"
    replace(self._path, "".join(json.dumps(r) + "\n" for r in kept))
    self._events = tensorboardX.SummaryWriter(
      os.path.join(workdir, "tensorboard"), purge_step=start_step + 1
    )

  def write(self, report: dict[str, Any]) -> None:
    self.last = report
    if not self._writes:
      return
    line = json.dumps(report) + "\n"
    if "://" in str(self._path):  # an object store has no appending
      self._path.write_text(self._path.read_text() + line)
    else:
      with self._path.open("a") as file:
        file.write(line)
    self._add_events(report, report["step"])

  def amend(self, found: dict[str, Any]) -> None:
    """Adds to the last report."""
    self.last |= found
    if not self._writes:
      return
    reports = [*read(str(self._path.parent))[:-1], self.last]
    replace(self._path, "".join(json.dumps(r) + "\n" for r in reports))
    self._add_events(found, self.last["step"])

  def _add_events(self, values: dict[str, Any], step: int) -> None:
    for name, value in values.items():
      if name != "step" and isinstance(value, int | float):
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    if self._writes:
      # On a full disk the cause is told already; metrics.jsonl has it all.
      with contextlib.suppress(OSError):
        self._events.close()


def read(workdir: str) -> list[dict[str, Any]]:
  """The reports of a run, without one that a kill cut short."""
  path = epath.Path(workdir) / "metrics.jsonl"
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.split("\n")[:-1]]


def replace(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text)
  partial.replace(path)


def write_config(workdir: str, config: config_lib.Config) -> None:
  replace(epath.Path(workdir) / "config.json", config_lib.to_json(config))


class Meter:
  """Tokens per second and the like since the last reading."""

  def __init__(self, config: config_lib.Config, start_step: int):
    self._config = config
    kind = jax.devices()[0].device_kind
    known = [v for k, v in _PEAK_FLOPS.items() if kind.startswith(k)]
    self._peak = known[0] * jax.device_count() if known else None
    self._before = (start_step, 0.0, 0.0)

  def read(
    self, step: int, step_seconds: float, wait_seconds: float
  ) -> dict[str, float | None]:
    """Rates since the last reading. The seconds are those of all steps so far
    (evaluation and saving left out) and of all waits for data. `mfu` is the
    model's operations (lm/model/counts.py) over the devices' bfloat16 peak,
    None where unknown.
    """
    now = step, step_seconds, wait_seconds
    steps, stepped, waited = (
      a - b for a, b in zip(now, self._before, strict=True)
    )
    self._before = now
    seconds = max(1e-9, stepped + waited)
    rate = steps * self._config.tokens_per_step / seconds
    length = self._config.train.sequence_length
    flops = rate * counts.train_flops(self._config.model, length)
    return {
      "tokens_per_second": rate,
      "step_seconds": seconds / max(1, steps),
      "mfu": None if self._peak is None else flops / self._peak,
      "data_wait_fraction": waited / seconds,
    }


class Progress:
  """One live line in a terminal; elsewhere a plain line a report."""

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
    self._console.print(text, highlight=False, soft_wrap=True)

  def close(self) -> None:
    self._live.stop()


def describe(report: dict[str, Any]) -> str:
  """A report in a line."""
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


def exponential(nats: float) -> float:
  """Perplexity; infinite where float64 cannot hold it."""
  return math.exp(nats) if nats < 709 else math.inf


def plot(workdir: str) -> None:
  """Draws curves.png: loss, bits per byte, learning rate and gradient norm."""
  import matplotlib.figure

  reports = read(workdir)

  def series(name):
    points = [(r["tokens"], r[name]) for r in reports if name in r]
    return tuple(zip(*points, strict=True)) if points else ((), ())

  figure = matplotlib.figure.Figure(figsize=(10, 6), layout="constrained")
  axes = figure.subplots(2, 2, sharex=True)
  thin = {"linewidth": 0.8, "color": "tab:blue"}
  bold = {"linewidth": 1.5, "color": "tab:orange", "marker": "o", "ms": 3}
  axes[0, 0].plot(*series("train/loss"), label="train (one batch)", **thin)
  axes[0, 0].plot(*series("eval/loss"), label="validation", **bold)
  axes[0, 0].set_ylabel("loss, nats per token")
  axes[0, 0].legend()
  axes[0, 1].plot(*series("eval/bits_per_byte"), **bold)
  axes[0, 1].set_ylabel("validation bits per byte")
  axes[1, 0].plot(*series("lr"), **thin)
  axes[1, 0].set_ylabel("learning rate")
  axes[1, 1].plot(*series("grad_norm"), **thin)
  axes[1, 1].set_ylabel("gradient norm")
  axes[1, 1].set_yscale("log")
  for axis in axes[1]:
    axis.set_xlabel("tokens")
  for axis in axes.flat:
    axis.grid(alpha=0.3)
  # A name in step with the run directory; the file appears whole.
  path = epath.Path(workdir) / "curves.png"
  with path.with_name(".curves.png").open("wb") as file:
    figure.savefig(file, dpi=110, format="png")
  path.with_name(".curves.png").replace(path)
