"""Fault cases of `python -m lm.verify --faults`.

Each case trains a small copy of the config in child processes, injects a fault
(lm/verify/faults/inject.py), restarts the run, and compares every report and
the digests of the final checkpoint with those of an unbroken run.
"""

import concurrent.futures
import dataclasses
import functools
import glob
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from lm import checkpoint, validation
from lm import config as config_lib
from lm.train import ledger, stop
from lm.verify import shrink
from lm.verify.checks import storage
from lm.verify.faults import runner as runner_lib
from lm.verify.faults.inject import Fault
from lm.verify.faults.runner import Runner
from lm.verify.result import Result

Case = Callable[[Runner], Result]

# Injection points before the first step. Those of _RESTORE need a checkpoint of
# an earlier start.
_CORPUS = ("tokenizing", "store written, not yet named")
_RESTORE = ("restoring", "restored", "dropping later reports")
_STARTUP = (*_CORPUS, "compiling", *_RESTORE)
# Injection points from the first step on.
_TRAINING = (
  "step",
  "report",
  "evaluating",
  "saving, copied",
  "saving, written",
  "saving, committed",
  "end",
)
# Injection points at which another process waits for the killed one.
_WAITING = (
  "tokenizing",
  "compiling",
  "restoring",
  "step",
  "evaluating",
  "saving, copied",
  "saving, written",
  "saving, committed",
  "end",
)
# Injection points of signals to two processes: a SIGTERM to one must stop both.
_COORDINATED = ("step", "evaluating", "saving, copied", "compiling")
_KILL, _TERM = signal.SIGKILL, signal.SIGTERM
_INT, _HUP = signal.SIGINT, signal.SIGHUP
_HEARTBEAT = 10  # seconds
# Kills a run of 12 steps that has a checkpoint already.
_MIDWAY = Fault("any step", delay=8.0)


def run(config: config_lib.Config) -> Iterator[Result]:
  """Runs all fault cases, some concurrently. `config` must be small: each case
  trains a few steps on random text.
  """
  with tempfile.TemporaryDirectory() as folder:
    runner = Runner(pathlib.Path(folder), _small(config, folder))
    for n_processes in (1, 2):
      runner.reference(n_processes)
    # Two at a time: one run leaves a core of two idle while waiting for files.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      yield from pool.map(lambda case: case(runner), _single_process_cases())
    yield from (case(runner) for case in _two_process_cases())
    yield _random_kills(runner)


def _single_process_cases() -> list[Case]:
  """Cases with one process for each run; two cases may run at a time."""
  return [
    *_signal_cases((*_STARTUP, *_TRAINING), (_KILL, _TERM), n_processes=1),
    # All signals have one handler: SIGINT and SIGHUP differ in the exit code.
    *_signal_cases(("compiling", "step"), (_INT, _HUP), n_processes=1),
    functools.partial(
      _refused_restart, point="another optimizer tree", exit_code=2
    ),
    functools.partial(
      _refused_restart, point="unreadable checkpoint", exit_code=1
    ),
    *(
      functools.partial(_flipped_bits, part=part, pattern=pattern)
      for part, pattern in _PARTS
    ),
    _two_at_once,
    _torn_checkpoint,
    _full_disk,
    _damaged_store,
  ]


def _two_process_cases() -> list[Case]:
  """Cases with several processes for a run, to be run one at a time."""
  return [
    *_signal_cases(_WAITING, (_KILL,), n_processes=2),
    *_signal_cases(
      ("step", "saving, copied"), (_KILL,), n_processes=2, group=True
    ),
    *_signal_cases(_COORDINATED, (_TERM,), n_processes=2),
    _elastic,
    _pmap,
  ]


def _signal_cases(
  points: tuple[str, ...], signals: tuple[signal.Signals, ...], **options: Any
) -> list[Case]:
  """A case of `_signalled` for each point and signal."""
  return [
    functools.partial(_signalled, point=point, which=which, **options)
    for point in points
    for which in signals
  ]


