"""Batches of token stores; the order is a pure function of (seed, step).

Window i of a token store is tokens [i T, (i + 1) T], T + 1 in number: each
token but the first is a target once. Training shuffles windows by a keyed
bijection, new for each epoch; validation keeps the order of the store. grain
runs both as pure functions without state and reaches any step in O(1).
"""

from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np

from lm import batch as batch_lib
from lm import config as config_lib
from lm.data import objectives
from lm.data import store as store_lib

# Threads that read windows, in addition to TensorStore's own threads.
_THREADS = 2


def n_windows(store: store_lib.TokenStore, length: int) -> int:
  return _ceil(store.n_tokens - 1, length)


def train_batches(
  config: config_lib.Config,
  prepared: store_lib.Prepared,
  *,
  start_step: int = 0,
  rows: tuple[int, int] | None = None,
) -> Iterator[batch_lib.Batch]:
  """Yields training batches from `start_step` on.

  `rows` are the rows [first, last) of each global batch that this process
  reads; None means all rows. Iteration ends after `data.epochs`, the last
  batch padded with rows of weight 0; None epochs are endless. Closing or
  dropping the iterator stops the threads.
  """
  t = config.train
  first, last = rows or (0, t.batch_size)
  order = training_order(config, prepared)
  n_batches = n_train_batches(config, prepared)

  def make(step: int) -> batch_lib.Batch:
    at = range(step * t.batch_size + first, step * t.batch_size + last)
    windows = [order[i] if i < len(order) else None for i in at]
    return _batch(prepared.train, windows, t.sequence_length)

  yield from _prefetched(config, make, start_step, n_batches)


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
  length, weights = config.train.sequence_length, config.data.train_weights
  # SeedSequence keeps seeds far apart: grain adds the epoch number to a seed.
  seeds = np.random.SeedSequence(config.seed).generate_state(
    len(prepared.train) + 1
  )
  windows = [
    grain.MapDataset.range(n_windows(store, length)).map(_Tag(s))
    for s, store in enumerate(prepared.train)
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


def _n_batches(config: config_lib.Config, store: store_lib.TokenStore) -> int:
  t = config.train
  n = _ceil(n_windows(store, t.sequence_length), t.batch_size)
  return n if t.eval_batches is None else min(n, t.eval_batches)


def validation_batches(
  config: config_lib.Config,
  prepared: store_lib.Prepared,
  *,
  rows: tuple[int, int] | None = None,
) -> Iterator[tuple[int, batch_lib.Batch]]:
  """Yields (source index, batch), source after source, in fixed order.

  Every token but bos is scored once, and the last batch of a source is padded
  with rows of weight 0; `train.eval_batches` limits the batches per source.
  The number of bytes scored is the sum of `tokenizer.byte_lengths[targets] *
  weights`; over a whole source, this sum equals `n_bytes` of the store.
  """
  t = config.train
  first, last = rows or (0, t.batch_size)
  for s, store in enumerate(prepared.validation):
    n = n_windows(store, t.sequence_length)

    def make(step: int, s: int = s, n: int = n) -> batch_lib.Batch:
      at = range(step * t.batch_size + first, step * t.batch_size + last)
      windows = [(s, i) if i < n else None for i in at]
      return _batch(prepared.validation, windows, t.sequence_length)

    for batch in _prefetched(config, make, 0, _n_batches(config, store)):
      yield s, batch


def _ceil(a: int, b: int) -> int:
  return -(-a // b)  # Integers: floats round the length of endless epochs.


class _Tag:
  """Maps window index i to (store index, i)."""

  def __init__(self, store: int):
    self._store = store

  def __call__(self, i: int) -> tuple[int, int]:
    return self._store, i


def _batch(
  stores: list[store_lib.TokenStore],
  windows: list[tuple[int, int] | None],
  length: int,
) -> batch_lib.Batch:
  """Stacks a row per (store index, window index); None is a padding row."""
  padding = jax.tree.map(lambda a: a[0], batch_lib.empty(1, length))

  def row(window: tuple[int, int] | None) -> batch_lib.Batch:
    if window is None:
      return padding
    s, i = window
    return objectives.causal(*stores[s].window(i * length, length + 1))

  return jax.tree.map(lambda *rows: np.stack(rows), *map(row, windows))


def _prefetched(
  config: config_lib.Config,
  make: Callable[[int], batch_lib.Batch],
  start: int,
  stop: int,
) -> Iterator[batch_lib.Batch]:
  """Yields make(start), ..., make(stop - 1), prefetched by grain's threads."""
  ahead = max(_THREADS, config.data.prefetch_rows // config.train.batch_size)
  batches = grain.MapDataset.range(start, stop).map(make)
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=ahead)
  # Closing this generator closes grain's iterator and stops grain's threads.
  yield from iter(batches.to_iter_dataset(options))
