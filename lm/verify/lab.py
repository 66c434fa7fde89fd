"""Harness for fault injection: starts, breaks and compares training runs."""

import copy
import dataclasses
import functools
import itertools
import math
import multiprocessing
import pathlib
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

from lm import checkpoint, schema
from lm import config as config_lib
from lm.train import ledger
from lm.train import metrics as metrics_lib
from lm.verify import bombs
from lm.verify.result import Result

# Seconds within which a process must end after a peer has ended.
SURVIVES = 60
LIFE = 300  # seconds; timeout of a start, far above a normal run
# Timing fields of a report, left out of the comparison.
_TIMES = "tokens_per_second step_seconds mfu data_wait_fraction".split()


@dataclasses.dataclass
class Life:
  """How the processes of one start of a run ended."""

  codes: list[int]
  said: str
  # Seconds from the first process's end to the last's.
  outlived: float


class Lab:
  """Starts runs, each in its own folder, and compares their results."""

  def __init__(self, folder: pathlib.Path, config: config_lib.Config):
    self.folder, self.config = folder, config
    self._numbers = itertools.count()

  @functools.cache  # noqa: B019 - a Lab lives as long as the command
  def unbroken(self, n_processes: int, n_devices: int = 2) -> pathlib.Path:
    workdir = self.new_run()
    life = self.live(workdir, n_processes, n_devices=n_devices)
    if any(life.codes):
      raise RuntimeError(f"an unbroken run failed: {life.said[-2000:]}")
    return workdir

  def new_run(
    self,
    *,
    fresh_corpus: bool = False,
    steps: int | None = None,
    save_every: int | None = None,
    mode: Literal["jit", "pmap"] = "jit",
  ) -> pathlib.Path:
    """Makes a folder with config and token stores; returns the workdir."""
    home = self.folder / f"run{next(self._numbers)}"
    home.mkdir()
    config = copy.deepcopy(self.config)
    config.data.cache_dir = str(home / "cache")
    config.mesh.mode = mode
    config.train.steps = steps or config.train.steps
    config.checkpoint.save_every = save_every or config.checkpoint.save_every
    # Later runs reuse the tokenizer and token stores of the first run.
    first = self.folder / "run0" / "cache"
    if first.exists() and not fresh_corpus:
      shutil.copytree(first, home / "cache")
    (home / "config.py").write_text(
      "from lm import validation\n\n\ndef get_config():\n"
      f"  return validation.from_json({config_lib.to_json(config)!r})\n"
    )
    return home / "run"

  def live(
    self,
    workdir: pathlib.Path,
    n_processes: int,
    order: bombs.Order | None = None,
    n_devices: int = 2,
  ) -> Life:
    """Starts the run's processes and waits until all have ended."""
    home = workdir.parent
    struck = str(home / "struck")
    order = dataclasses.replace(order or bombs.Order(struck), struck=struck)
    if order.window is not None:
      pathlib.Path(struck).unlink(missing_ok=True)
    compiling = order.window == "compiling"
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    options = {
      "jax_platforms": "cpu",
      "jax_num_cpu_devices": n_devices // n_processes,
      # Restarts reuse compiled programs, except in the window "compiling":
      # the fault needs a real compilation.
      "jax_enable_compilation_cache": not compiling,
      "jax_compilation_cache_dir": str(self.folder / "compiled"),
      "jax_persistent_cache_min_compile_time_secs": 0,
    }
    env = {}
    if n_processes > 1:
      env["COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
      env["PROCESS_COUNT"] = str(n_processes)
    arguments = [f"--config={home / 'config.py'}", f"--workdir={workdir}"]
    logs = [str(home / f"said{i}") for i in range(n_processes)]
    children = []
    for i, log in enumerate(logs):
      own = env | {"PROCESS_INDEX": str(i)} if env else env
      leader = children[0].pid if children else None
      children.append(_start(arguments, order, own, options, log, leader))
    outlived = _wait(children)
    said = "".join(pathlib.Path(log).read_text() for log in logs)
    return Life([child.exitcode for child in children], said, outlived)

  def finish(
    self,
    name: str,
    workdir: pathlib.Path,
    n_processes: int,
    problems: Sequence[str] = (),
    note: str = "",
    unbroken: pathlib.Path | None = None,
  ) -> Result:
    """Restarts the run to its end and compares it with an unbroken run."""
    life = self.live(workdir, n_processes)
    problems = [*problems]
    if any(life.codes):
      problems.append(f"restart ended with {life.codes}: {life.said[-300:]}")
    n = differences(workdir, unbroken or self.unbroken(n_processes))
    return Result(
      "faults",
      name,
      float(n),
      0.0,
      n == 0 and not problems,
      "; ".join([*problems, note or cost(workdir)]),
    )


# Process.start() polls all children, and an exit code can be read only once:
# starts and polls of different threads must not overlap.
_ONE_AT_A_TIME = threading.Lock()


def _start(*args: Any) -> Any:
  """Starts a process of `bombs.train` in milliseconds: the fork server has
  imported the training loop already.
  """
  context = multiprocessing.get_context("forkserver")
  with _ONE_AT_A_TIME:
    context.set_forkserver_preload(["lm.train.loop", "lm.verify.bombs"])
    process = context.Process(target=bombs.train, args=args)
    process.start()
  return process


def _has_ended(child: Any) -> bool:
  with _ONE_AT_A_TIME:
    return child.exitcode is not None


def _wait(children: list[Any]) -> float:
  """Seconds from the first end to the last; kills processes at a timeout."""
  deadline, first = time.monotonic() + LIFE, None
  while not all(map(_has_ended, children)):
    now = time.monotonic()
    if first is None and any(map(_has_ended, children)):
      first = now
      deadline = now + SURVIVES
    if now > deadline:
      for child in children:
        child.kill()
    time.sleep(0.05)
  return 0.0 if first is None else time.monotonic() - first


def differences(workdir: pathlib.Path, wanted: pathlib.Path) -> int:
  """Number of differing report values and digests of the last checkpoint."""
  both = []
  for run in (workdir, wanted):
    reports = metrics_lib.read(str(run))
    values = [
      (place, name, value)
      for place, report in enumerate(reports)
      for name, value in report.items()
      if name not in _TIMES
    ]
    try:
      meta = checkpoint.load_meta(str(run))
      values += [(meta.step, *item) for item in meta.digests.items()]
    except schema.UserError:
      values.append((0, "checkpoint", "none"))
    both.append(set(values))
  return len(both[0] ^ both[1])


def cost(workdir: pathlib.Path) -> str:
  """Redone work by goodput.json: steps of the last fault, seconds of all."""
  attempts = ledger.read(str(workdir))
  total = ledger.summarize(attempts)
  again = sum(
    attempt["seconds"][phase]
    for attempt in attempts[1:]
    for phase in ("start", "compile", "restore")
  )
  struck = workdir.parent / "struck"
  steps = "0"
  if struck.exists() and len(attempts) > 1:
    reached = attempts[-2]["first_step"] + int(struck.read_text())
    # 0 where the fault came before the steps.
    steps = str(max(0, reached - attempts[-1]["first_step"]))
  return (
    f"lost {steps} step(s), {total['lost']:.1f} s of them; "
    f"{again:.1f} s to start again"
  )


def largest_error(got: pathlib.Path, want: pathlib.Path) -> float:
  """Largest relative error of training losses; inf where batches differ."""
  pairs = list(
    itertools.zip_longest(*(metrics_lib.read(str(run)) for run in (got, want)))
  )
  if not all(
    a and b and a["step"] == b["step"] and a["batch_hash"] == b["batch_hash"]
    for a, b in pairs
  ):
    return math.inf
  return max(abs(a["train/loss"] / b["train/loss"] - 1) for a, b in pairs)
