"""Paired bootstrap over documents, of ratios such as bits per byte.

A ratio is a sum over documents divided by their bytes. Documents are drawn with
replacement, each with its values under all models at once (paired) and within
its source (stratified: the sources are given, their documents are a sample).

Intervals are symmetric and studentised (bootstrap-t: Hall 1988, Annals of
Statistics 16:927): few documents of unequal length have a standard error that
varies with the resample, which percentiles overlook. Over simulations with
log-normal lengths (sigma 1.5; 20 documents) 95 % intervals held the truth in
93 %, percentiles in 89 %, Student's t in 81 %; with 10 documents 92 %, 86 % and
78 %. Hence MIN_DOCUMENTS.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

# Least documents of a source, for an interval.
MIN_DOCUMENTS = 20
# One less than a round number: 5 % of (resamples + 1) is then whole.
N_RESAMPLES = 9_999
# Most documents drawn in all: fewer resamples, at least 999, of huge sources.
_MAX_DRAWN = 400_000_000
# Documents drawn at a time; bounds the memory.
_CHUNK = 1 << 22


class Estimate(NamedTuple):
  """A ratio, its 95 % interval, and the two-sided p-value of a ratio of 0; the
  interval leaves out 0 just where p <= 0.05.
  """

  value: float
  low: float
  high: float
  p: float


class _Sums(NamedTuple):
  """Sums over the documents of a source, over N resamples. `e` is a residual,
  the value of a document less its bytes times the ratio found; `b` is bytes.
  """

  n: int
  e: Float[np.ndarray, "N K"]
  ee: Float[np.ndarray, "N K"]
  eb: Float[np.ndarray, "N K"]
  b: Float[np.ndarray, "N 1"]
  bb: Float[np.ndarray, "N 1"]


def n_resamples(n_documents: int) -> int:
  """Resamples of `n_documents` in all: N_RESAMPLES, fewer of very many."""
  thousands = max(1, _MAX_DRAWN // n_documents // 1000)
  return min(N_RESAMPLES, 1000 * thousands - 1)


def ratios(
  values: Float[np.ndarray, "K D"],
  n_bytes: Int[np.ndarray, "D"],
  sizes: Sequence[int],
  n: int,
  seed: int = 0,
) -> list[Estimate]:
  """Estimates of sum(values) / sum(n_bytes) for each of K rows, over the same
  `n` resamples. The D documents are those of the sources in order, `sizes` of
  each.

  Raises ValueError if a source has fewer than two documents.
  """
  if min(sizes) < 2 or sum(sizes) != len(n_bytes):
    raise ValueError(f"sources of {sizes} documents, {len(n_bytes)} in all")
  weights = np.asarray(n_bytes, np.float64)
  found = values.sum(1) / weights.sum()
  residuals = values - found[:, None] * weights
  ends = np.cumsum(sizes)
  parts = [slice(e - size, e) for e, size in zip(ends, sizes, strict=True)]
  whole = [
    _sums(residuals[:, p], weights[p], np.ones((1, size)))
    for p, size in zip(parts, sizes, strict=True)
  ]
  _, error = _delta(whole)
  rng = np.random.default_rng(seed)
  drawn = [_resample(residuals[:, p], weights[p], n, rng) for p in parts]
  delta, errors = _delta(drawn)
  statistics = np.sort(np.abs(_divide(delta, errors)), axis=0)
  observed = np.abs(_divide(found, error[0]))
  quantile = statistics[round(0.95 * (n + 1)) - 1]
  # A value without error has an interval of one point.
  half = np.where(error[0] > 0, quantile * error[0], 0.0)
  p = (1 + (statistics >= observed).sum(0)) / (n + 1)
  return [
    Estimate(float(r), float(r - h), float(r + h), float(q))
    for r, h, q in zip(found, half, p, strict=True)
  ]


def holm(p_values: Sequence[float]) -> list[float]:
  """P-values corrected for their number (Holm 1979), in the same order."""
  corrected, least = [0.0] * len(p_values), 0.0
  order = sorted(range(len(p_values)), key=lambda i: p_values[i])
  for rank, i in enumerate(order):
    least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
    corrected[i] = least
  return corrected


def _resample(residuals, weights, n, rng) -> _Sums:
  """Sums over each of `n` resamples of a source's documents."""
  n_documents = len(weights)
  rows = max(1, _CHUNK // n_documents)
  parts = []
  for first in range(0, n, rows):
    shape = (min(rows, n - first), n_documents)
    picks = rng.integers(n_documents, size=shape)
    picks += np.arange(shape[0])[:, None] * n_documents
    counts = np.bincount(picks.ravel(), minlength=shape[0] * n_documents)
    parts.append(_sums(residuals, weights, counts.reshape(shape)))
  sums = zip(*(p[1:] for p in parts), strict=True)
  return _Sums(n_documents, *map(np.concatenate, sums))


def _sums(residuals, weights, counts) -> _Sums:
  """Sums over documents taken `counts` [N, documents] times."""
  counts = counts.astype(np.float64)
  e, b = residuals.T, weights[:, None]
  sums = [counts @ x for x in (e, e * e, e * b, b, b * b)]
  return _Sums(len(weights), *sums)


def _delta(
  parts: Sequence[_Sums],
) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K"]]:
  """(ratio less the ratio found, its standard error by the delta method)."""
  total = np.sum([p.b for p in parts], 0)
  delta = np.sum([p.e for p in parts], 0) / total
  variance = np.zeros_like(delta)
  for p in parts:  # residuals anew, about the ratio of the resample
    squares = p.ee - 2 * delta * p.eb + delta**2 * p.bb
    sums = p.e - delta * p.b
    variance += p.n / (p.n - 1) * np.maximum(squares - sums**2 / p.n, 0)
  return delta, np.sqrt(variance) / total


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a / b; 0 where both are 0, infinite where only b is."""
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(a == 0, 0.0, a / b)
