"""Attention over packed documents on one GPU: python benchmarks/attention.py

Times of a layer's attention in bfloat16, forward and with its gradient, by each
kernel of lm/model/kernels.py that the GPU has; beside them cuDNN's causal
attention, which knows no documents. `error` is the largest difference of the
output and of the gradients from float32, relative to the largest value.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import turns

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lm.model import attention

# Rows, tokens, query heads, key heads, head size: llama_1b's, llama3_8b's.
SHAPES = ((4, 4096, 32, 8, 64), (2, 8192, 32, 8, 128))
SMALL = ((2, 768, 4, 2, 64),)
KERNELS = ("mosaic", "cudnn", "reference")
DOCUMENT = 700  # tokens of a document on average
# Of each error: window, soft-cap, tokens of a document's prefix.
KINDS = {
  "causal": (None, None, None),
  "window": (200, None, None),
  "softcap": (None, 3.0, None),
  "prefix": (None, None, 100),
  "prefix, window": (200, None, 300),
}


def rows(shape, prefix: int | None = None) -> attention.Tokens:
  """Documents of random lengths, the last tokens padding."""
  B, T = shape[:2]
  opens = np.random.default_rng(0).random((B, T)) < 1 / DOCUMENT
  opens[:, 0] = True
  firsts = np.maximum.accumulate(np.where(opens, np.arange(T), 0), axis=1)
  positions = np.arange(T) - firsts
  segments = opens.cumsum(axis=1)
  segments[:, -T // 16 :] = 0
  flags = None if prefix is None else jnp.asarray(positions < prefix)
  as_int = functools.partial(jnp.asarray, dtype=jnp.int32)
  return attention.Tokens(as_int(positions), as_int(segments), flags)


def arrays(shape, dtype=jnp.bfloat16):
  """q, k, v and the gradient of the output."""
  B, T, N, K, H = shape
  rng = np.random.default_rng(1)
  sizes = (N, K, K, N)
  made = (rng.standard_normal((B, T, n, H), np.float32) for n in sizes)
  return [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in made]


def ours(kernel, window=None, softcap=None):
  def run(q, k, v, tokens):
    scale = q.shape[-1] ** -0.5
    how = {"window": window, "softcap": softcap, "kernel": kernel}
    return attention.attend(q, k, v, tokens, tokens, scale=scale, **how)

  return run


def without_documents(q, k, v, tokens):
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation="cudnn"
  )


def both(function):
  def run(q, k, v, d_out, tokens):
    real = (tokens.segments > 0)[..., None, None]
    out, back = jax.vjp(lambda *x: function(*x, tokens) * real, q, k, v)
    return out, *back(d_out)

  return run


def dense(q, k, v, tokens, window, softcap):
  """Softmax over a mask [T, T]."""
  B, T, N, H = q.shape
  k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * H**-0.5
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  seen = attention.visible(tokens, tokens, window)[:, None]
  shares = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
  return jnp.einsum("BNTS,BSNH->BTNH", shares, v)


def error(kernel: str, shape, window, softcap, prefix) -> float:
  tokens = rows(shape, prefix)
  run = jax.jit(both(ours(kernel, window, softcap)))
  got = run(*arrays(shape), tokens)
  with jax.default_matmul_precision("highest"):
    exact = functools.partial(dense, window=window, softcap=softcap)
    wanted = jax.jit(both(exact))(*arrays(shape, jnp.float32), tokens)
  pairs = zip(got, wanted, strict=True)
  return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def measure(function, shape) -> dict[str, float]:
  tokens, (q, k, v, d_out) = rows(shape), arrays(shape)
  found = {}
  for name, run, args in (
    ("forward", function, (q, k, v, tokens)),
    ("both", both(function), (q, k, v, d_out, tokens)),
  ):
    compiled = jax.jit(run).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(5):
      started = time.perf_counter()
      for _ in range(5):
        out = compiled(*args)
      jax.block_until_ready(out)
      seconds.append((time.perf_counter() - started) / 5)
    found[f"{name}_ms"] = 1e3 * statistics.median(seconds)
    memory = compiled.memory_analysis().temp_size_in_bytes
    found[f"{name}_mib"] = memory / 2**20
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--small", action="store_true", help="for a CPU")
  parser.add_argument("--errors", action="store_true", help="no times")
  parser.add_argument(
    "--kernel", choices=KERNELS, action="append", help="default: all"
  )
  parser.add_argument("--json", action="store_true")
  options = parser.parse_args()
  names = options.kernel
  if names is None:
    names = ["reference"] if options.small else ["mosaic", "cudnn"]
  platform = jax.default_backend()
  if platform != "gpu" and not (options.small and {*names} == {"reference"}):
    parser.error(f"no GPU but {platform}: write --small --kernel=reference")
  say = functools.partial(print, file=sys.stderr, flush=True)
  errors, times = {}, {}
  for name in names:
    for kind, how in KINDS.items():
      if name != "cudnn" or how[1] is None:  # cuDNN has no soft-cap
        found = errors[f"{name}, {kind}"] = error(name, SMALL[0], *how)
        say(f"error {found:.4f}  {name}, {kind}")
  functions = {name: ours(name) for name in names}
  if not options.small:
    functions["cuDNN, causal, without documents"] = without_documents
  for name, function in functions.items():
    for shape in () if options.errors else SMALL if options.small else SHAPES:
      found = times[f"{name} {shape}"] = measure(function, shape)
      say("  ".join(f"{k} {v:.2f}" for k, v in found.items()), "", name, shape)
  machine = turns.machine("jax", "jaxlib", "tokamax")
  machine["device"] = jax.devices()[0].device_kind
  if options.json:
    found = {"machine": machine, "errors": errors, "times": times}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
  turns.run(main)
