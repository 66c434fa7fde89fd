"""Prefill and decode: each one compiled program per bucket of sizes.

The layers are unrolled and each has its own cache, donated, so that a step
copies nothing.

B batch, T prompt length, S cache slots, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lm import config as config_lib
from lm import sharding
from lm.model import attention, decoder
from lm.sample import rules


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["lengths", "limits", "eos", "parameters"],
  meta_fields=[],
)
@dataclasses.dataclass
class Rows:
  """What stays the same while a batch is decoded.

  Tokens in each prompt, tokens at most to draw (0 for rows that only fill the
  batch), the id that ends the row, and the rules.
  """

  lengths: Int[Array, "B"]
  limits: Int[Array, "B"]
  eos: Int[Array, "B"]
  parameters: rules.Parameters


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "cache",
    "n_steps",
    "done",
    "n_tokens",
    "tokens",
    "log_probabilities",
  ],
  meta_fields=[],
)
@dataclasses.dataclass
class Progress:
  """What decoding carries from step to step.

  Column 0 of `tokens` is the last of the prompt and column i + 1 was drawn in
  step i; of a row, the first `n_tokens` that were drawn count. The cache holds
  what stands before column `n_steps`.
  """

  cache: attention.Cache
  n_steps: Int[Array, ""]
  done: Bool[Array, "B"]
  n_tokens: Int[Array, "B"]
  tokens: Int[Array, "B S"]
  log_probabilities: Float[Array, "B S"]


@functools.partial(jax.jit, static_argnames="cfg")
def unroll(
  cfg: config_lib.ModelConfig, params: decoder.Params
) -> tuple[Any, Any]:
  """Graph and arrays of the model, with arrays of its own for each layer.

  All but vectors come in the compute dtype, to which the model would
  otherwise cast them at every use.
  """
  graph, state = nnx.split(decoder.bind(cfg, params).unroll())
  return graph, jax.tree.map(
    lambda x: x.astype(cfg.dtype) if x.ndim > 1 else x, state
  )


@functools.partial(jax.jit, static_argnames=("graph", "n_slots"))
def prefill(
  graph: Any,
  state: Any,
  inputs: Int[Array, "B T"],
  last: Int[Array, "B"],
  rows: Rows,
  n_slots: int,
) -> Progress:
  """Reads the prompts, all but the `last` token of each, into a new cache.

  The last one is left to the first step of `decode`, so that every token is
  drawn by the same program, and the head never reads a prompt.
  """
  model = nnx.merge(graph, state)
  n_rows, n_tokens = inputs.shape
  places = jnp.arange(n_tokens)[None]
  real = places < rows.lengths[:, None] - 1
  tokens = attention.Tokens(
    # Padding lies at 0, since a learned table may end before the bucket does.
    positions=jnp.where(real, places, 0),
    segments=real.astype(jnp.int32),
    prefix=jnp.zeros_like(real),
  )
  empty = attention.empty_cache(model.cfg, n_rows, n_slots)
  _, cache = model.extend(inputs, tokens, empty)
  slots = jnp.zeros_like(empty.tokens.positions)
  return Progress(
    cache=cache,
    n_steps=jnp.zeros((), jnp.int32),
    done=rows.limits == 0,
    n_tokens=jnp.zeros_like(rows.lengths),
    tokens=attention.write(slots, last[:, None], 0),
    log_probabilities=jnp.zeros_like(slots, jnp.float32),
  )


@functools.partial(
  jax.jit, static_argnames=("graph", "n_ids"), donate_argnames="progress"
)
def decode(
  graph: Any, state: Any, rows: Rows, progress: Progress, n_ids: int
) -> Progress:
  """Draws tokens, of the first `n_ids`, until every row is done."""
  model = nnx.merge(graph, state)

  def step(now: Progress) -> Progress:
    alive = ~now.done[:, None]
    # Rows that are done write empty slots, and stay within the context.
    position = (rows.lengths - 1 + now.n_steps)[:, None]
    tokens = attention.Tokens(
      positions=jnp.where(alive, position, 0),
      segments=alive.astype(jnp.int32),
      prefix=jnp.zeros_like(alive),
    )
    inputs = jax.lax.dynamic_slice_in_dim(now.tokens, now.n_steps, 1, axis=1)
    hidden, cache = model.extend(inputs, tokens, now.cache)
    logits = model.logits(hidden)[:, 0]
    ids, logs = _sample(logits, rows, now.n_steps, n_ids)
    n_steps = now.n_steps + 1
    ended = (ids == rows.eos) | jnp.isnan(logs) | (n_steps >= rows.limits)
    return Progress(
      cache=cache,
      n_steps=n_steps,
      done=now.done | ended,
      n_tokens=now.n_tokens + ~now.done,
      tokens=attention.write(now.tokens, ids[:, None], n_steps),
      log_probabilities=attention.write(
        now.log_probabilities, logs[:, None], n_steps
      ),
    )

  return jax.lax.while_loop(lambda now: ~jnp.all(now.done), step, progress)


def _sample(logits, rows, n_steps, n_ids):
  sample = functools.partial(rules.sample, n_ids=n_ids)
  if sharding.has_mesh():
    # Rows are drawn apart, so each device draws its own, on whole rows.
    logits = jax.sharding.reshard(logits, sharding.partition("batch", None))
    by_row = sharding.partition("batch")
    sample = jax.shard_map(
      sample, in_specs=by_row, out_specs=by_row, check_vma=False
    )
  return sample(logits, rows.parameters, rows.lengths + n_steps)
