"""Reports of steps: read a step behind the devices, judged, written.

The metrics of a step are read while the devices run the next one. A loss or a
gradient norm that is not finite is found here, before anything is saved.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lm import checkpoint, locks, schema
from lm import config as config_lib
from lm.data import pipeline, store
from lm.evaluate import perplexity
from lm.model import counts
from lm.train import ledger as ledger_lib
from lm.train import meter as meter_lib
from lm.train import metrics as metrics_lib


class Diverged(schema.ConfigError, FloatingPointError):
  """The loss diverged. A restart with the same config would diverge again: the
  exit code is that of ConfigError, and launchers do not retry.
  """


class Reporter:
  """Reads, judges and reports the steps of one start of a run.

  Keeps `batch_hash` and `unreported` of `meta` up to the last step read.
  """

  def __init__(
    self,
    config: config_lib.Config,
    workdir: str,
    meta: checkpoint.Meta,
    checkpoints: checkpoint.Checkpoints,
    ledger: ledger_lib.Ledger,
    progress: metrics_lib.Progress,
    lock: locks.Lock | None,
    start: int,
  ):
    self._config, self._workdir, self._meta = config, workdir, meta
    self._checkpoints, self._ledger = checkpoints, ledger
    self._progress, self._lock = progress, lock
    self._writer = metrics_lib.Writer(workdir, start)
    self._meter = meter_lib.Meter(config, start)
    # (step, metrics still on the devices) of the last step.
    self._pending: tuple[int, dict[str, Any]] | None = None
    # (step, numbers, values of each layer) of the last step read.
    self._unreported: (
      tuple[int, dict[str, float], dict[str, list[float]]] | None
    ) = None
    # Steps skipped so far, and consecutive skips up to the last step.
    self._n_skipped: int | None = None
    self._n_in_a_row = 0

  def dispatched(self, step: int, metrics: dict[str, Any]) -> None:
    """Reads and, if due, reports the step before; `metrics` of `step` are still
    on the devices. Raises Diverged, as `read` does.
    """
    self.read()
    self.report_if_due()
    self._pending = step, metrics

  def read(self) -> None:
    """Fetches the last step's metrics. Raises Diverged on a nonfinite loss or
    gradient norm without SkipConfig, or on too many skipped steps.
    """
    if self._pending is None:
      return
    step, on_device = self._pending
    self._pending = None
    found = jax.device_get(on_device)
    batch = found.pop("batch")
    self._meta.batch_hash = _chained(self._meta.batch_hash, batch)
    layers = {k: v.tolist() for k, v in found.pop("layers").items()}
    numbers = {k: float(v) for k, v in found.items()}
    finite = np.isfinite([numbers["loss"], numbers["grad_norm"]]).all()
    skip = self._config.optimizer.skip
    if not finite and skip is None:
      raise Diverged(
        f"step {step}: loss {numbers['loss']}, gradient norm "
        f"{numbers['grad_norm']}; {self._ways_back()}"
      )
    if skip is not None:
      self._count_skipped(step, int(numbers["skipped"]), skip.window)
    weight = numbers["weight"]
    if weight == 0:  # no token of the batch is scored
      numbers["loss"] = math.nan
    elif finite:
      nats, tokens = self._meta.unreported
      self._meta.unreported = nats + numbers["loss"] * weight, tokens + weight
    self._unreported = step, numbers, layers

  def report_if_due(self) -> None:
    t = self._config.train
    if self._unreported and any(
      every is not None and self._unreported[0] % every == 0
      for every in (t.log_every, t.statistics_every)
    ):
      self.report()

  def report(self, evaluation: dict[str, float] | None = None) -> None:
    """Reports the last step read, together with `evaluation`. If the step was
    reported already, adds `evaluation` to the report. Raises RunError if
    another process has taken over the run.
    """
    if self._unreported is None:
      if evaluation:
        self._writer.amend(evaluation)
        self._progress.show(self._writer.last)
      return
    (step, numbers, layers), self._unreported = self._unreported, None
    if self._lock is not None and self._lock.lost:
      raise schema.RunError(
        f"--workdir={self._workdir}: another process has taken over this run, "
        "since this one gave no sign of life; see lock.json there"
      )
    self._ledger.book()
    spent = self._ledger.seconds
    nats, tokens = self._meta.unreported
    self._meta.unreported = (0.0, 0.0)
    loss = nats / tokens if tokens else numbers["loss"]
    every = self._config.train.statistics_every
    if every is None or step % every:
      layers = {}
    self._writer.write(
      {
        "step": step,
        "tokens": step * self._config.tokens_per_step,
        "train/loss": loss,
        "train/last_loss": numbers["loss"],
        "train/perplexity": perplexity.exponential(loss),
        "grad_norm": numbers["grad_norm"],
        "lr": numbers["lr"],
        "batch_hash": self._meta.batch_hash,
        **({"skipped": numbers["skipped"]} if "skipped" in numbers else {}),
        **{f"layers/{name}": values for name, values in layers.items()},
        **self._meter.read(step, spent["step"], spent["data_wait"]),
        **(evaluation or {}),
      }
    )
    self._progress.show(self._writer.last)

  def close(self) -> None:
    self._writer.close()

  def _count_skipped(self, step: int, n_skipped: int, most: int) -> None:
    """Raises Diverged after `most` consecutive skipped steps."""
    before = self._n_skipped
    self._n_skipped = n_skipped
    if before is None:  # the first step of this start
      return
    self._n_in_a_row = self._n_in_a_row + 1 if n_skipped > before else 0
    if self._n_in_a_row >= most:
      raise Diverged(
        f"step {step}: the last {most} steps (optimizer.skip.window) were all "
        f"left out; {self._ways_back()}"
      )

  def _ways_back(self) -> str:
    """For messages: the checkpoints kept, and how to resume from them."""
    found = self._checkpoints.steps()
    skip = ", or set optimizer.skip to leave such steps out"
    if self._config.optimizer.skip is not None:
      skip = ""
    if not found:
      return f"there is no checkpoint. Lower optimizer.peak_lr{skip}"
    losses = {
      r["step"]: r.get("train/loss") for r in metrics_lib.read(self._workdir)
    }
    known = [
      f"{step} (training loss {losses[step]:.4g})"
      if losses.get(step) is not None
      else str(step)
      for step in found
    ]
    return (
      f"last checkpoint: step {found[-1]}; all that are kept: "
      f"{', '.join(known)}. Go on from one by --from_step=STEP "
      "--config.checkpoint.on_mismatch=fresh_optimizer with a lower "
      f"optimizer.peak_lr{skip}"
    )


def _chained(before: str, words: np.ndarray) -> str:
  """Chained batch hash: hex digest of the hash `before` and new words."""
  text = bytes.fromhex(before) + words.astype("<u4").tobytes()
  return hashlib.blake2b(text, digest_size=8).hexdigest()


def say_what_runs(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  prepared: store.Prepared,
  start: int,
  say: Callable[[str], None],
) -> None:
  """Prints the size of the model, the mesh, and the steps of this start."""
  shape = " x ".join(f"{k} {v}" for k, v in mesh.shape.items())
  tokens = sum(s.n_tokens for s in prepared.train)
  say(
    f"{counts.parameter_count(config.model):,} parameters on "
    f"{schema.counted(mesh.size, f'{jax.devices()[0].device_kind} device')}, "
    f"{config.mesh.mode} {shape}; "
    f"{tokens:,} training tokens, {config.tokens_per_step:,} a step; "
    f"from step {start} to {config.train.steps}"
  )
  if start:
    return
  for s, source in enumerate(prepared.train):
    scored, padding = pipeline.shares(config, prepared, s)
    say(
      f"{source.spec}: {scored:.0%} of the positions are scored, {padding:.0%} "
      "are padding"
    )
  if pipeline.n_train_batches(config, prepared) == config.train.steps:
    say(
      f"data.epochs={config.data.epochs}: the data end at step "
      f"{config.train.steps}, and the schedule with them"
    )
