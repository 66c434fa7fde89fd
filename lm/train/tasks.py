"""Runs tasks of lm-evaluation-harness during training (config.tasks).

lm/evaluate/harness.py and the sampler behind it are imported inside functions:
they are a tenth of a start, and most runs have no tasks.
"""

import jax
from jax.sharding import NamedSharding

from lm import config as config_lib
from lm import processes
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder
from lm.train import stop as stop_lib


class Tasks:
  """The tasks of a run, maybe none, loaded once by process 0.

  Raises ConfigError, on every process, without lm-eval, on unknown tasks, and
  on data impossible to load.
  """

  def __init__(
    self,
    config: config_lib.Config,
    mesh: jax.sharding.Mesh,
    rows: NamedSharding,
    tokenizer: tokenizer_lib.Tokenizer,
    stop: stop_lib.Stop,
  ):
    self._config, self._tasks = config, config.tasks
    if config.tasks is None:
      return

    from lm.evaluate import harness

    harness.check_installed("config.tasks")
    self._mesh, self._rows = mesh, rows
    self._tokenizer, self._stop = tokenizer, stop
    self._loaded = processes.only_first(self._find)

    from lm.evaluate import harness_model

    self._step = harness_model.make_step(config.model, mesh)

  def due(self, step: int, last_step: int) -> bool:
    if self._tasks is None:
      return False
    return step % self._tasks.every == 0 or step == last_step

  def run(self, params: decoder.Params) -> dict[str, float] | None:
    """Collective: returns {"task/NAME/METRIC": value} on process 0 and {} on
    the remaining processes. Returns None after a stop (SIGTERM), checked for
    between batches.
    """
    from lm.evaluate import harness, harness_model, likelihood

    assert self._tasks is not None
    train = self._config.train
    answerer = harness_model.Answerer(
      self._config.model,
      params,
      self._tokenizer,
      self._mesh,
      train.batch_size // train.microbatches,
      self._stop.agreed,
      self._step,
    )
    model = harness_model.HarnessModel(answerer)
    limit = self._tasks.limit
    try:
      found = answerer.lead(
        lambda: harness.run(model, self._loaded, limit=limit)
      )
    except likelihood.Stopped:
      return None
    return {
      f"task/{name}/{metric}": score["value"]
      for name, task in (found or {}).items()
      for metric, score in task["metrics"].items()
      if score["value"] is not None
    }

  def _find(self):
    from lm.evaluate import harness

    assert self._tasks is not None
    names = "config.tasks.names", "config.tasks.include_path"
    return harness.find(
      self._tasks.names,
      self._tasks.include_path,
      self._config.data.cache_dir,
      names,
    )
