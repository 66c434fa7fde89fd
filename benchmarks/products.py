"""What XLA's CPU compiler is slow at, in small programs: the reasons for the
form of products in lm/model/weights.py and kernels.py, and for lm/chips.py.

  JAX_PLATFORMS=cpu python benchmarks/products.py [--torch [--dtype=bfloat16]]

Prints the milliseconds of each form, the best of several, in turns, and the
ratio to the form that the code has. `--torch` prints instead how fast XLA
multiplies the matrices of the shapes of benchmarks/train.py, over PyTorch's
rate, and how fast the parts of a layer between those products are, forward and
gradient, each in a process of its own, in turns: what a step can reach of
PyTorch's speed.
"""

import argparse
import functools
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train
import turns

from lm import chips

B, T, D, F, N, H = 8, 256, 192, 768, 3, 64
TURNS, CALLS = 9, 5


def draw(*shape: int) -> jax.Array:
  values = np.random.default_rng(sum(shape)).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


def compiled(function, *arguments, ours: bool = True, dtype="float32"):
  options = chips.compiler_options("cpu", dtype) if ours else {}
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
  q, k = draw(B, N, T, H), draw(B, N, T, H)

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


def bfloat16() -> None:
  from lm.model import weights

  x, w = (a.astype(jnp.bfloat16) for a in (draw(B * T, D), draw(D, F)))

  def gradients(product):
    return jax.grad(lambda x, w: jnp.sum(product(x, w)) ** 2, argnums=(0, 1))

  written = gradients(lambda x, w: weights._product("TD,DF->TF", None, x, w))
  own = gradients(lambda x, w: x @ w)
  compare(
    "a product in bfloat16 and its gradients",
    {
      "sums leave it in float32": compiled(written, x, w, dtype="bfloat16"),
      "JAX's own gradients": compiled(own, x, w, dtype="bfloat16"),
      "the same, by Eigen": compiled(own, x, w),
    },
    x,
    w,
  )

  def slope(dtype):
    def gelu(x):
      return jax.nn.gelu(x.astype(dtype)).astype(jnp.bfloat16)

    return jax.grad(lambda x: jnp.sum(gelu(x)))

  x = draw(B * T, F).astype(jnp.bfloat16)
  compare(
    "GELU of bfloat16 and its gradient",
    {
      "in float32": compiled(slope(jnp.float32), x, dtype="bfloat16"),
      "in bfloat16": compiled(slope(jnp.bfloat16), x, dtype="bfloat16"),
    },
    x,
  )


def gradients_of_weights() -> None:
  """Both operands are summed over their first axes; the left one is wider."""
  from lm.model import weights

  for title, equation, left, right in (
    ("the loss's gradient of the head", "CV,CD->VD", (512, 2048), (512, D)),
    (
      "an MLP's gradient of its second matrix",
      "TF,TD->FD",
      (B * T, F),
      (B * T, D),
    ),
    (
      "attention's gradient of keys",
      "BKRS,BKRH->BKSH",
      (B, N, T // 2, T),
      (B, N, T // 2, H),
    ),
  ):

    def plain(a, b, equation=equation):
      return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    ours = functools.partial(weights.float32_sums, equation)
    for dtype in ("float32", "bfloat16"):
      a, b = (draw(*shape).astype(dtype) for shape in (left, right))
      compare(
        f"{title} in {dtype}",
        {
          "the narrow operand on the left": compiled(ours, a, b, dtype=dtype),
          "the wide one, its columns summed": compiled(
            plain, a, b, dtype=dtype
          ),
        },
        a,
        b,
      )


# --- beside PyTorch -----------------------------------------------------------

# rows, inputs, outputs of a product.
SHAPES = {
  "nanoGPT's size, MLP": (768, 128, 512),
  "quickstart, MLP": (2048, 192, 768),
  "quickstart, head": (2048, 192, 2048),
  "GPT-2, attention": (1024, 768, 768),
  "GPT-2, MLP": (1024, 768, 3072),
  "GPT-2, head": (1024, 768, 50304),
}


PARTS = ("attention", "LayerNorm", "GELU")


def our_part(part: str, shape: train.Shape):
  from lm.model import kernels, layers

  def attention(q, k, v):
    seen = jnp.tri(shape.T, dtype=bool)[None].repeat(shape.B, 0)
    scale = q.shape[-1] ** -0.5
    return kernels.blocked(q * scale, k, v, seen, True, None, None)

  model = train.our_config(shape, "float32", "adamw").model
  parts = {
    "attention": attention,
    "LayerNorm": layers.Norm(shape.D, model)._normalise,
    "GELU": jax.nn.gelu,
  }

  def both(d, *inputs):
    out, pull = jax.vjp(parts[part], *inputs)
    return out, pull(d)

  return both


def torch_part(part: str):
  import torch
  from torch.nn import functional as F

  def attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).contiguous()

  def norm(x, scale, bias):
    return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)

  def gelu(x):
    return F.gelu(x, approximate="tanh")

  def both(d, *inputs):
    inputs = [x.requires_grad_() for x in inputs]
    function = {"attention": attention, "LayerNorm": norm, "GELU": gelu}
    out = function[part](*inputs)
    return out, torch.autograd.grad(out, inputs, d)

  return both


