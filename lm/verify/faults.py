"""Fault injection: `python -m lm.verify --faults` breaks and restarts runs.

Each row trains a small copy of the config in child processes, kills the run in
a window (lm/verify/bombs.py), restarts the run, and compares every report and
the digests of the final checkpoint with an unbroken run's.
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
from collections.abc import Iterator

from lm import checkpoint, validation
from lm import config as config_lib
from lm.train import ledger, stop
from lm.verify import bombs, data, shrink
from lm.verify import lab as lab_lib
from lm.verify.lab import Lab
from lm.verify.result import Result

# Windows before the first step. _RESUMING needs a checkpoint of an earlier
# start.
_PREPARING = ("tokenizing", "store written, not yet named")
_RESUMING = ("restoring", "restored", "dropping later reports")
_STARTING = (*_PREPARING, "compiling", *_RESUMING)
_RUNNING = (
  "step",
  "report",
  "evaluating",
  "saving, copied",
  "saving, written",
  "saving, committed",
  "end",
)
# Windows that matter with two processes: a SIGTERM to one must stop both.
_TOLD = ("step", "evaluating", "saving, copied", "compiling")
_KILL, _TERM = signal.SIGKILL, signal.SIGTERM
_INT, _HUP = signal.SIGINT, signal.SIGHUP
_HEARTBEAT = 10  # seconds


def run(config: config_lib.Config) -> Iterator[Result]:
  """Runs all faults, some concurrently. `config` must be small: each fault
  trains a few steps on random text.
  """
  with tempfile.TemporaryDirectory() as folder:
    lab = Lab(pathlib.Path(folder), _small(config, folder))
    alone = [
      *(
        functools.partial(_killed, lab, window, which, 1, False)
        for window in (*_STARTING, *_RUNNING)
        for which in (_KILL, _TERM)
      ),
      *(
        functools.partial(_killed, lab, window, which, 1, False)
        for window in ("compiling", *_RUNNING)
        for which in (_INT, _HUP)
      ),
      functools.partial(_changed_start, lab, "another optimizer tree", 2),
      functools.partial(_changed_start, lab, "unreadable checkpoint", 1),
      *(functools.partial(_flipped_bit, lab, *part) for part in _PARTS),
      functools.partial(_two_at_once, lab),
      functools.partial(_torn_checkpoint, lab),
      functools.partial(_full_disk, lab),
      functools.partial(_damaged_store, lab),
    ]
    several = [
      *(
        functools.partial(_killed, lab, window, _KILL, 2, False)
        for window in (*_STARTING, *_RUNNING)
      ),
      *(functools.partial(_killed, lab, w, _KILL, 2, True) for w in _TOLD),
      *(functools.partial(_killed, lab, w, _TERM, 2, False) for w in _TOLD),
      functools.partial(_elastic, lab),
      functools.partial(_pmap, lab),
    ]
    for n_processes in (1, 2):
      lab.unbroken(n_processes)
    # Two at a time: one run leaves a core of two idle while waiting for files.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      yield from pool.map(lambda fault: fault(), alone)
    yield from (fault() for fault in several)
    yield _at_random(lab)


def _small(config: config_lib.Config, folder: str) -> config_lib.Config:
  """Config of a 12-step run with a report per step, on 2 devices."""
  config = data.small_corpus(config, folder)
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


# --- the faults ---------------------------------------------------------------


def _killed(
  lab: Lab,
  window: str,
  which: signal.Signals,
  n_processes: int,
  group: bool,
) -> Result:
  """Sends a signal to a process, or to all, in `window`; then restarts."""
  whom = {(1, False): "the process", (2, False): "one of 2", (2, True): "both"}
  name = f"{which.name} to {whom[n_processes, group]}: {window}"
  workdir = lab.new_run(fresh_corpus=window in _PREPARING)
  problems = []
  if window in _RESUMING:
    lab.live(workdir, n_processes, bombs.Order("", "saving, committed"))
  order = bombs.Order("", window, which, group)
  life = lab.live(workdir, n_processes, order)
  if not (workdir.parent / "struck").exists():
    problems.append(f"the bomb did not go off: {life.said[-300:]}")
  if which == _KILL and -_KILL not in life.codes:
    problems.append(f"nothing was killed: {life.codes}")
  told = which != _KILL and (n_processes == 1 or window not in _STARTING)
  # In the window "end" only the plot is missing: nothing is left to stop.
  promised = 0 if window == "end" else stop.EXIT_CODES.get(which, 0)
  if told and set(life.codes) - {promised}:
    problems.append(f"ended with {life.codes}: {life.said[-300:]}")
  note = ""
  if n_processes > 1 and not group and not told:
    note = f"the other ended after {life.outlived:.1f} s"
    if life.outlived > lab_lib.SURVIVES:
      problems.append("the other process had to be killed")
  found = lab.finish(name, workdir, n_processes, problems)
  return dataclasses.replace(
    found, note="; ".join(part for part in (found.note, note) if part)
  )


def _torn_checkpoint(lab: Lab) -> Result:
  """Truncates the parameter data files of the last checkpoint to half.

  All data files are truncated, since some hold no referenced data.
  """
  workdir = lab.new_run()
  lab.live(workdir, 1, bombs.Order("", "any step", delay=8.0))
  names = os.listdir(workdir / "checkpoints")
  last = str(max(int(name) for name in names if name.isdigit()))
  for torn in (workdir / "checkpoints" / last / "params").rglob("d/*"):
    os.truncate(torn, torn.stat().st_size // 2)
  found = lab.finish("torn files in the last checkpoint", workdir, 1)
  moved = (workdir / "damaged" / last).exists()
  note = f"step {last} set aside; " if moved else "not noticed; "
  return dataclasses.replace(
    found, passed=found.passed and moved, note=note + found.note
  )


def _changed_start(lab: Lab, window: str, code: int) -> Result:
  """A restart that cannot use the checkpoints, though the files are intact,
  must exit with `code` and no traceback, and must move no checkpoint.
  """
  workdir = lab.new_run()
  lab.live(workdir, 1, bombs.Order("", "any step", delay=8.0))
  before = checkpoint.steps(str(workdir))
  life = lab.live(workdir, 1, bombs.Order("", window))
  problems = [] if life.codes == [code] else [f"ended with {life.codes}"]
  if "Traceback" in life.said:
    problems.append(f"a traceback: {life.said[-300:]}")
  if checkpoint.steps(str(workdir)) != before:
    problems.append("checkpoints were moved")
  said = life.said.strip().split("\n")[-1]
  return lab.finish(window, workdir, 1, problems, f"it said: {said[:200]}")


# Name and glob pattern of the checkpoint files to corrupt by a bit flip.
_PARTS = (
  ("arrays", "params/**/d/*"),
  ("optimizer state", "rest/**/d/*"),
  ("meta", "meta/metadata"),
  ("manifest", "params/manifest.ocdbt"),
  ("names of arrays", "params/_METADATA"),
  ("validation loss", "metrics/metrics"),
)


def _flipped_bit(lab: Lab, part: str, pattern: str) -> Result:
  """Flips a bit in each file of the last checkpoint that matches `pattern`.

  The run must end as if unbroken, with at most the last checkpoint moved.
  """
  workdir = lab.new_run()
  lab.live(workdir, 1, bombs.Order("", "any step", delay=8.0))
  steps = checkpoint.steps(str(workdir))
  last = workdir / "checkpoints" / str(steps[-1])
  for path in last.glob(pattern):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
  found = lab.finish(f"a bit of the last checkpoint's {part}", workdir, 1)
  damaged = workdir / "damaged"
  moved = sorted(p.name for p in damaged.iterdir()) if damaged.exists() else []
  passed = found.passed and moved in ([], [last.name])
  note = f"set aside: {', '.join(moved) or 'none'}; {found.note}"
  return dataclasses.replace(found, passed=passed, note=note)


def _two_at_once(lab: Lab) -> Result:
  """A second start of a live run must be refused, the first undisturbed."""
  workdir = lab.new_run()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    # 4 s a batch: the second start comes before the first run ends.
    first = pool.submit(lab.live, workdir, 1, bombs.Order("", "slow steps"))
    deadline = time.monotonic() + lab_lib.LIFE
    while not (workdir / "metrics.jsonl").exists():
      if time.monotonic() > deadline or first.done():
        break
      time.sleep(0.05)
    second = lab.live(workdir, 1)
    life = first.result()
  problems = []
  if second.codes != [1] or "in use by process" not in second.said:
    problems.append(f"the second ended with {second.codes}")
  if life.codes != [0]:
    problems.append(f"the first ended with {life.codes}: {life.said[-300:]}")
  return lab.finish("the same command twice at once", workdir, 1, problems)


def _pmap(lab: Lab) -> Result:
  """Mode pmap on two processes: a run that is killed, restarted and stopped
  must end as if unbroken, with the losses of mode jit.
  """
  unbroken, workdir = (lab.new_run(mode="pmap") for _ in range(2))
  problems = []
  for run, order in (
    (unbroken, None),
    (workdir, bombs.Order("", "any step", _KILL, delay=5.0)),
    (workdir, bombs.Order("", "any step", _TERM, delay=3.0)),
  ):
    life = lab.live(run, 2, order)
    killed = order is not None and order.signal == _KILL
    if not killed and any(life.codes):
      problems.append(f"ended with {life.codes}: {life.said[-300:]}")
  error = lab_lib.largest_error(unbroken, lab.unbroken(2))
  limit = 1e-4 if lab.config.model.dtype == "float32" else 2e-2
  if error > limit:
    problems.append("other losses than mode jit")
  note = f"losses within {error:.1e} of mode jit"
  return lab.finish(
    "mode pmap on 2 processes", workdir, 2, problems, note, unbroken
  )


def _full_disk(lab: Lab) -> Result:
  """The run's disk (tmpfs) holds about one checkpoint, and is then enlarged."""
  name, unbroken = "full disk", lab.unbroken(1)
  step = next((unbroken / "checkpoints").iterdir())
  size = sum(p.stat().st_size for p in step.rglob("*") if p.is_file())
  workdir = lab.new_run()
  workdir.mkdir()
  disk = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "lm", workdir]
  mounted = subprocess.run(disk, capture_output=True, text=True)
  if mounted.returncode:
    note = (
      f"not checked: no tmpfs may be mounted here: {mounted.stderr.strip()}"
    )
    return Result("faults", name, None, None, False, note)
  try:
    life = lab.live(workdir, 1)
    problems = [] if life.codes[0] > 0 else [f"ended with {life.codes[0]}"]
    last = life.said.strip().split("\n")[-1]
    larger = ["mount", "-o", f"remount,size={size * 50}", workdir]
    subprocess.run(larger, check=True)
    return lab.finish(name, workdir, 1, problems, f"it said: {last[:200]}")
  finally:
    subprocess.run(["umount", workdir], check=True)


