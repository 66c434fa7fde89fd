"""Reports a step that takes far longer than others, with all stacks."""

import collections
import statistics
import sys
import threading
import time
import traceback

# Steps that the median is of, and those that it takes to have one.
_WINDOW, _LEAST = 64, 5
# A wait below it is never worth a report, in seconds.
_SHORTEST = 1.0


class Watchdog:
  """`step_done` after each step; silent while not `watching`.

  A step that lasts longer than `factor` medians is reported to stderr, again
  each time that its duration has doubled. It goes on: whether to end it is
  for the one who reads, or for the heartbeats between processes.
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
    """Until the next `step_done`: evaluation and saving are no steps."""
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
  """The Python stack of every thread; faulthandler's writes to a file
  descriptor, which stderr does not have in a notebook.
  """
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  return "\n".join(
    f"Thread {names.get(ident, ident)}:\n"
    + "".join(traceback.format_stack(frame))
    for ident, frame in sys._current_frames().items()
  )
