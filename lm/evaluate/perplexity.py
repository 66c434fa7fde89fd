"""Negative log-likelihood (nll) of text, as sums divided once at the end.

Sums run over every scored token, in float64 on the host; no result is a mean of
means. bos is context only; eos is scored and stands for 0 bytes. To compare
across tokenizers, use bits per byte.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lm import batch as batch_lib
from lm import chips, sharding
from lm import config as config_lib
from lm import objective as objective_lib
from lm.data import sources, windows
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder, scoring

# Batches dispatched to the device while the host reads an earlier batch.
_AHEAD = 2


class Scores(NamedTuple):
  """Scores of each target of a batch; replicated on every device."""

  nll: Float[Array, "B T"]  # Nats, float32; 0 where not scored.
  weights: Float[Array, "B T"]
  n_bytes: Int[Array, "B T"]  # Bytes of the target's text; 0 where not scored.


Step = Callable[[decoder.Params, batch_lib.Batch, Any], Scores]


def score(
  cfg: config_lib.ModelConfig,
  params: decoder.Params,
  batch: batch_lib.Batch,
  byte_lengths: Int[Array, "V"],
) -> Scores:
  """Scores a batch, with or without a mesh in context. `byte_lengths` are those
  of `Tokenizer.target_bytes`.
  """
  hidden, _ = decoder.forward(cfg, params, batch)
  head, bias = decoder.bind(cfg, params).head_parts()
  nll = scoring.token_nll(
    hidden,
    head,
    batch.targets,
    bias=bias,
    chunk=cfg.loss_chunk,
    softcap=cfg.logit_softcap,
  )
  scored = batch.weights > 0
  rows = sharding.spec("batch", "length")
  n_bytes = byte_lengths.at[batch.targets].get(out_sharding=rows)
  dropped = byte_lengths.at[batch.inputs].get(out_sharding=rows)
  n_bytes = jnp.maximum(n_bytes + jnp.minimum(dropped, 0), 0)
  scores = Scores(
    jnp.where(scored, nll, 0), batch.weights, jnp.where(scored, n_bytes, 0)
  )
  if sharding.has_mesh():
    # Every process reads all scores, and a process holds only its rows.
    scores = Scores(*(jax.sharding.reshard(x, P()) for x in scores))
  return scores


def eval_step(
  cfg: config_lib.ModelConfig, whole: NamedSharding | None = None
) -> Step:
  """`score`, jitted once for each shape: (params, batch, byte_lengths).

  `whole` is the sharding of an array replicated on every process, needed where
  no mesh is in context (mode pmap).
  """
  return jax.jit(
    functools.partial(score, cfg),
    out_shardings=whole,
    compiler_options=chips.compiler_options(sharding.platform(), cfg.dtype),
  )


@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over scored targets, each times its weight; `a + b` merges. Weights
  are 1 but in masked diffusion, whose sums estimate those of the whole text.

  `nll_eos` and `n_eos` cover the targets of 0 bytes, in plain text only eos. A
  rate with a denominator of 0 is NaN: an empty text has no bits per byte.
  """

  nll: float = 0.0
  n_tokens: int | float = 0
  n_bytes: int | float = 0
  # Words of the raw text by str.split(); 0 where the text is unavailable.
  n_words: int = 0
  nll_eos: float = 0.0
  n_eos: int | float = 0

  def __add__(self, other: "Totals") -> "Totals":
    mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
    return Totals(*(a + b for a, b in zip(mine, theirs, strict=True)))

  @property
  def loss(self) -> float:
    """Nats per token."""
    return _ratio(self.nll, self.n_tokens)

  @property
  def perplexity(self) -> float:
    return exponential(self.loss)

  @property
  def perplexity_without_eos(self) -> float:
    """Perplexity per token of text, as in tools that do not score eos."""
    return exponential(
      _ratio(self.nll - self.nll_eos, self.n_tokens - self.n_eos)
    )

  @property
  def word_perplexity(self) -> float:
    return exponential(_ratio(self.nll, self.n_words))

  @property
  def bits_per_byte(self) -> float:
    return _ratio(self.nll / math.log(2), self.n_bytes)

  @property
  def bits_per_byte_without_eos(self) -> float:
    """As in tools that do not score eos."""
    return _ratio((self.nll - self.nll_eos) / math.log(2), self.n_bytes)


def overall(parts: Sequence[tuple[str, Totals]]) -> Totals:
  """Sum over (source, totals) of causal sources; over all, if none is causal:
  objectives have other denominators.
  """
  causal = [
    totals
    for source, totals in parts
    if objective_lib.of(source) == objective_lib.Causal()
  ]
  return sum(causal or [totals for _, totals in parts], Totals())


def _ratio(numerator: float, denominator: int | float) -> float:
  return numerator / denominator if denominator else math.nan


