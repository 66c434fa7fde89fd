"""Muon (https://kellerjordan.github.io/posts/muon/): momentum whose matrices
are orthogonalized by Newton-Schulz iteration.

As optax.contrib.muon, but all matrices of a shape are one batch, and on a mesh
each device multiplies whole matrices, its share of the batch. Left to the
partitioner, every iteration would gather every matrix.

N matrices, m short side, n long side.
"""

import collections
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lm import sharding
from lm.model import weights

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def scale_by_muon(
  declared: Any, *, momentum: float, epsilon: float, dtype: Any
) -> optax.GradientTransformation:
  """Nesterov momentum, orthogonalized.

  `declared` (`decoder.declared`) has the axes of each weight; heads and head
  width together are a single dimension. Matrices are multiplied in `dtype`. The
  state is optax's, which checkpoints store.
  """

  def init(params: Any) -> optax.contrib.MuonState:
    return optax.contrib.MuonState(
      count=jnp.zeros((), jnp.int32),
      mu=jax.tree.map(jnp.zeros_like, params),
      ns_coeffs=jnp.asarray(COEFFICIENTS),
    )

  def update(updates, state, params=None):
    del params
    mu = optax.tree.update_moment(updates, state.mu, momentum, 1)
    count = optax.safe_increment(state.count)
    ahead = jax.tree.map(
      lambda m, g: momentum * m + (1 - momentum) * g,
      optax.tree.bias_correction(mu, momentum, optax.safe_increment(count)),
      optax.tree.bias_correction(updates, momentum, count),
    )
    new = state._replace(count=count, mu=mu)
    return _orthogonalized(declared, ahead, epsilon, dtype), new

  return optax.GradientTransformation(init, update)


def scale_by_shape(declared: Any) -> optax.GradientTransformation:
  """Multiplies a matrix by sqrt(max(1, outputs / inputs))."""

  def scaled(path, x):
    weight = weights.of(declared, path)
    inputs, _ = _side(weight, x.shape, weight.input_axes)
    outputs, _ = _side(weight, x.shape, weight.output_axes)
    return math.sqrt(max(1, outputs / inputs)) * x

  return optax.stateless(
    lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates)
  )


def _orthogonalized(declared: Any, tree: Any, epsilon: float, dtype: Any):
  """`tree` with every matrix orthogonalized."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
  # By sides, the shorter first: (place of the leaf, whether it was turned, it).
  groups: dict[Any, list[tuple[int, bool, Array]]]
  groups = collections.defaultdict(list)
  for place, (path, leaf) in enumerate(leaves):
    weight = weights.of(declared, path)
    inputs = _side(weight, leaf.shape, weight.input_axes)
    outputs = _side(weight, leaf.shape, weight.output_axes)
    matrices = leaf.reshape(-1, inputs[0], outputs[0])
    if turned := inputs > outputs:
      inputs, outputs, matrices = outputs, inputs, matrices.mT
    groups[inputs, outputs].append((place, turned, matrices))
  done = [leaf for _, leaf in leaves]
  for ((_, rows), (_, columns)), members in groups.items():
    x = jnp.concatenate([matrices for _, _, matrices in members])
    norms = jnp.linalg.norm(x, axis=(1, 2), keepdims=True)
    x = (x / (norms + epsilon)).astype(dtype)
    x = sharding.spread(newton_schulz, x, rows, columns)
    ends = np.cumsum([len(matrices) for _, _, matrices in members])
    parts = jnp.split(x, ends[:-1])
    for (place, turned, _), part in zip(members, parts, strict=True):
      leaf = (part.mT if turned else part).reshape(done[place].shape)
      done[place] = leaf.astype(done[place].dtype)
  return jax.tree.unflatten(treedef, done)


def _side(
  weight: weights.Weight, shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[int, tuple[str, ...]]:
  """(size, mesh axes along which it lies) of a matrix's inputs or outputs."""
  names = [weight.axes[axis - weight.stacked] for axis in axes]
  return (
    math.prod(shape[axis] for axis in axes),
    sharding.mesh_axes(*[name for name in names if name is not None]),
  )


@jax.named_scope("newton_schulz")
def newton_schulz(x: Float[Array, "N m n"]) -> Float[Array, "N m n"]:
  """Singular values of `x`, at most 1, moved near 1 by the quintic polynomial
  x -> a x + b (x x^T) x + c (x x^T)^2 x, five times.

  Wide float32 matrices: polynomials of the Gram matrix x x^T commute, so that
  they are multiplied first and x at last. This takes 34 m^3 + 4 m^2 n FLOPs
  where five steps take 10 m^3 + 20 m^2 n. Singular values far below 1 have the
  rounding of their squares: a relative error of the result below 1e-3.
  """
  a, b, c = COEFFICIENTS
  if x.dtype != jnp.float32 or 2 * x.shape[2] <= 3 * x.shape[1]:

    def multiply(equation, *operands):
      return weights.float32_sums(equation, *operands).astype(x.dtype)

    for _ in range(STEPS):
      gram = multiply("Nik,Njk->Nij", x, x)
      p = b * gram + multiply("Nij,Njk->Nik", c * gram, gram)
      x = a * x + multiply("Nij,Njk->Nik", p, x)
    return x
  dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  gram = dot(x, x.mT)
  total = jnp.eye(x.shape[1], dtype=x.dtype)[None]
  for step in range(STEPS):
    # The polynomial is a I + p.
    p = b * gram + c * dot(gram, gram)
    total = a * total + (dot(p, total) if step else p)
    if step + 1 < STEPS:
      once = a * gram + dot(p, gram)
      gram = a * once + dot(p, once)
  return dot(total, x)
