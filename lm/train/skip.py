"""Skipping outlier steps (config.optimizer.skip), whose updates are dropped."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lm import config as config_lib


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["values", "count", "skipped"],
  meta_fields=[],
)
@dataclasses.dataclass
class History:
  """Loss and gradient norm of the last finite steps, for SkipConfig.

  Leaves may be arrays, shapes or shardings, as in any pytree.
  """

  values: Any  # float32 [window, 2]
  count: Any  # int32, finite steps seen
  skipped: Any  # int32, steps skipped


def fresh(skip: config_lib.SkipConfig) -> History:
  """The history before the first step."""
  zero = jnp.zeros((), jnp.int32)
  return History(jnp.zeros((skip.window, 2), jnp.float32), zero, zero)


def judge(
  skip: config_lib.SkipConfig, old: History, mean: Array, norm: Array
) -> tuple[Array, History]:
  """(whether to keep a step of this loss and gradient norm, new history).

  Finite outliers still enter the history: a lasting change of level is accepted
  in time.
  """
  seen = jnp.stack([mean, norm])
  centre, spread = jnp.mean(old.values, axis=0), jnp.std(old.values, axis=0)
  finite = jnp.all(jnp.isfinite(seen))
  outlier = jnp.any(seen > centre + skip.sigma * spread)
  keep = finite & ~(outlier & (old.count >= skip.window))
  slot = old.count % skip.window
  return keep, History(
    old.values.at[slot].set(jnp.where(finite, seen, old.values[slot])),
    old.count + finite.astype(jnp.int32),
    old.skipped + (~keep).astype(jnp.int32),
  )
