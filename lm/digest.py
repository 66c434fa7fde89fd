"""Digest: a 64-bit hash of any tree of arrays, the same on any mesh."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_PRIME = np.uint32(0x01000193)
_BLOCK = 1 << 24  # words


def of_tree(tree: Any, first_row: Array | int = 0) -> Array:
  """Digest, uint32 [2], of the bits, positions and tree path of all elements.

  The digest is a sum modulo 2^32 of mixed words, hence the same on any mesh. If
  an array is split by hand (`jax.pmap`), `first_row` is the index of row 0 in
  the whole array, and the sum of the parts' digests is the digest of the whole.
  """
  total = jnp.zeros(2, jnp.uint32)
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = np.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
    total += _digest(x, name, jnp.asarray(first_row, jnp.uint32))
  return total


@jax.jit  # outside of jit, arrays of the same shape share a compiled program
def _digest(x: Array, name: Array, first_row: Array) -> Array:
  if x.ndim == 0:
    x = x[None]
  where = jax.typeof(x).sharding
  whole = where.mesh.empty or where.spec[0] is None
  n = _rows(len(x), x.size) if whole else len(x)
  if n == len(x):
    return _mixed(x, name, first_row)

  def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
    first, rows = block
    return total + _mixed(rows.reshape(n, *x.shape[1:]), name, first), None

  firsts = first_row + jnp.arange(0, len(x), n, dtype=jnp.uint32)
  # With n = 1, a reshape would copy all of x.
  blocks = x if n == 1 else x.reshape(-1, n, *x.shape[1:])
  return jax.lax.scan(add, jnp.zeros(2, jnp.uint32), (firsts, blocks))[0]


def _rows(n: int, size: int) -> int:
  """Rows of a block of an array of `n` rows and `size` words: the most, of at
  most `_BLOCK` words, that divide `n`. XLA on CPUs holds the mixed words of a
  block, for each of two sums.
  """
  most = min(n, max(1, _BLOCK * n // max(1, size)))
  return next((k for k in range(most, 0, -1) if n % k == 0), n)


def _mixed(x: Array, place: Array, first_row: Array) -> Array:
  """Sums, uint32 [2], of the words of `x`, each mixed with its position."""
  if x.dtype == bool:  # has no bits to cast
    x = x.astype(jnp.uint8)
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
  where = jax.typeof(x).sharding
  where = None if where.mesh.empty else where
  for axis in range(x.ndim):
    i = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=where)
    if axis == 0:
      i += first_row
    place = place * _PRIME + i
  # The finalizer of MurmurHash3 (A. Appleby, public domain), with two seeds.
  sums = []
  for seed in (0x9E3779B9, 0x85EBCA77):
    h = words ^ (place * np.uint32(seed))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    sums.append(jnp.sum(h ^ (h >> 16), dtype=jnp.uint32))
  return jnp.stack(sums)
