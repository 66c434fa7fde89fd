"""`python -m lm.verify --faults` breaks runs, and sees them end as if unbroken.

Each row trains a small copy of the config in child processes, kills it in one
window (lm/verify/bombs.py), starts it again and compares every report and the
digests of the final checkpoint with those of a run that nobody broke.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import glob
import itertools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from lm import checkpoint
from lm import config as config_lib
from lm.train import ledger, stop
from lm.train import metrics as metrics_lib
from lm.verify import bombs, data
from lm.verify.result import Result

# Those whose bomb goes off before the first step, and those for which an
# earlier life must have left a checkpoint.
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
# With two processes a SIGTERM to one is told to the other: where it matters.
_TOLD = ("step", "evaluating", "saving, copied", "compiling")
_KILL, _TERM = signal.SIGKILL, signal.SIGTERM
_INT, _HUP = signal.SIGINT, signal.SIGHUP
# A survivor of a lost peer must have ended by then, in seconds.
_SURVIVES = 60
_HEARTBEAT = 10
_LIFE = 300  # what no life comes near to, in seconds
# Reports are compared in all that is not a time.
_TIMES = "tokens_per_second step_seconds mfu data_wait_fraction".split()


def run(config: config_lib.Config) -> Iterator[Result]:
  """All faults, some at a time. `config` is small; it is trained a few steps
  on made-up text.
  """
  with tempfile.TemporaryDirectory() as folder:
    lab = _Lab(pathlib.Path(folder), _small(config, folder))
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
    # One process leaves a core of two idle while it waits for files.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      yield from pool.map(lambda fault: fault(), alone)
    yield from (fault() for fault in several)
    yield _at_random(lab)


def _small(config: config_lib.Config, folder: str) -> config_lib.Config:
  """A run of 12 steps with a report each, on 2 devices."""
  config = data.small_corpus(config, folder)
  config.mesh = config_lib.MeshConfig(heartbeat_seconds=_HEARTBEAT)
  t, o = config.train, config.optimizer
  if o.schedule == "wsd":  # whose decay follows the warm-up
    o.warmup_steps = o.warmup_steps * 12 // t.steps
  t.steps, t.log_every, t.eval_every, t.eval_batches = 12, 1, 4, 3
  t.batch_size = max(8, t.batch_size)
  t.microbatches = 1
  config.data.validation = config.data.train[:1]
  config.data.epochs = None
  config.checkpoint = config_lib.CheckpointConfig(save_every=3, keep_last=3)
  return config_lib.validate(config)


@dataclasses.dataclass
class _Life:
  """How the processes of one start of a run ended."""

  codes: list[int]
  said: str
  # From the first end to the last, in seconds.
  outlived: float


class _Lab:
  """Starts runs, each in a folder of its own, and compares them."""

  def __init__(self, folder: pathlib.Path, config: config_lib.Config):
    self.folder, self.config = folder, config
    self._numbers = itertools.count()

  @functools.cache  # noqa: B019 - one laboratory lives as long as the command
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
    """A folder with a config and the tokenized corpus; returns its workdir."""
    home = self.folder / f"run{next(self._numbers)}"
    home.mkdir()
    config = copy.deepcopy(self.config)
    config.data.cache_dir = str(home / "cache")
    config.mesh.mode = mode
    config.train.steps = steps or config.train.steps
    config.checkpoint.save_every = save_every or config.checkpoint.save_every
    # The tokenizer and the stores of the first run serve the others.
    first = self.folder / "run0" / "cache"
    if first.exists() and not fresh_corpus:
      shutil.copytree(first, home / "cache")
    (home / "config.py").write_text(
      "from lm import config\n\n\ndef get_config():\n"
      f"  return config.from_json({config_lib.to_json(config)!r})\n"
    )
    return home / "run"

  def live(
    self,
    workdir: pathlib.Path,
    n_processes: int,
    order: bombs.Order | None = None,
    n_devices: int = 2,
  ) -> _Life:
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
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(n_devices // n_processes),
      # A restart compiles what was compiled before, except where the
      # compilation is what is broken.
      "JAX_ENABLE_COMPILATION_CACHE": "false" if compiling else "true",
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if n_processes > 1:
      env["COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
      env["PROCESS_COUNT"] = str(n_processes)
    children: list[subprocess.Popen] = []
    logs = [open(home / f"said{i}", "w+") for i in range(n_processes)]
    for i, log in enumerate(logs):
      children.append(
        subprocess.Popen(
          [
            sys.executable,
            "-m",
            "lm.verify.bombs",
            json.dumps(dataclasses.asdict(order)),
            f"--config={home / 'config.py'}",
            f"--workdir={workdir}",
          ],
          env=env | {"PROCESS_INDEX": str(i)},
          stdout=log,
          stderr=subprocess.STDOUT,
          # One group for all, so that a bomb can reach them.
          process_group=children[0].pid if children else 0,
        )
      )
    outlived = _wait(children)
    said = ""
    for log in logs:
      log.seek(0)
      said += log.read()
      log.close()
    return _Life([child.returncode for child in children], said, outlived)

  def finish(
    self,
    name: str,
    workdir: pathlib.Path,
    n_processes: int,
    problems: Sequence[str] = (),
    note: str = "",
    unbroken: pathlib.Path | None = None,
  ) -> Result:
    """Starts the run again, lets it end, and compares it with the unbroken."""
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
      "; ".join([*problems, note or _cost(workdir)]),
    )


def _wait(children: list[subprocess.Popen]) -> float:
  """Seconds from the first end to the last; kills what does not end."""
  deadline, first = time.monotonic() + _LIFE, None
  while any(child.poll() is None for child in children):
    now = time.monotonic()
    if first is None and any(child.poll() is not None for child in children):
      first = now
      deadline = now + _SURVIVES
    if now > deadline:
      for child in children:
        child.kill()
    time.sleep(0.05)
  return 0.0 if first is None else time.monotonic() - first


def differences(workdir: pathlib.Path, wanted: pathlib.Path) -> int:
  """Values of the reports, and digests of the last checkpoint, that differ."""
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
    except config_lib.UserError:
      values.append((0, "checkpoint", "none"))
    both.append(set(values))
  return len(both[0] ^ both[1])


def _cost(workdir: pathlib.Path) -> str:
  """Work that the last fault made the run do again, by its own account."""
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
    # None where the fault came before the steps.
    steps = str(max(0, reached - attempts[-1]["first_step"]))
  return (
    f"lost {steps} step(s), {total['lost']:.1f} s of them; "
    f"{again:.1f} s to start again"
  )


# --- the faults ---------------------------------------------------------------


def _killed(
  lab: _Lab, window: str, which: signal.Signals, n_processes: int, group: bool
) -> Result:
  """A signal in a window, to one of the processes or to all."""
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
  # A run that is complete but for its picture has nothing more to stop.
  promised = 0 if window == "end" else stop.EXIT_CODES.get(which, 0)
  if told and set(life.codes) - {promised}:
    problems.append(f"ended with {life.codes}: {life.said[-300:]}")
  note = ""
  if n_processes > 1 and not group and not told:
    note = f"the other ended after {life.outlived:.1f} s"
    if life.outlived > _SURVIVES:
      problems.append("the other process had to be killed")
  found = lab.finish(name, workdir, n_processes, problems)
  return dataclasses.replace(
    found, note="; ".join(part for part in (found.note, note) if part)
  )


def _torn_checkpoint(lab: _Lab) -> Result:
  """The data files of the last checkpoint's parameters lose their second half;
  all of them, since some hold nothing that is still referred to.
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