def part_inputs(part: str, shape: train.Shape) -> list[np.ndarray]:
  """The output's gradient, and the inputs."""
  rng, lead = np.random.default_rng(0), (shape.B, shape.T)
  sizes = {
    "attention": [(*lead, shape.N, shape.D // shape.N)] * 4,
    "LayerNorm": [(*lead, shape.D)] * 2 + [(shape.D,)] * 2,
    "GELU": [(*lead, 4 * shape.D)] * 2,
  }[part]
  return [rng.normal(size=size).astype(np.float32) for size in sizes]


def side(name: str, dtype: str):
  """Answers the name of a product by the GFLOP/s of it and its gradients, and
  that of a layer and a part by runs per second.
  """
  if name == "torch":
    import torch

    def tensor(array):
      return torch.from_numpy(array).to(getattr(torch, dtype))

    def products(x, w, dy):
      return x @ w, dy @ w.T, x.T @ dy
  else:
    from lm.model import weights

    def tensor(array):
      return jnp.asarray(array, dtype)

    def multiply(x, w):
      return weights._product("TD,DF->TF", None, x, w)

    def products(x, w, dy):
      y, pull = jax.vjp(multiply, x, w)
      return y, *pull(dy)

  def runs(function, arrays) -> float:
    inputs = [tensor(array) for array in arrays]
    run = function
    if name != "torch":
      run = compiled(function, *inputs, dtype=dtype)
    seconds, n = 0.0, 0
    jax.block_until_ready(run(*inputs))
    started = time.perf_counter()
    while seconds < 1:
      jax.block_until_ready(run(*inputs))
      n, seconds = n + 1, time.perf_counter() - started
    return n / seconds

  def rate(asked: str) -> float:
    if asked in SHAPES:
      M, K, N = SHAPES[asked]
      rng = np.random.default_rng(0)
      sizes = (M, K), (K, N), (M, N)
      arrays = [rng.normal(size=size).astype(np.float32) for size in sizes]
      return 6 * M * K * N * runs(products, arrays) / 1e9
    named, part = asked.split(": ")
    shape = train.SHAPES[named]
    inputs = part_inputs(part, shape)
    if name == "torch":
      return runs(torch_part(part), inputs)
    return runs(our_part(part, shape), inputs)

  return rate


def beside_torch(dtype: str) -> None:
  environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
  sides = [
    turns.Side(f"--side={name}", f"--dtype={dtype}", environment=environment)
    for name in ("ours", "torch")
  ]
  parts = [f"{shape}: {part}" for shape in train.SHAPES for part in PARTS]
  for names, unit in ((SHAPES, "GFLOP/s"), (parts, "runs/s")):
    rows = []
    for asked in names:
      rates = [[one.ask(asked) for one in sides] for _ in range(5)]
      ours, theirs = zip(*rates, strict=True)
      ratio = turns.described(*turns.ratios(ours, theirs))
      rows.append([asked, *(f"{turns.median(x):.0f}" for x in (ours, theirs))])
      rows[-1].append(ratio)
    columns = ("with gradients", f"XLA {unit}", "PyTorch", "ratio")
    turns.print_table(dtype, columns, rows)
  for one in sides:
    one.close()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--torch", action="store_true")
  parser.add_argument(
    "--dtype", choices=("float32", "bfloat16"), default="float32"
  )
  parser.add_argument(
    "--side", choices=("ours", "torch"), help=argparse.SUPPRESS
  )
  options = parser.parse_args()
  if options.side:
    turns.serve(lambda: side(options.side, options.dtype))
  elif options.torch:
    if absent := turns.missing("torch"):
      parser.error(absent)
    beside_torch(options.dtype)
  else:
    mlp()
    attention()
    bfloat16()
    gradients_of_weights()


if __name__ == "__main__":
  turns.run(main)
