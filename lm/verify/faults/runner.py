"""Runner of fault injection: starts training runs and compares their results.

A run is started several times: a start that is broken by an injected fault is
followed by a restart.
"""

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


class Runner:
  """Starts runs, each in a folder of its own, and compares their results."""

  def __init__(self, folder: pathlib.Path, config: config_lib.Config):
    self.folder, self.config = folder, config
    self._numbers = itertools.count()

  @functools.cache  # noqa: B019 - a Runner is kept until the command ends
  def reference(self, n_processes: int, n_devices: int = 2) -> pathlib.Path:
    """Workdir of an unbroken run, made at the first call."""
    workdir = self.new_run()
    outcome = self.start(workdir, n_processes, n_devices=n_devices)
    if any(outcome.exit_codes):
      raise RuntimeError(f"an unbroken run failed: {outcome.output[-2000:]}")
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
      # Restarts reuse compiled programs, except where the fault is injected
      # while the process compiles: that needs a real compilation.
      "jax_enable_compilation_cache": not (
        fault is not None and fault.point == "compiling"
      ),
      "jax_compilation_cache_dir": str(self.folder / "compiled"),
      "jax_persistent_cache_min_compile_time_secs": 0,
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

  def finish(
    self,
    name: str,
    workdir: pathlib.Path,
    n_processes: int,
    problems: Sequence[str] = (),
    note: str = "",
    reference: pathlib.Path | None = None,
  ) -> Result:
    """Restarts the run to its end and compares the run with `reference`; None
    stands for the unbroken run on as many processes.
    """
    outcome = self.start(workdir, n_processes)
    problems = [*problems, *(f"restart {p}" for p in outcome.unexpected())]
    n = differences(workdir, reference or self.reference(n_processes))
    return Result(
      "faults",
      name,
      float(n),
      0.0,
      n == 0 and not problems,
      "; ".join([*problems, note or cost(workdir)]),
    )


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
    context.set_forkserver_preload(["lm.train.loop", inject.__name__])
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
  """File that a process creates when the process sends the signal of a fault;
  holds the number of batches that the process had taken.
  """
  return workdir.parent / "injected"


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
  """Lost work by goodput.json: the steps that the last restart repeated, the
  seconds of all repeated steps, and the seconds that all restarts took.
  """
  attempts = ledger.read(str(workdir))
  total = ledger.summarize(attempts)
  again = sum(
    attempt["seconds"][phase]
    for attempt in attempts[1:]
    for phase in ("start", "compile", "restore")
  )
  steps = 0
  if marker(workdir).exists() and len(attempts) > 1:
    taken = int(marker(workdir).read_text())
    reached = attempts[-2]["first_step"] + taken
    # 0 where the signal came before the first step.
    steps = max(0, reached - attempts[-1]["first_step"])
  return (
    f"lost {steps} step(s), {total['lost']:.1f} s of them; "
    f"{again:.1f} s to start again"
  )


def largest_error(found: pathlib.Path, wanted: pathlib.Path) -> float:
  """Largest relative error of training losses; inf where batches differ."""
  runs = (metrics_lib.read(str(run)) for run in (found, wanted))
  pairs = list(itertools.zip_longest(*runs))
  if not all(
    a and b and a["step"] == b["step"] and a["batch_hash"] == b["batch_hash"]
    for a, b in pairs
  ):
    return math.inf
  return max(abs(a["train/loss"] / b["train/loss"] - 1) for a, b in pairs)
