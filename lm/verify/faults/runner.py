"""Runner of fault injection: starts training runs and compares their results.

A run is started several times: the start after an injected fault is the
recovery from it, and may itself be broken by the next fault.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import itertools
import math
import multiprocessing
import pathlib
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from lm import checkpoint, schema
from lm import config as config_lib
from lm.train import metrics as metrics_lib
from lm.verify.faults import inject
from lm.verify.result import Result

START_TIMEOUT = 300  # seconds, far above the duration of a normal start
# Seconds within which a process must end after another process has ended.
PEER_TIMEOUT = 60
# Timing fields of a report, left out of the comparison.
_TIMES = "tokens_per_second step_seconds mfu data_wait_fraction".split()


@dataclasses.dataclass
class Outcome:
  """How the processes of one start of a run ended."""

  exit_codes: list[int]
  output: str
  # Seconds from the first process's end to the last's.
  gap: float

  def unexpected(self, wanted: int = 0) -> list[str]:
    """A line on the exit codes if one is not `wanted`; else nothing."""
    if not set(self.exit_codes) - {wanted}:
      return []
    return [f"ended with {self.exit_codes}: {self.output[-300:]}"]

  @property
  def last_line(self) -> str:
    return self.output.strip().split("\n")[-1]


@dataclasses.dataclass
class Broken:
  """A run that a fault has broken; `problems` are where it broke otherwise than
  it must.
  """

  name: str
  problems: list[str]
  note: str = ""
  # Damages checkpoints before the next start.
  damage: Callable[[], None] = lambda: None
  # Lists of checkpoints that the next start may set aside.
  set_aside: Sequence[list[str]] = ([],)
  # Last step whose checkpoint is whole and one that the unbroken run has, too.
  step: int = 0


class Runner:
  """Starts runs, each in a folder of its own, and compares their results."""

  def __init__(self, folder: pathlib.Path, config: config_lib.Config):
    self.folder, self.config = folder, config
    self._numbers = itertools.count()

  @functools.cache  # noqa: B019 - a Runner is kept until the command ends
  def reference(self, n_processes: int) -> pathlib.Path:
    """Workdir of an unbroken run with all its checkpoints, made at the first
    call.
    """
    workdir = self.new_run(keep_all=True)
    outcome = self.start(workdir, n_processes)
    if any(outcome.exit_codes):
      raise RuntimeError(f"an unbroken run failed: {outcome.output[-2000:]}")
    return workdir

  def new_run(
    self,
    *,
    keep_all: bool = False,
    mode: Literal["jit", "pmap"] = "jit",
  ) -> pathlib.Path:
    """Makes a folder with config and token stores; returns the workdir."""
    home = self.folder / f"run{next(self._numbers)}"
    home.mkdir()
    config = copy.deepcopy(self.config)
    config.data.cache_dir = str(home / "cache")
    config.mesh.mode = mode
    if keep_all:
      config.checkpoint.keep_last = config.train.steps
    # Later runs reuse the tokenizer and token stores of the first run.
    first = self.folder / "run0" / "cache"
    if first.exists():
      shutil.copytree(first, home / "cache")
    (home / "config.py").write_text(
      "from lm import validation\n\n\ndef get_config():\n"
      f"  return validation.from_json({config_lib.to_json(config)!r})\n"
    )
    return home / "run"

  def start(
    self,
    workdir: pathlib.Path,
    n_processes: int,
    fault: inject.Fault | None = None,
    n_devices: int = 2,
  ) -> Outcome:
    """Starts the run's processes and waits until all have ended."""
    home = workdir.parent
    if fault is not None:
      marker(workdir).unlink(missing_ok=True)
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    options = {
      "jax_platforms": "cpu",
      "jax_num_cpu_devices": n_devices // n_processes,
    }
    shared = {}
    if n_processes > 1:
      shared["COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
      shared["PROCESS_COUNT"] = str(n_processes)
    arguments = [f"--config={home / 'config.py'}", f"--workdir={workdir}"]
    logs = [str(home / f"log{i}") for i in range(n_processes)]
    children = []
    for i, log in enumerate(logs):
      env = shared | {"PROCESS_INDEX": str(i)} if shared else {}
      leader = children[0].pid if children else None
      children.append(
        _start_process(
          arguments, fault, str(marker(workdir)), env, options, log, leader
        )
      )
    gap = _wait(children)
    output = "".join(pathlib.Path(log).read_text() for log in logs)
    return Outcome([child.exitcode for child in children], output, gap)

  def chain(
    self,
    cases: Sequence[Callable[["Runner", pathlib.Path], Broken]],
    n_processes: int,
  ) -> Iterator[Result]:
    """Breaks one run by each case in turn. A case starts the run once, which is
    the recovery from the case before; the last start alone goes to the end.

    A case's Result comes after the first later start that saves a checkpoint:
    the digests of the checkpoint and all reports before it must equal those of
    the unbroken run, and after the last start, everything must.
    """
    workdir, unbroken = self.new_run(), self.reference(n_processes)
    waiting: list[Broken] = []
    for case in cases:
      broken = case(self, workdir)
      _check_set_aside(workdir, waiting)
      common = _steps(workdir) & _steps(unbroken)
      step = max(common, default=0)
      later = [b for b in waiting if b.step < step]
      yield from _judged(later, workdir, unbroken, step)
      broken.damage()
      common -= {int(name) for name in broken.set_aside[-1]}
      broken.step = max(common, default=0)
      waiting = [*(b for b in waiting if b.step >= step), broken]
    outcome = self.start(workdir, n_processes)
    _check_set_aside(workdir, waiting)
    waiting[-1].problems += [f"restart {p}" for p in outcome.unexpected()]
    yield from _judged(waiting, workdir, unbroken)

  def finish(
    self,
    broken: Broken,
    workdir: pathlib.Path,
    n_processes: int,
    unbroken: pathlib.Path,
  ) -> Result:
    """Restarts the run for two saves, and compares it with `unbroken` at the
    last checkpoint that both have.
    """
    fault = inject.Fault("saving, copied", signal.SIGTERM)
    outcome = self.start(workdir, n_processes, fault)
    broken.problems += [f"restart {p}" for p in outcome.unexpected()]
    step = max(_steps(workdir) & _steps(unbroken), default=0)
    return next(_judged([broken], workdir, unbroken, step))


def as_they_come(jobs: Sequence[Iterable[Result]]) -> Iterator[Result]:
  """Yields each result of the jobs once it is there; two jobs run at a time.

  A run leaves a core of two idle while it waits for files, or for a lost
  process. Runs of two processes are a single job: a heartbeat comes from a
  thread that needs no Python and next to no time, and none of three processes
  on two cores goes without for the 10 s of the heartbeat.
  """
  found: queue.SimpleQueue[Result | None] = queue.SimpleQueue()

  def work(job):
    try:
      for result in job:
        found.put(result)
    finally:
      found.put(None)

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    working = [pool.submit(work, job) for job in jobs]
    for _ in jobs:
      yield from iter(found.get, None)
    for job in working:
      job.result()  # raises what the job has raised


# --- processes ----------------------------------------------------------------

# Process.start() polls all children, and an exit code can be read only once:
# starts and polls of different threads must not overlap.
_ONE_AT_A_TIME = threading.Lock()


def _start_process(*args: Any) -> Any:
  """Starts a process of `inject.train` in milliseconds: the fork server has
  imported the training loop already.
  """
  context = multiprocessing.get_context("forkserver")
  with _ONE_AT_A_TIME:
    context.set_forkserver_preload(
      ["lm.train.loop", "matplotlib.figure", "tensorboardX", inject.__name__]
    )
    process = context.Process(target=inject.train, args=args)
    process.start()
  return process


def _has_ended(child: Any) -> bool:
  with _ONE_AT_A_TIME:
    return child.exitcode is not None


def _wait(children: list[Any]) -> float:
  """Seconds from the first end to the last; kills processes at a timeout."""
  deadline, first = time.monotonic() + START_TIMEOUT, None
  while not all(map(_has_ended, children)):
    now = time.monotonic()
    if first is None and any(map(_has_ended, children)):
      first = now
      deadline = now + PEER_TIMEOUT
    if now > deadline:
      for child in children:
        child.kill()
    time.sleep(0.05)
  return 0.0 if first is None else time.monotonic() - first


# --- results of runs ----------------------------------------------------------


def marker(workdir: pathlib.Path) -> pathlib.Path:
  """File that a process creates when it sends the signal of a fault."""
  return workdir.parent / "injected"


def differences(
  workdir: pathlib.Path, wanted: pathlib.Path, step: int | None = None
) -> int:
  """Number of differing report values and digests of the last checkpoint, or of
  the checkpoint of `step` and the reports before it: a stop during evaluation
  leaves the report of `step` for the next start to complete.
  """
  both = []
  for run in (workdir, wanted):
    reports = metrics_lib.read(str(run))
    values = [
      (place, name, value)
      for place, report in enumerate(reports)
      if step is None or report["step"] < step
      for name, value in report.items()
      if name not in _TIMES
    ]
    try:
      meta = checkpoint.load_meta(str(run), step)
      values += [(meta.step, *item) for item in meta.digests.items()]
    except schema.UserError:
      values.append((0, "checkpoint", f"none of {run}"))
    both.append(set(values))
  return len(both[0] ^ both[1])


def _judged(
  found: Sequence[Broken],
  workdir: pathlib.Path,
  unbroken: pathlib.Path,
  step: int | None = None,
) -> Iterator[Result]:
  """A Result of each broken run that was started again, by `differences`."""
  n = differences(workdir, unbroken, step) if found else 0
  compared = (
    "compared as a whole" if step is None else f"compared at step {step}"
  )
  for broken in found:
    yield Result(
      "faults",
      broken.name,
      float(n),
      0.0,
      n == 0 and not broken.problems,
      "; ".join(filter(None, [*broken.problems, broken.note, compared])),
    )


def _steps(workdir: pathlib.Path) -> set[int]:
  return set(checkpoint.steps(str(workdir)))


def _check_set_aside(workdir: pathlib.Path, waiting: Sequence[Broken]) -> None:
  """Notes what the start after the last fault has set aside, and if it may not;
  then clears it away.
  """
  moved = sorted(path.name for path in workdir.glob("damaged/*"))
  shutil.rmtree(workdir / "damaged", ignore_errors=True)
  for broken in waiting[-1:]:
    said = f"set aside: {', '.join(moved) or 'none'}"
    if moved not in broken.set_aside:
      broken.problems.append(said)
    elif len(broken.set_aside[-1]):
      broken.note = said


def largest_error(found: pathlib.Path, wanted: pathlib.Path) -> float:
  """Largest relative error of the training losses that were found; inf where
  batches differ, or where there are none.
  """
  runs = (metrics_lib.read(str(run)) for run in (found, wanted))
  pairs = list(zip(*runs, strict=False))
  if not pairs or not all(
    a["step"] == b["step"] and a["batch_hash"] == b["batch_hash"]
    for a, b in pairs
  ):
    return math.inf
  return max(abs(a["train/loss"] / b["train/loss"] - 1) for a, b in pairs)
