"""Whether a run was asked to end (SIGTERM), and its processes agree on when.

Light to import, so that it can listen before anything heavy is loaded.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# What the first of several processes waits before it leaves a start-up: the
# others are joined through it, and are to leave by themselves before.
_LAST_OUT_SECONDS = 2.0


class Stop:
  """Listens to SIGTERM from its making on; `began` is when that was."""

  def __init__(self):
    self.began = time.time()
    self.asked = False
    # Whether all processes know of it, and end after the step at hand.
    self.stopping = False
    # Whether other processes hang on this one, which then leaves last.
    self.is_first_of_several = False
    self._before: Any = None
    signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, *_) -> None:
    self.asked = True

  def start(self, what: str, make: Callable[[], T]) -> T:
    """make(), or a clean exit of the process (code 0) where SIGTERM comes
    first.

    For what comes before the first step. A compilation, a restore or the wait
    for other processes holds its thread for minutes and cannot be cancelled,
    but no step was taken yet that could be lost, and files are written whole.
    """
    made: list[T] = []
    failed: list[BaseException] = []

    def work():
      try:
        made.append(make())
      except BaseException as error:
        failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
      if self.asked:
        self._leave(what)
      thread.join(0.05)
    if failed:
      raise failed[0]
    return made[0]

  def _leave(self, what: str) -> None:
    print(f"stopped by SIGTERM while {what}; no step is lost", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if self.is_first_of_several:
      time.sleep(_LAST_OUT_SECONDS)
    os._exit(0)

  def agreed(self) -> bool:
    """True on every process at the same call, one or two after one was asked.

    Every process must call it equally often. With several it adds up who was
    asked, on the devices, and reads the sum of the call before, so that the
    host runs ahead as far as it does without.
    """
    import jax

    if jax.process_count() == 1:
      self.stopping = self.asked
    elif not self.stopping:
      before, self._before = self._before, _adder()(self.asked)
      self.stopping = before is not None and int(before) > 0
    return self.stopping


@functools.lru_cache
def _adder() -> Callable[[bool], Any]:
  """Devices whose process says True; the sum is on all, and not waited for."""
  import jax
  import numpy as np

  mesh = jax.sharding.Mesh(np.array(jax.devices()), "all")
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  add = jax.jit(lambda x: x.sum(), out_shardings=whole)

  def count(mine: bool) -> jax.Array:
    local = np.full(jax.local_device_count(), mine, np.int32)
    with jax.set_mesh(mesh):  # an evaluation has the run's in context
      return add(jax.make_array_from_process_local_data(rows, local))

  return count