def exponential(nats: float) -> float:
  """Perplexity exp(nats); infinite where float64 would overflow, as for a long
  text without spaces, which is one word of many nats.
  """
  return math.inf if nats > 709 else math.exp(nats)


def totals(scores: Scores) -> Totals:
  """Sums of a batch, read from the device; `n_words` stays 0."""
  nll, weights, n_bytes = (np.asarray(x, np.float64) for x in scores)
  eos = (weights > 0) & (n_bytes == 0)
  return Totals(
    nll=float((nll * weights).sum()),
    n_tokens=_count(weights),
    n_bytes=_count(n_bytes * weights),
    nll_eos=float((nll * weights)[eos].sum()),
    n_eos=_count(weights[eos]),
  )


def _count(weights: np.ndarray) -> int | float:
  """Sum of weights; an int where all are 0 or 1."""
  total = float(weights.sum())
  return int(total) if total.is_integer() else total


def evaluate_batches(
  step: Step,
  params: decoder.Params,
  batches: Iterable[batch_lib.Batch],
  byte_lengths: np.ndarray,
  should_stop: Callable[[], bool] = lambda: False,
) -> Totals | None:
  """Totals of batches on the devices; None if `should_stop` returned True.

  `byte_lengths` [V] are the tokenizer's `target_bytes`. `should_stop` is called
  once a batch and must return the same value on every process.
  """
  table = np.asarray(byte_lengths, np.int32)
  result = Totals()
  for scores in ahead(step(params, batch, table) for batch in batches):
    if should_stop():
      return None
    result += totals(scores)
  return result


class DocumentScore(NamedTuple):
  name: str
  totals: Totals


def evaluate_source(
  step: Step,
  params: decoder.Params,
  source: sources.Source,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  n_rows: int,
  context: int,
  stride: int,
  usual: int | None = None,
) -> Iterator[DocumentScore]:
  """Yields a score per document, in source order; scores are independent.
  `usual` is that of `windows.pack`.

  A document's log-probability given bos is `-totals.nll`, eos included.
  Documents skipped by the policies on what is invalid are left out. Reads the
  source lazily. Raises ValueError if tokens and text differ in bytes, but for
  texts that the tokenizer says it changes: bytes are those of the text.
  """
  # Documents in progress, oldest first.
  pending: collections.deque[DocumentScore] = collections.deque()

  def documents() -> Iterator[np.ndarray]:
    for i in range(len(source)):
      document = source[i]
      if document is None:
        continue
      ids = tokenizer.encode(document.text)
      n_bytes, n_words = len(document.text.encode()), len(document.text.split())
      if tokenizer.lossy is None and tokenizer.n_bytes(ids) != n_bytes:
        raise ValueError(
          f"{document.name}: its tokens stand for {tokenizer.n_bytes(ids)} "
          f"bytes and it has {n_bytes}: the tokenizer's byte_lengths are wrong"
        )
      known = Totals(n_bytes=n_bytes, n_words=n_words)
      pending.append(DocumentScore(document.name, known))
      yield np.array([tokenizer.bos, *ids, tokenizer.eos], np.int32)

  table = np.asarray(tokenizer.target_bytes, np.int32)
  results = ahead(
    (places, step(params, place_rows(batch), table).nll)
    for batch, places in windows.pack(
      documents(), n_rows, context, stride, usual
    )
  )
  scored = Totals()  # of the oldest document in progress
  for places, on_device in results:
    nll = np.asarray(on_device, np.float64)
    for place in places:
      part = nll[place.row, place.first : place.stop]
      scored += Totals(nll=float(part.sum()), n_tokens=len(part))
      if place.is_last:
        scored += Totals(nll_eos=float(part[-1]), n_eos=1)
        name, known = pending.popleft()
        yield DocumentScore(name, known + scored)
        scored = Totals()


def ahead(results: Iterable[Any]) -> Iterator[Any]:
  """Yields each result once _AHEAD later results have been dispatched."""
  queue: collections.deque[Any] = collections.deque()
  for result in results:
    queue.append(result)
    if len(queue) > _AHEAD:
      yield queue.popleft()
  yield from queue


def place_rows(
  batch: batch_lib.Batch, where: NamedSharding | None = None
) -> batch_lib.Batch:
  """Places this process's rows of a batch on the mesh in context, if any, or as
  `where` says; every process passes the whole batch.
  """
  if where is None:
    if not sharding.has_mesh():
      return batch
    where = NamedSharding(
      jax.sharding.get_mesh(), sharding.partition("batch", "length")
    )
  n_rows = len(batch.inputs)
  first, last = sharding.local_rows(where, n_rows)
  rows = jax.tree.map(lambda a: a[first:last], batch)
  return sharding.place(rows, where, n_rows)
