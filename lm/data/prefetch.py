"""Prefetch of batches: by threads or processes to the host, by a thread from
there to the devices.
"""

import collections
import concurrent.futures
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from lm import batch as batch_lib
from lm import schema

# Threads that make batches, in addition to TensorStore's own threads.
_THREADS = 2


def to_host(
  make: Callable[[int], batch_lib.Batch],
  start: int,
  stop: int,
  n_ahead: int,
  n_processes: int = 0,
) -> Iterator[batch_lib.Batch]:
  """Yields make(start), ..., make(stop - 1), about `n_ahead` of them prefetched
  by grain's threads, or by processes that take the steps in turns; `make` is
  then pickled. Raises RunError if a process is killed.
  """
  n_ahead = max(n_ahead, _THREADS)
  batches = grain.MapDataset.range(start, stop).map(make)
  n_threads = 1 if n_processes else _THREADS
  options = grain.ReadOptions(n_threads, prefetch_buffer_size=n_ahead)
  made = batches.to_iter_dataset(options)
  if n_processes:
    if not flags.FLAGS.is_parsed():  # grain reads some
      flags.FLAGS.mark_as_parsed()
    each = -(-n_ahead // n_processes)
    workers = grain.MultiprocessingOptions(n_processes, each)
    made = made.mp_prefetch(workers, _begin_process)
  try:
    # Closing this generator stops the threads or processes.
    with contextlib.closing(iter(made)) as found:
      for batch in found:
        # Out of shared memory, where processes put it.
        yield jax.tree.map(np.array, batch) if n_processes else batch
  except RuntimeError as error:
    if "terminated unexpectedly" not in str(error):
      raise
    raise schema.RunError(
      f"config.data.processes={n_processes}: a process that makes batches was "
      "killed; memory or shared memory (/dev/shm) may be short. Give more, or "
      "lower data.processes or data.prefetch_rows"
    ) from error


def _begin_process(index: int, count: int) -> None:
  """Makes a process end with its parent alone: not by a signal to the group, on
  which the parent saves, but also if the parent is killed. It takes no device.
  """
  del index, count
  jax.config.update("jax_platforms", "cpu")
  for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(name, signal.SIG_IGN)
  parent = os.getppid()

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


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
