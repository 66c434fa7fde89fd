"""Negative log-likelihood of text, as sums that are divided once.

Sums run over every scored token, in float64 on the host; nothing is ever a
mean of means. bos is context alone; eos is scored and stands for 0 bytes. The
number that compares across tokenizers is bits per byte.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lm import batch as batch_lib
from lm import config as config_lib
from lm import sharding
from lm.data import sources, windows
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder, loss

# Batches that the device has in hand while the host reads an earlier one.
_AHEAD = 2


class Scores(NamedTuple):
  """What a batch says of each of its targets; whole on every device."""

  nll: Float[Array, "B T"]  # Nats, float32; 0 where not scored.
  scored: Bool[Array, "B T"]
  n_bytes: Int[Array, "B T"]  # Of the text it stands for; 0 where not scored.


Step = Callable[[decoder.Params, batch_lib.Batch, Any], Scores]


def score(
  cfg: config_lib.ModelConfig,
  params: decoder.Params,
  batch: batch_lib.Batch,
  byte_lengths: Int[Array, "V"],
) -> Scores:
  """Scores a batch, on the mesh in context or on none.

  A target counts once if its weight is not 0, whatever the weight.
  """
  hidden = decoder.forward(cfg, params, batch)
  nll = loss.token_nll(
    hidden,
    decoder.bind(cfg, params).head_weight(),
    batch.targets,
    chunk=cfg.loss_chunk,
    softcap=cfg.logit_softcap,
  )
  scored = batch.weights > 0
  rows = sharding.spec("batch", "length")
  n_bytes = byte_lengths.at[batch.targets].get(out_sharding=rows)
  scores = Scores(
    jnp.where(scored, nll, 0), scored, jnp.where(scored, n_bytes, 0)
  )
  if sharding.has_mesh():
    # Every process reads the result, and a process holds only its rows.
    scores = Scores(*(jax.sharding.reshard(x, P()) for x in scores))
  return scores


def eval_step(
  cfg: config_lib.ModelConfig, whole: NamedSharding | None = None
) -> Step:
  """`score`, compiled once for each shape: (params, batch, byte_lengths).

  `whole` is the sharding of an array that every process has all of; it is
  needed where no mesh is in context to say so (mode pmap).
  """
  return jax.jit(functools.partial(score, cfg), out_shardings=whole)


@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over scored targets; `a + b` merges.

  `nll_eos` and `n_eos` are the part of the targets that stand for no bytes,
  which in plain text is eos alone. A rate whose denominator is 0 is nan: an
  empty text has no bits per byte.
  """

  nll: float = 0.0
  n_tokens: int = 0
  n_bytes: int = 0
  # Of the raw text, as str.split() counts; 0 where the text is not at hand.
  n_words: int = 0
  nll_eos: float = 0.0
  n_eos: int = 0

  def __add__(self, other: "Totals") -> "Totals":
    mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
    return Totals(*(a + b for a, b in zip(mine, theirs, strict=True)))

  @property
  def loss(self) -> float:
    """Nats per token."""
    return _ratio(self.nll, self.n_tokens)

  @property
  def perplexity(self) -> float:
    return _exp(self.loss)

  @property
  def perplexity_without_eos(self) -> float:
    """Per token of text, as tools that do not score eos report it."""
    return _exp(_ratio(self.nll - self.nll_eos, self.n_tokens - self.n_eos))

  @property
  def word_perplexity(self) -> float:
    return _exp(_ratio(self.nll, self.n_words))

  @property
  def bits_per_byte(self) -> float:
    return _ratio(self.nll / math.log(2), self.n_bytes)


def _ratio(numerator: float, denominator: int) -> float:
  return numerator / denominator if denominator else math.nan


def _exp(nats: float) -> float:
  # Beyond float64: a long text without spaces is one word of many nats.
  return math.inf if nats > 709 else math.exp(nats)


def totals(scores: Scores) -> Totals:
  """Sums of one batch, read from the device; words are not known here."""
  nll, scored, n_bytes = (np.asarray(x) for x in scores)
  eos = scored & (n_bytes == 0)
  return Totals(
    nll=float(nll.sum(dtype=np.float64)),
    n_tokens=int(scored.sum()),
    n_bytes=int(n_bytes.sum(dtype=np.int64)),
    nll_eos=float(nll[eos].sum(dtype=np.float64)),
    n_eos=int(eos.sum()),
  )


def evaluate_batches(
  step: Step,
  params: decoder.Params,
  batches: Iterable[batch_lib.Batch],
  byte_lengths: np.ndarray,
  should_stop: Callable[[], bool] = lambda: False,
) -> Totals | None:
  """Totals of batches that lie on the devices; None where it was stopped.

  `byte_lengths` [V] are the tokenizer's. `should_stop` is asked once a batch;
  where there are several processes it must say the same on each.
  """
  table = np.asarray(byte_lengths, np.int32)
  result = Totals()
  for scores in _ahead(step(params, batch, table) for batch in batches):
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
) -> Iterator[DocumentScore]:
  """Yields each document of a source, in its order, scored apart from others.

  Its log-probability given bos is `-totals.nll`, eos included. Documents that
  the policy on invalid UTF-8 skips are left out. Reads the source as it goes.
  """
  # Documents under way, the first one first.
  pending: collections.deque[DocumentScore] = collections.deque()

  def documents() -> Iterator[np.ndarray]:
    for i in range(len(source)):
      document = source[i]
      if document is None:
        continue
      ids = tokenizer.encode(document.text)
      n_bytes, n_words = len(document.text.encode()), len(document.text.split())
      if tokenizer.n_bytes(ids) != n_bytes:
        raise ValueError(
          f"{document.name}: its tokens stand for {tokenizer.n_bytes(ids)} "
          f"bytes and it has {n_bytes}: the tokenizer's byte_lengths are wrong"
        )
      known = Totals(n_bytes=n_bytes, n_words=n_words)
      pending.append(DocumentScore(document.name, known))
      yield np.array([tokenizer.bos, *ids, tokenizer.eos], np.int32)

  table = np.asarray(tokenizer.byte_lengths, np.int32)
  results = _ahead(
    (places, step(params, _place(batch), table).nll)
    for batch, places in windows.pack(documents(), n_rows, context, stride)
  )
  scored = Totals()  # of the first document under way
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


def _ahead(results: Iterable[Any]) -> Iterator[Any]:
  """Yields each result once _AHEAD later ones have been dispatched."""
  queue: collections.deque[Any] = collections.deque()
  for result in results:
    queue.append(result)
    if len(queue) > _AHEAD:
      yield queue.popleft()
  yield from queue


def _place(batch: batch_lib.Batch) -> batch_lib.Batch:
  """This process's rows of a batch onto the mesh in context, if there is one;
  every process has the whole batch.
  """
  if not sharding.has_mesh():
    return batch
  where = NamedSharding(
    jax.sharding.get_mesh(), sharding.partition("batch", "length")
  )
  n_rows = len(batch.inputs)
  first, last = sharding.local_rows(where, n_rows)
  rows = jax.tree.map(lambda a: a[first:last], batch)
  return sharding.place(rows, where, n_rows)
