"""A batch in chunks of tokens, and a device's share of the vocabulary: what
loss.py and scoring.py need so as never to hold all logits.

These run inside `sharding.per_shard`. B batch, T length, C tokens of a chunk, D
model, V vocabulary. Without a mesh, or on one device, there are no collectives.
"""

import jax
import jax.numpy as jnp

from lm import sharding


def over(step, carry, chunk, *arrays):
  """Scans `step` over chunks of at most `chunk` tokens of the arrays [B, T,
  ...]: in a chunk, rows and positions are one axis C. Returns the last carry,
  and the second results [C, ...] as [B, T, ...].

  Zeros pad the last chunk: padding has weight 0.
  """
  B, T = arrays[0].shape[:2]
  n = -(-B * T // chunk)
  C = B * T if n == 1 else chunk

  def cut(a):
    a = a.reshape(B * T, *a.shape[2:])
    a = jnp.pad(a, [(0, n * C - B * T)] + [(0, 0)] * (a.ndim - 1))
    return a.reshape(n, C, *a.shape[1:])

  def join(a):
    return a.reshape(n * C, *a.shape[2:])[: B * T].reshape(B, T, *a.shape[2:])

  pieces = tuple(cut(a) for a in arrays)
  if n == 1:
    carry, found = step(carry, tuple(a[0] for a in pieces))
    return carry, jax.tree.map(lambda a: join(a[None]), found)
  carry, found = jax.lax.scan(step, carry, pieces)
  return carry, jax.tree.map(join, found)


def whole_head(head, dtype):
  """All-gathers the local vocabulary rows to the full width, in `dtype`."""
  head, axes = head.astype(dtype), sharding.shared_axes("embed")
  return jax.lax.all_gather(head, axes, axis=1, tiled=True) if axes else head


def ids(scores):
  """Ids [1, V] of the local shard of the vocabulary."""
  local = jnp.arange(scores.shape[-1])[None]
  axes = sharding.shared_axes("vocab")
  mine = jax.lax.axis_index(axes) if axes else 0
  return local + mine * scores.shape[-1]


def psum(x, *axes):
  """Sum over the mesh axes of the logical `axes`."""
  over = sharding.shared_axes(*axes)
  return jax.lax.psum(x, over) if over else x


def pmax(x):
  """Maximum over the shards of the vocabulary."""
  axes = sharding.shared_axes("vocab")
  return jax.lax.pmax(x, axes) if axes else x
