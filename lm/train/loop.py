"""The training loop: steps, evaluation, saving.

Order of a step: take the batch, dispatch the step, then read the metrics of
the previous step while the device works. The host waits for the device only in
evaluation, in saving and at the end. What comes before the first step is in
lm/train/start.py.
"""

import dataclasses
import math

import jax

from lm import config as config_lib
from lm import sharding
from lm.data import pipeline, prefetch
from lm.train import ledger as ledger_lib
from lm.train import plot, programs, report, resume
from lm.train import profile as profile_lib
from lm.train import start as start_lib
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
  with start_lib.opened(config, workdir, stop, from_step) as start:
    say = start.progress.say
    if start.complete:
      if jax.process_index() == 0:
        plot.draw_if_missing(workdir)
      say(f"{workdir} is at step {start.step}: complete")
      return 0
    now = start.config, start.mesh, start.prepared, start.step
    report.say_what_runs(*now, say)
    return _Run(start).go()


class _Run:
  """A run from its state on: shared by steps, evaluation and saving."""

  def __init__(self, start: start_lib.Start):
    config, workdir, closing = start.config, start.workdir, start.closing
    self.config, self.workdir, self.stop = config, workdir, start.stop
    self.prepared, self.evaluation = start.prepared, start.evaluation
    self.checkpoints, self.progress = start.checkpoints, start.progress
    self.rows = programs.batch_sharding(config, start.mesh)
    self.ledger = ledger_lib.Ledger(workdir, start.stop.began)
    self.train_step, self.state, self.meta = start.first_state(self.ledger)
    # The step restored: an earlier one than start.step, if that is damaged.
    self.first = self.meta.step
    if jax.process_index() == 0:
      said = resume.write_config(workdir, config, self.first)
      if said is not None:
        self.progress.say(said)
    self.reporter = report.Reporter(
      config,
      workdir,
      self.meta,
      self.checkpoints,
      self.ledger,
      self.progress,
      start.lock,
      self.first,
    )
    closing.callback(self.reporter.close)
    self.watchdog = watchdog_lib.Watchdog(config.train.slow_step_factor)
    closing.callback(self.watchdog.close)
    self.profile = profile_lib.Profile(workdir, config.train.profile)
    closing.callback(self.profile.close)

  def go(self) -> int:
    """Runs the steps that are left; returns the exit code."""
    self.ledger.starts_from(self.first)
    if self.first:
      self.progress.say(self.ledger.describe())
    step, loss = self.first, None
    if self.evaluation.lacks(self.workdir, step):
      loss = self._evaluate(step)
      if self.stop.stopping:  # a later step would leave the report without it
        return self._finish(step, loss)
    for step, batch in self._numbered_batches():
      loss = None  # not that of the step before, if a stop comes now
      with self.profile.step(step):
        self.state, numbers = self.train_step(self.state, batch)
      self.profile.dispatched(step, numbers)
      self.reporter.dispatched(step, numbers)
      self.watchdog.step_done(step)
      if self.stop.agreed():
        break
      if self.evaluation.due(step):
        loss = self._evaluate(step)
      saves = step % self.config.checkpoint.save_every == 0
      if saves or step == self.config.train.steps:
        self._save(step, loss)
      if self.stop.stopping:
        break
    return self._finish(step, loss)

  def _numbered_batches(self):
    """Yields (step, batch on the devices) for each remaining step."""
    t = self.config.train
    batches = prefetch.DevicePrefetch(
      pipeline.train_batches(
        self.config,
        self.prepared,
        start_step=self.first,
        rows=sharding.local_rows(self.rows, t.batch_size),
      ),
      lambda batch: sharding.place(batch, self.rows, t.batch_size),
    )
    for step in range(self.first + 1, t.steps + 1):
      with self.ledger.within("data_wait"):
        batch = next(batches)
      yield step, batch

  def _evaluate(self, step: int) -> float | None:
    """Reports the validation loss and the tasks, whichever is due; returns the
    loss, None without one. A stop cuts both short.
    """
    jax.block_until_ready(self.state.params)
    self.watchdog.pause()
    self.reporter.read()  # reported together with the evaluation
    loss = None
    for evaluate in (self.evaluation.validate, self.evaluation.tasks):
      with self.ledger.within("evaluate"):
        found = evaluate(step, self.state.model)
      if found is not None:
        self.reporter.report(found)
        loss = found.get("eval/loss", loss)
    # NaN has no place in an order: a checkpoint of it could pass for the best.
    return loss if loss is not None and math.isfinite(loss) else None

  def _save(self, step: int, loss: float | None) -> None:
    self.reporter.read()  # raises Diverged before a NaN is saved
    # Not after the save: `meta` would have its tokens as unreported ones. A
    # restart adds to the report an evaluation that a stop cut short.
    if step == self.config.train.steps or self.evaluation.due(step):
      self.reporter.report()
    self.reporter.report_if_due()
    self.watchdog.pause()
    with self.ledger.within("save"):
      meta = dataclasses.replace(self.meta, step=step, loss=loss)
      self.checkpoints.save(resume.to_trees(self.state), meta)
    self.ledger.saved(step)

  def _finish(self, step: int, loss: float | None) -> int:
    """Saves the last step, also after a stop, and draws curves.png; returns the
    exit code.
    """
    stopping = self.stop.stopping
    if step > (self.checkpoints.latest_step() or 0):
      self._save(step, loss)
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
