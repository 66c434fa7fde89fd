"""A trace of a few steps, in the run directory.

The program within the trace has the stage of each operation (embed, attention,
mlp, final_norm, loss, optimizer), forward and backward. xprof reads
WORKDIR/profile, and Perfetto its `*.trace.json.gz`. On CPUs both show only
operations, without stages.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from lm import schema


class Profile:
  """Traces steps first .. first + n - 1 of `steps` = (first, n), if a start
  reaches them.
  """

  def __init__(self, workdir: str, steps: tuple[int, ...] | None):
    self._where = os.path.join(workdir, "profile")
    first, n = steps or (0, 0)
    self._first, self._last = first, first + n - 1
    self._active = False

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Within: the dispatch of a step."""
    if step == self._first:
      jax.profiler.start_trace(self._where)
      self._active = True
    if not self._active:
      yield
      return
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      yield

  def dispatched(self, step: int, result: Any) -> None:
    """After the dispatch of a step; the last waits for `result`."""
    if self._active and step >= self._last:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    if self._active:
      self._active = False
      try:
        jax.profiler.stop_trace()
      except jax.errors.JaxRuntimeError as error:
        raise schema.RunError(
          f"{self._where}: the trace could not be written: {error}"
        ) from error