def _small(config: config_lib.Config, folder: str) -> config_lib.Config:
  """Config of a 12-step run with a report per step, on 2 devices."""
  config = storage.small_corpus(config, folder)
  config.mesh = config_lib.MeshConfig(heartbeat_seconds=_HEARTBEAT)
  shrink.shorten(config, 12)
  t = config.train
  t.log_every, t.eval_every, t.eval_batches = 1, 4, 3
  t.batch_size = max(8, t.batch_size)
  t.microbatches = 1
  config.data.validation = config.data.train[:1]
  config.data.epochs = None
  config.checkpoint = config_lib.CheckpointConfig(save_every=3, keep_last=3)
  return validation.validate(config)


# --- signals ------------------------------------------------------------------


def _signalled(
  runner: Runner,
  point: str,
  which: signal.Signals,
  n_processes: int,
  group: bool = False,
) -> Result:
  """Sends a signal to a process, or to all, at `point`; then restarts."""
  target = "the process" if n_processes == 1 else "one of 2"
  name = f"{which.name} to {'both' if group else target}: {point}"
  workdir = runner.new_run(fresh_corpus=point in _CORPUS)
  problems = []
  if point in _RESTORE:
    runner.start(workdir, n_processes, Fault("saving, committed"))
  outcome = runner.start(workdir, n_processes, Fault(point, which, group))
  if not runner_lib.marker(workdir).exists():
    problems.append(f"the fault was not injected: {outcome.output[-300:]}")
  if which == _KILL and -_KILL not in outcome.exit_codes:
    problems.append(f"nothing was killed: {outcome.exit_codes}")
  # Two processes handle a signal together only from the first step on.
  handled = which != _KILL and (n_processes == 1 or point not in _STARTUP)
  # At the point "end" only the plot is missing: nothing is left to stop.
  wanted = 0 if point == "end" else stop.EXIT_CODES.get(which, 0)
  if handled:
    problems += outcome.unexpected(wanted)
  note = ""
  if n_processes > 1 and not group and not handled:
    note = f"the other ended after {outcome.gap:.1f} s"
    if outcome.gap > runner_lib.PEER_TIMEOUT:
      problems.append("the other process had to be killed")
  found = runner.finish(name, workdir, n_processes, problems)
  return dataclasses.replace(
    found, note="; ".join(part for part in (found.note, note) if part)
  )


def _random_kills(
  runner: Runner, n_kills: int = 10, n_steps: int = 100
) -> Result:
  """Kills a run many times, each time at a random moment, then compares."""
  draw = random.Random(runner.config.seed)
  unbroken, workdir = (
    runner.new_run(steps=n_steps, save_every=5) for _ in range(2)
  )
  runner.start(unbroken, 1)
  kills = 0
  for _ in range(n_kills):
    # Half of the delays are in seconds and mostly hit the start; half are in
    # steps, few enough for the kill to come before the end.
    fault = (
      Fault("any time", delay=draw.uniform(0, 2))
      if draw.random() < 0.5
      else Fault("any step", delay=float(draw.randint(1, 15)))
    )
    kills += runner.start(workdir, 1, fault).exit_codes == [-_KILL]
  outcome = runner.start(workdir, 1)
  n = runner_lib.differences(workdir, unbroken)
  total = ledger.summarize(ledger.read(str(workdir)))
  return Result(
    "faults",
    f"{kills} random SIGKILLs in one run of {n_steps} steps",
    float(n),
    0.0,
    n == 0 and kills == n_kills and outcome.exit_codes == [0],
    f"lost {total['lost']:.1f} s of steps",
  )


# --- damaged files ------------------------------------------------------------


