"""Numbers of each layer that a step reports (config.train.statistics_every).

L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.model import decoder


def means(aux: decoder.Aux) -> dict[str, Array]:
  """Means over tokens of the sums `aux`; root mean squares for its squares."""
  if not aux:
    return {}
  sums = dict(aux)
  tokens = jnp.maximum(sums.pop("tokens"), 1.0)
  means = jax.tree.map(lambda total: total / tokens, sums)
  squares = means.pop("square", {})
  return means | {f"{k}_rms": jnp.sqrt(v) for k, v in squares.items()}


@jax.named_scope("statistics")
def norms(tree: Any) -> Float[Array, "L"]:
  """Norm of each layer of a tree like the trainable parameters."""
  return jnp.sqrt(
    sum(
      jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))
      for x in jax.tree.leaves(tree["layers"])
    )
  )
