"""Fault injection: the training process of `python -m lm.verify --faults`.

The process runs `python -m lm.train` and sends itself a signal at an exact
place, a wrapped function of lm/ or a wrapped file rename. A kill therefore hits
its window on fast and slow machines alike.
"""

import atexit
import dataclasses
import errno
import json
import os
import pathlib
import runpy
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Order:
  """Where and how a fault strikes; `window` None injects no fault.

  The first process to strike creates the file `struck`, and the other processes
  then do not strike. With `group` the signal goes to the whole process group.
  """

  struck: str
  window: str | None = None
  signal: int = signal.SIGKILL
  group: bool = False
  # Seconds to wait (window "any time") or batches to take ("any step").
  delay: float = 0.0


def before(owner: Any, name: str, strike: Callable, at: int = 1) -> None:
  """Strikes when `owner.name` is called for the `at`-th time."""
  original, calls = getattr(owner, name), [0]

  def wrapped(*args, **kwargs):
    calls[0] += 1
    if calls[0] == at:
      strike()
    return original(*args, **kwargs)

  setattr(owner, name, wrapped)


def after(owner: Any, name: str, strike: Callable, at: int | None = 1) -> None:
  """Strikes when the `at`-th call of `owner.name` returns (None: each call)."""
  original, calls = getattr(owner, name), [0]

  def wrapped(*args, **kwargs):
    result = original(*args, **kwargs)
    calls[0] += 1
    if at is None or calls[0] == at:
      strike()
    return result

  setattr(owner, name, wrapped)


def during(owner: Any, name: str, strike: Callable, delay: float) -> None:
  """Strikes `delay` seconds after the first call of `owner.name`."""
  before(owner, name, lambda: threading.Timer(delay, strike).start())


def renaming(matches: Callable[[str, str], bool], strike: Callable, place):
  """Strikes before or after (`place`) each file rename that `matches`."""
  for name in ("rename", "replace"):
    original = getattr(os, name)

    def wrapped(source, target, *args, original=original, **kwargs):
      found = matches(os.fspath(source), os.fspath(target))
      if found and place == "before":
        strike()
      original(source, target, *args, **kwargs)
      if found and place == "after":
        strike()

    setattr(os, name, wrapped)


def _is_commit(source: str, target: str) -> bool:
  """Whether the rename commits a checkpoint's step directory."""
  path = pathlib.Path(target)
  return path.name.isdigit() and path.parent.name == "checkpoints"


