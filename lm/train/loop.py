"""The training loop.

Order of a step: take the batch, dispatch the step, then read the numbers of
the step before while the device works. Evaluation, saving and the end are the
only places where the host waits for the device.
"""

import contextlib
import dataclasses
import functools
import hashlib
from typing import Any

import jax
import numpy as np
from etils import epath

from lm import checkpoint, sharding
from lm import config as config_lib
from lm.data import pipeline, store
from lm.evaluate import perplexity
from lm.train import ledger as ledger_lib
from lm.train import metrics as metrics_lib
from lm.train import step as step_lib
from lm.train import stop as stop_lib
from lm.train import watchdog as watchdog_lib

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
  "config.train.slow_step_factor",
)


def train(
  config: config_lib.Config, workdir: str, stop: stop_lib.Stop | None = None
) -> int:
  """Trains, or goes on training, the run in `workdir`; returns the exit code.

  Raises ConfigError before anything is written where the config does not fit
  the devices, the sources, or the run that is there already; and
  FloatingPointError, the last good checkpoint kept, where the loss is not
  finite and no SkipConfig says to go on.
  """
  stop = stop or stop_lib.Stop()
  stop.is_first_of_several = (
    jax.process_count() > 1 and jax.process_index() == 0
  )
  mesh = sharding.make_mesh(config)
  _refuse_other_run(config, workdir)
  prepared = stop.start(
    "preparing the corpus", functools.partial(store.prepare, config)
  )
  epath.Path(workdir).mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as closing:
    try:
      return _Run(config, workdir, mesh, prepared, stop, closing).go()
    except BaseException as error:
      if jax.process_count() > 1:
        closing.pop_all()  # it would wait for processes that may be lost
        if isinstance(error, jax.errors.JaxRuntimeError):
          error.add_note(
            "Where another process of the run was lost, its own output says "
            "why. Start them all again: the run goes on from its last "
            "checkpoint."
          )
      raise


