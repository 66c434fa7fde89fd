"""The training loop.

Order of a step: take the batch, dispatch the step, then read the numbers of
the step before while the device works. Evaluation, saving and the end are the
only places where the host waits for the device.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import signal
import sys
import threading
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lm import checkpoint, sharding
from lm import config as config_lib
from lm.data import pipeline, store
from lm.evaluate import perplexity
from lm.train import metrics as metrics_lib
from lm.train import step as step_lib

# Fields that a restart may change: they say how a run is computed, watched and
# stored, and how long it is, but not what its steps are.
_FREE = (
  "config.mesh.",
  "config.checkpoint.",
  "config.data.cache_dir",
  "config.data.workers",
  "config.data.prefetch_rows",
  "config.model.attention",
  "config.model.remat",
  "config.model.scan_layers",
  "config.model.loss_chunk",
  "config.train.steps",
  "config.train.microbatches",
  "config.train.log_every",
  "config.train.eval_every",
  "config.train.eval_batches",
)


class Stop:
  """Whether the run was asked to end (SIGTERM); the same for all processes."""

  def __init__(self):
    self.asked = False
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, *_) -> None:
    self.asked = True

  def at(self, step: int) -> bool:
    """True on every process at the same step, soon after one was asked."""
    if jax.process_count() > 1:
      self.asked |= multihost_utils.reached_preemption_sync_point(step)
    return self.asked


def train(config: config_lib.Config, workdir: str) -> int:
  """Trains, or goes on training, the run in `workdir`; returns the exit code.

  Raises ConfigError before anything is written where the config does not fit
  the devices, the sources, or the run that is there already; and
  FloatingPointError, the last good checkpoint kept, where the loss is not
  finite and no SkipConfig says to go on.
  """
  mesh = sharding.make_mesh(config)
  _refuse_other_run(config, workdir)
  prepared = store.prepare(config)
  stop = Stop()
  epath.Path(workdir).mkdir(parents=True, exist_ok=True)
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint)
  start = checkpoints.latest_step() or 0
  run = _Run(config, workdir, mesh, prepared, checkpoints, stop, start)
  try:
    return run.go()
  finally:
    run.close()


class _Run:
  """What the parts of one run share."""

  def __init__(self, config, workdir, mesh, prepared, checkpoints, stop, start):
    self.config, self.workdir, self.mesh = config, workdir, mesh
    self.prepared, self.checkpoints = prepared, checkpoints
    self.stop, self.start = stop, start
    self.meta = checkpoint.Meta(
      step=start,
      config=config,
      tokenizer=prepared.tokenizer.to_json(),
      fingerprint=_fingerprint(prepared),
    )
    if start:
      _refuse_other_data(self.meta, workdir)
    elif jax.process_index() == 0:
      metrics_lib.write_config(workdir, config)
    self.writer = metrics_lib.Writer(workdir, start)
    self.progress = metrics_lib.Progress(config.train.steps, start)
    self.rows = step_lib.batch_sharding(config, mesh)
    self.eval_step = perplexity.eval_step(config.model)
    self.pending: tuple[int, dict[str, Any]] | None = None
    self.reported = start

  def close(self) -> None:
    self.progress.close()
    self.writer.close()
    self.checkpoints.close()

  def go(self) -> int:
    """Every step from `start` on."""
    t, c = self.config.train, self.config.checkpoint
    if self.start >= t.steps:
      self.progress.say(f"{self.workdir} is at step {self.start}: complete")
      return 0
    self._say_what_runs()
    train_step = self._compile()
    state = self._first_state()
    self.batches = pipeline.to_device(self._host_batches(), self._place)
    self.meter = metrics_lib.Meter(self.config)
    step, evaluated = self.start, None
    for step, batch in enumerate(self.batches, self.start + 1):
      state, numbers = train_step(state, batch)
      self._read_pending()
      self.pending = step, numbers
      if self.stop.at(step):
        break
      evaluated = None
      if step % t.eval_every == 0 or step == t.steps:
        evaluated = self._evaluate(step, state)
      if step % c.save_every == 0 or step == t.steps:
        self._save(step, state, evaluated)
      if step == t.steps or self.stop.asked:
        break
    return self._finish(step, state, evaluated)

  def _finish(self, step, state, evaluated) -> int:
    """Saves the end, wherever it came, and draws the picture."""
    if not self.stop.asked and evaluated is None:  # the data ended first
      evaluated = self._evaluate(step, state)
    self._read_pending(report=True)
    if step > (self.checkpoints.latest_step() or 0):
      self._save(step, state, evaluated)
    self.checkpoints.wait()
    if jax.process_index() == 0:
      metrics_lib.plot(self.workdir)
    if self.stop.asked:
      self.progress.say(
        f"stopped by SIGTERM; step {step} is saved, the same command goes on"
      )
    return 0

  # --- parts of a step ---

  def _read_pending(
    self, report: bool = False, found: dict[str, float] | None = None
  ) -> None:
    """Reads the last step's numbers; reports them where it is time to, where
    asked, and with what an evaluation found.
    """
    if self.pending is None:
      return
    step, on_device = self.pending
    self.pending = None
    numbers = {k: float(v) for k, v in jax.device_get(on_device).items()}
    finite = np.isfinite([numbers["loss"], numbers["grad_norm"]]).all()
    if not finite and self.config.optimizer.skip is None:
      raise FloatingPointError(
        f"step {step}: loss {numbers['loss']}, gradient norm "
        f"{numbers['grad_norm']}; last checkpoint: step "
        f"{self.checkpoints.latest_step()}. Lower optimizer.peak_lr, or set "
        "optimizer.skip to leave such steps out"
      )
    if not (report or found or step % self.config.train.log_every == 0):
      return
    waited, self.batches.wait_seconds = self.batches.wait_seconds, 0.0
    entry = {
      "step": step,
      "tokens": step * self.config.tokens_per_step,
      "train/loss": numbers["loss"],
      "train/perplexity": metrics_lib.exponential(numbers["loss"]),
      "grad_norm": numbers["grad_norm"],
      "lr": numbers["lr"],
      **({"skipped": numbers["skipped"]} if "skipped" in numbers else {}),
      **self.meter.read(step - self.reported, waited),
      **(found or {}),
    }
    self.reported = step
    self.writer.write(entry)
    self.progress.show(entry)

  def _evaluate(self, step, state) -> float | None:
    """Reports validation sums over all sources; None where it was stopped."""
    jax.block_until_ready(state.params)
    params = state.params if state.ema is None else state.ema
    first_last = sharding.local_rows(self.rows, self.config.train.batch_size)
    batches = pipeline.validation_batches(
      self.config, self.prepared, rows=first_last
    )
    with self.meter.paused(), self._mesh():
      totals = perplexity.evaluate_batches(
        self.eval_step,
        params,
        (self._place(batch) for _, batch in batches),
        self.prepared.tokenizer.byte_lengths,
        should_stop=lambda: self.stop.asked,
      )
    if totals is None:
      return None
    found = {
      "eval/loss": totals.loss,
      "eval/perplexity": totals.perplexity,
      "eval/bits_per_byte": totals.bits_per_byte,
    }
    self._read_pending(found=found)
    return totals.loss

  def _save(self, step, state, loss) -> None:
    self._read_pending(report=loss is not None)  # refuses to save a nan
    with self.meter.paused():
      rest = (state.step, state.opt_state, state.history)
      meta = dataclasses.replace(self.meta, step=step)
      self.checkpoints.save(step, state.params, state.ema, rest, meta, loss)

  # --- start ---

  def _say_what_runs(self) -> None:
    from lm.model import counts

    c = self.config
    shape = " x ".join(f"{k} {v}" for k, v in self.mesh.shape.items())
    tokens = sum(s.n_tokens for s in self.prepared.train)
    self.progress.say(
      f"{counts.parameter_count(c.model):,} parameters on {self.mesh.size} "
      f"{jax.devices()[0].device_kind} device(s), {c.mesh.mode} {shape}; "
      f"{tokens:,} training tokens, {c.tokens_per_step:,} a step; "
      f"from step {self.start} to {c.train.steps}"
    )

  def _compile(self):
    make = functools.partial(step_lib.compile_step, self.config, self.mesh)
    return _interruptible(make, self.stop)

  def _first_state(self) -> step_lib.State:
    """Fresh, or that of the last checkpoint on this run's mesh."""
    if not self.start:
      return step_lib.create_state(self.config, self.mesh)
    like = step_lib.abstract_state(self.config, self.mesh)
    rest = (like.step, like.opt_state, like.history)
    params, ema, (step, opt_state, history) = self.checkpoints.restore(
      self.start, like.params, like.ema, rest
    )
    return step_lib.State(step, params, ema, opt_state, history)

  def _host_batches(self):
    rows = sharding.local_rows(self.rows, self.config.train.batch_size)
    return pipeline.train_batches(
      self.config, self.prepared, start_step=self.start, rows=rows
    )

  def _place(self, batch):
    # `causal` marks no prefix; without the field, kernels' masks are fixed.
    batch = {k: v for k, v in batch.items() if k != "prefix"}
    return sharding.place(batch, self.rows, self.config.train.batch_size)

  def _mesh(self):
    """The mesh in context, unless the mode is pmap, where none is."""
    jitted = self.config.mesh.mode == "jit"
    return jax.set_mesh(self.mesh) if jitted else contextlib.nullcontext()


