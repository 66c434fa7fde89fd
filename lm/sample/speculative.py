"""Speculative decoding: proposes tokens for the model to check in one step.

A draft model proposes (arXiv:2211.17192), or earlier text does (prompt lookup).
`decoding.decode` draws each token from the model's own logits, with the noise
of the token's position, and accepts a proposal that equals the drawn token: a
wrong proposal costs time and changes no token.

B rows, R positions of the history, V vocabulary, k proposals; `slots` are
`decoding.Slots`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from lm import sharding
from lm.model import decoder, inference, kv_cache


def look_up(slots: Any, k: int) -> Int[Array, "B k"]:
  """Prompt lookup: proposes [B, k], the tokens after the latest earlier
  occurrence of the last two tokens. Without a match, proposals are arbitrary.
  """
  B, R = slots.history.shape
  place = jnp.arange(R)[None]
  row = jnp.arange(B)
  last, before = slots.last, slots.history[row, slots.lengths - 1]
  pair = (jnp.roll(slots.history, 1, axis=1) == before[:, None]) & (
    slots.history == last[:, None]
  )
  pair &= (place > 0) & (place < slots.lengths[:, None])
  found = jnp.max(jnp.where(pair, place, 0), axis=1)
  ahead = jnp.minimum(found[:, None] + 1 + jnp.arange(k)[None], R - 1)
  return jnp.take_along_axis(slots.history, ahead, axis=1)


def propose(
  draft: decoder.Decoder,
  cache: kv_cache.Cache,
  slots: Any,
  k: int,
  go_on: Callable[[Array, Any], Any],
) -> tuple[Int[Array, "B k"], kv_cache.Cache]:
  """Draft model: proposes [B, k], drawn by the same rules and noise.

  `go_on(logits, slots)` draws a token of each row from logits [B, V] and
  returns the advanced slots. The draft model also reads the last proposal: the
  draft's KV cache must be complete if all proposals are accepted.
  """
  cache = dataclasses.replace(cache, lengths=slots.lengths)
  proposed = []
  for i in range(k + 1):
    hidden, cache = inference.extend(draft, slots.last[:, None], cache)
    if i == k:
      break
    slots = sharding.by_row(go_on, draft.logits(hidden)[:, 0], slots)
    cache = dataclasses.replace(cache, lengths=slots.lengths)
    proposed.append(slots.last[:, None])
  return jnp.concatenate(proposed, axis=1), cache
