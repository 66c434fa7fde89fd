"""Training speed beside PyTorch's GPT-2, in one run: python benchmarks/train.py

Needs the `bench` extra. Both train the same shape with AdamW on the same
machine, in turns; figures are tokens per second and their ratio, in float32
and in bfloat16 (autocast in PyTorch). The share of time in matrix products is
that of our step's operations on the device, from a profile.
"""

import collections
import dataclasses
import glob
import gzip
import json
import re
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
import transformers

from lm import batch as batch_lib
from lm import config as config_lib
from lm import sharding, validation
from lm.train import programs

L, D, N, V, T, B = 4, 256, 4, 8192, 256, 8
ROUNDS, STEPS = 4, 4
TOKENS = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)


def ours(dtype: str):
  """(one step, the compiled program) for the GPT-2 shape."""
  config = config_lib.Config()
  config.model = config_lib.ModelConfig(
    vocab_size=V,
    n_layers=L,
    d_model=D,
    n_heads=N,
    n_kv_heads=N,
    d_head=D // N,
    d_mlp=4 * D,
    context_length=T,
    norm="layernorm",
    mlp="gelu",
    bias=True,
    positions="learned",
    dtype=dtype,
    scan_layers=False,
  )
  config.optimizer = config_lib.OptimizerConfig(name="adamw", peak_lr=1e-4)
  config.train.batch_size, config.train.sequence_length = B, T
  mesh = sharding.make_mesh(validation.validate(config))
  state = programs.create_state(config, mesh)
  compiled = programs.compile_step(config, mesh)
  rows = dataclasses.replace(
    batch_lib.unscored(TOKENS[:, :-1]),
    targets=TOKENS[:, 1:],
    weights=np.ones((B, T), np.float32),
  )
  batch = sharding.place(rows, programs.batch_sharding(config, mesh), B)
  held = [state]

  def step() -> float:
    held[0], metrics = compiled(held[0], batch)
    return float(metrics["loss"])

  return step, compiled


def theirs(dtype: str):
  config = transformers.GPT2Config(
    vocab_size=V,
    n_positions=T,
    n_embd=D,
    n_layer=L,
    n_head=N,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
  )
  model = transformers.GPT2LMHeadModel(config)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
  ids = torch.from_numpy(TOKENS[:, :-1].astype(np.int64))
  targets = torch.from_numpy(TOKENS[:, 1:].astype(np.int64))

  def step() -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
      logits = model(ids).logits
      loss = torch.nn.functional.cross_entropy(
        logits.float().view(-1, V), targets.reshape(-1)
      )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())

  return step


def seconds(step) -> float:
  started = time.perf_counter()
  for _ in range(STEPS):
    step()
  return (time.perf_counter() - started) / STEPS


def matmul_share(step, compiled) -> float:
  """Of the time that the program's own operations take, that of dots."""
  operations = set(re.findall(r"%?([\w.\-]+) = ", compiled.as_text()))
  spent = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      step()
    (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
    with gzip.open(path) as file:
      events = json.load(file)["traceEvents"]
  for event in events:
    if event.get("ph") == "X" and event["name"] in operations:
      is_dot = re.match(r"ynn|dot|onednn|custom-call", event["name"])
      spent[bool(is_dot)] += event["dur"]
  return spent[True] / max(1, sum(spent.values()))


def main() -> None:
  print(f"{L} layers, width {D}, {N} heads, V {V}, batch {B} x {T} tokens")
  for dtype in ("float32", "bfloat16"):
    (mine, compiled), other = ours(dtype), theirs(dtype)
    first = mine(), other()
    seconds(mine), seconds(other)  # warm-up
    times = [(seconds(mine), seconds(other)) for _ in range(ROUNDS)]
    a, b = (statistics.median(t) for t in zip(*times, strict=True))
    ratios = [theirs_ / ours_ for ours_, theirs_ in times]
    print(
      f"{dtype:8}  ours {B * T / a:,.0f} tokens/s, PyTorch {B * T / b:,.0f}; "
      f"ratio {statistics.median(ratios):.2f} "
      f"({min(ratios):.2f} to {max(ratios):.2f}); "
      f"{matmul_share(mine, compiled):.0%} of our time in matrix products; "
      f"first losses {first[0]:.3f}, {first[1]:.3f}"
    )


if __name__ == "__main__":
  main()
