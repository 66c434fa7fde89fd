"""Fault cases of `python -m lm.verify --faults`.

A small copy of the config is trained in child processes. A chain of faults
(lm/verify/faults/inject.py) breaks one run again and again: each start is the
recovery from the last fault and the victim of the next. Reports and the digests
of checkpoints are compared with those of an unbroken run.
"""

import concurrent.futures
import functools
import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from lm import checkpoint, validation
from lm import config as config_lib
from lm.train import ledger, stop
from lm.verify import shrink
from lm.verify.checks import storage
from lm.verify.faults import runner as runner_lib
from lm.verify.faults.inject import Fault
from lm.verify.faults.runner import Broken, Runner
from lm.verify.result import Result

# A way to break the run in the given workdir, by a start of it.
Case = Callable[[Runner, pathlib.Path], Broken]

# Injection points before the first step. Those of _RESTORE need a checkpoint of
# an earlier start; those of _CORPUS, a corpus without its token stores.
_CORPUS = ("tokenizing", "store written, not yet named")
_RESTORE = ("restoring", "restored", "dropping later reports")
_STARTUP = (*_CORPUS, "compiling", *_RESTORE)
_KILL, _TERM = signal.SIGKILL, signal.SIGTERM
_INT, _HUP = signal.SIGINT, signal.SIGHUP
_HEARTBEAT = 10  # seconds
_SAVE_EVERY = 3  # steps


def run(config: config_lib.Config) -> Iterator[Result]:
  """Runs all fault cases, some concurrently. `config` must be small: each case
  trains a few steps on random text.
  """
  one, two = _single_process_chains(), _two_process_chain()
  # One save for each case is enough: a start moves the run on by two at most,
  # and by none before the first step. A fault that finds no steps left fails.
  steps = _SAVE_EVERY * max(map(len, (*one, two)))
  with tempfile.TemporaryDirectory() as folder:
    runner = Runner(pathlib.Path(folder), _small(config, folder, steps))
    runner.reference(1)
    several = (case(runner) for case in (_elastic, _pmap))
    single = (case(runner) for case in (_full_disk, _random_kills))
    yield from runner_lib.as_they_come(
      [
        itertools.chain(runner.chain(two, 2), several),
        *(runner.chain(cases, 1) for cases in one),
        single,
      ]
    )


def _single_process_chains() -> list[list[Case]]:
  """Chains of cases with one process for each run; two may run at a time."""
  return [
    [
      # All signals have one handler: SIGINT and SIGHUP differ in the exit code.
      *_signals(("compiling", "step"), (_INT, _HUP)),
      *_signals(("compiling", "report", "evaluating"), (_KILL, _TERM)),
      *_signals(("saving, written", "saving, committed"), (_KILL, _TERM)),
      *_signals(("saving, copied",), (_TERM,)),
      *_signals(("end",), (_KILL,)),
    ],
    [
      *_signals(_CORPUS, (_KILL, _TERM)),
      # The second save waits for the first: a kill then leaves a checkpoint and
      # later reports, which no start drops before the last point of _RESTORE.
      *_signals(("saving, copied",), (_KILL,)),
      *_signals((*_RESTORE, "step"), (_KILL, _TERM)),
      *_signals(("end",), (_TERM,)),
    ],
    [
      _two_at_once,
      functools.partial(_refused, point="another optimizer tree", exit_code=2),
      functools.partial(_refused, point="unreadable checkpoint", exit_code=1),
      _damaged_store,
      *(
        functools.partial(_flipped_bits, part=part, pattern=pattern)
        for part, pattern in _PARTS
      ),
      _torn_checkpoint,
    ],
  ]


def _two_process_chain() -> list[Case]:
  """Cases with two processes: points at which one waits for the other, and
  signals to one that must stop both.
  """
  signals = functools.partial(_signals, n_processes=2)
  return [
    *signals(("tokenizing", "compiling", "step", "evaluating"), (_KILL,)),
    *signals(("saving, copied", "restoring", "saving, written"), (_KILL,)),
    *signals(("saving, committed",), (_KILL,)),
    *signals(("step", "saving, copied"), (_KILL,), group=True),
    *signals(("step", "evaluating", "saving, copied", "compiling"), (_TERM,)),
    *signals(("end",), (_KILL,)),
  ]


def _signals(
  points: Sequence[str],
  signals: Sequence[signal.Signals],
  n_processes: int = 1,
  group: bool = False,
) -> list[Case]:
  """A case of `_signalled` for each point and signal."""
  return [
    functools.partial(
      _signalled, fault=Fault(point, which, group), n_processes=n_processes
    )
    for point in points
    for which in signals
  ]


