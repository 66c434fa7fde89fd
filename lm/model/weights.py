"""Weight declarations, and the product `dot` of activations with a matrix.

A `Weight` declares the logical axes of a model array, the number of axes summed
over in a product, and the role. The metadata of each `nnx.Param` holds its
`Weight`; `decoder.declared` returns all, as a tree like the parameters. Readers
are optimizer groups, Muon's dimensions, weight decay and int8 scales.

B batch, T query length, D model, V vocabulary.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lm import sharding

Role = Literal["matrix", "embedding", "head", "vector"]


@dataclasses.dataclass(frozen=True)
class Weight:
  """Declaration of an array of the model.

  `axes` are logical names (sharding.RULES). A product sums over the first
  `n_inputs` axes; vectors (bias, norm scale) and look-up tables have none. With
  `stacked` the array has a leading layer axis, not counted in either field. A
  `frozen` weight is never trained: no gradient, no optimizer state, no average.
  """

  axes: tuple[str | None, ...]
  role: Role
  n_inputs: int = 0
  stacked: bool = False
  frozen: bool = False

  @property
  def input_axes(self) -> tuple[int, ...]:
    """Array axes summed over in a product."""
    return tuple(range(self.stacked, self.stacked + self.n_inputs))

  @property
  def output_axes(self) -> tuple[int, ...]:
    """Array axes kept in a product."""
    first = self.stacked + self.n_inputs
    return tuple(range(first, self.stacked + len(self.axes)))


def matrix(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  scale: float,
  *,
  role: Role = "matrix",
  n_inputs: int = 1,
) -> nnx.Param:
  """A float32 weight, normal with deviation `scale`, created sharded."""
  if scale == 0:
    value = jnp.zeros(shape, jnp.float32)
  else:
    value = scale * jax.random.normal(rngs.params(), shape, jnp.float32)
  return _declare(value, Weight(axes, role, n_inputs))


def table(
  rngs: nnx.Rngs,
  shape: tuple[int, int],
  axes: tuple[str | None, str | None],
  scale: float,
) -> nnx.Param:
  """An embedding table, read by row look-up."""
  return matrix(rngs, shape, axes, scale, role="embedding", n_inputs=0)


def vector(
  value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> nnx.Param:
  """A float32 bias or norm scale, filled with `value`."""
  return _declare(jnp.full(shape, value, jnp.float32), Weight(axes, "vector"))


def _declare(value: Array, declared: Weight) -> nnx.Param:
  where = sharding.spec(*declared.axes)
  return nnx.Param(value, out_sharding=where, declared=declared)


def declared(param: nnx.Variable) -> Weight:
  return param.get_metadata()["declared"]


def of(weights: Any, path: tuple[Any, ...]) -> Weight:
  """The `Weight` at a tree path of the parameters."""
  return functools.reduce(lambda node, key: node[key.key], path, weights)


def split(params: Any, weights: Any) -> tuple[Any, Any]:
  """(trainable, frozen) parameters, each a tree without the other's leaves.

  `weights` is `decoder.declared`'s tree; `join` is the inverse.
  """

  def part(params, weights, frozen):
    found = {}
    for name, weight in weights.items():
      if isinstance(weight, dict):
        if inner := part(params[name], weight, frozen):
          found[name] = inner
      elif weight.frozen == frozen:
        found[name] = params[name]
    return found

  return part(params, weights, False), part(params, weights, True)


def join(trainable: Any, frozen: Any) -> Any:
  """All parameters, from the two trees of `split`."""
  found = dict(trainable)
  for name, value in frozen.items():
    found[name] = (
      join(found.get(name, {}), value) if isinstance(value, dict) else value
    )
  return found


# --- products -----------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Reversed:
  """A weight stored with axes in reverse order (transposed), for `dot`.

  On CPUs, a product of a single token with a tall matrix is a fifth faster if
  the sum runs along contiguous memory.
  """

  values: Array


def dot(
  equation: str,
  x: Float[Array, "..."],
  weight: nnx.Param,
  *axes: str | None,
  adapter: Callable[..., Array] | None = None,
) -> Float[Array, "..."]:
  """einsum of activations with a matrix, in the activations' dtype.

  `axes` are logical names of the output's axes. The weight may be an array, a
  `Reversed`, or a `qwix.QArray`: int8 values and a float32 scale per output.
  `adapter` (lm/model/lora.py) gives an update that is added to the product.
  Two summed axes (heads and head width) are flattened first, and on CPUs rows
  and positions, too: XLA's CPU compiler has no fast product over two axes, in
  forward or backward (benchmarks/products.py).
  """
  if adapter is not None:
    y = dot(equation, x, weight, *axes)
    return y + adapter(equation, x, *axes)
  values, scales = weight.get_value(), None
  if not isinstance(values, jax.Array | Reversed):
    values, scales = values.qvalue, values.scale
  inputs, rest = equation.split(",")
  letters, outputs = rest.split("->")
  if isinstance(values, Reversed):
    letters, values = letters[::-1], values.values
  elif declared(weight).n_inputs == 2:
    x, values = _merge(x, x.ndim - 2), _merge(values, 0)
    inputs, letters = inputs[:-1], letters[0] + letters[2:]
  whole_rows = not sharding.mesh_axes("length")
  multiply = _flat_dot if whole_rows and sharding.platform() == "cpu" else _dot
  y = multiply(inputs, letters, outputs, x, values.astype(x.dtype), axes)
  if scales is None:
    return y
  return (y * scales.reshape(1, 1, *y.shape[2:])).astype(y.dtype)


def _dot(inputs, letters, outputs, x, values, axes):
  where = sharding.spec(*axes)
  equation = f"{inputs},{letters}->{outputs}"
  return jnp.einsum(equation, x, values, out_sharding=where)


def _flat_dot(inputs, letters, outputs, x, values, axes):
  """`_dot` as a product of two matrices: batch and length are one axis of
  activations, and heads and head width one axis of the weight.
  """
  sizes = dict(zip(inputs + letters, x.shape + values.shape, strict=True))
  if len(letters) == 3:
    values, letters = _merge(values, 1), letters[:2]
  equation = f"{inputs[1:]},{letters}->{outputs[1] + outputs[2]}"
  where, matrix = sharding.spec(axes[0], axes[2]), _merge(x, 0)
  y = _product(equation, where, matrix, values)
  shape = tuple(sizes[letter] for letter in outputs)
  return jax.lax.reshape(y, shape, out_sharding=sharding.spec(*axes))


def float32_sums(
  equation: str, a: Array, b: Array, where: P | None = None
) -> Array:
  """einsum of operands in the compute dtype, accumulated in float32."""
  on_cpu = sharding.platform() == "cpu"
  left, right, out = re.split(",|->", equation)
  kept = [letter for letter in left if letter in out]
  if on_cpu and not left.startswith("".join(kept)):
    return _sums_of_columns(left, right, out, a, b, where)
  sums = _sums(equation, a, b, where)
  # JAX 0.10 fails to run such a product if XLA makes a transpose part of it.
  in_bfloat16 = on_cpu and a.dtype == jnp.bfloat16
  return jax.lax.optimization_barrier(sums) if in_bfloat16 else sums


def _sums(equation: str, a: Array, b: Array, where: P | None) -> Array:
  return jnp.einsum(
    equation, a, b, preferred_element_type=jnp.float32, out_sharding=where
  )


def _sums_of_columns(
  left: str, right: str, out: str, a: Array, b: Array, where: P | None
) -> Array:
  """`float32_sums` over axes of `a` that are not its last, in the form for
  which XLA's products on CPUs are fast (benchmarks/products.py).

  XLA copies such a left operand number by number, so the narrower one takes its
  place, unless the sums are too short to pay for transposing the product. In
  bfloat16 the left operand is copied here, its summed axes last: only then XLA
  multiplies bfloat16 as such, by YNNPACK, and does not convert it to float32.
  """
  sizes = dict(zip(left + right, a.shape + b.shape, strict=True))

  def size(letters):
    return math.prod(sizes[letter] for letter in letters)

  of_left, of_right = set(left) - set(right), set(right) - set(left)
  order = out
  if size(of_right) < min(size(of_left), size(set(left) - set(out))):
    left, right, a, b = right, left, b, a
    order = "".join(sorted(out, key=lambda letter: letter in of_left))
  if a.dtype == jnp.bfloat16:
    rows = "".join(sorted(left, key=lambda letter: letter not in out))
    a = jnp.transpose(a, [left.index(letter) for letter in rows])
    left, a = rows, in_order(a)
  if where is not None:
    where = P(*(where[out.index(letter)] for letter in order))
  # Without a barrier XLA would make the transpose part of the product.
  sums = _sums(f"{left},{right}->{order}", a, b, where)
  sums = jax.lax.optimization_barrier(sums)
  return jnp.transpose(sums, [order.index(letter) for letter in out])


def in_order(a: Array) -> Array:
  """`a`, on CPUs in bfloat16 laid out as its axes are: XLA's product is in
  bfloat16 only so, and converts a transposed operand, a view, to float32.
  """
  if sharding.platform() != "cpu" or a.dtype != jnp.bfloat16:
    return a
  # Without another axis the barrier would be of the view.
  return jnp.squeeze(jax.lax.optimization_barrier(jnp.expand_dims(a, 0)), 0)


def _rounded_sums(equation: str, where: P | None, x: Array, w: Array) -> Array:
  """A product of two matrices, "TD,DF->TF" or "TD,FD->TF", sharded as `where`.

  Its gradients are written out, for JAX's own do not come from `float32_sums`.
  """
  return float32_sums(equation, x, w, where).astype(x.dtype)


def _forward(equation, where, x, w):
  return _rounded_sums(equation, where, x, w), (x, w)


def _backward(equation, where, saved, dy):
  del where
  x, w = saved
  of_x, of_w = (
    jax.typeof(a).sharding.spec if sharding.has_mesh() else None for a in saved
  )
  of, outputs = equation.split("->")
  inputs, letters = of.split(",")
  dx = float32_sums(f"{outputs},{letters}->{inputs}", dy, w, of_x)
  if letters[0] in inputs:
    dw = float32_sums(f"{inputs},{outputs}->{letters}", x, dy, of_w)
  else:
    dw = float32_sums(f"{outputs},{inputs}->{letters}", dy, x, of_w)
  return dx.astype(x.dtype), dw.astype(w.dtype)


_product = jax.custom_vjp(_rounded_sums, nondiff_argnums=(0, 1))
_product.defvjp(_forward, _backward)


def _merge(x: Array, axis: int) -> Array:
  """Merges `axis` and the axis after it, which keep the sharding of `axis`."""
  where = None
  if sharding.has_mesh():
    spec = [*jax.typeof(x).sharding.spec]
    del spec[axis + 1]
    where = P(*spec)
  size = x.shape[axis] * x.shape[axis + 1]
  shape = (*x.shape[:axis], size, *x.shape[axis + 2 :])
  return jax.lax.reshape(x, shape, out_sharding=where)


def scores(
  x: Float[Array, "*lead D"], head: Float[Array, "V D"], *axes: str | None
) -> Float[Array, "*lead V"]:
  """Logits before any soft-cap: product in x's dtype, accumulated in float32.

  `axes` are logical names of the output's axes; omit `axes` for a local shard
  (inside `sharding.per_shard`).
  """
  where = sharding.spec(*axes) if axes else None
  return float32_sums("...D,VD->...V", x, head.astype(x.dtype), where)
