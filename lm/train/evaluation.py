"""Evaluation during training: when, on what, and what is reported."""

import contextlib
import functools
import itertools
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import config as config_lib
from lm import sharding
from lm.data import pipeline, store
from lm.evaluate import perplexity
from lm.model import decoder
from lm.train import metrics, programs
from lm.train import stop as stop_lib
from lm.train import tasks as tasks_lib


class Evaluation:
  """The evaluations of a run: validation sources, and tasks of
  lm-evaluation-harness, each maybe none. Raises ConfigError as `tasks.Tasks`.
  """

  def __init__(
    self,
    config: config_lib.Config,
    mesh: jax.sharding.Mesh,
    prepared: store.Prepared,
    stop: stop_lib.Stop,
  ):
    self._config, self._mesh = config, mesh
    self._prepared, self._stop = prepared, stop
    self._rows = programs.batch_sharding(config, mesh)
    # Mode pmap has no mesh in context: the result sharding must be given.
    whole = NamedSharding(mesh, P()) if config.mesh.mode == "pmap" else None
    self._step = perplexity.eval_step(config.model, whole)
    load = functools.partial(
      tasks_lib.Tasks, config, mesh, self._rows, prepared.tokenizer, stop
    )
    self._tasks = stop.start("loading tasks", load)

  def due(self, step: int) -> bool:
    return self._validates_at(step) or self._has_tasks_at(step)

  def lacks(self, workdir: str, step: int) -> bool:
    """Whether a stop (SIGTERM) cut short the evaluation after `step`."""
    due = {
      "eval/loss": self._validates_at(step),
      "task/": self._has_tasks_at(step),
    }
    reports = metrics.read(workdir) if step else []
    return any(
      is_due and not any(name.startswith(prefix) for name in report)
      for report in reports
      if report["step"] == step
      for prefix, is_due in due.items()
    )

  def validate(
    self, step: int, params: decoder.Params
  ) -> dict[str, float] | None:
    """What to report of the validation sources after `step`: `summary`. None
    if none is due, or if a stop cut the evaluation short.
    """
    if not self._validates_at(step):
      return None
    n_rows = self._config.train.batch_size
    batches = pipeline.validation_batches(
      self._config,
      self._prepared,
      rows=sharding.local_rows(self._rows, n_rows),
    )
    jitted = self._config.mesh.mode == "jit"
    parts = []
    with jax.set_mesh(self._mesh) if jitted else contextlib.nullcontext():
      for s, pairs in itertools.groupby(batches, key=lambda pair: pair[0]):
        part = perplexity.evaluate_batches(
          self._step,
          params,
          (sharding.place(batch, self._rows, n_rows) for _, batch in pairs),
          self._prepared.tokenizer.target_bytes,
          should_stop=self._stop.agreed,
        )
        if part is None:
          return None
        parts.append((self._prepared.validation[s], part))
    return summary(parts)

  def tasks(self, step: int, params: decoder.Params) -> dict[str, float] | None:
    """The scores of the tasks after `step`, as `Tasks.run`. None if none is
    due, or if a stop cut them short.
    """
    if self._stop.stopping or not self._has_tasks_at(step):
      return None
    return self._tasks.run(params)

  def _validates_at(self, step: int) -> bool:
    t = self._config.train
    due = step % t.eval_every == 0 or step == t.steps
    return due and bool(self._prepared.validation)

  def _has_tasks_at(self, step: int) -> bool:
    return self._tasks.due(step, self._config.train.steps)


def summary(
  parts: Sequence[tuple[store.TokenStore, perplexity.Totals]],
) -> dict[str, float]:
  """What to report of an evaluation: `eval/loss` and more of it over all causal
  sources; over all sources, if none is causal.

  Of several sources, each is reported with its loss and its denominator: the
  weight of its scored tokens.
  """
  totals = perplexity.overall([(source.spec, part) for source, part in parts])
  said = {
    "eval/loss": totals.loss,
    "eval/perplexity": totals.perplexity,
    "eval/bits_per_byte": totals.bits_per_byte,
  }
  if len(parts) > 1:
    for source, part in parts:
      said[f"eval/{source.spec}/loss"] = part.loss
      said[f"eval/{source.spec}/tokens"] = part.n_tokens
  return said