def _changed_start(lab: _Lab, window: str, code: int) -> Result:
  """A start that finds the checkpoints unfit for a reason of its own: it ends
  with one line and `code`, and moves none of them.
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


# Files of a checkpoint's item, in which a bit turns over.
_PARTS = (
  ("arrays", "params/**/d/*"),
  ("optimizer state", "rest/**/d/*"),
  ("meta", "meta/metadata"),
  ("manifest", "params/manifest.ocdbt"),
  ("names of arrays", "params/_METADATA"),
  ("validation loss", "metrics/metrics"),
)


def _flipped_bit(lab: _Lab, part: str, pattern: str) -> Result:
  """One bit of such files of the last checkpoint: the run ends as if unbroken,
  and at most that checkpoint was moved.
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


def _two_at_once(lab: _Lab) -> Result:
  """The same command, while it runs: refused, and the first is undisturbed."""
  workdir = lab.new_run()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    # Slow enough at its end for the other to start meanwhile.
    first = pool.submit(lab.live, workdir, 1, bombs.Order("", "slow steps"))
    deadline = time.monotonic() + _LIFE
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


def _pmap(lab: _Lab) -> Result:
  """Mode pmap on two processes: killed, started again, and stopped, it ends as
  if unbroken, with the losses of mode jit.
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
  error = _largest_error(unbroken, lab.unbroken(2))
  limit = 1e-4 if lab.config.model.dtype == "float32" else 2e-2
  if error > limit:
    problems.append("other losses than mode jit")
  note = f"losses within {error:.1e} of mode jit"
  return lab.finish(
    "mode pmap on 2 processes", workdir, 2, problems, note, unbroken
  )


def _largest_error(got: pathlib.Path, want: pathlib.Path) -> float:
  """Of the training losses, relative; infinite where batches differ."""
  pairs = list(
    itertools.zip_longest(*(metrics_lib.read(str(run)) for run in (got, want)))
  )
  if not all(
    a and b and a["step"] == b["step"] and a["batch_hash"] == b["batch_hash"]
    for a, b in pairs
  ):
    return math.inf
  return max(abs(a["train/loss"] / b["train/loss"] - 1) for a, b in pairs)


def _full_disk(lab: _Lab) -> Result:
  """The run's disk holds about one checkpoint, and is then made larger."""
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


