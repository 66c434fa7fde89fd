"""Batches of token stores; the order is a pure function of (seed, step).

A source's windows (lm/data/packing.py) become rows by its objective
(lm/data/objectives.py). Training shuffles windows by a keyed bijection, new for
each epoch; validation keeps their order. What an objective draws follows from
the seed and the number of the row in training, from the number of the window in
validation. grain runs both as pure functions without state and reaches any step
in O(1).
"""

import dataclasses
import functools
from collections.abc import Generator, Iterable, Iterator

import grain
import jax
import numpy as np

from lm import batch as batch_lib
from lm import config as config_lib
from lm import schema
from lm.data import objectives, packing, prefetch
from lm.data import store as store_lib

# Packing and draws of validation: the same for every seed of a run.
_VALIDATION_SEED = 2**32  # above every seed of a run
# Rows of a source that `shares` reads.
_SAMPLED_ROWS = 64


def train_batches(
  config: config_lib.Config,
  prepared: store_lib.Prepared,
  *,
  start_step: int = 0,
  rows: tuple[int, int] | None = None,
) -> Generator[batch_lib.Batch, None, None]:
  """Yields training batches from `start_step` on.

  `rows` are the rows [first, last) of each global batch that this process
  reads; None means all rows. Iteration ends after `data.epochs`, the last
  batch padded with rows of weight 0; None epochs are endless. Closing or
  dropping the iterator stops the threads or the `data.processes`, which do not
  change a batch.
  """
  make = _TrainBatch(config, prepared, rows or (0, config.train.batch_size))
  n, n_processes = n_train_batches(config, prepared), config.data.processes
  ahead = _batches_ahead(config)
  yield from prefetch.to_host(make, start_step, n, ahead, n_processes)


@dataclasses.dataclass
class _TrainBatch:
  """Makes the rows [first, last) of a training batch from its step. Each
  process gets one, and finds order and windows itself.
  """

  config: config_lib.Config
  prepared: store_lib.Prepared
  rows: tuple[int, int]

  @functools.cached_property
  def order(self) -> grain.MapDataset:
    return training_order(self.config, self.prepared)

  @functools.cached_property
  def windows(self) -> list[packing.Windows]:
    return training_windows(self.config, self.prepared)

  @functools.cached_property
  def looks_ahead(self) -> bool:
    return self.config.data.looks_ahead  # parses the sources

  def row(self, i: int) -> batch_lib.Batch | None:
    if i >= len(self.order) or (source := self.order[i]) is None:
      return None
    s, window = source
    prepared, windows = self.prepared, self.windows[s]
    return _row(
      prepared, prepared.train[s], windows[window], self.config.seed, i
    )

  def __call__(self, step: int) -> batch_lib.Batch:
    t, (first, last) = self.config.train, self.rows
    at = range(step * t.batch_size + first, step * t.batch_size + last)
    return _stacked(map(self.row, at), t.sequence_length, self.looks_ahead)


def n_train_batches(
  config: config_lib.Config, prepared: store_lib.Prepared
) -> int:
  """Number of batches in all epochs; if endless, more than any run's steps."""
  return _ceil(len(training_order(config, prepared)), config.train.batch_size)


def training_order(
  config: config_lib.Config, prepared: store_lib.Prepared
) -> grain.MapDataset:
  """(store index, window index) of each training row, over all epochs.

  Without `train_weights` an epoch is one shuffle of all windows. With weights,
  each source is shuffled separately and repeated as often as the weight needs;
  an epoch then has as many rows as all sources have windows.
  """
  weights = config.data.train_weights
  # SeedSequence keeps seeds far apart: grain adds the epoch number to a seed.
  seeds = np.random.SeedSequence(config.seed).generate_state(
    len(prepared.train) + 1
  )
  windows = [
    grain.MapDataset.range(len(windows)).map(lambda i, s=s: (s, i))
    for s, windows in enumerate(training_windows(config, prepared))
  ]
  n = sum(map(len, windows))
  epochs = config.data.epochs
  if not weights:
    everything = grain.MapDataset.concatenate(windows)
    return everything.shuffle(seed=int(seeds[-1])).repeat(epochs)
  mixed = grain.MapDataset.mix(
    [
      w.shuffle(seed=int(seed)).repeat()
      for w, seed in zip(windows, seeds[:-1], strict=True)
    ],
    weights,
  )
  return mixed if epochs is None else mixed[: epochs * n]