class _Run:
  """What the parts of one run share."""

  def __init__(self, config, workdir, mesh, prepared, stop, closing):
    self.config, self.workdir, self.mesh = config, workdir, mesh
    self.prepared, self.stop, self.closing = prepared, stop, closing
    self.checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint)
    closing.callback(self.checkpoints.close)
    self.start = self.checkpoints.latest_step() or 0
    self.meta = checkpoint.Meta(
      step=0,
      config=config,
      tokenizer=prepared.tokenizer.to_json(),
      fingerprint=_fingerprint(prepared),
      batch_hash="",
    )
    self.progress = metrics_lib.Progress(config.train.steps, self.start)
    closing.callback(self.progress.close)
    self.rows = step_lib.batch_sharding(config, mesh)
    self.eval_step = perplexity.eval_step(config.model)
    # Of the last step: numbers on the devices, then on the host, then reported.
    self.pending: tuple[int, dict[str, Any]] | None = None
    self.unreported: tuple[int, dict[str, float]] | None = None

  def go(self) -> int:
    """Every step from the last checkpoint on."""
    t, c = self.config.train, self.config.checkpoint
    if self.start >= t.steps and not self._lacks_evaluation():
      self.progress.say(f"{self.workdir} is at step {self.start}: complete")
      return 0
    self._say_what_runs()
    train_step, state = self._set_up()
    step, evaluated = self.start, None
    if self._lacks_evaluation():
      evaluated = self._evaluate(step, state)
    for step, batch in self._numbered_batches():
      state, numbers = train_step(state, batch)
      self._read_pending()
      self._report_if_due()
      self.pending = step, numbers
      self.watchdog.step_done(step)
      if self.stop.agreed():
        break
      evaluated = None
      if self._evaluates_at(step):
        evaluated = self._evaluate(step, state)
      if step % c.save_every == 0 or step == t.steps:
        self._save(step, state, evaluated)
      if self.stop.stopping:
        break
    return self._finish(step, state, evaluated)

  def _finish(self, step, state, evaluated) -> int:
    """Saves the end, wherever it came, and draws the picture."""
    stopping = self.stop.stopping
    if not stopping and evaluated is None:  # the data ended first
      evaluated = self._evaluate(step, state)
    self._read_pending()
    # An evaluation that is due but was cut short is added on restart.
    if not stopping or self._evaluates_at(step):
      self._report()
    if step > (self.checkpoints.latest_step() or 0):
      self._save(step, state, evaluated)
    with self.ledger.within("save"):
      self.checkpoints.wait()
    if jax.process_index() == 0:
      metrics_lib.plot(self.workdir)
    self.ledger.write()
    self.progress.say(self.ledger.describe())
    if stopping:
      self.progress.say(
        f"stopped by SIGTERM; step {step} is saved, the same command goes on"
      )
    return 0

  # --- parts of a step ---

  def _numbered_batches(self):
    """(step, batch) of each step to come, on the devices."""
    t = self.config.train
    batches = pipeline.to_device(
      pipeline.train_batches(
        self.config,
        self.prepared,
        start_step=self.start,
        rows=sharding.local_rows(self.rows, t.batch_size),
      ),
      self._place,
    )
    for step in range(self.start + 1, t.steps + 1):
      with self.ledger.within("data_wait"):
        batch = next(batches, None)
      if batch is None:
        return
      yield step, batch

  def _evaluates_at(self, step: int) -> bool:
    t = self.config.train
    return step % t.eval_every == 0 or step == t.steps

  def _read_pending(self) -> None:
    """Reads the last step's numbers; raises where they are not finite."""
    if self.pending is None:
      return
    step, on_device = self.pending
    self.pending = None
    found = jax.device_get(on_device)
    batch = found.pop("batch")
    self.meta.batch_hash = _chained(self.meta.batch_hash, batch)
    numbers = {k: float(v) for k, v in found.items()}
    finite = np.isfinite([numbers["loss"], numbers["grad_norm"]]).all()
    if not finite and self.config.optimizer.skip is None:
      raise FloatingPointError(
        f"step {step}: loss {numbers['loss']}, gradient norm "
        f"{numbers['grad_norm']}; last checkpoint: step "
        f"{self.checkpoints.latest_step()}. Lower optimizer.peak_lr, or set "
        "optimizer.skip to leave such steps out"
      )
    self.unreported = step, numbers

  def _report_if_due(self) -> None:
    if (
      self.unreported and self.unreported[0] % self.config.train.log_every == 0
    ):
      self._report()

  def _report(self, evaluation: dict[str, float] | None = None) -> None:
    """Reports the last step that was read, if that was not done yet, and what
    an evaluation after it found.
    """
    if self.unreported is None:
      if evaluation:
        self.writer.amend(evaluation)
        self.progress.show(self.writer.last)
      return
    (step, numbers), self.unreported = self.unreported, None
    self.ledger.book()
    spent = self.ledger.seconds
    self.writer.write(
      {
        "step": step,
        "tokens": step * self.config.tokens_per_step,
        "train/loss": numbers["loss"],
        "train/perplexity": metrics_lib.exponential(numbers["loss"]),
        "grad_norm": numbers["grad_norm"],
        "lr": numbers["lr"],
        "batch_hash": self.meta.batch_hash,
        **({"skipped": numbers["skipped"]} if "skipped" in numbers else {}),
        **self.meter.read(step, spent["step"], spent["data_wait"]),
        **(evaluation or {}),
      }
    )
    self.progress.show(self.writer.last)

  def _evaluate(self, step, state) -> float | None:
    """Reports validation sums over all sources; None where it was stopped."""
    jax.block_until_ready(state.params)
    self.watchdog.pause()
    self._read_pending()  # its report will tell of the evaluation too
    params = state.params if state.ema is None else state.ema
    first_last = sharding.local_rows(self.rows, self.config.train.batch_size)
    batches = pipeline.validation_batches(
      self.config, self.prepared, rows=first_last
    )
    with self.ledger.within("evaluate"), self._mesh():
      totals = perplexity.evaluate_batches(
        self.eval_step,
        params,
        (self._place(batch) for _, batch in batches),
        self.prepared.tokenizer.byte_lengths,
        should_stop=self.stop.agreed,
      )
    if totals is None:
      return None
    found = {
      "eval/loss": totals.loss,
      "eval/perplexity": totals.perplexity,
      "eval/bits_per_byte": totals.bits_per_byte,
    }
    self._report(found)
    return totals.loss

  def _save(self, step, state, loss) -> None:
    self._read_pending()  # refuses to save a nan
    self._report_if_due()
    self.watchdog.pause()
    with self.ledger.within("save"):
      rest = (state.step, state.opt_state, state.history)
      meta = dataclasses.replace(self.meta, step=step)
      self.checkpoints.save(step, state.params, state.ema, rest, meta, loss)
    self.ledger.saved(step)

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

  def _set_up(self):
    """Compiled step and state, and all that writes while they run."""
    if self.start == 0 and jax.process_index() == 0:
      metrics_lib.write_config(self.workdir, self.config)
    self.ledger = ledger_lib.Ledger(self.workdir, self.stop.began)

    def make():
      with self.ledger.within("restore"):
        state = self._first_state()
      with self.ledger.within("compile"):
        return step_lib.compile_step(self.config, self.mesh), state

    train_step, state = self.stop.start("restoring or compiling", make)
    self.writer = metrics_lib.Writer(self.workdir, self.start)
    self.closing.callback(self.writer.close)
    self.meter = metrics_lib.Meter(self.config, self.start)
    self.watchdog = watchdog_lib.Watchdog(self.config.train.slow_step_factor)
    self.closing.callback(self.watchdog.close)
    self.ledger.starts_from(self.start)
    if self.start:
      self.progress.say(self.ledger.describe())
    return train_step, state

  def _first_state(self) -> step_lib.State:
    """Fresh, or that of the last whole checkpoint on this run's mesh."""
    like = step_lib.abstract_state(self.config, self.mesh)
    rest = (like.step, like.opt_state, like.history)
    while self.start:
      try:
        meta = checkpoint.load_meta(self.workdir, self.start)
        self._refuse_other_data(meta)
        params, ema, (step, opt_state, history) = self.checkpoints.restore(
          self.start, like.params, like.ema, rest
        )
      except checkpoint.Damaged as error:
        where = self.checkpoints.set_aside(self.start)
        self.start = self.checkpoints.latest_step() or 0
        said = f"{error}. Moved to {where}; going back to step {self.start}"
        if jax.process_count() > 1:  # the others may not have noticed
          raise checkpoint.Damaged(f"{said}: start the run again") from error
        self.progress.say(said)
        continue
      self.meta.batch_hash = meta.batch_hash
      return step_lib.State(step, params, ema, opt_state, history)
    return step_lib.create_state(self.config, self.mesh)

  def _refuse_other_data(self, before: checkpoint.Meta) -> None:
    if before.fingerprint != self.meta.fingerprint:
      raise config_lib.ConfigError(
        f"--workdir={self.workdir}: its checkpoint was trained on other data "
        f"(fingerprint {before.fingerprint}, now {self.meta.fingerprint}): the "
        "sources have changed since. Restore them, or name another workdir"
      )

  def _lacks_evaluation(self) -> bool:
    """Whether the evaluation after the last step was cut short (SIGTERM)."""
    if self.start == 0 or not self._evaluates_at(self.start):
      return False
    reports = metrics_lib.read(self.workdir)
    last = [r for r in reports if r["step"] == self.start]
    return bool(last) and "eval/loss" not in last[0]

  def _place(self, batch):
    # `causal` marks no prefix; without the field, kernels' masks are fixed.
    batch = {k: v for k, v in batch.items() if k != "prefix"}
    return sharding.place(batch, self.rows, self.config.train.batch_size)

  def _mesh(self):
    """The mesh in context, unless the mode is pmap, where none is."""
    jitted = self.config.mesh.mode == "jit"
    return jax.set_mesh(self.mesh) if jitted else contextlib.nullcontext()


def _chained(before: str, words: np.ndarray) -> str:
  """Digest of a digest and what comes after it."""
  text = bytes.fromhex(before) + words.astype("<u4").tobytes()
  return hashlib.blake2b(text, digest_size=8).hexdigest()


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