def _tear_a_report(strike: Callable, dies: bool) -> None:
  """Strikes at a report; with `dies`, half of the report's line is on disk."""
  from lm.train import metrics

  def tear(self, report):
    if dies and self._writes:
      line = json.dumps(report)
      with self._path.open("a") as file:
        file.write(line[: len(line) // 2])
    strike()
    return original(self, report)

  original = metrics.Writer.write
  metrics.Writer.write = tear


def _another_tree() -> None:
  """Adds a link to the optimizer's state, as a new version of optax might."""
  import optax

  from lm.train import optimizer

  make = optimizer.make

  def chained(*args):
    link = optax.scale_by_schedule(lambda _: 1.0)
    return optax.chain(link, make(*args))

  optimizer.make = chained


def _unreadable() -> None:
  """Makes every checkpoint restore fail with EIO, as a broken disk would."""
  import orbax.checkpoint as ocp

  def fails(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  ocp.Checkpointer.restore = fails


def plant(order: Order, strike: Callable[[], None]) -> None:
  """Injects the fault of `order.window`. Imports lm.train, and so JAX."""
  from lm import checkpoint
  from lm.data import pipeline, store
  from lm.evaluate import perplexity
  from lm.train import loop, metrics
  from lm.train import step as step_lib

  dies = order.signal == signal.SIGKILL
  windows: dict[str, Callable[[], None]] = {
    "tokenizing": lambda: before(store, "_append", strike),
    "store written, not yet named": lambda: renaming(
      lambda _, to: os.path.basename(to).startswith("tokens-"), strike, "before"
    ),
    "compiling": lambda: during(step_lib, "compile_step", strike, 0.2),
    "step": lambda: after(pipeline.DevicePrefetch, "__next__", strike, 5),
    "report": lambda: _tear_a_report(strike, dies),
    "evaluating": lambda: before(perplexity, "totals", strike, 2),
    "saving, copied": lambda: after(checkpoint.Checkpoints, "save", strike, 2),
    "saving, written": lambda: renaming(_is_commit, strike, "before"),
    "saving, committed": lambda: renaming(_is_commit, strike, "after"),
    "restoring": lambda: before(checkpoint, "_restore", strike),
    "restored": lambda: after(checkpoint, "_restore", strike),
    "dropping later reports": lambda: renaming(
      lambda _, to: os.path.basename(to) == "metrics.jsonl", strike, "before"
    ),
    "end": lambda: before(metrics, "plot", strike),
    "slow steps": lambda: after(
      pipeline.DevicePrefetch, "__next__", lambda: time.sleep(4), at=None
    ),
    "another optimizer tree": _another_tree,
    "unreadable checkpoint": _unreadable,
    "any time": lambda: threading.Timer(order.delay, strike).start(),
    "any step": lambda: after(
      pipeline.DevicePrefetch, "__next__", strike, int(order.delay)
    ),
  }
  assert loop  # the modules that loop uses are wrapped before loop runs
  windows[order.window or ""]()


def _striker(order: Order) -> Callable[[], None]:
  """Returns `strike`, which sends the signal and records in the file `struck`
  how many batches this process has taken.
  """
  from lm.data import pipeline

  taken = [0]

  def count():
    taken[0] += 1

  after(pipeline.DevicePrefetch, "__next__", count, at=None)

  def strike():
    try:
      with open(order.struck, "x") as file:
        file.write(str(taken[0]))
    except FileExistsError:
      return
    if order.group:
      os.killpg(0, order.signal)
    else:
      os.kill(os.getpid(), order.signal)
    if order.signal == signal.SIGKILL:
      time.sleep(60)  # until the signal arrives

  return strike


def _join_group(leader: int) -> None:
  """Joins the leader's process group; waits up to 10 s for the group."""
  for _ in range(1000):
    try:
      return os.setpgid(0, leader)
    except PermissionError:
      time.sleep(0.01)
  raise TimeoutError(f"process {leader} has not made its process group")


def _cache_programs() -> None:
  """Lets every process write to the compilation cache. JAX lets only process 0
  write, whose programs serve all processes. On CPUs the cache key includes the
  process, and all other processes would compile again at each start.
  """
  from jax._src import compiler

  state = types.SimpleNamespace(process_id=0, client=None)
  compiler.distributed = types.SimpleNamespace(global_state=state)  # type: ignore


def train(
  arguments: list[str],
  order: Order,
  environment: dict[str, str],
  options: dict[str, Any],
  log: str,
  leader: int | None,
) -> None:
  """Runs `python -m lm.train ARGUMENTS` in a forked process, with a fault.

  JAX options go through `options`, since JAX read its environment variables at
  import. Output goes to the file `log`. Processes of one start form a process
  group led by the first; `leader` is the leader's pid, None in the leader.
  """
  said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(said, 1)
  os.dup2(said, 2)
  _join_group(os.getpid() if leader is None else leader)
  os.environ |= environment
  import jax

  for name, value in options.items():
    jax.config.update(name, value)
  _cache_programs()
  if order.window is not None:
    plant(order, _striker(order))
  sys.argv = ["lm.train", *arguments]
  try:
    runpy.run_module("lm.train", run_name="__main__", alter_sys=True)
  finally:
    atexit._run_exitfuncs()  # a fork ends without exit handlers
