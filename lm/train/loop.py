"""The training loop.

Order of a step: take the batch, dispatch the step, then read the metrics of
the previous step while the device works. The host waits for the device only in
evaluation, in saving and at the end.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools

import jax
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import checkpoint, locks, processes, sharding, validation
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm.data import pipeline, prefetch, store
from lm.evaluate import perplexity
from lm.train import init_from, plot, programs, report, resume, tasks
from lm.train import ledger as ledger_lib
from lm.train import metrics as metrics_lib
from lm.train import profile as profile_lib
from lm.train import stop as stop_lib
from lm.train import watchdog as watchdog_lib


def train(
  config: config_lib.Config,
  workdir: str,
  stop: stop_lib.Stop | None = None,
  from_step: int | None = None,
) -> int:
  """Trains or resumes the run in `workdir`; returns the exit code.

  `from_step` is the checkpoint to resume from; later checkpoints are moved to
  abandoned/. Without `stop`, signal handlers are installed during the call and
  restored at the end.

  Raises ConfigError, before the first step, if the config does not fit the
  devices, the sources, the other processes, or the run already in `workdir`;
  RunError if another process has the run; and Diverged, with the last good
  checkpoint kept, if the loss or the gradient norm is not finite and SkipConfig
  is off, or if the last `skip.window` steps were all skipped.
  """
  with contextlib.ExitStack() as own:
    stop = stop or own.enter_context(stop_lib.Stop())
    stop.is_first_of_several = (
      jax.process_count() > 1 and jax.process_index() == 0
    )
    resume.check_processes_start_alike(config)
    mesh = mesh_lib.make(config)
    prepare = functools.partial(_prepare, config, workdir, from_step)
    prepared = stop.start(
      "preparing the corpus", functools.partial(processes.on_all, prepare)
    )
    resume.check_processes_read_alike(config, prepared, workdir)
    config = _ending_with_data(config, prepared)
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    lock = None
    if jax.process_index() == 0:
      lock = stop.start(
        "waiting for the run directory", functools.partial(locks.Lock, workdir)
      )
      own.callback(lock.release)
      stop.on_leave = lock.release
      for left in epath.Path(workdir).glob("*.partial"):
        left.unlink()  # left by a start killed during a write
    with contextlib.ExitStack() as closing:
      try:
        run = _Run(config, workdir, mesh, prepared, stop, closing, lock)
        return run.go(from_step)
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


def _prepare(
  config: config_lib.Config, workdir: str, from_step: int | None
) -> store.Prepared:
  resume.refuse_other_config(config, resume.earlier_config(workdir), workdir)
  resume.check_from_step(workdir, from_step)
  return store.prepare(config, init_from.tokenizer(config, workdir))


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


class _Run:
  """A run: state shared by set-up, steps, evaluation and saving."""

  def __init__(self, config, workdir, mesh, prepared, stop, closing, lock):
    self.config, self.workdir, self.mesh = config, workdir, mesh
    self.prepared, self.stop, self.closing = prepared, stop, closing
    self.lock = lock
    self.checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint)
    closing.callback(self.checkpoints.close)
    self.meta = checkpoint.Meta(
      step=0,
      config=config,
      tokenizer=prepared.tokenizer.to_json(),
      fingerprint=resume.fingerprint(prepared.train, prepared.tokenizer),
      validation=resume.fingerprint(prepared.validation, prepared.tokenizer),
    )
    self.last_step = config.train.steps
    self.rows = programs.batch_sharding(config, mesh)
    # Mode pmap has no mesh in context: the result sharding must be given.
    whole = NamedSharding(mesh, P()) if config.mesh.mode == "pmap" else None
    self.eval_step = perplexity.eval_step(config.model, whole)
    load = functools.partial(
      tasks.Tasks, config, mesh, self.rows, prepared.tokenizer, stop
    )
    self.tasks = stop.start("loading tasks", load)

  def go(self, from_step: int | None = None) -> int:
    """Runs all steps after the last checkpoint, or after `from_step`; returns
    the exit code.
    """
    if from_step is not None:
      resume.abandon_later(self.checkpoints, from_step)
    self.start = self.checkpoints.latest_step() or 0
    self.progress = metrics_lib.Progress(self.last_step, self.start)
    self.closing.callback(self.progress.close)
    if self.start >= self.last_step and not self._lacks_evaluation():
      if jax.process_index() == 0:
        plot.draw_if_missing(self.workdir)
      self.progress.say(f"{self.workdir} is at step {self.start}: complete")
      return 0
    now = self.config, self.mesh, self.prepared, self.start
    report.say_what_runs(*now, self.progress.say)
    train_step, state = self._set_up()
    step, evaluated = self.start, None
    if self._lacks_evaluation():
      evaluated = self._evaluate(step, state)
      if self.stop.stopping:  # a later step would leave the report without it
        return self._finish(step, state, evaluated)
    for step, batch in self._numbered_batches():
      with self.profile.step(step):
        state, numbers = train_step(state, batch)
      self.profile.dispatched(step, numbers)
      self.reporter.dispatched(step, numbers)
      self.watchdog.step_done(step)
      if self.stop.agreed():
        break
      evaluated = None
      if self._evaluates_at(step):
        evaluated = self._evaluate(step, state)
      if (
        step % self.config.checkpoint.save_every == 0 or step == self.last_step
      ):
        self._save(step, state, evaluated)
      if self.stop.stopping:
        break
    return self._finish(step, state, evaluated)

  def _finish(self, step, state, evaluated) -> int:
    """Saves the last step, also after a stop, and draws curves.png; returns the
    exit code.
    """
    stopping = self.stop.stopping
    self.reporter.read()
    # A restart adds to the report an evaluation that a stop cut short.
    if not stopping or self._evaluates_at(step):
      self.reporter.report()
    if step > (self.checkpoints.latest_step() or 0):
      self._save(step, state, evaluated)
    with self.ledger.within("save"):
      self.checkpoints.wait()
    if jax.process_index() == 0:
      plot.draw(self.workdir)
    self.ledger.write()
    self.progress.say(self.ledger.describe())
    if not stopping:
      return 0
    self.progress.say(
      f"stopped by {self.stop.reason}; step {step} is saved, the same command "
      "goes on"
    )
    return self.stop.exit_code

  # --- parts of a step ---

  def _numbered_batches(self):
    """Yields (step, batch on the devices) for each remaining step."""
    t = self.config.train
    batches = prefetch.DevicePrefetch(
      pipeline.train_batches(
        self.config,
        self.prepared,
        start_step=self.start,
        rows=sharding.local_rows(self.rows, t.batch_size),
      ),
      self._place,
    )
    for step in range(self.start + 1, self.last_step + 1):
      with self.ledger.within("data_wait"):
        batch = next(batches)
      yield step, batch

  def _evaluates_at(self, step: int) -> bool:
    return self._validates_at(step) or self.tasks.due(step, self.last_step)

  def _validates_at(self, step: int) -> bool:
    every = self.config.train.eval_every
    due = step % every == 0 or step == self.last_step
    return due and bool(self.prepared.validation)

  def _evaluate(self, step, state) -> float | None:
    """Validates and does tasks, whichever is due; returns the validation loss,
    None without one. A stop cuts both short.
    """
    jax.block_until_ready(state.params)
    self.watchdog.pause()
    self.reporter.read()  # reported together with the evaluation
    loss = self._validate(state) if self._validates_at(step) else None
    if not self.stop.stopping and self.tasks.due(step, self.last_step):
      with self.ledger.within("evaluate"):
        found = self.tasks.run(state.model)
      if found is not None:
        self.reporter.report(found)
    return loss

  def _validate(self, state) -> float | None:
    """Reports the validation loss over all causal sources (over all sources, if
    none is causal), and the loss and the scored tokens of each source if there
    are several; returns the first. None if a stop cut the evaluation short.
    """
    first_last = sharding.local_rows(self.rows, self.config.train.batch_size)
    batches = pipeline.validation_batches(
      self.config, self.prepared, rows=first_last
    )
    params, parts = state.model, []
    with self.ledger.within("evaluate"), self._mesh():
      for s, pairs in itertools.groupby(batches, key=lambda pair: pair[0]):
        part = perplexity.evaluate_batches(
          self.eval_step,
          params,
          (self._place(batch) for _, batch in pairs),
          self.prepared.tokenizer.target_bytes,
          should_stop=self.stop.agreed,
        )
        if part is None:
          return None
        parts.append((self.prepared.validation[s], part))
    totals, said = report.evaluation(parts)
    self.reporter.report(said)
    return totals.loss

  def _save(self, step, state, loss) -> None:
    self.reporter.read()  # raises Diverged before a NaN is saved
    self.reporter.report_if_due()
    self.watchdog.pause()
    with self.ledger.within("save"):
      meta = dataclasses.replace(self.meta, step=step, loss=loss)
      self.checkpoints.save(resume.to_trees(state), meta)
    self.ledger.saved(step)

  # --- start ---

  def _set_up(self):
    """(compiled step, state), restored or fresh. Also opens ledger, metrics and
    watchdog.
    """
    self.ledger = ledger_lib.Ledger(self.workdir, self.stop.began)

    def make():
      # The step compiles while the state is created or restored.
      compiled = stop_lib.background(
        functools.partial(programs.compile_step, self.config, self.mesh)
      )
      # After an error of the restore, too: Python must not end meanwhile.
      self.closing.callback(concurrent.futures.wait, [compiled])
      with self.ledger.within("restore"):
        state, meta = resume.first_state(
          self.config,
          self.mesh,
          self.workdir,
          self.checkpoints,
          self.meta,
          self.progress.say,
        )
        if meta is not None:
          self.meta.batch_hash = meta.batch_hash
          self.meta.unreported = meta.unreported
        self.start = 0 if meta is None else meta.step
      with self.ledger.within("compile"):
        return compiled.result(), state

    train_step, state = self.stop.start("restoring or compiling", make)
    if jax.process_index() == 0:
      said = resume.write_config(self.workdir, self.config, self.start)
      if said is not None:
        self.progress.say(said)
    self.reporter = report.Reporter(
      self.config,
      self.workdir,
      self.meta,
      self.checkpoints,
      self.ledger,
      self.progress,
      self.lock,
      self.start,
    )
    self.closing.callback(self.reporter.close)
    self.watchdog = watchdog_lib.Watchdog(self.config.train.slow_step_factor)
    self.closing.callback(self.watchdog.close)
    self.profile = profile_lib.Profile(self.workdir, self.config.train.profile)
    self.closing.callback(self.profile.close)
    self.ledger.starts_from(self.start)
    if self.start:
      self.progress.say(self.ledger.describe())
    return train_step, state

  def _lacks_evaluation(self) -> bool:
    """Whether a stop cut short the evaluation after the last step (SIGTERM)."""
    due = {
      "eval/loss": self._validates_at(self.start),
      "task/": self.tasks.due(self.start, self.last_step),
    }
    reports = metrics_lib.read(self.workdir) if self.start else []
    return any(
      is_due and not any(name.startswith(prefix) for name in report)
      for report in reports
      if report["step"] == self.start
      for prefix, is_due in due.items()
    )

  def _place(self, batch):
    return sharding.place(batch, self.rows, self.config.train.batch_size)

  def _mesh(self):
    """Context manager: sets the mesh; mode pmap has no mesh in context."""
    jitted = self.config.mesh.mode == "jit"
    return jax.set_mesh(self.mesh) if jitted else contextlib.nullcontext()
