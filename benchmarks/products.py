"""What XLA's CPU compiler is slow at, in small programs: the reasons for the
form of products in lm/model/weights.py and kernels.py, and for lm/chips.py.

  JAX_PLATFORMS=cpu python benchmarks/products.py

Prints the milliseconds of each form, the best of several, in turns, and the
ratio to the form that the code has.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lm import chips

B, T, D, F, N, H = 8, 256, 192, 768, 3, 64
TURNS, CALLS = 9, 5


def draw(*shape: int) -> jax.Array:
  values = np.random.default_rng(sum(shape)).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


def compiled(function, *arguments, ours: bool = True):
  options = chips.compiler_options("cpu") if ours else {}
  program = jax.jit(function).lower(*arguments)
  return program.compile(compiler_options=options)


def compare(title: str, forms: dict, *arguments) -> None:
  """The first of `forms` (name -> compiled program) is what the code has."""
  best = dict.fromkeys(forms, np.inf)
  for _ in range(TURNS):
    for name, program in forms.items():
      jax.block_until_ready(program(*arguments))
      started = time.perf_counter()
      for _ in range(CALLS):
        done = program(*arguments)
      jax.block_until_ready(done)
      best[name] = min(best[name], (time.perf_counter() - started) / CALLS)
  print(title)
  first = next(iter(best.values()))
  for name, seconds in best.items():
    print(f"  {1e3 * seconds:7.2f} ms  {seconds / first:5.2f}  {name}")


def mlp() -> None:
  x, up, down = draw(B, T, D), draw(D, F), draw(F, D)

  def flat(x, weight):
    y = x.reshape(-1, x.shape[-1]) @ weight
    return y.reshape(*x.shape[:2], -1)

  def axes(x, weight):
    return jnp.einsum("BTD,DF->BTF", x, weight)

  def gradients(product):
    def total(x, up, down):
      return jnp.sum(product(jax.nn.gelu(product(x, up)), down))

    return jax.grad(total, argnums=(0, 1, 2))

  inputs = x, up, down
  compare(
    "an MLP and its gradient",
    {
      "rows and positions as one axis": compiled(gradients(flat), *inputs),
      "rows and positions as two": compiled(gradients(axes), *inputs),
    },
    *inputs,
  )


def attention() -> None:
  q, k, p = draw(B, N, T, H), draw(B, N, T, H), draw(B, N, T, T)

  def scores(q, k):
    return jnp.einsum("BNTH,BNSH->BNTS", q, k)

  compare(
    "scores of attention",
    {
      "by Eigen": compiled(scores, q, k),
      "by YNNPACK (XLA's default)": compiled(scores, q, k, ours=False),
    },
    q,
    k,
  )

  def small_turned(p, k):
    turned = jax.lax.optimization_barrier(k.swapaxes(2, 3))
    return jnp.einsum("BNHT,BNTS->BNHS", turned, p).swapaxes(2, 3)

  def large_turned(p, k):
    return jnp.einsum("BNTS,BNTH->BNSH", p, k)

  compare(
    "product with transposed probabilities",
    {
      "the small operand is transposed": compiled(small_turned, p, k),
      "the large one is": compiled(large_turned, p, k),
    },
    p,
    k,
  )


if __name__ == "__main__":
  mlp()
  attention()
