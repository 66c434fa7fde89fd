"""Log-probabilities of a given text, from raw logits: token by token.

`token_nll` is what evaluation sums, on any mesh, and `token_scores` adds each
token's rank; `score` adds the likeliest alternatives, with the weights of
inference; `fill` reads a text in both directions, and gives the likeliest ids
of its masked positions.

B rows, T length, D model, V vocabulary, A alternatives, M masked positions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lm import sharding
from lm.model import attention, chunks, loss

# Positions per block of logits; T of `score` and M of `fill` are multiples.
CHUNK = 16


@jax.named_scope("loss")
def token_nll(
  x: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  *,
  bias: Float[Array, "V"] | None = None,
  chunk: int,
  softcap: float | None = None,
) -> Float[Array, "B T"]:
  """Negative log-likelihood of each target, in nats."""

  def one(logits, targets):
    return loss.chunk_nll(logits, targets)[0]

  options = chunk, softcap, ("batch", "length")
  return _by_chunk(one, x, head, bias, targets, *options)


@jax.named_scope("loss")
def token_scores(
  x: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  *,
  bias: Float[Array, "V"] | None = None,
  chunk: int,
  softcap: float | None = None,
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
  """`token_nll` and the rank of each target, from 1; equal logits rank by id.

  So a target of rank 1 is the token that greedy decoding draws.
  """

  def one(logits, targets):
    nll, _, hit = loss.chunk_nll(logits, targets)
    return nll, _ranks(logits, targets, hit)

  rows = ("batch", "length")
  return _by_chunk(one, x, head, bias, targets, chunk, softcap, (rows, rows))


def _by_chunk(judge, x, head, bias, targets, chunk, softcap, out_axes):
  """`judge(logits [C, V], targets [C])` of each chunk, joined to [B, T]."""
  rows = ("batch", "length")

  def local(x, head, bias, targets):
    head = chunks.whole_head(head, x.dtype)

    def one(_, piece):
      logits, _ = loss.chunk_logits(piece[0], head, bias, softcap)
      return None, judge(logits, piece[1])

    return chunks.over(one, None, chunk, x, targets)[1]

  run = sharding.per_shard(
    local,
    (*rows, None),
    ("vocab", "embed"),
    ("vocab",),
    rows,
    out_axes=out_axes,
  )
  return run(x, head, bias, targets)


def _ranks(scores, targets, hit):
  """Rank of each target, from 1; of equal scores the lower id ranks first."""
  own = jnp.sum(jnp.where(hit, scores, 0), axis=-1)
  chosen = chunks.psum(own, "vocab")[:, None]
  earlier = chunks.ids(scores) < targets[:, None]
  better = (scores > chosen) | ((scores == chosen) & earlier)
  return 1 + chunks.psum(jnp.sum(better, axis=-1, dtype=jnp.int32), "vocab")


@functools.partial(jax.jit, static_argnames=("graph", "n_alternatives"))
def score(
  graph: Any,
  state: Any,
  inputs: Int[Array, "B T"],
  targets: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  wanted: Bool[Array, "B"],
  *,
  n_alternatives: int,
) -> tuple[
  Float[Array, "B T"],
  Int[Array, "B T"],
  Int[Array, "B T A"],
  Float[Array, "B T A"],
]:
  """Log-probability and rank of each target, and the likeliest alternatives,
  at most `n_alternatives`; zeros if no row is `wanted`.

  Ranks count from 1; equal logits rank by id. Logits are computed CHUNK
  positions at a time, to avoid an array of [B, T, V].
  """
  model = nnx.merge(graph, state)
  B, T = inputs.shape
  hidden, _ = model(inputs, _tokens(T, lengths, bidirectional=False))

  def chunk(i):
    part = jax.lax.dynamic_slice_in_dim(hidden, i, CHUNK, axis=1)
    ids = jax.lax.dynamic_slice_in_dim(targets, i, CHUNK, axis=1)
    return sharding.by_row(judge, model.logits(part), ids, wanted)

  judge = functools.partial(_judge, n_alternatives=n_alternatives)
  parts = jax.lax.map(chunk, jnp.arange(0, T, CHUNK))
  return _joined(parts, B, T)


def _judge(logits, ids, wanted, n_alternatives):
  logs = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(logs, ids[..., None], axis=-1)
  earlier = jnp.arange(logs.shape[-1])[None, None] < ids[..., None]
  better = (logs > own) | ((logs == own) & earlier)
  ranks = 1 + jnp.sum(better, axis=-1, dtype=jnp.int32)
  n = min(n_alternatives, logs.shape[-1])
  shape = (*ids.shape, n)
  other_logs, other_ids = jax.lax.cond(
    jnp.any(wanted),
    lambda: tuple(jax.lax.top_k(logs, n)),
    lambda: (jnp.zeros(shape, logs.dtype), jnp.zeros(shape, jnp.int32)),
  )
  return own[..., 0], ranks, other_ids, other_logs


@functools.partial(
  jax.jit, static_argnames=("graph", "n_ids", "n_alternatives")
)
def fill(
  graph: Any,
  state: Any,
  inputs: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  masked: Int[Array, "B M"],
  *,
  n_ids: int,
  n_alternatives: int,
) -> tuple[Int[Array, "B M A"], Float[Array, "B M A"], Float[Array, "B M"]]:
  """Of each position in `masked`: the likeliest of the first `n_ids` ids, with
  their log-probabilities (natural), and the entropy in bits.

  Every token attends to the whole row, as in a masked LM (BERT): the logits at
  a position predict the token at that position, not the next. The
  distributions are over the whole vocabulary, and each is given the text
  with all masks in it. Logits are computed at the masked positions only.
  """
  model = nnx.merge(graph, state)
  B, M = masked.shape
  tokens = _tokens(inputs.shape[1], lengths, bidirectional=True)
  hidden, _ = model(inputs, tokens)
  hidden = sharding.by_row(
    lambda x, at: jnp.take_along_axis(x, at[..., None], axis=1), hidden, masked
  )

  def likeliest(logits):
    logs = jax.nn.log_softmax(logits)
    terms = jnp.where(logs > -jnp.inf, jnp.exp(logs) * logs, 0)
    entropy = -jnp.sum(terms, axis=-1) / jnp.log(2.0)
    best, ids = jax.lax.top_k(logs[..., :n_ids], n_alternatives)
    return ids, best, entropy

  def chunk(i):
    part = jax.lax.dynamic_slice_in_dim(hidden, i, CHUNK, axis=1)
    return sharding.by_row(likeliest, model.logits(part))

  parts = jax.lax.map(chunk, jnp.arange(0, M, CHUNK))
  return _joined(parts, B, M)


def _tokens(T, lengths, *, bidirectional):
  """Documents of `lengths` tokens [B] in rows of T."""
  places = jnp.arange(T)[None]
  real = places < lengths[:, None]
  # Padding gets position 0: a row may be longer than a learned table.
  positions = jnp.where(real, places, 0)
  prefix = real if bidirectional else None
  return attention.Tokens(positions, real.astype(jnp.int32), prefix)


def _joined(parts, B, T):
  """Arrays [T / CHUNK, B, CHUNK, ...] as [B, T, ...]."""
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), parts
  )