def training_windows(
  config: config_lib.Config, prepared: store_lib.Prepared
) -> list[packing.Windows]:
  """Windows of each training source."""
  return [
    packing.windows(store, config, seed=config.seed) for store in prepared.train
  ]


def validation_windows(
  config: config_lib.Config, prepared: store_lib.Prepared
) -> list[packing.Windows]:
  """Windows of each validation source, the same for every seed."""
  return [
    packing.windows(store, config, seed=_VALIDATION_SEED)
    for store in prepared.validation
  ]


def validation_batches(
  config: config_lib.Config,
  prepared: store_lib.Prepared,
  *,
  rows: tuple[int, int] | None = None,
) -> Iterator[tuple[int, batch_lib.Batch]]:
  """Yields (source index, batch), source after source, in fixed order.

  The last batch of a source is padded with rows of weight 0;
  `train.eval_batches` limits the batches per source. A causal source scores
  every token but bos once: over the whole source, the sum of
  `tokenizer.byte_lengths[targets] * weights` equals `n_bytes` of the store.
  """
  t = config.train
  first, last = rows or (0, t.batch_size)
  for s, windows in enumerate(validation_windows(config, prepared)):
    store = prepared.validation[s]

    def row(i: int, store=store, windows=windows) -> batch_lib.Batch | None:
      if i >= len(windows):
        return None
      return _row(prepared, store, windows[i], _VALIDATION_SEED, i)

    def make(step: int, row=row, store=store) -> batch_lib.Batch:
      at = range(step * t.batch_size + first, step * t.batch_size + last)
      ahead = store.objective.looks_ahead
      return _stacked(map(row, at), t.sequence_length, ahead)

    n = _ceil(len(windows), t.batch_size)
    n = n if t.eval_batches is None else min(n, t.eval_batches)
    for batch in prefetch.to_host(make, 0, n, _batches_ahead(config)):
      yield s, batch


def sample(
  config: config_lib.Config, prepared: store_lib.Prepared, s: int, n: int
) -> Iterator[batch_lib.Batch]:
  """Yields at most `n` rows of training source `s`, evenly spread."""
  store, windows = prepared.train[s], training_windows(config, prepared)[s]
  for i in range(0, len(windows), _ceil(len(windows), n)):
    yield _row(prepared, store, windows[i], config.seed, i)


def shares(
  config: config_lib.Config, prepared: store_lib.Prepared, s: int
) -> tuple[float, float]:
  """Of the positions of training source `s`, the shares that are scored and
  that are padding, from a sample of its rows. Raises ConfigError if none is
  scored.
  """
  rows = list(sample(config, prepared, s, _SAMPLED_ROWS))
  scored = float(np.mean([row.weights > 0 for row in rows]))
  if scored == 0:
    raise schema.ConfigError(
      f"source {prepared.train[s].spec!r}: of "
      f"{schema.counted(len(rows), 'row')} none has a target: there is nothing "
      "to learn. Look at its documents with `python -m lm.data --show=3`"
    )
  return scored, float(np.mean([row.segments == 0 for row in rows]))


def _row(
  prepared: store_lib.Prepared,
  store: store_lib.TokenStore,
  window: objectives.Window,
  seed: int,
  i: int,
) -> batch_lib.Batch:
  """Row `i` of a run or of a validation source, drawn from (seed, i)."""
  rng = np.random.Generator(
    np.random.Philox(key=np.array([seed, i], np.uint64))
  )
  return objectives.row(store.objective, prepared.tokenizer, window, rng)


def _batches_ahead(config: config_lib.Config) -> int:
  return config.data.prefetch_rows // config.train.batch_size


def _ceil(a: int, b: int) -> int:
  return -(-a // b)  # Integers: floats round the length of endless epochs.


def _stacked(
  rows: Iterable[batch_lib.Batch | None], length: int, prefix: bool
) -> batch_lib.Batch:
  """Stacks rows; None is a padding row. With `prefix`, a row without one gets a
  prefix of no position.
  """
  padding = jax.tree.map(
    lambda a: a[0], batch_lib.empty(1, length, prefix=prefix)
  )

  def filled(row: batch_lib.Batch | None) -> batch_lib.Batch:
    if row is None or not prefix or row.prefix is not None:
      return padding if row is None else row
    return dataclasses.replace(row, prefix=padding.prefix)

  return jax.tree.map(lambda *leaves: np.stack(leaves), *map(filled, rows))
