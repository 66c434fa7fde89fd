"""Training objectives: a window of tokens to one batch row (lm/batch.py).

An objective is a pure NumPy function of tokens [T+1], document numbers [T+1],
from 1 within the window, 0 for padding, and random numbers. The model and the
train step do not depend on the objective: objectives differ in the tokens of a
row, in what is seen ahead (`prefix`), and in what is scored (`weights`). What
span corruption and FIM do to one text is in spans.py and fim.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lm import batch as batch_lib
from lm import objective as objective_lib
from lm.data import fim, spans
from lm.data import tokenizer as tokenizer_lib

# Least rate of masked diffusion, and so the largest weight, as in LLaDA.
_LEAST_RATE = 1e-3


class Window(NamedTuple):
  """Tokens [T+1], document numbers [T+1], from 1; 0 is padding. Of chats also
  whether each token is a training target: bool [T+1].
  """

  tokens: np.ndarray
  documents: np.ndarray
  scored: np.ndarray | None = None


def row(
  objective: objective_lib.Causal,
  tokenizer: tokenizer_lib.Tokenizer,
  window: Window,
  rng: np.random.Generator,
) -> batch_lib.Batch:
  """One row of an objective, each leaf [T]; `prefix` None if it sees nothing
  ahead.
  """
  tokens, documents, scored = window
  match objective:
    case objective_lib.Chat():
      assert scored is not None, "a store of texts"
      return chat(tokens, documents, scored)
    case objective_lib.Prefix():
      return prefix(tokens, documents, rng)
    case objective_lib.SpanCorruption():
      return span_corruption(objective, tokenizer, tokens, documents, rng)
    case objective_lib.Fim():
      return fill_in_the_middle(objective, tokenizer, tokens, documents, rng)
    case objective_lib.Masked():
      return masked(objective, tokenizer, tokens, documents, rng)
    case _:
      return causal(tokens, documents)


def causal(tokens: np.ndarray, documents: np.ndarray) -> batch_lib.Batch:
  """Next-token prediction: one row, each leaf [T].

  Weight is 0 at padding, and where the target opens a new document: the tokens
  before do not predict the next document.
  """
  segments = documents[:-1].astype(np.int32)
  n = len(segments)
  index = np.arange(n, dtype=np.int32)
  starts = np.where(np.diff(segments, prepend=-1) != 0, index, 0)
  positions = index - np.maximum.accumulate(starts)
  same = (documents[1:] == segments) & (segments > 0)
  return batch_lib.Batch(
    inputs=tokens[:-1].astype(np.int32),
    targets=tokens[1:].astype(np.int32),
    weights=same.astype(np.float32),
    segments=segments,
    positions=np.where(segments > 0, positions, 0).astype(np.int32),
  )


def chat(
  tokens: np.ndarray, documents: np.ndarray, scored: np.ndarray
) -> batch_lib.Batch:
  """Next-token prediction of the `scored` tokens [T+1] alone."""
  plain = causal(tokens, documents)
  return dataclasses.replace(plain, weights=plain.weights * scored[1:])


def prefix(
  tokens: np.ndarray, documents: np.ndarray, rng: np.random.Generator
) -> batch_lib.Batch:
  """Prefix LM: each document is split where a uniform draw says, after its
  first token at the earliest and before its last target at the latest.

  The prefix is seen in both directions. Its last position predicts the first
  token behind it; its other positions are not scored, since they see their
  targets.
  """
  plain = causal(tokens, documents)
  seen, weights = np.zeros(len(plain.inputs), np.bool_), plain.weights.copy()
  for some in _documents(plain.segments):
    n_scored = int(weights[some].sum())
    if n_scored:
      stop = some.start + 1 + int(rng.random() * n_scored)
      seen[some.start : stop] = True
      weights[some.start : stop - 1] = 0
  return dataclasses.replace(plain, weights=weights, prefix=seen)


def fill_in_the_middle(
  objective: objective_lib.Fim,
  tokenizer: tokenizer_lib.Tokenizer,
  tokens: np.ndarray,
  documents: np.ndarray,
  rng: np.random.Generator,
) -> batch_lib.Batch:
  """Fill-in-the-middle: `rate` of the documents are reordered (lm/data/fim.py),
  then all is next-token prediction. A sentinel is no target: where it stands is
  the draw's choice, not the text's.
  """
  pieces = [
    fim.reorder(objective, tokenizer, tokens[some], rng)
    for some in _documents(documents)
  ]
  plain = causal(*_joined(tokenizer.pad, len(tokens), pieces))
  kept = ~np.isin(plain.targets, fim.sentinels(tokenizer))
  return dataclasses.replace(plain, weights=plain.weights * kept)


def span_corruption(
  objective: objective_lib.SpanCorruption,
  tokenizer: tokenizer_lib.Tokenizer,
  tokens: np.ndarray,
  documents: np.ndarray,
  rng: np.random.Generator,
) -> batch_lib.Batch:
  """Span corruption: bos and the text with a sentinel in place of each span,
  seen in both directions; then each sentinel and its span, and eos: scored
  (lm/data/spans.py). A document without text takes no place.
  """
  pieces, n_seen = [], []
  for some in _documents(documents):
    text = tokens[some]
    text = text[(text != tokenizer.bos) & (text != tokenizer.eos)]
    if len(text):
      seen, said = spans.corrupted(objective, tokenizer, text, rng)
      pieces.append(np.concatenate([seen, said]))
      n_seen.append(len(seen))
  plain = causal(*_joined(tokenizer.pad, len(tokens), pieces))
  ahead, weights = np.zeros(len(plain.inputs), np.bool_), plain.weights.copy()
  for some, n in zip(_documents(plain.segments), n_seen, strict=True):
    ahead[some.start : some.start + n] = True
    weights[some.start : some.start + n - 1] = 0
  return dataclasses.replace(plain, weights=weights, prefix=ahead)


def masked(
  objective: objective_lib.Masked,
  tokenizer: tokenizer_lib.Tokenizer,
  tokens: np.ndarray,
  documents: np.ndarray,
  rng: np.random.Generator,
) -> batch_lib.Batch:
  """Masked LM and masked diffusion: the target of a position is its own token,
  and all positions of a document see each other. bos and eos are never chosen.
  """
  plain = causal(tokens, documents)
  inputs, targets = plain.inputs.copy(), plain.inputs
  weights = np.zeros(len(inputs), np.float32)
  ordinary = np.flatnonzero(tokenizer.byte_lengths)
  text = (plain.segments > 0) & (tokenizer.byte_lengths[inputs] > 0)
  for some in _documents(plain.segments):
    places = some.start + np.flatnonzero(text[some])
    order = np.argsort(rng.random(len(places)))
    if objective.rate is None:
      rate = _LEAST_RATE + (1 - _LEAST_RATE) * rng.random()
      chosen = places[rng.random(len(places)) < rate]
      inputs[chosen], weights[chosen] = tokenizer.mask, 1 / rate
    elif len(places):
      n = max(1, round(objective.rate * len(places)))
      chosen, draw = places[order[:n]], rng.random(n)
      other = ordinary[(rng.random(n) * len(ordinary)).astype(np.int64)]
      shown = np.where(draw < 0.9, other, inputs[chosen])
      inputs[chosen] = np.where(draw < 0.8, tokenizer.mask, shown)
      weights[chosen] = 1
  return dataclasses.replace(
    plain,
    inputs=inputs,
    targets=targets,
    weights=weights,
    prefix=plain.segments > 0,
  )


def _documents(numbers: np.ndarray) -> Iterator[slice]:
  """Yields the slice of each document of a window or a row."""
  edges = np.flatnonzero(np.diff(numbers, prepend=0, append=0))
  for start, stop in zip(edges, edges[1:], strict=False):
    if numbers[start]:
      yield slice(int(start), int(stop))


def _joined(
  pad: int, n: int, pieces: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and document numbers [n] of documents one after another."""
  tokens, documents = np.full(n, pad, np.int32), np.zeros(n, np.int32)
  stop = 0
  for number, piece in enumerate(pieces, 1):
    start, stop = stop, stop + len(piece)
    tokens[start:stop], documents[start:stop] = piece, number
  assert stop <= n, (stop, n)
  return tokens, documents
