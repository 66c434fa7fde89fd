"""Graceful stop (SIGTERM, SIGINT, SIGHUP) at a step agreed by all processes.

Light to import: the signal handlers start before anything heavy is loaded.
"""

import concurrent.futures
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# Signals that make a run save and end, and the exit code of the program.
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGHUP: 0, signal.SIGINT: 130}
# Seconds that process 0 of several waits before it exits during start-up: the
# other processes are joined through process 0 and must exit before it.
_LAST_OUT_SECONDS = 2.0
# Seconds in which a second SIGINT is the same Ctrl-C: the terminal and a
# launcher may both send it.
_ONE_PRESS_SECONDS = 0.3


def background(make: Callable[[], T]) -> concurrent.futures.Future[T]:
  """Runs make() in a daemon thread, which unlike a thread of an executor does
  not keep the process from ending.
  """
  made: concurrent.futures.Future[T] = concurrent.futures.Future()

  def work():
    try:
      made.set_result(make())
    except BaseException as error:
      made.set_exception(error)

  threading.Thread(target=work, daemon=True).start()
  return made


class Stop:
  """Handles the signals of EXIT_CODES from construction until `close`, and then
  restores the old handlers. `began` is the time of construction, in seconds.

  Only the main thread gets signals: in another thread no handler is installed.
  A Ctrl-C after a first signal ends the process at once.
  """

  def __init__(self):
    self.began = time.time()
    self.asked = False
    # The first signal received, and its exit code.
    self.signal: signal.Signals | None = None
    self.exit_code = 0
    # Whether all processes have agreed to end after the current step.
    self.stopping = False
    # Whether this is process 0 of several, which must exit last.
    self.is_first_of_several = False
    # Called before a signal during `start` ends the process by os._exit.
    self.on_leave: Callable[[], None] = lambda: None
    self._before: Any = None
    self._pressed = 0.0
    self._handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
      for which in EXIT_CODES:
        if signal.getsignal(which) != signal.SIG_IGN:  # nohup sets it
          self._handlers[which] = signal.signal(which, self._ask)

  def __enter__(self) -> "Stop":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    for which, handler in self._handlers.items():
      # None stands for a handler that was not installed from Python.
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
    """For messages: the signal received by this process, or by another."""
    if self.signal is None:
      return "a signal to another process"
    return "Ctrl-C" if self.signal == signal.SIGINT else self.signal.name

  def start(self, what: str, make: Callable[[], T]) -> T:
    """Returns make(), run in a thread; a signal meanwhile ends the process.

    For work before the first step. A compilation, a restore or the wait for
    processes blocks the thread for minutes and cannot be cancelled, but no step
    can be lost yet, and files are written whole. Reraises errors of make().
    """
    made = background(make)
    while not made.done():
      if self.asked:
        self._leave(what)
      concurrent.futures.wait([made], 0.05)
    return made.result()

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
    """Collective: all processes return True at the same call, at most two calls
    after any process received a signal. All must call equally often.

    With several processes, each call starts a sum of the flags on the devices
    and reads the sum of the previous call: the host still runs ahead of the
    devices as far as without a sum.
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
  """A function that counts the devices whose process passes True. The count is
  replicated on all devices, and the call does not wait for the result.
  """
  import jax
  import numpy as np

  mesh = jax.sharding.Mesh(np.array(jax.devices()), "all")
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  add = jax.jit(lambda x: x.sum(), out_shardings=whole)

  def count(mine: bool) -> jax.Array:
    local = np.full(jax.local_device_count(), mine, np.int32)
    with jax.set_mesh(mesh):  # an evaluation sets the run's mesh
      return add(jax.make_array_from_process_local_data(rows, local))

  return count
