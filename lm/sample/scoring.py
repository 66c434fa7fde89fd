"""Scores a text: log-probabilities of raw logits, before sampling rules.

B rows, T length, V vocabulary, A alternatives.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lm import schema, sharding
from lm.data import windows
from lm.model import attention
from lm.sample import engine as engine_lib
from lm.sample import request as request_lib

# Positions per block of logits; every bucket length is a multiple.
CHUNK = 16


class Part(NamedTuple):
  """Scores of the next N tokens of a text, in NumPy."""

  logs: Float[np.ndarray, "N"]
  ranks: Int[np.ndarray, "N"]
  other_ids: Int[np.ndarray, "N A"]
  other_logs: Float[np.ndarray, "N A"]


def parts(
  sampler: Any, ids: Sequence[int], n_alternatives: int, stride: int | None
) -> Iterator[Part]:
  """Yields the scores of `ids[1:]`, a Part per window.

  The windows are the same as in `lm.evaluate` (lm/data/windows.py); each window
  is a device call. Raises ConfigError on a stride outside [1, context].
  """
  context: int = sampler.cfg.context_length
  stride = context if stride is None else stride
  if not 1 <= stride <= context:
    raise schema.ConfigError(
      f"stride={stride}: must be from 1 to the context of {context}"
    )
  tokens, ways = np.asarray(ids, np.int32), sampler.ways
  cuts = windows.cut(len(ids) - 1, context, stride) if len(ids) > 1 else ()
  for window in cuts:
    length = window.stop - window.first
    shape = ways, engine_lib.bucket(length, CHUNK)
    inputs, targets = np.full((2, *shape), sampler.tokenizer.pad, np.int32)
    inputs[:, :length] = tokens[window.first : window.stop]
    targets[:, :length] = tokens[window.first + 1 : window.stop + 1]
    lengths = np.full(ways, length, np.int32)
    wanted = np.full(ways, n_alternatives > 0)
    rows = map(sampler.place, (inputs, targets, lengths, wanted))
    with sampler.in_mesh():
      found = score(sampler.graph, sampler.state, *rows)
      found = sampler.fetch(found if n_alternatives else found[:2])
    logs, ranks, *others = (
      x[0, length - window.n_scored : length] for x in found
    )
    none = np.empty((len(logs), 0), np.int32)
    others = [x[:, :n_alternatives] for x in others] or [none, none]
    yield Part(logs, ranks, *others)


def collect(
  sampler: Any, ids: Sequence[int], found: Iterable[Part]
) -> request_lib.Score:
  """Joins the output of `parts(ids)` into a Score."""
  logs, ranks, others = [], [], []
  for part in found:
    logs += part.logs.tolist()
    ranks += part.ranks.tolist()
    columns = part.other_ids.tolist(), part.other_logs.tolist()
    others += [
      [request_lib.Alternative(*one) for one in zip(*pair, strict=True)]
      for pair in zip(*columns, strict=True)
    ]
  scored = np.asarray(ids, np.int32)[1:].tolist()
  return request_lib.Score(
    token_ids=scored,
    pieces=[sampler.piece(i) for i in scored],
    log_probabilities=logs,
    ranks=ranks,
    alternatives=others,
    n_bytes=sampler.tokenizer.n_bytes(scored),
  )


@functools.partial(jax.jit, static_argnames=("graph",))
def score(
  graph: Any,
  state: Any,
  inputs: Int[Array, "B T"],
  targets: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  wanted: Bool[Array, "B"],
) -> tuple[
  Float[Array, "B T"],
  Int[Array, "B T"],
  Int[Array, "B T A"],
  Float[Array, "B T A"],
]:
  """Log-probability and rank of each target, and the likeliest alternatives,
  zeros if no row is `wanted`.

  Ranks count from 1; equal logits rank by id. Logits are computed CHUNK
  positions at a time, to avoid an array of [B, T, V].
  """
  model = nnx.merge(graph, state)
  B, T = inputs.shape
  places = jnp.arange(T)[None]
  real = places < lengths[:, None]
  tokens = attention.Tokens(
    jnp.where(real, places, 0), real.astype(jnp.int32), None
  )
  hidden, _ = model(inputs, tokens)

  def chunk(i):
    part = jax.lax.dynamic_slice_in_dim(hidden, i, CHUNK, axis=1)
    ids = jax.lax.dynamic_slice_in_dim(targets, i, CHUNK, axis=1)
    return sharding.by_row(_judge, model.logits(part), ids, wanted)

  parts = jax.lax.map(chunk, jnp.arange(0, T, CHUNK))
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), parts
  )


def _judge(logits, ids, wanted):
  logs = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(logs, ids[..., None], axis=-1)
  earlier = jnp.arange(logs.shape[-1])[None, None] < ids[..., None]
  better = (logs > own) | ((logs == own) & earlier)
  ranks = 1 + jnp.sum(better, axis=-1, dtype=jnp.int32)
  n = min(request_lib.MAX_ALTERNATIVES, logs.shape[-1])
  shape = (*ids.shape, n)
  other_logs, other_ids = jax.lax.cond(
    jnp.any(wanted),
    lambda: tuple(jax.lax.top_k(logs, n)),
    lambda: (jnp.zeros(shape, logs.dtype), jnp.zeros(shape, jnp.int32)),
  )
  return own[..., 0], ranks, other_ids, other_logs
