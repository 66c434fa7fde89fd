"""Goodput ledger: the wall time of a run by phase, in goodput.json.

An attempt is the lifetime of a process, and every second of an attempt belongs
to a phase. Steps repeated by a later attempt are lost work, the time between
two attempts is down time, and goodput is the share of the wall time spent in
steps that lasted.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from lm import files, schema
from lm.train import metrics

PHASES = (
  "start",
  "compile",
  "restore",  # the state is made or restored
  "step",
  "data_wait",
  "evaluate",
  "save",
)
# Least seconds between two writes of the file by `book`. After a kill, the time
# since the last write counts as down time.
_WRITE_EVERY = 5.0


class Ledger:
  """Goodput ledger of a run; this process's attempt is the last entry.

  `began` is the start of the process, in seconds of the epoch. Only process 0
  writes the file.
  """

  def __init__(self, workdir: str, began: float):
    self._path = epath.Path(workdir) / "goodput.json"
    self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    self._attempt: dict[str, Any] = {
      "began": began,
      "written": began,
      "first_step": None,  # known once the start is over
      "seconds": self.seconds,
      # Seconds of steps at each checkpoint, to compute what a kill lost.
      "saved": {},
    }
    self._attempts = [*_earlier(self._path, self._attempt), self._attempt]
    self.phase = "start"
    self._booked = time.perf_counter() - max(0.0, time.time() - began)
    self.book()
    self.write()

  def starts_from(self, step: int) -> None:
    """Ends the start phase; `step` is the checkpoint resumed from, or 0."""
    self._attempt["first_step"] = step
    self.book()
    self.phase = "step"
    self.write()

  def book(self) -> None:
    """Adds the time since the last booking to the current phase."""
    now = time.perf_counter()
    self.seconds[self.phase] += now - self._booked
    self._booked = now
    if time.time() - self._attempt["written"] > _WRITE_EVERY:
      self.write()

  @contextlib.contextmanager
  def within(self, phase: str) -> Iterator[None]:
    """Books the time inside as `phase`, then returns to the outer phase."""
    self.book()
    outer, self.phase = self.phase, phase
    try:
      yield
    finally:
      self.book()
      self.phase = outer

  def saved(self, step: int) -> None:
    self.book()
    self._attempt["saved"][str(step)] = self.seconds["step"]
    self.write()

  def write(self) -> None:
    self._attempt["written"] = time.time()
    if jax.process_index() == 0:
      files.replace(self._path, json.dumps(self._attempts, indent=1))

  def describe(self) -> str:
    """Summary line of the ledger, the largest part first."""
    total = summarize(self._attempts)
    wall, share = total.pop("wall"), total.pop("goodput")
    parts = sorted(total.items(), key=lambda item: -item[1])
    names = {name: name.replace("_", " ") for name in total}
    names["restore"] = "make or restore the state"
    said = [f"{names[n]} {_time(s)}" for n, s in parts if s >= 0.05]
    return (
      f"goodput {share:.1%} of {_time(wall)}, "
      f"{schema.counted(len(self._attempts), 'attempt')}: {', '.join(said)}"
    )


def _earlier(path: epath.Path, now: dict[str, Any]) -> list[dict[str, Any]]:
  """Attempts of starts before that of `now`. A damaged file gives []: process 0
  copies the content to a file beside it and prints a message.
  """
  if not path.exists():
    return []
  content = path.read_bytes()
  try:
    attempts = json.loads(content)
    # With `now`, since only of what a later one follows are all fields read.
    summarize(attempts + [now | {"first_step": 0}])
    return attempts
  except files.MALFORMED:
    if jax.process_index() == 0:
      where = metrics.set_aside(path, content)
      print(f"{path} is damaged: moved to {where}", file=sys.stderr)
    return []


def read(workdir: str) -> list[dict[str, Any]]:
  return json.loads((epath.Path(workdir) / "goodput.json").read_text())


def summarize(attempts: list[dict[str, Any]]) -> dict[str, float]:
  """Seconds by phase, with `lost`, `down`, `wall` and the share `goodput`.

  `step` excludes lost steps; all values but `wall` and `goodput` sum to `wall`.
  """
  total: dict[str, float] = dict.fromkeys((*PHASES, "lost", "down"), 0.0)
  ahead = None  # smallest `first_step` of the later attempts
  after = None
  for attempt in reversed(attempts):
    for phase in PHASES:
      total[phase] += attempt["seconds"][phase]
    if ahead is not None:
      kept = attempt["saved"].get(str(ahead), 0.0)
      total["lost"] += attempt["seconds"]["step"] - kept
    if after is not None:
      total["down"] += max(0.0, after - attempt["written"])
    first = attempt["first_step"]
    if first is not None:
      ahead = first if ahead is None else min(ahead, first)
    after = attempt["began"]
  total["step"] -= total["lost"]
  wall = sum(total.values())
  return total | {
    "wall": wall,
    "goodput": total["step"] / wall if wall else 0.0,
  }


def _time(seconds: float) -> str:
  if seconds < 100:
    return f"{seconds:.1f} s"
  minutes = seconds / 60
  return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
