"""Cuts documents into windows of the model's context and packs batches.

A document is the tokens bos, text, eos. Every token but bos is a target, scored
in exactly one window.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lm import batch as batch_lib

# Length of the shortest rows: a kernel may need whole tiles of 128.
MIN_LENGTH = 128


class Window(NamedTuple):
  """Inputs are tokens [first, stop), targets are tokens [first + 1, stop + 1);
  the last `n_scored` targets are scored.
  """

  first: int
  stop: int
  n_scored: int


class Place(NamedTuple):
  """Position of scored targets in a batch: columns [first, stop) of `row`.

  `document` counts from 0; `is_last` is True if the targets end the document.
  """

  document: int
  row: int
  first: int
  stop: int
  is_last: bool


def cut(n_targets: int, context: int, stride: int) -> Iterator[Window]:
  """Yields windows of at most `context` tokens; each target is scored once.

  The first window scores all of its targets, each later window `stride` more
  targets after `context - stride` unscored tokens. The last window reaches back
  as far as the context allows.

  These are lm-evaluation-harness's `get_rolling_token_windows` of the same
  targets, with `context_len = context - stride + 1`. That harness has no eos
  among them: its last window of a document that is longer than the context ends
  a token earlier, and so begins a token earlier.
  """
  stop = scored = min(context, n_targets)
  yield Window(0, stop, scored)
  while stop < n_targets:
    scored = min(stride, n_targets - stop)
    stop += scored
    yield Window(stop - context, stop, scored)


def row_length(n: int, context: int) -> int:
  """Length of rows that hold `n` tokens: powers of two make few programs."""
  return min(2 ** math.ceil(math.log2(max(n, MIN_LENGTH))), context)


def pack(
  documents: Iterable[np.ndarray],
  n_rows: int,
  context: int,
  stride: int,
  usual: int | None = None,
) -> Iterator[tuple[batch_lib.Batch, list[Place]]]:
  """Packs windows: yields batches [n_rows, T] and places of targets. T is for
  `usual` tokens (None: the context), and more where a window is longer.

  Documents stay in order. Each window goes to the first row with room. Windows
  in one row are separate segments: packing changes no number. The rest is
  padding.
  """
  least = row_length(usual or context, context)
  rows = Rows(n_rows, least)
  for document, tokens in enumerate(documents):
    n_targets = len(tokens) - 1
    for window in cut(n_targets, context, stride):
      is_last = window.stop == n_targets
      if not rows.add(document, tokens, window, is_last):
        if rows.places:
          yield rows.batch, rows.places
        n = max(window.stop - window.first, least)
        rows = Rows(n_rows, row_length(n, context))
        rows.add(document, tokens, window, is_last)
  if rows.places:
    yield rows.batch, rows.places


class Rows:
  """A batch of [n_rows, context] being packed; `places` in order of `add`."""

  def __init__(self, n_rows: int, context: int):
    self.batch = batch_lib.empty(n_rows, context)
    self.places: list[Place] = []
    self._used = np.zeros(n_rows, np.int64)

  def add(
    self, document: int, tokens: np.ndarray, window: Window, is_last: bool
  ) -> bool:
    """Puts the window into the first row with room; False if no row fits."""
    length = window.stop - window.first
    batch, context = self.batch, self.batch.inputs.shape[1]
    (fitting,) = np.nonzero(self._used + length <= context)
    if not len(fitting):
      return False
    row = int(fitting[0])
    first = int(self._used[row])
    stop = first + length
    self._used[row] = stop
    scored = stop - window.n_scored
    self.places.append(Place(document, row, scored, stop, is_last))
    read = tokens[window.first : window.stop + 1]
    batch.inputs[row, first:stop] = read[:-1]
    batch.targets[row, first:stop] = read[1:]
    batch.weights[row, scored:stop] = 1
    batch.segments[row, first:stop] = len(self.places)
    batch.positions[row, first:stop] = np.arange(length)
    return True