def _damaged_store(lab: _Lab) -> Result:
  """A bit of the tokens turns over between two lives."""
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


def _elastic(lab: _Lab) -> Result:
  """One run on 8 devices, 4, 2 processes of 4, and 8 again."""
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
  error = _largest_error(workdir, lab.unbroken(1, 8))
  # Sums in another order, through a dozen optimizer steps; bfloat16 has 8 bits.
  limit = 1e-4 if lab.config.model.dtype == "float32" else 2e-2
  return Result(
    "faults",
    "8 devices -> 4 -> 2 processes of 4 -> 8: losses, and the same batches",
    error,
    limit,
    error <= limit and not problems,
    "; ".join(problems),
  )


def _at_random(lab: _Lab, n_kills: int = 20, n_steps: int = 200) -> Result:
  """Many kills of one run, each at a random moment."""
  draw = random.Random(lab.config.seed)
  unbroken, workdir = (
    lab.new_run(steps=n_steps, save_every=5) for _ in range(2)
  )
  lab.live(unbroken, 1)
  kills = 0
  for _ in range(n_kills):
    # Half of them in seconds, which mostly hits the start, half in steps, few
    # enough to come before the end.
    order = (
      bombs.Order("", "any time", delay=draw.uniform(0, 4))
      if draw.random() < 0.5
      else bombs.Order("", "any step", delay=float(draw.randint(1, 15)))
    )
    kills += lab.live(workdir, 1, order).codes == [-_KILL]
  life = lab.live(workdir, 1)
  n = differences(workdir, unbroken)
  lasted = ledger.summarize(ledger.read(str(workdir)))
  return Result(
    "faults",
    f"{kills} random SIGKILLs in one run of {n_steps} steps",
    float(n),
    0.0,
    n == 0 and kills == n_kills and life.codes == [0],
    f"lost {lasted['lost']:.1f} s of steps",
  )
