"""The start of a run: all that comes before its first step.

The order matters: the config is checked against devices, data, processes and
the run directory before anything is written, and the step compiles while the
state is created or restored.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
from etils import epath

from lm import checkpoint, files, locks, processes, validation
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm.data import pipeline, store
from lm.train import evaluation as evaluation_lib
from lm.train import init_from, programs, resume
from lm.train import ledger as ledger_lib
from lm.train import metrics as metrics_lib
from lm.train import step as step_lib
from lm.train import stop as stop_lib


@contextlib.contextmanager
def opened(
  config: config_lib.Config,
  workdir: str,
  stop: stop_lib.Stop | None,
  from_step: int | None,
) -> Iterator["Start"]:
  """Within: a checked run that this process has the lock of. Without `stop`,
  signal handlers are installed meanwhile. Raises as `loop.train`.
  """
  with contextlib.ExitStack() as own:
    stop = stop or own.enter_context(stop_lib.Stop())
    stop.is_first_of_several = (
      jax.process_count() > 1 and jax.process_index() == 0
    )
    resume.check_processes_start_alike(config)
    mesh = mesh_lib.make(config)
    work = functools.partial(prepare, config, workdir, from_step)
    prepared = stop.start(
      "preparing the corpus", functools.partial(processes.on_all, work)
    )
    resume.check_processes_read_alike(config, prepared, workdir)
    config = _ending_with_data(config, prepared)
    lock = _locked(workdir, stop, own)
    with contextlib.ExitStack() as closing:
      try:
        yield Start(
          config, workdir, mesh, prepared, stop, closing, lock, from_step
        )
      except BaseException as error:
        if jax.process_count() > 1:
          closing.pop_all()  # closing waits for processes that may be lost
          if isinstance(error, jax.errors.JaxRuntimeError):
            error.add_note(
              "Where another process of the run was lost, its own output says "
              "why. Start them all again: the run goes on from its last "
              "checkpoint."
            )
        raise


def prepare(
  config: config_lib.Config, workdir: str, from_step: int | None
) -> store.Prepared:
  """Tokenizer and token stores of a run that may start or go on in `workdir`.
  Raises ConfigError if it may not.
  """
  resume.check_from_step(workdir, from_step)
  last = checkpoint.last_undamaged(workdir, from_step)
  before = resume.earlier_config(workdir, last)
  resume.refuse_other_config(config, before, workdir)
  prepared = store.prepare(config, init_from.tokenizer(config, workdir))
  resume.refuse_other_data(workdir, last, prepared)
  return prepared


def _ending_with_data(
  config: config_lib.Config, prepared: store.Prepared
) -> config_lib.Config:
  """The config with at most the steps that data.epochs gives: the schedule ends
  with the data. Raises ConfigError as `validate`.
  """
  n = pipeline.n_train_batches(config, prepared)
  if config.train.steps <= n:
    return config
  train = dataclasses.replace(config.train, steps=n)
  return validation.validate(dataclasses.replace(config, train=train))


def _locked(
  workdir: str, stop: stop_lib.Stop, own: contextlib.ExitStack
) -> locks.Lock | None:
  """The lock of the run directory, which is made if absent; None on processes
  other than the first.
  """
  path = epath.Path(workdir)
  path.mkdir(parents=True, exist_ok=True)
  if jax.process_index() != 0:
    return None
  lock = stop.start(
    "waiting for the run directory", functools.partial(locks.Lock, workdir)
  )
  own.callback(lock.release)
  stop.on_leave = lock.release
  for left in path.glob(files.PARTIALS):
    left.unlink()  # left by a start killed during a write
  return lock


class Start:
  """What a start of a run has before its state."""

  def __init__(
    self,
    config: config_lib.Config,
    workdir: str,
    mesh: jax.sharding.Mesh,
    prepared: store.Prepared,
    stop: stop_lib.Stop,
    closing: contextlib.ExitStack,
    lock: locks.Lock | None,
    from_step: int | None,
  ):
    self.config, self.workdir, self.mesh = config, workdir, mesh
    self.prepared, self.stop = prepared, stop
    # Closes what the run opens; the lock is that of process 0.
    self.closing, self.lock = closing, lock
    self.checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint)
    closing.callback(self.checkpoints.close)
    self.evaluation = evaluation_lib.Evaluation(config, mesh, prepared, stop)
    if from_step is not None:
      resume.abandon_later(self.checkpoints, from_step)
    # The last checkpoint; 0 without one.
    self.step = self.checkpoints.latest_step() or 0
    self.progress = metrics_lib.Progress(config.train.steps, self.step)
    closing.callback(self.progress.close)

  @property
  def complete(self) -> bool:
    """Whether nothing is left to do; `first_state` mends a checkpoint of which
    the metadata cannot be read.
    """
    if self.step < self.config.train.steps:
      return False
    try:
      checkpoint.load_meta(self.workdir, self.step)
    except files.Damaged:
      return False
    return not self.evaluation.lacks(self.workdir, self.step)

  def first_state(
    self, ledger: ledger_lib.Ledger
  ) -> tuple[programs.Step, step_lib.State, checkpoint.Meta]:
    """(compiled step, state, its metadata): restored, or fresh at step 0.
    Raises as `resume.first_state`.
    """
    prepared, tokenizer = self.prepared, self.prepared.tokenizer
    meta = checkpoint.Meta(
      step=0,
      config=self.config,
      tokenizer=tokenizer.to_json(),
      fingerprint=resume.fingerprint(prepared.train, tokenizer),
      validation=resume.fingerprint(prepared.validation, tokenizer),
    )

    def make():
      compiled = stop_lib.background(
        functools.partial(programs.compile_step, self.config, self.mesh)
      )
      # After an error of the restore, too: Python must not end meanwhile.
      self.closing.callback(concurrent.futures.wait, [compiled])
      with ledger.within("restore"):
        state, found = resume.first_state(
          self.config,
          self.mesh,
          self.workdir,
          self.checkpoints,
          meta,
          self.progress.say,
        )
      if found is not None:
        meta.step, meta.batch_hash = found.step, found.batch_hash
        meta.unreported = found.unreported
      with ledger.within("compile"):
        return compiled.result(), state

    step, state = self.stop.start("restoring or compiling", make)
    return step, state, meta
