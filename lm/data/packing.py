"""Packing: which tokens of a token store fill which row.

A window is the tokens of one row and one more, since each token is the target
of the token before. `chop` cuts the store every T tokens. `best_fit` puts whole
documents into windows, the longest first, each where the least room is left
(arXiv:2404.10830): no document is cut that fits a window. Both are pure
functions of the documents' lengths, the objective and the seed.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lm import config as config_lib
from lm import objective as objective_lib
from lm import schema
from lm.data import fim, objectives, spans
from lm.data import store as store_lib
from lm.data import tokenizer as tokenizer_lib


def windows(
  store: store_lib.TokenStore, config: config_lib.Config, *, seed: int
) -> "Windows":
  """The windows of a store for rows of `train.sequence_length`, by
  `data.packing` and the store's objective; the same object for the same
  arguments.
  """
  length = config.train.sequence_length
  if config.data.packing == "chop" and store.objective.choppable:
    return Chopped(store, length)
  return _best_fit(store, store.objective, length, seed)


class Chopped:
  """Window i has tokens [i T, (i + 1) T], T + 1 in number."""

  def __init__(self, store: store_lib.TokenStore, length: int):
    self._store, self._length = store, length

  def __len__(self) -> int:
    return -(-(self._store.n_tokens - 1) // self._length)

  def __getitem__(self, i: int) -> objectives.Window:
    n = self._length
    return objectives.Window(*self._store.window(i * n, n + 1))

  @property
  def cut_share(self) -> float:
    """Share of documents that no single window holds."""
    ends = self._store.ends
    # A document is whole in a window if no cut falls between its tokens.
    first = np.concatenate([[0], ends[:-1]]) // self._length
    return float(np.mean((ends - 2) // self._length > first))


class BestFit:
  """Windows of whole documents; a document longer than a window is cut into
  windows, and the rest is packed as a document.
  """

  def __init__(
    self,
    store: store_lib.TokenStore,
    objective: objective_lib.Causal,
    length: int,
    seed: int,
  ):
    self._store, self._length = store, length
    shape = shape_of(objective, length)
    lengths = np.diff(store.ends, prepend=0)
    # As in Chopped.
    self.cut_share = float(np.mean(lengths > shape.longest))
    starts = store.ends - lengths
    if isinstance(objective, objective_lib.Chat):
      pieces = _chats(objective, starts, lengths, shape)
    else:
      pieces = _cut(starts, lengths, shape)
    self._starts, self._sizes = pieces
    if not len(self._sizes):
      raise schema.ConfigError(
        f"source {store.spec!r}: has "
        f"{schema.counted(len(lengths), 'conversation')}, and none fits a row "
        f"of train.sequence_length={length}; the shortest has "
        f"{lengths.min()} tokens: write |chat(long='cut_start'), which keeps "
        "their ends, or train with a larger one"
      )
    needed = shape.size(self._sizes)
    rng = np.random.Generator(np.random.Philox(key=seed))
    bins = best_fit(needed, shape.room, rng)
    # In the order of the first document: the first windows are of all lengths.
    _, first, bins = np.unique(bins, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    order = np.argsort(place[bins], kind="stable")
    self._starts, self._sizes = self._starts[order], self._sizes[order]
    self._ends = np.cumsum(np.bincount(bins)[np.argsort(first)])

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, i: int) -> objectives.Window:
    some = slice(int(self._ends[i - 1]) if i else 0, int(self._ends[i]))
    starts, sizes = self._starts[some], self._sizes[some]
    tokens, scored = self._store.pieces(starts, sizes)
    documents = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    return padded(self._store.pad, self._length, tokens, documents, scored)


class Shape(NamedTuple):
  """How documents of an objective fit a window of T + 1 tokens."""

  # Most tokens of the store in one piece, and how many of them a document's
  # next piece repeats.
  longest: int
  overlap: int
  # Tokens in a window, and how many of them a piece of n tokens takes at most.
  room: int
  size: Callable[[np.ndarray], np.ndarray]


def shape_of(objective: objective_lib.Causal, length: int) -> Shape:
  """The shape of an objective in rows of `length`.

  Raises ConfigError if a row is too short for any text.
  """
  room = length + 1
  if isinstance(objective, objective_lib.Masked):
    return Shape(length, 0, length, lambda n: n)
  if not isinstance(
    objective, objective_lib.Fim | objective_lib.SpanCorruption
  ):
    return Shape(room, 1, room, lambda n: n)

  def size(n):
    if isinstance(objective, objective_lib.Fim):
      return n + fim.EXTRA
    return n + 2 + 2 * spans.counts(objective, n)[1]

  n = np.arange(room + 1)
  fits = size(n) <= room
  if isinstance(objective, objective_lib.SpanCorruption):
    fits &= spans.counts(objective, n)[1] <= len(tokenizer_lib.SENTINELS)
  longest = int(n[fits].max(initial=0))
  schema.require(
    longest > 0,
    "config.train.sequence_length",
    length,
    f"too short for {objective}, which adds tokens to each text",
  )
  return Shape(longest, 0, room, size)


def _cut(
  starts: np.ndarray, lengths: np.ndarray, shape: Shape
) -> tuple[np.ndarray, np.ndarray]:
  """(first token, tokens) of each piece: documents that no window holds are cut
  into pieces as long as possible.
  """
  step = shape.longest - shape.overlap
  n_pieces = 1 + np.maximum(0, -(-(lengths - shape.longest) // step))
  document = np.repeat(np.arange(len(lengths)), n_pieces)
  firsts = np.cumsum(n_pieces) - n_pieces
  offsets = (np.arange(len(document)) - firsts[document]) * step
  sizes = np.minimum(shape.longest, lengths[document] - offsets)
  return starts[document] + offsets, sizes


def _chats(
  objective: objective_lib.Chat,
  starts: np.ndarray,
  lengths: np.ndarray,
  shape: Shape,
) -> tuple[np.ndarray, np.ndarray]:
  """As `_cut`, of conversations: those that no window holds are dropped, or
  lose their start or their end.
  """
  if objective.long == "drop":
    kept = lengths <= shape.longest
    return starts[kept], lengths[kept]
  lost = np.maximum(0, lengths - shape.longest)
  if objective.long == "cut_start":
    starts = starts + lost
  return starts, lengths - lost


# The windows of a store, in a fixed order.
Windows = Chopped | BestFit


@functools.lru_cache(maxsize=64)
def _best_fit(
  store: store_lib.TokenStore,
  objective: objective_lib.Causal,
  length: int,
  seed: int,
) -> BestFit:
  return BestFit(store, objective, length, seed)


def best_fit(
  sizes: np.ndarray, room: int, rng: np.random.Generator
) -> np.ndarray:
  """Best-fit decreasing: the bin of each item, int64 [n], from 0.

  No bin has more than `room`. `rng` decides which of equal items goes where.
  Takes items of one size together: the time depends on the number of distinct
  sizes, little on the number of items.
  """
  order = np.lexsort((rng.random(len(sizes)), -sizes))
  bins = np.empty(len(sizes), np.int64)
  # By room left: the bins with that room, and their number.
  open_bins: dict[int, np.ndarray] = {}
  counts = np.zeros(room + 1, np.int64)
  n_bins = 0

  def put(left: int, ids: np.ndarray) -> None:
    if len(ids):
      before = open_bins.get(left)
      open_bins[left] = ids if before is None else np.append(before, ids)
      counts[left] += len(ids)

  cuts = np.flatnonzero(np.diff(sizes[order])) + 1
  for items in np.split(order, cuts) if len(sizes) else ():
    size = int(sizes[items[0]])
    while len(items):
      fitting = np.flatnonzero(counts[size:])
      if len(fitting):
        left = size + int(fitting[0])
        ids = open_bins.pop(left)
        counts[left] = 0
      else:
        left = room
        n_new = math.ceil(len(items) / (room // size))
        ids = np.arange(n_bins, n_bins + n_new)
        n_bins += n_new
      # An item makes its bin the best fit for the next item of its size.
      each = left // size
      n = min(len(items), each * len(ids))
      bins[items[:n]] = np.repeat(ids, each)[:n]
      full, rest = divmod(n, each)
      put(left - each * size, ids[:full])
      if rest:
        put(left - rest * size, ids[full : full + 1])
      put(left, ids[full + (rest > 0) :])
      items = items[n:]
  return bins


def padded(
  pad: int,
  length: int,
  tokens: np.ndarray,
  documents: np.ndarray,
  scored: np.ndarray | None = None,
) -> objectives.Window:
  """A window [length + 1] of fewer tokens, with padding at the end."""
  both = np.zeros((2, length + 1), np.int32)
  both[0] = pad
  both[:, : len(tokens)] = tokens, documents
  if scored is not None:
    scored = np.pad(scored, (0, length + 1 - len(scored)))
  return objectives.Window(both[0], both[1], scored)
