"""Whether a run was asked to end (SIGTERM, SIGINT, SIGHUP), and its processes
agree on when.

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

# Signals that ask a run to save and end, and the exit code of its program.
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGHUP: 0, signal.SIGINT: 130}
# What the first of several processes waits before it leaves a start-up: the
# others are joined through it, and are to leave by themselves before.
_LAST_OUT_SECONDS = 2.0
# One Ctrl-C may come twice, from the terminal and from a launcher.
_ONE_PRESS_SECONDS = 0.3


class Stop:
  """Listens to the signals of EXIT_CODES from its making until `close`, which
  gives the handlers back. `began` is the time of its making, in seconds.

  Made outside of the main thread, which alone gets signals, it hears none. A
  second Ctrl-C ends the process at once.
  """

  def __init__(self):
    self.began = time.time()
    self.asked = False
    # The signal that asked, and the exit code that it asks for.
    self.signal: signal.Signals | None = None
    self.exit_code = 0
    # Whether all processes know of it, and end after the step at hand.
    self.stopping = False
    # Whether other processes hang on this one, which then leaves last.
    self.is_first_of_several = False
    # Called before a start-up is left, which ends the process at once.
    self.on_leave: Callable[[], None] = lambda: None
    self._before: Any = None
    self._pressed = 0.0
    self._handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
      for which in EXIT_CODES:
        if signal.getsignal(which) != signal.SIG_IGN:  # as under nohup
          self._handlers[which] = signal.signal(which, self._ask)

  def __enter__(self) -> "Stop":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    for which, handler in self._handlers.items():
      # None is a handler that was not made in Python.
      signal.signal(which, signal.SIG_DFL if handler is None else handler)
    self._handlers = {}

  def _ask(self, number: int, _) -> None:
    now = time.monotonic()
    if number == signal.SIGINT:
      if self.asked and now - self._pressed > _ONE_PRESS_SECONDS:
        os._exit(EXIT_CODES[signal.SIGINT])
      self._pressed = now
    if not self.asked:
      self.signal = signal.Signals(number)
      self.exit_code = EXIT_CODES[self.signal]
      self.asked = True

  @property
  def reason(self) -> str:
    """What asked for the end, on this process or on another."""
    if self.signal is None:
      return "a signal to another process"
    return "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name

  def start(self, what: str, make: Callable[[], T]) -> T:
    """make(), or an orderly exit of the process where a signal comes first.

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
    print(
      f"stopped by {self.reason} while {what}; no step is lost", file=sys.stderr
    )
    self.on_leave()
    sys.stdout.flush()
    sys.stderr.flush()
    if self.is_first_of_several:
      time.sleep(_LAST_OUT_SECONDS)
    os._exit(self.exit_code)

  def agreed(self) -> bool:
    """Collective: every process must call it equally often. True on all at the
    same call, at most two calls after any of them was asked.

    With several it adds up who was asked, on the devices, and reads the sum of
    the call before, so that the host runs ahead as far as it does without.
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