def _small(
  config: config_lib.Config, folder: str, steps: int
) -> config_lib.Config:
  """Config of a run of `steps` with a report per step, on 2 devices."""
  config = storage.small_corpus(config, folder)
  config.mesh = config_lib.MeshConfig(heartbeat_seconds=_HEARTBEAT)
  shrink.shorten(config, steps)
  t = config.train
  # Some evaluations come just before a save, others between two.
  t.log_every, t.eval_every, t.eval_batches = 1, 2, 3
  t.batch_size = max(8, t.batch_size)
  t.microbatches = 1
  config.data.validation = config.data.train[:1]
  config.data.epochs = None
  config.checkpoint = config_lib.CheckpointConfig(
    save_every=_SAVE_EVERY, keep_last=3
  )
  return validation.validate(config)


# --- signals ------------------------------------------------------------------


def _signalled(
  runner: Runner, workdir: pathlib.Path, fault: Fault, n_processes: int
) -> Broken:
  """Sends the fault's signal to a process, or to all."""
  point, which = fault.point, signal.Signals(fault.signal)
  target = "the process" if n_processes == 1 else "one of 2"
  name = f"{which.name} to {'both' if fault.group else target}: {point}"
  if point in _CORPUS:
    _remove_stores(workdir)
  outcome = runner.start(workdir, n_processes, fault)
  problems = []
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
  if handled and point not in (*_STARTUP, "end"):
    said = re.search(r"step (\d+) is saved", outcome.output)
    if not said or int(said[1]) not in checkpoint.steps(str(workdir)):
      problems.append("the step at hand was not saved")
  note = ""
  if n_processes > 1 and not fault.group and not handled:
    note = f"the other ended after {outcome.gap:.1f} s"
    if outcome.gap > runner_lib.PEER_TIMEOUT:
      problems.append("the other process had to be killed")
  return Broken(name, problems, note)


