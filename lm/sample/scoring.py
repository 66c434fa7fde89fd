"""How likely a text is: what every sampling rule starts from.

B rows, T length, V vocabulary, A alternatives.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lm import sharding
from lm.model import attention

# Positions whose logits are held at once; every bucket is a multiple.
CHUNK = 16


@functools.partial(jax.jit, static_argnames=("graph", "n_alternatives"))
def score(
  graph: Any,
  state: Any,
  inputs: Int[Array, "B T"],
  targets: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  *,
  n_alternatives: int,
) -> tuple[
  Float[Array, "B T"],
  Int[Array, "B T"],
  Int[Array, "B T A"],
  Float[Array, "B T A"],
]:
  """Log-probability and rank of each target, and the likeliest alternatives.

  Ranks count from 1; equals rank by id. Positions are read a chunk at a time,
  so that the logits of all are never held.
  """
  model = nnx.merge(graph, state)
  B, T = inputs.shape
  places = jnp.arange(T)[None]
  real = places < lengths[:, None]
  tokens = attention.Tokens(
    jnp.where(real, places, 0), real.astype(jnp.int32), None
  )
  hidden = model(inputs, tokens)

  def chunk(i):
    part = jax.lax.dynamic_slice_in_dim(hidden, i, CHUNK, axis=1)
    ids = jax.lax.dynamic_slice_in_dim(targets, i, CHUNK, axis=1)
    judge = functools.partial(_judge, n_alternatives=n_alternatives)
    return sharding.by_row(judge, model.logits(part), ids)

  parts = jax.lax.map(chunk, jnp.arange(0, T, CHUNK))
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), parts
  )


def _judge(logits, ids, n_alternatives):
  logs = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(logs, ids[..., None], axis=-1)
  earlier = jnp.arange(logs.shape[-1])[None, None] < ids[..., None]
  better = (logs > own) | ((logs == own) & earlier)
  ranks = 1 + jnp.sum(better, axis=-1, dtype=jnp.int32)
  other_logs, other_ids = jax.lax.top_k(logs, n_alternatives)
  return own[..., 0], ranks, other_ids, other_logs
