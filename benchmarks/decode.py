"""Decoding against what the machine's memory allows, and against Hugging Face.

JAX_PLATFORMS=cpu python benchmarks/decode.py [--batch=1,8,32] [--n_new=64]
    [--temperature=1 --top_k=50 --top_p=0.9] [--config=configs/llama_1b.py]
JAX_PLATFORMS=cpu python benchmarks/decode.py --queue

A GPT-2 of random weights (124M, float32) continues a prompt of 32 tokens,
greedily, by lm.sample and by `transformers.generate` (where it is installed) in
turns, best of several. The ceiling is measured in the same turns: a product of
a vector with as many bytes of matrices as a step reads.

`--queue` serves 64 samples of 10 to 500 tokens (as many below 70 as above:
log-uniform) through 8 slots, by continuous batching and in batches of 8 that
each last as long as their longest sample.
"""

import dataclasses
import functools
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich
from absl import app, flags
from rich import table as table_lib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lm import cli
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib

_BATCH = flags.DEFINE_list("batch", ["1", "8", "32"], "Samples at once.")
_N_NEW = flags.DEFINE_integer("n_new", 64, "Tokens to draw of each.")
_TURNS = flags.DEFINE_integer("turns", 3, "Turns, of which the best counts.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_REFERENCE = flags.DEFINE_bool("reference", True, "Time Hugging Face too.")
_CONFIG = flags.DEFINE_string(
  "config", None, "Model of this config, in float32, in place of GPT-2."
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Of ours, where it is hot.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Of ours, where it is hot.")
_QUEUE = flags.DEFINE_bool("queue", False, "Continuous against static batches.")
_N_PROMPT = 32

GPT2 = config_lib.ModelConfig(
  vocab_size=50304,
  n_layers=12,
  d_model=768,
  n_heads=12,
  n_kv_heads=12,
  d_head=64,
  d_mlp=3072,
  context_length=1024,
  norm="layernorm",
  mlp="gelu",
  bias=True,
  positions="learned",
)


def weight_bytes(cfg: config_lib.ModelConfig) -> int:
  """Bytes of the matrices that a step reads, the head among them."""
  D, H = cfg.d_model, cfg.d_head
  heads = 2 * cfg.n_heads + 2 * cfg.n_kv_heads
  mlp = (3 if cfg.gated else 2) * cfg.d_mlp
  layer = D * (heads * H + mlp)
  itemsize = jnp.dtype(cfg.dtype).itemsize
  return (cfg.n_layers * layer + D * cfg.vocab_size) * itemsize


def make_sampler(cfg: config_lib.ModelConfig) -> sampler_lib.Sampler:
  params = jax.jit(functools.partial(decoder.init_params, cfg))(
    jax.random.key(0)
  )
  return sampler_lib.Sampler(cfg, params, tokenizer_lib.Tokenizer())


def make_request(n_new: int, seed: int) -> request_lib.Request:
  """One of exactly `n_new` tokens."""
  return request_lib.Request(
    [i % 200 + 120 for i in range(_N_PROMPT - 1)],
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    max_new_tokens=n_new,
    min_tokens=n_new,
    seed=seed,
  )


def make_ours(cfg: config_lib.ModelConfig):
  sampler = make_sampler(cfg)

  def run(n_rows, n_new):
    requests = [make_request(n_new, i) for i in range(n_rows)]
    start = time.perf_counter()
    engine = sampler.engine(n_rows, 128)
    for request in requests:
      engine.submit(request)
    engine.step(1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    while not engine.idle:
      engine.step()
    return first, (n_new - 1) / (time.perf_counter() - start)

  return run


def make_reference(cfg: config_lib.ModelConfig):
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  torch.set_num_threads(os.cpu_count() or 1)
  model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(vocab_size=cfg.vocab_size)
  ).eval()
  prompt = torch.arange(_N_PROMPT)[None]

  def generate(n_rows, n_new):
    start = time.perf_counter()
    with torch.inference_mode():
      model.generate(
        prompt.repeat(n_rows, 1),
        attention_mask=torch.ones(n_rows, _N_PROMPT, dtype=torch.long),
        do_sample=_TEMPERATURE.value > 0,
        top_k=0,
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        pad_token_id=0,
      )
    return time.perf_counter() - start

  def run(n_rows, n_new):
    first = generate(n_rows, 1)
    return first, (n_new - 1) / (generate(n_rows, n_new) - first)

  return run


def make_ceiling(cfg: config_lib.ModelConfig):
  """Reads what a step reads, in squares of the model's width."""
  D = cfg.d_model
  n = weight_bytes(cfg) // (D * D * jnp.dtype(cfg.dtype).itemsize)
  matrices = [
    jax.random.normal(jax.random.key(i), (4 * D, D), cfg.dtype)
    for i in range(n // 4)
  ]

  @jax.jit
  def product(x, matrices):
    return [matrix @ x for matrix in matrices]

  x = jnp.ones(D, cfg.dtype)

  def run(n_steps):
    start = time.perf_counter()
    for _ in range(n_steps):
      jax.block_until_ready(product(x, matrices))
    return n_steps * len(matrices) * 4 / n / (time.perf_counter() - start)

  return run


def compare_queue() -> None:
  """Tokens per second of the same requests, both ways in turns."""
  rng = np.random.default_rng(0)
  lengths = np.exp(rng.uniform(np.log(10), np.log(500), 64)).astype(int)
  requests = [make_request(int(n), i) for i, n in enumerate(lengths)]
  sampler, n_slots, n_places = make_sampler(GPT2), 8, _N_PROMPT + 512

  def serve(requests):
    engine = sampler.engine(n_slots, n_places)
    for request in requests:
      engine.submit(request)
    n_tokens = 0
    while not engine.idle:
      n_tokens += sum(len(piece.token_ids) for piece in engine.step())
    return n_tokens

  def time_of(batches):
    start = time.perf_counter()
    n_tokens = sum(serve(batch) for batch in batches)
    return n_tokens / (time.perf_counter() - start)

  serve(requests[:1])  # compiles
  static = [requests[i : i + n_slots] for i in range(0, 64, n_slots)]
  for turn in range(_TURNS.value):
    fixed, continuous = time_of(static), time_of([requests])
    print(
      f"turn {turn}: {lengths.sum()} tokens; static {fixed:.1f} tokens/s, "
      f"continuous {continuous:.1f}: {continuous / fixed:.2f} times, "
      f"load {os.getloadavg()[0]:.1f}",
      flush=True,
    )


def main(_) -> None:
  if _QUEUE.value:
    return compare_queue()
  cfg, n_new = GPT2, _N_NEW.value
  if _CONFIG.value is not None:
    cfg = cli.load(_CONFIG.value).model
    cfg = dataclasses.replace(cfg, dtype="float32")
  ours, ceiling = make_ours(cfg), make_ceiling(cfg)
  ceiling(1)  # compiles
  compares = _REFERENCE.value and _CONFIG.value is None
  reference = make_reference(cfg) if compares else None
  table = table_lib.Table(
    "batch",
    "steps/s",
    "weights GB/s",
    "of matrix-vector",
    "first token ms",
    "Hugging Face steps/s",
    "times Hugging Face",
    title=f"load {os.getloadavg()[0]:.1f}",
  )
  for batch in map(int, _BATCH.value):
    rows = []
    ours(batch, n_new)  # compiles
    for _ in range(_TURNS.value):
      rows.append((ceiling(n_new), *ours(batch, n_new)))
      if reference is not None:
        rows[-1] += reference(batch, n_new)
    columns = np.array(rows)
    top, first, steps = (
      columns[:, 0].max(), columns[:, 1].min(), columns[:, 2].max()
    )  # fmt: skip
    other = columns[:, 4].max() if reference is not None else float("nan")
    table.add_row(
      str(batch),
      f"{steps:.1f}",
      f"{steps * weight_bytes(cfg) / 1e9:.1f}",
      f"{steps / top:.0%}",
      f"{1e3 * first:.0f}",
      f"{other:.1f}",
      f"{steps / other:.2f}",
    )
  rich.print(table)


if __name__ == "__main__":
  app.run(main)
