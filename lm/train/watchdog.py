"""Watchdog: reports a slow step, with the stacks of all threads."""

import collections
import statistics
import sys
import threading
import time
import traceback

# Most steps in the median of durations, and the fewest needed for a median.
_WINDOW, _LEAST = 64, 5
# Shorter steps are never reported, in seconds.
_SHORTEST = 1.0


class Watchdog:
  """Reports slow steps to stderr; the loop calls `step_done` after each step.

  A step longer than `factor` medians is reported, and again each time its
  duration has doubled. The run goes on: ending the run is left to the reader or
  to the heartbeats between processes. A `factor` of None disables the watchdog.
  """

  def __init__(self, factor: float | None):
    self._factor = factor
    self._durations: collections.deque[float] = collections.deque(
      maxlen=_WINDOW
    )
    self._step = 0
    self._since: float | None = None
    self._next = 0.0
    self._ended = threading.Event()
    if factor is not None:
      threading.Thread(target=self._watch, daemon=True).start()

  def step_done(self, step: int) -> None:
    now = time.monotonic()
    if self._since is not None:
      self._durations.append(now - self._since)
    self._step, self._next, self._since = step, 0.0, now

  def pause(self) -> None:
    """Silent until the next `step_done`, for evaluation and saving."""
    self._since = None

  def close(self) -> None:
    self._ended.set()

  def _watch(self) -> None:
    assert self._factor is not None
    while not self._ended.wait(_SHORTEST / 4):
      since, known = self._since, list(self._durations)
      if since is None or len(known) < _LEAST:
        continue
      lasted, median = time.monotonic() - since, statistics.median(known)
      if lasted < max(_SHORTEST, self._factor * median, self._next):
        continue
      self._next = 2 * lasted
      print(
        f"watchdog: the step after {self._step} has taken {lasted:.1f} s, the "
        f"median is {median:.3f} s; stacks of all threads follow",
        _stacks(),
        sep="\n",
        file=sys.stderr,
        flush=True,
      )


def _stacks() -> str:
  """The Python stack of every thread. faulthandler needs a file descriptor,
  and stderr has none in a notebook.
  """
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  return "\n".join(
    f"Thread {names.get(ident, ident)}:\n"
    + "".join(traceback.format_stack(frame))
    for ident, frame in sys._current_frames().items()
  )
