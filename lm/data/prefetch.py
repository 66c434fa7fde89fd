"""Prefetch of batches to the devices."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

from lm import batch as batch_lib


class DevicePrefetch:
  """Prefetches batches to the devices, two batches ahead of the caller.

  A worker thread takes host batches and calls `place` on each batch; the caller
  waits only if reading and placing together are too slow.
  """

  def __init__(
    self,
    batches: Iterator[batch_lib.Batch],
    place: Callable[[batch_lib.Batch], Any],
  ):
    self._batches = batches
    self._place = place
    self._worker = concurrent.futures.ThreadPoolExecutor(1)
    self._placed: collections.deque[concurrent.futures.Future] = (
      collections.deque()
    )

  def __iter__(self) -> "DevicePrefetch":
    return self

  def __next__(self) -> Any:
    while len(self._placed) < 3:
      self._placed.append(self._worker.submit(self._next))
    batch = self._placed.popleft().result()
    if batch is None:
      raise StopIteration
    return batch

  def _next(self) -> Any:
    host = next(self._batches, None)
    return None if host is None else self._place(host)
