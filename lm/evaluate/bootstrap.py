"""Paired bootstrap over documents, for ratios like bits per byte.

A ratio is a sum over documents divided by their bytes. Documents are drawn with
replacement, each with the values under all models at once (paired), and within
each source (stratified: the sources are given, their documents are a sample).

Intervals are symmetric and studentised (bootstrap-t: Hall 1988, Annals of
Statistics 16:927): with few documents of unequal length, the standard error
varies with the resample, and percentile intervals neglect the variation. In
simulations with log-normal lengths (sigma 1.5; 20 documents), 95 % intervals
covered the true value in 93 % of cases, percentile intervals in 89 %, and
Student's t in 81 %; with 10 documents, in 92 %, 86 % and 78 %. Hence
MIN_DOCUMENTS.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

# Least number of documents in a source for an interval.
MIN_DOCUMENTS = 20
# One less than a round number: 5 % of (resamples + 1) is then whole.
N_RESAMPLES = 9_999
# Bound on documents drawn: large sources get fewer resamples, at least 999.
_MAX_DRAWN = 400_000_000
# Documents drawn at a time, to bound the memory.
_CHUNK = 1 << 22


class Estimate(NamedTuple):
  """A ratio, the ends of the 95 % interval, and the two-sided p-value of the
  hypothesis of ratio 0; the interval excludes 0 if and only if p <= 0.05.
  """

  value: float
  low: float
  high: float
  p: float


class _Sums(NamedTuple):
  """Sums over a source's documents, for N resamples and K ratios. `b` are bytes
  of a document, and `e` residuals: the value less ratio times bytes.
  """

  n: int
  e: Float[np.ndarray, "N K"]
  ee: Float[np.ndarray, "N K"]
  eb: Float[np.ndarray, "N K"]
  b: Float[np.ndarray, "N 1"]
  bb: Float[np.ndarray, "N 1"]


def n_resamples(n_documents: int) -> int:
  """Number of resamples: N_RESAMPLES, or fewer for very many documents."""
  thousands = max(1, _MAX_DRAWN // n_documents // 1000)
  return min(N_RESAMPLES, 1000 * thousands - 1)


def ratios(
  values: Float[np.ndarray, "K D"],
  n_bytes: Int[np.ndarray, "D"],
  sizes: Sequence[int],
  n: int,
  seed: int = 0,
) -> list[Estimate]:
  """Estimates sum(values) / sum(n_bytes) for each of K rows, over the same `n`
  resamples. The D documents are ordered by source, and `sizes` has the number
  of documents in each source.

  Raises ValueError if a source has fewer than two documents, or if `sizes` do
  not add up to D.
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
  # A ratio with standard error 0 has an interval of width 0.
  half = np.where(error[0] > 0, quantile * error[0], 0.0)
  p = (1 + (statistics >= observed).sum(0)) / (n + 1)
  return [
    Estimate(float(r), float(r - h), float(r + h), float(q))
    for r, h, q in zip(found, half, p, strict=True)
  ]


def holm(p_values: Sequence[float]) -> list[float]:
  """Corrects p-values for their number (Holm 1979), in the given order."""
  corrected, least = [0.0] * len(p_values), 0.0
  order = sorted(range(len(p_values)), key=lambda i: p_values[i])
  for rank, i in enumerate(order):
    least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
    corrected[i] = least
  return corrected


def _resample(residuals, weights, n, rng) -> _Sums:
  """Draws `n` resamples of a source's documents and returns the sums."""
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
  """Returns sums over documents weighted by `counts` [N, documents]."""
  counts = counts.astype(np.float64)
  e, b = residuals.T, weights[:, None]
  sums = [counts @ x for x in (e, e * e, e * b, b, b * b)]
  return _Sums(len(weights), *sums)


def _delta(
  parts: Sequence[_Sums],
) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K"]]:
  """Returns (ratio of a resample less the estimated ratio, standard error by
  the delta method).
  """
  total = np.sum([p.b for p in parts], 0)
  delta = np.sum([p.e for p in parts], 0) / total
  variance = np.zeros_like(delta)
  for p in parts:  # Residuals are taken about the ratio of the resample.
    squares = p.ee - 2 * delta * p.eb + delta**2 * p.bb
    sums = p.e - delta * p.b
    variance += p.n / (p.n - 1) * np.maximum(squares - sums**2 / p.n, 0)
  return delta, np.sqrt(variance) / total


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns a / b, with 0 for 0 / 0, and infinity if only b is 0."""
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(a == 0, 0.0, a / b)
