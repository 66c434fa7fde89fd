"""Log-likelihoods of parts of texts, in packed batches of a few lengths.

A span, a request of an evaluation task, is a list of tokens with the last few
scored given the tokens before. Long spans come first, and a batch is as long as
the longest span, rounded up to a power of two: this needs few compilations and
little padding.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lm import batch as batch_lib
from lm import chips, sharding
from lm import config as config_lib
from lm.data import windows
from lm.evaluate import perplexity
from lm.model import decoder, scoring


class Stopped(Exception):
  """Raised after all processes have agreed to stop (SIGTERM)."""


class Span(NamedTuple):
  """`tokens` [n], with n at most the context length + 1. The last `n_scored`
  tokens are scored; `n_scored` is below n, as the first token has no context.
  """

  tokens: Sequence[int]
  n_scored: int


class Likelihood(NamedTuple):
  """The log-likelihood `total` of the scored tokens in nats, and whether each
  scored token has the largest logit.
  """

  total: float
  is_greedy: bool


Scores = tuple[Float[Array, "B T"], Int[Array, "B T"]]
Step = Callable[[decoder.Params, batch_lib.Batch], Scores]


def _score(
  cfg: config_lib.ModelConfig, params: decoder.Params, batch: batch_lib.Batch
) -> Scores:
  """Returns the negative log-likelihood (nats) and the rank (from 1) of each
  target, replicated to every process.
  """
  hidden, _ = decoder.forward(cfg, params, batch)
  head, bias = decoder.bind(cfg, params).head_parts()
  scores = scoring.token_scores(
    hidden,
    head,
    batch.targets,
    bias=bias,
    chunk=cfg.loss_chunk,
    softcap=cfg.logit_softcap,
  )
  if sharding.has_mesh():
    nll, ranks = (jax.sharding.reshard(x, P()) for x in scores)
    return nll, ranks
  return scores


def make_step(
  cfg: config_lib.ModelConfig, whole: NamedSharding | None = None
) -> Step:
  """Returns `_score` under jax.jit, compiled once for each batch length;
  `whole` is as in `perplexity.eval_step`.
  """
  return jax.jit(
    functools.partial(_score, cfg),
    out_shardings=whole,
    compiler_options=chips.compiler_options(sharding.platform(), cfg.dtype),
  )


def score(
  step: Step,
  params: decoder.Params,
  spans: Sequence[Span],
  *,
  n_rows: int,
  context: int,
  where: NamedSharding | None = None,
  should_stop: Callable[[], bool] = lambda: False,
  tell: Callable[[int], None] = lambda n_done: None,
) -> list[Likelihood]:
  """Returns the Likelihood of each span, (0, True) if no token is scored.

  `n_rows` is a multiple of the devices along the batch, and `where` the
  sharding of a batch if no mesh is in context. Collective: all processes pass
  the same spans. Raises Stopped if `should_stop`, called once per batch, is
  true; `should_stop` must return the same value on every process. `tell` gets
  the number of spans scored so far.
  """
  found = [Likelihood(0.0, True)] * len(spans)
  batches, n_done = pack(spans, n_rows, context), 0
  for places, scores in perplexity.ahead(
    (places, step(params, perplexity.place_rows(batch, where)))
    for batch, places in batches
  ):
    if should_stop():
      raise Stopped
    nll, ranks = map(np.asarray, scores)
    for place in places:
      part = place.row, slice(place.first, place.stop)
      total = -math.fsum(nll[part].tolist())
      is_greedy = bool((ranks[part] == 1).all())
      found[place.document] = Likelihood(total, is_greedy)
    n_done += len(places)
    tell(n_done)
  return found


def pack(
  spans: Sequence[Span], n_rows: int, context: int
) -> Iterator[tuple[batch_lib.Batch, list[windows.Place]]]:
  """Packs spans with scored tokens into batches, the longest first, and yields
  (batch, places of the spans in the batch).
  """
  rows = None
  order = [i for i, span in enumerate(spans) if span.n_scored]
  for i in sorted(order, key=lambda i: -len(spans[i].tokens)):
    span = np.asarray(spans[i].tokens, np.int32)
    n = len(span) - 1
    window = windows.Window(0, n, spans[i].n_scored)
    if rows is None or not rows.add(i, span, window, True):
      if rows is not None:
        yield rows.batch, rows.places
      rows = windows.Rows(n_rows, windows.row_length(n, context))
      rows.add(i, span, window, True)
  if rows is not None:
    yield rows.batch, rows.places