def _random_kills(runner: Runner, n_kills: int = 10) -> Result:
  """Kills a run many times, each time at a random moment, then compares."""
  draw = random.Random(runner.config.seed)
  workdir, kills = runner.new_run(), 0
  steps = runner.config.train.steps
  for _ in range(n_kills):
    # Half of the delays are in seconds and mostly hit the start; half are in
    # steps, few enough for the kill to come before the end.
    fault = (
      Fault("any time", delay=draw.uniform(0, 1.5))
      if draw.random() < 0.5
      else Fault("any step", delay=float(draw.randint(1, 2 * steps // n_kills)))
    )
    kills += runner.start(workdir, 1, fault).exit_codes == [-_KILL]
  outcome = runner.start(workdir, 1)
  n = runner_lib.differences(workdir, runner.reference(1))
  total = ledger.summarize(ledger.read(str(workdir)))
  return Result(
    "faults",
    f"{kills} random SIGKILLs in one run of {steps} steps",
    float(n),
    0.0,
    n == 0 and kills == n_kills and outcome.exit_codes == [0],
    f"lost {total['lost']:.1f} s of steps",
  )


# --- damaged files ------------------------------------------------------------


def _flip_bits(paths: Iterable[pathlib.Path], part: int) -> None:
  """Flips a bit of each file, in the byte at 1 / `part` of its length."""
  for path in paths:
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


def _flipped_bits(
  runner: Runner, workdir: pathlib.Path, part: str, pattern: str
) -> Broken:
  """Flips a bit in each file of the last checkpoint that matches `pattern`. At
  most this checkpoint may be set aside.
  """
  last, problems = _killed_after_a_save(runner, workdir)
  # Where the last has no validation loss, an earlier one has, or the next.
  paths = [*last.glob(pattern)] or [*last.parent.glob(f"*/{pattern}")]
  if not paths:
    last, more = _killed_after_a_save(runner, workdir)
    paths, problems = [*last.glob(pattern)], problems + more
  return Broken(
    f"a bit of the last checkpoint's {part}",
    problems if paths else ["there is no such file"],
    damage=lambda: _flip_bits(paths, 2),
    set_aside=([], [last.name]),
  )


def _torn_checkpoint(runner: Runner, workdir: pathlib.Path) -> Broken:
  """Truncates the parameter data files of the last checkpoint to half: it must
  be set aside.

  All data files are truncated, since some hold no referenced data.
  """
  last, problems = _killed_after_a_save(runner, workdir)

  def tear():
    for torn in (last / "params").rglob("d/*"):
      os.truncate(torn, torn.stat().st_size // 2)

  return Broken(
    "torn files in the last checkpoint",
    problems,
    damage=tear,
    set_aside=([last.name],),
  )


def _killed_after_a_save(
  runner: Runner, workdir: pathlib.Path
) -> tuple[pathlib.Path, list[str]]:
  """Starts the run and kills it at the second save, which waits for the first.
  Returns the last checkpoint, and problems.
  """
  codes = runner.start(workdir, 1, Fault("saving, copied")).exit_codes
  problems = [] if codes == [-_KILL] else [f"nothing was killed: {codes}"]
  last = str(checkpoint.steps(str(workdir))[-1])
  return workdir / "checkpoints" / last, problems


def _stores(workdir: pathlib.Path) -> list[pathlib.Path]:
  """The run's whole token stores, not those that a kill left unfinished."""
  found = (workdir.parent / "cache").glob("tokens-*")
  return [path for path in found if not path.suffix]


def _remove_stores(workdir: pathlib.Path) -> None:
  for path in _stores(workdir):
    shutil.rmtree(path)


def _damaged_store(runner: Runner, workdir: pathlib.Path) -> Broken:
  """Flips a bit of the token stores between two starts. The second start must
  be refused.
  """
  _flip_bits([path / "tokens" / "c" / "0" for path in _stores(workdir)], 8)
  outcome = runner.start(workdir, 1)
  last = outcome.last_line
  refused = outcome.exit_codes == [1] and "is damaged" in last
  problems = (
    [] if refused else [f"ended with {outcome.exit_codes}: {last[:200]}"]
  )
  _remove_stores(workdir)
  return Broken("damaged token store", problems, f"it said: {last[:200]}")


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
    broken = Broken(name, problems, f"it said: {outcome.last_line[:200]}")
    return runner.finish(broken, workdir, 1, unbroken)
  finally:
    subprocess.run(["umount", workdir], check=True)


# --- restarts -----------------------------------------------------------------


def _refused(
  runner: Runner, workdir: pathlib.Path, point: str, exit_code: int
) -> Broken:
  """A restart that cannot use the checkpoints, though the files are intact,
  must exit with `exit_code` and no traceback, and must move no checkpoint.
  """
  steps = checkpoint.steps(str(workdir))
  outcome = runner.start(workdir, 1, Fault(point))
  problems = []
  if outcome.exit_codes != [exit_code]:
    problems.append(f"ended with {outcome.exit_codes}")
  if "Traceback" in outcome.output:
    problems.append(f"a traceback: {outcome.output[-300:]}")
  if checkpoint.steps(str(workdir)) != steps or not steps:
    problems.append(f"checkpoints were moved, or there were none: {steps}")
  return Broken(point, problems, f"it said: {outcome.last_line[:200]}")


def _two_at_once(runner: Runner, workdir: pathlib.Path) -> Broken:
  """A second start of a run that is still training must be refused, naming the
  first process, and must leave it undisturbed. A SIGTERM then stops the first.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    # A second for each batch: the second start comes before the run's end.
    started = pool.submit(runner.start, workdir, 1, Fault("slow steps"))
    while not (workdir / "metrics.jsonl").exists() and not started.done():
      time.sleep(0.05)
    second = runner.start(workdir, 1)
    owner = re.search(r"in use by process (\d+)", second.output)
    if owner:
      os.kill(int(owner[1]), _TERM)
    first = started.result()
  problems = [f"the first {problem}" for problem in first.unexpected()]
  if second.exit_codes != [1] or not owner:
    problems.append(f"the second ended with {second.exit_codes}")
  return Broken("the same command twice at once", problems)


def _loss_limit(runner: Runner) -> float:
  """Allowed relative error of losses whose sums are in a different order, over
  a dozen optimizer steps; bfloat16 has 8 bits.
  """
  return 1e-4 if runner.config.model.dtype == "float32" else 2e-2


def _elastic(runner: Runner) -> Result:
  """Elastic restart: 8 devices, 4, 2 processes of 4, and 8 again."""
  workdir = runner.new_run()
  problems = []
  for n_processes, n_devices in ((1, 8), (1, 4), (2, 8), (1, 8)):
    fault = Fault("any step", _TERM, delay=3.0)
    outcome = runner.start(workdir, n_processes, fault, n_devices)
    problems += outcome.unexpected()
  error = runner_lib.largest_error(workdir, runner.reference(1))
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
  must go on as if unbroken, with the losses of mode jit.
  """
  unbroken, workdir = (runner.new_run(mode="pmap") for _ in range(2))
  far_enough = Fault("any step", _TERM, delay=12.0)
  problems = runner.start(unbroken, 2, far_enough).unexpected()
  runner.start(workdir, 2, Fault("any step", _KILL, delay=5.0))
  stopped = runner.start(workdir, 2, Fault("any step", _TERM, delay=3.0))
  problems += stopped.unexpected()
  error = runner_lib.largest_error(unbroken, runner.reference(1))
  if error > _loss_limit(runner):
    problems.append("other losses than mode jit")
  note = f"losses within {error:.1e} of mode jit"
  broken = Broken("mode pmap on 2 processes", problems, note)
  return runner.finish(broken, workdir, 2, unbroken)