def _interruptible(make, stop: Stop):
  """make(), or a clean exit of the process where SIGTERM comes first.

  A compilation holds its thread for minutes and cannot be cancelled; no step
  was taken yet that could be lost.
  """
  if jax.process_count() > 1:
    return make()
  made: list[Any] = []
  failed: list[BaseException] = []

  def work():
    try:
      made.append(make())
    except BaseException as error:
      failed.append(error)

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  while thread.is_alive():
    thread.join(0.05)
    if stop.asked:
      print("stopped by SIGTERM while compiling", file=sys.stderr)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(0)
  if failed:
    raise failed[0]
  return made[0]


def _fingerprint(prepared: store.Prepared) -> str:
  """Names the stores that training reads, and the tokenizer that made them."""
  parts = [s.fingerprint for s in prepared.train]
  parts.append(prepared.tokenizer.fingerprint)
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _refuse_other_run(config: config_lib.Config, workdir: str) -> None:
  """Raises ConfigError where `workdir` holds a run of another config."""
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    return
  before = config_lib.from_json(path.read_text())
  changed = [
    f"{name} was {old!r} and is {new!r}"
    for name, (old, new) in config_lib.differences(before, config).items()
    if not name.startswith(_FREE)
  ]
  if changed:
    raise config_lib.ConfigError(
      f"--workdir={workdir}: holds a run of another config: "
      f"{'; '.join(changed)}. Name another workdir, or restore these fields"
    )


def _refuse_other_data(meta: checkpoint.Meta, workdir: str) -> None:
  before = checkpoint.load_meta(workdir, meta.step)
  if before.fingerprint != meta.fingerprint:
    raise config_lib.ConfigError(
      f"--workdir={workdir}: its checkpoint was trained on other data "
      f"(fingerprint {before.fingerprint}, now {meta.fingerprint}): the "
      "sources have changed since. Restore them, or name another workdir"
    )