def _damaged_store(lab: Lab) -> Result:
  """Flips a bit of the token stores between two starts: must be refused."""
  workdir = lab.new_run()
  lab.live(workdir, 1, bombs.Order("", "any step", delay=5.0))
  pattern = str(workdir.parent / "cache" / "tokens-*" / "tokens" / "c" / "0")
  stores = sorted(glob.glob(pattern))
  for path in stores:
    content = bytearray(pathlib.Path(path).read_bytes())
    content[len(content) // 8] ^= 1
    pathlib.Path(path).write_bytes(bytes(content))
  life = lab.live(workdir, 1)
  last = life.said.strip().split("\n")[-1]
  refused = life.codes == [1] and "is damaged" in last
  problems = [] if refused else [f"ended with {life.codes}: {last[:200]}"]
  for path in stores:
    shutil.rmtree(pathlib.Path(path).parents[2])
  return lab.finish("damaged token store", workdir, 1, problems)


def _elastic(lab: Lab) -> Result:
  """Elastic restart: 8 devices, 4, 2 processes of 4, and 8 again."""
  workdir = lab.new_run()
  problems = []
  for n_processes, n_devices in ((1, 8), (1, 4), (2, 8)):
    order = bombs.Order("", "any step", _TERM, delay=3.0)
    life = lab.live(workdir, n_processes, order, n_devices)
    if any(life.codes):
      problems.append(f"ended with {life.codes}: {life.said[-300:]}")
  life = lab.live(workdir, 1, n_devices=8)
  if any(life.codes):
    problems.append(f"ended with {life.codes}: {life.said[-300:]}")
  error = lab_lib.largest_error(workdir, lab.unbroken(1, 8))
  # Sums in a different order, over a dozen optimizer steps; bfloat16: 8 bits.
  limit = 1e-4 if lab.config.model.dtype == "float32" else 2e-2
  return Result(
    "faults",
    "8 devices -> 4 -> 2 processes of 4 -> 8: losses, and the same batches",
    error,
    limit,
    error <= limit and not problems,
    "; ".join(problems),
  )


def _at_random(lab: Lab, n_kills: int = 20, n_steps: int = 200) -> Result:
  """Kills a run many times, each time at a random moment, then compares."""
  draw = random.Random(lab.config.seed)
  unbroken, workdir = (
    lab.new_run(steps=n_steps, save_every=5) for _ in range(2)
  )
  lab.live(unbroken, 1)
  kills = 0
  for _ in range(n_kills):
    # Half of the delays are in seconds and mostly hit the start; half are in
    # steps, few enough for the kill to come before the end.
    order = (
      bombs.Order("", "any time", delay=draw.uniform(0, 2))
      if draw.random() < 0.5
      else bombs.Order("", "any step", delay=float(draw.randint(1, 15)))
    )
    kills += lab.live(workdir, 1, order).codes == [-_KILL]
  life = lab.live(workdir, 1)
  n = lab_lib.differences(workdir, unbroken)
  lasted = ledger.summarize(ledger.read(str(workdir)))
  return Result(
    "faults",
    f"{kills} random SIGKILLs in one run of {n_steps} steps",
    float(n),
    0.0,
    n == 0 and kills == n_kills and life.codes == [0],
    f"lost {lasted['lost']:.1f} s of steps",
  )
