"""Fault injection in the training process of `python -m lm.verify --faults`.

The process runs `python -m lm.train` and sends itself a signal at an injection
point: a call of a function of lm/, or a file rename, that this module wraps.
The signal therefore arrives at the same place on fast and slow machines.
"""

import atexit
import dataclasses
import errno
import gc
import json
import os
import pathlib
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Fault:
  """A fault to inject: the name of an injection point, and the signal to send.

  With `group` the signal goes to the whole process group. A few points change
  the behaviour of the process and send no signal.
  """

  point: str
  signal: int = signal.SIGKILL
  group: bool = False
  # Seconds to wait (point "any time") or batches to take ("any step").
  delay: float = 0.0


# --- wrappers -----------------------------------------------------------------


def before(owner: Any, name: str, action: Callable, at: int = 1) -> None:
  """Wraps `owner.name`: calls `action` before the `at`-th call."""
  original, calls = getattr(owner, name), [0]

  def wrapped(*args, **kwargs):
    calls[0] += 1
    if calls[0] == at:
      action()
    return original(*args, **kwargs)

  setattr(owner, name, wrapped)


def after(owner: Any, name: str, action: Callable, at: int | None = 1) -> None:
  """Wraps `owner.name`: calls `action` after the `at`-th call that returns, or
  after each where `at` is None.
  """
  original, calls = getattr(owner, name), [0]

  def wrapped(*args, **kwargs):
    result = original(*args, **kwargs)
    calls[0] += 1
    if at is None or calls[0] == at:
      action()
    return result

  setattr(owner, name, wrapped)


def during(owner: Any, name: str, action: Callable, delay: float) -> None:
  """Wraps `owner.name`: calls `action` in a thread, `delay` seconds after the
  first call begins.
  """
  before(owner, name, lambda: threading.Timer(delay, action).start())


def renaming(matches: Callable[[str, str], bool], action: Callable, place):
  """Wraps file renames: calls `action` before or after (`place`) each rename
  whose source and target `matches` accepts.
  """
  for name in ("rename", "replace"):
    original = getattr(os, name)

    def wrapped(source, target, *args, original=original, **kwargs):
      found = matches(os.fspath(source), os.fspath(target))
      if found and place == "before":
        action()
      original(source, target, *args, **kwargs)
      if found and place == "after":
        action()

    setattr(os, name, wrapped)


# --- injection points ---------------------------------------------------------


def _is_commit(source: str, target: str) -> bool:
  """Whether the rename commits a checkpoint's step directory."""
  path = pathlib.Path(target)
  return path.name.isdigit() and path.parent.name == "checkpoints"


def _signal_in_report(send_signal: Callable, killed: bool) -> None:
  """Sends the signal when a report is written. If the signal kills the process,
  half of the report's line is on disk by then.
  """
  from lm.train import metrics

  def write(self, report):
    if killed and self._writes:
      line = json.dumps(report)
      with self._path.open("a") as file:
        file.write(line[: len(line) // 2])
    send_signal()
    return original(self, report)

  original = metrics.Writer.write
  metrics.Writer.write = write


def _change_optimizer_tree() -> None:
  """Adds a transform to the optimizer, so that the tree of the optimizer state
  differs, as a new version of optax might make it.
  """
  import optax

  from lm.train import optimizer

  make = optimizer.make

  def chained(*args):
    no_op = optax.scale_by_schedule(lambda _: 1.0)
    return optax.chain(no_op, make(*args))

  optimizer.make = chained


def _fail_restores() -> None:
  """Makes every checkpoint restore fail with EIO, as a broken disk would."""
  import orbax.checkpoint as ocp

  def restore(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  ocp.Checkpointer.restore = restore


def install(fault: Fault, send_signal: Callable[[], None]) -> None:
  """Wraps the functions of `fault.point`. Imports lm.train, and so JAX."""
  from lm import checkpoint
  from lm.data import prefetch, store
  from lm.evaluate import perplexity
  from lm.train import plot, programs

  send, batches = send_signal, prefetch.DevicePrefetch
  killed = fault.signal == signal.SIGKILL
  points: dict[str, Callable[[], None]] = {
    "tokenizing": lambda: before(store, "_append", send),
    "store written, not yet named": lambda: renaming(
      lambda _, to: os.path.basename(to).startswith("tokens-"), send, "before"
    ),
    "compiling": lambda: during(programs, "compile_step", send, 0.2),
    "step": lambda: after(batches, "__next__", send, 5),
    "report": lambda: _signal_in_report(send, killed),
    "evaluating": lambda: before(perplexity, "totals", send, 2),
    "saving, copied": lambda: after(checkpoint.Checkpoints, "save", send, 2),
    "saving, written": lambda: renaming(_is_commit, send, "before"),
    "saving, committed": lambda: renaming(_is_commit, send, "after"),
    "restoring": lambda: before(checkpoint, "_restore", send),
    "restored": lambda: after(checkpoint, "_restore", send),
    "dropping later reports": lambda: renaming(
      lambda _, to: os.path.basename(to) == "metrics.jsonl", send, "before"
    ),
    "end": lambda: before(plot, "draw", send),
    "slow steps": lambda: after(
      batches, "__next__", lambda: time.sleep(1), at=None
    ),
    "another optimizer tree": _change_optimizer_tree,
    "unreadable checkpoint": _fail_restores,
    "any time": lambda: threading.Timer(fault.delay, send).start(),
    "any step": lambda: after(batches, "__next__", send, int(fault.delay)),
  }
  points[fault.point]()


# --- the process --------------------------------------------------------------


def _signal_sender(fault: Fault, marker: str) -> Callable[[], None]:
  """Returns a function that sends the fault's signal, once over all processes
  of the run: the first process to call it creates the file `marker`.
  """

  def send_signal():
    try:
      open(marker, "x").close()
    except FileExistsError:
      return
    if fault.group:
      os.killpg(0, fault.signal)
    else:
      os.kill(os.getpid(), fault.signal)
    if fault.signal == signal.SIGKILL:
      time.sleep(60)  # until the signal arrives

  return send_signal


def _join_process_group(leader: int) -> None:
  """Joins the leader's process group; waits up to 10 s for the group."""
  for _ in range(1000):
    try:
      return os.setpgid(0, leader)
    except PermissionError:
      time.sleep(0.01)
  raise TimeoutError(f"process {leader} has not made its process group")


def _heed_signals() -> None:
  """Undoes what nohup, and a shell of its background jobs, make of signals that
  faults send: processes ignore them, and their children, too.
  """
  signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGHUP, signal.SIG_DFL)


def train(
  arguments: list[str],
  fault: Fault | None,
  marker: str,
  environment: dict[str, str],
  options: dict[str, Any],
  log: str,
  leader: int | None,
) -> None:
  """Runs `python -m lm.train ARGUMENTS` in a forked process, with `fault`.

  JAX options go through `options`, since JAX read its environment variables at
  import. Output goes to the file `log`. Processes of one start form a process
  group led by the first; `leader` is the leader's pid, None in the leader.
  """
  gc.freeze()  # collections would copy the pages shared with the fork server
  output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(output, 1)
  os.dup2(output, 2)
  _join_process_group(os.getpid() if leader is None else leader)
  _heed_signals()
  os.environ |= environment
  import jax

  for name, value in options.items():
    jax.config.update(name, value)
  if fault is not None:
    install(fault, _signal_sender(fault, marker))
  sys.argv = ["lm.train", *arguments]
  try:
    runpy.run_module("lm.train", run_name="__main__", alter_sys=True)
  finally:
    atexit._run_exitfuncs()  # a fork ends without exit handlers
