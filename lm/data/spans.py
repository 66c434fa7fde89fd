"""Span corruption of one text: where the spans are, and what stands for them
(arXiv:1910.10683).
"""

import numpy as np

from lm import objective as objective_lib
from lm.data import tokenizer as tokenizer_lib


def corrupted(
  objective: objective_lib.SpanCorruption,
  tokenizer: tokenizer_lib.Tokenizer,
  text: np.ndarray,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """(bos and the text with a sentinel in place of each span; each sentinel with
  its span, and eos), of a text without bos and eos, of one token at least.

  Lengths of the spans, and of what is between, are random partitions, as in T5.
  """
  n_noise, n_spans = (int(n) for n in counts(objective, len(text)))
  spans = _partition(n_noise, n_spans, rng)
  kept = _partition(len(text) - n_noise, n_spans, rng)
  ends = np.cumsum(np.stack([kept, spans], axis=1).ravel())
  parts = np.split(text, ends[:-1])
  marks = np.array(tokenizer.sentinels[:n_spans], np.int32)[:, None]
  seen: list[np.ndarray] = [np.array([tokenizer.bos])]
  said: list[np.ndarray] = []
  for between, mark, span in zip(parts[::2], marks, parts[1::2], strict=True):
    seen += [between, mark]
    said += [mark, span]
  return np.concatenate(seen), np.concatenate([*said, [tokenizer.eos]])


def counts(objective: objective_lib.SpanCorruption, n):
  """(tokens in spans, spans) of a text of `n` tokens, as T5 rounds them; of an
  array of lengths, arrays.
  """
  n = np.asarray(n)
  n_noise = np.round(n * objective.rate).astype(np.int64)
  n_noise = np.minimum(np.maximum(n_noise, 1), np.maximum(n - 1, 1))
  n_spans = np.round(n_noise / objective.mean_span).astype(np.int64)
  most = np.minimum(n_noise, np.maximum(n - n_noise, 1))
  return n_noise, np.minimum(np.maximum(n_spans, 1), most)


def _partition(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
  """`k` lengths, all of sum `n`, each at least 1 if n allows: int64 [k]."""
  if n < k:
    return np.full(k, n)  # a text of one token: k is 1
  cuts = np.sort(np.argsort(rng.random(n - 1))[: k - 1]) + 1
  return np.diff(cuts, prepend=0, append=n)
