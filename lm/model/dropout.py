"""Dropout, and its PRNG keys: one per row of the global batch.

B batch, T length.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def dropout(
  x: Float[Array, "B T *rest"], rate: float, keys: Key[Array, "B"] | None
) -> Float[Array, "B T *rest"]:
  """Zeroes a share `rate` of x, scales the rest by 1 / (1 - rate).

  A key per row makes the row's dropout mask the same on any mesh and in any
  split into microbatches. Keys of None disable dropout.
  """
  if keys is None or rate == 0:
    return x
  draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))
  return jnp.where(draw(keys), x / (1 - rate), jnp.zeros((), x.dtype))


def row_keys(key: Key[Array, ""], rows: Int[Array, "B"]) -> Key[Array, "B"]:
  """A PRNG key per row, derived from the row's number in the global batch."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def fold_rows(
  keys: Key[Array, "B"] | None, data: int | Array
) -> Key[Array, "B"] | None:
  """Folds `data` into each key; None stays None."""
  if keys is None:
    return None
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)