def _flip_bit(path: pathlib.Path, part: int) -> None:
  """Flips a bit of the file, in the byte at 1 / `part` of its length."""
  content = bytearray(path.read_bytes())
  content[len(content) // part] ^= 1
  path.write_bytes(bytes(content))


# Name and glob pattern of the checkpoint files to corrupt by a bit flip.
_PARTS = (
  ("arrays", "params/**/d/*"),
  ("optimizer state", "rest/**/d/*"),
  ("meta", "meta/metadata"),
  ("manifest", "params/manifest.ocdbt"),
  ("names of arrays", "params/_METADATA"),
  ("validation loss", "metrics/metrics"),
)


def _flipped_bits(runner: Runner, part: str, pattern: str) -> Result:
  """Flips a bit in each file of the last checkpoint that matches `pattern`.

  The run must end as if unbroken, with at most the last checkpoint moved.
  """
  workdir = runner.new_run()
  runner.start(workdir, 1, _MIDWAY)
  steps = checkpoint.steps(str(workdir))
  last = workdir / "checkpoints" / str(steps[-1])
  for path in last.glob(pattern):
    _flip_bit(path, 2)
  found = runner.finish(f"a bit of the last checkpoint's {part}", workdir, 1)
  damaged = workdir / "damaged"
  moved = sorted(p.name for p in damaged.iterdir()) if damaged.exists() else []
  passed = found.passed and moved in ([], [last.name])
  note = f"set aside: {', '.join(moved) or 'none'}; {found.note}"
  return dataclasses.replace(found, passed=passed, note=note)


def _torn_checkpoint(runner: Runner) -> Result:
  """Truncates the parameter data files of the last checkpoint to half.

  All data files are truncated, since some hold no referenced data.
  """
  workdir = runner.new_run()
  runner.start(workdir, 1, _MIDWAY)
  last = str(checkpoint.steps(str(workdir))[-1])
  for torn in (workdir / "checkpoints" / last / "params").rglob("d/*"):
    os.truncate(torn, torn.stat().st_size // 2)
  found = runner.finish("torn files in the last checkpoint", workdir, 1)
  moved = (workdir / "damaged" / last).exists()
  note = f"step {last} set aside; " if moved else "not noticed; "
  return dataclasses.replace(
    found, passed=found.passed and moved, note=note + found.note
  )


def _damaged_store(runner: Runner) -> Result:
  """Flips a bit of the token stores between two starts. The second start must
  be refused.
  """
  workdir = runner.new_run()
  runner.start(workdir, 1, Fault("any step", delay=5.0))
  pattern = str(workdir.parent / "cache" / "tokens-*" / "tokens" / "c" / "0")
  stores = [pathlib.Path(path) for path in sorted(glob.glob(pattern))]
  for path in stores:
    _flip_bit(path, 8)
  outcome = runner.start(workdir, 1)
  last = outcome.last_line
  refused = outcome.exit_codes == [1] and "is damaged" in last
  problems = (
    [] if refused else [f"ended with {outcome.exit_codes}: {last[:200]}"]
  )
  for path in stores:
    shutil.rmtree(path.parents[2])
  return runner.finish("damaged token store", workdir, 1, problems)


def _full_disk(runner: Runner) -> Result:
  """Trains on a disk (tmpfs) that holds about one checkpoint, then enlarges the
  disk and restarts.
  """
  name, unbroken = "full disk", runner.reference(1)
  step = next((unbroken / "checkpoints").iterdir())
  size = sum(p.stat().st_size for p in step.rglob("*") if p.is_file())
  workdir = runner.new_run()
  workdir.mkdir()
  disk = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "lm", workdir]
  mounted = subprocess.run(disk, capture_output=True, text=True)
  if mounted.returncode:
    note = (
      f"not checked: no tmpfs may be mounted here: {mounted.stderr.strip()}"
    )
    return Result("faults", name, None, None, False, note)
  try:
    outcome = runner.start(workdir, 1)
    code = outcome.exit_codes[0]
    problems = [] if code > 0 else [f"ended with {code}"]
    larger = ["mount", "-o", f"remount,size={size * 50}", workdir]
    subprocess.run(larger, check=True)
    note = f"it said: {outcome.last_line[:200]}"
    return runner.finish(name, workdir, 1, problems, note)
  finally:
    subprocess.run(["umount", workdir], check=True)


# --- restarts -----------------------------------------------------------------


def _refused_restart(runner: Runner, point: str, exit_code: int) -> Result:
  """A restart that cannot use the checkpoints, though the files are intact,
  must exit with `exit_code` and no traceback, and must move no checkpoint.
  """
  workdir = runner.new_run()
  runner.start(workdir, 1, _MIDWAY)
  steps = checkpoint.steps(str(workdir))
  outcome = runner.start(workdir, 1, Fault(point))
  problems = []
  if outcome.exit_codes != [exit_code]:
    problems.append(f"ended with {outcome.exit_codes}")
  if "Traceback" in outcome.output:
    problems.append(f"a traceback: {outcome.output[-300:]}")
  if checkpoint.steps(str(workdir)) != steps:
    problems.append("checkpoints were moved")
  note = f"it said: {outcome.last_line[:200]}"
  return runner.finish(point, workdir, 1, problems, note)


def _two_at_once(runner: Runner) -> Result:
  """A second start of a run that is still training must be refused, and must
  leave the first start undisturbed.
  """
  workdir = runner.new_run()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    # 4 s a batch: the second start comes before the first run ends.
    started = pool.submit(runner.start, workdir, 1, Fault("slow steps"))
    deadline = time.monotonic() + runner_lib.START_TIMEOUT
    while not (workdir / "metrics.jsonl").exists():
      if time.monotonic() > deadline or started.done():
        break
      time.sleep(0.05)
    second = runner.start(workdir, 1)
    first = started.result()
  problems = []
  if second.exit_codes != [1] or "in use by process" not in second.output:
    problems.append(f"the second ended with {second.exit_codes}")
  problems += [f"the first {problem}" for problem in first.unexpected()]
  return runner.finish("the same command twice at once", workdir, 1, problems)


def _loss_limit(runner: Runner) -> float:
  """Allowed relative error of losses whose sums are in a different order, over
  a dozen optimizer steps; bfloat16 has 8 bits.
  """
  return 1e-4 if runner.config.model.dtype == "float32" else 2e-2


def _elastic(runner: Runner) -> Result:
  """Elastic restart: 8 devices, 4, 2 processes of 4, and 8 again."""
  workdir = runner.new_run()
  problems = []
  for n_processes, n_devices in ((1, 8), (1, 4), (2, 8)):
    fault = Fault("any step", _TERM, delay=3.0)
    outcome = runner.start(workdir, n_processes, fault, n_devices)
    problems += outcome.unexpected()
  problems += runner.start(workdir, 1, n_devices=8).unexpected()
  error = runner_lib.largest_error(workdir, runner.reference(1, 8))
  limit = _loss_limit(runner)
  return Result(
    "faults",
    "8 devices -> 4 -> 2 processes of 4 -> 8: losses, and the same batches",
    error,
    limit,
    error <= limit and not problems,
    "; ".join(problems),
  )


def _pmap(runner: Runner) -> Result:
  """Mode pmap on two processes: a run that is killed, restarted and stopped
  must end as if unbroken, with the losses of mode jit.
  """
  unbroken, workdir = (runner.new_run(mode="pmap") for _ in range(2))
  problems = runner.start(unbroken, 2).unexpected()
  runner.start(workdir, 2, Fault("any step", _KILL, delay=5.0))
  stopped = runner.start(workdir, 2, Fault("any step", _TERM, delay=3.0))
  problems += stopped.unexpected()
  error = runner_lib.largest_error(unbroken, runner.reference(2))
  if error > _loss_limit(runner):
    problems.append("other losses than mode jit")
  note = f"losses within {error:.1e} of mode jit"
  return runner.finish(
    "mode pmap on 2 processes", workdir, 2, problems, note, unbroken
  )
