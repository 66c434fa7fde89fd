"""Training speed beside PyTorch: python benchmarks/train.py [--shape=nanogpt]

Needs the `bench` extra. Both sides train the same GPT-2 architecture (learned
positions, LayerNorm, biases, GELU, tied head) with AdamW and a clip of the
gradient's norm, each in a process of its own that stays idle while the other
runs, in turns. PyTorch's side is a plain module with one product for queries,
keys and values, scaled_dot_product_attention, fused AdamW and all cores, eager
or by torch.compile, whichever is faster. bfloat16 is autocast there. Both
processes get huge pages from malloc, as in launch/quickstart.sh.

Prints a line per shape and dtype: tokens per second of both sides, the median
ratio of the turns (ours over PyTorch's) and its range. `--json` prints the same
as JSON, with versions, cores and load. `--profile` prints our step's time by
operation instead, from XLA's own profile.
"""

import argparse
import collections
import dataclasses
import glob
import json
import os
import re
import sys
import tempfile
import time

import numpy as np
import turns

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclasses.dataclass(frozen=True)
class Shape:
  """A GPT-2 of L layers, width D, N heads and V ids on B rows of T tokens."""

  L: int
  D: int
  N: int
  V: int
  T: int
  B: int


SHAPES = {
  "nanogpt": Shape(4, 128, 4, 65, 64, 12),  # its size for a CPU
  "quickstart": Shape(4, 192, 3, 2048, 256, 8),
  "gpt2": Shape(12, 768, 12, 50304, 512, 2),
}
SIDES = ("ours", "torch", "torch-compiled")
# A step allocates its memory anew, and page faults would take a tenth of it.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def rows(shape: Shape) -> np.ndarray:
  size = shape.B, shape.T + 1
  return np.random.default_rng(0).integers(0, shape.V, size).astype(np.int32)


# --- our side -----------------------------------------------------------------


def our_config(shape: Shape, dtype: str, optimizer: str):
  from lm import config as config_lib
  from lm import validation

  config = config_lib.Config()
  config.model = config_lib.ModelConfig(
    vocab_size=shape.V,
    n_layers=shape.L,
    d_model=shape.D,
    n_heads=shape.N,
    n_kv_heads=shape.N,
    d_head=shape.D // shape.N,
    d_mlp=4 * shape.D,
    context_length=shape.T,
    norm="layernorm",
    mlp="gelu",
    biases=("qkv", "o", "mlp", "norm"),
    positions="learned",
    dtype=dtype,
    scan_layers=False,
  )
  config.optimizer = config_lib.OptimizerConfig(name=optimizer, peak_lr=1e-4)
  config.train.batch_size = shape.B
  config.train.sequence_length = shape.T
  return validation.validate(config)


def placed(config, mesh, tokens: np.ndarray):
  """The batch of rows of tokens, each of which is scored, on the devices."""
  from lm import batch as batch_lib
  from lm import sharding
  from lm.train import programs

  batch = dataclasses.replace(
    batch_lib.unscored(tokens[:, :-1]),
    targets=tokens[:, 1:],
    weights=np.ones_like(tokens[:, 1:], np.float32),
  )
  return sharding.place(
    batch, programs.batch_sharding(config, mesh), len(tokens)
  )


def ours(shape: Shape, dtype: str, optimizer: str):
  """(one step, the compiled program)."""
  from lm import mesh as mesh_lib
  from lm.train import programs

  config = our_config(shape, dtype, optimizer)
  mesh = mesh_lib.make(config)
  state = programs.create_state(config, mesh)
  compiled = programs.compile_step(config, mesh)
  batch = placed(config, mesh, rows(shape))
  held = [state]

  def step() -> float:
    held[0], metrics = compiled(held[0], batch)
    return float(metrics["loss"])

  return step, compiled


# --- PyTorch's side -----------------------------------------------------------


def theirs(shape: Shape, dtype: str, compiled: bool):
  import torch
  from torch import nn
  from torch.nn import functional

  torch.set_num_threads(os.cpu_count() or 1)
  D, N, T = shape.D, shape.N, shape.T

  class Layer(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
      self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
      self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
      parts = self.qkv(self.norm1(x)).split(D, dim=2)
      heads = [p.unflatten(2, (N, D // N)).transpose(1, 2) for p in parts]
      y = functional.scaled_dot_product_attention(*heads, is_causal=True)
      x = x + self.out(y.transpose(1, 2).flatten(2))
      y = functional.gelu(self.up(self.norm2(x)), approximate="tanh")
      return x + self.down(y)

  class Model(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed, self.places = nn.Embedding(shape.V, D), nn.Embedding(T, D)
      for table in (self.embed, self.places):
        nn.init.normal_(table.weight, std=0.02)
      self.layers = nn.ModuleList(Layer() for _ in range(shape.L))
      self.norm = nn.LayerNorm(D)

    def forward(self, ids, targets):
      x = self.embed(ids) + self.places.weight[None]
      for layer in self.layers:
        x = layer(x)
      logits = functional.linear(self.norm(x), self.embed.weight).float()
      return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

  torch.manual_seed(0)
  model = Model()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  loss_of = torch.compile(model) if compiled else model
  tokens = torch.from_numpy(rows(shape).astype(np.int64))
  ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

  def step() -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
      loss = loss_of(ids, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())

  return step


# --- turns --------------------------------------------------------------------


def runner(step):
  """Answers a number of steps by their seconds and last loss."""

  def run(n_steps: int) -> tuple[float, float]:
    started = time.perf_counter()
    for _ in range(n_steps):
      loss = step()
    return time.perf_counter() - started, loss

  return run


class Side(turns.Side):
  """A side that has warmed up."""

  def __init__(self, *arguments: str):
    super().__init__(*arguments, environment=ENVIRONMENT)
    self.first_loss = self.ask(1)[1]
    self.ask(2)  # warm-up
    self.seconds = self.ask(3)[0] / 3  # a step


def compare(name: str, dtype: str, optimizer: str, n_turns: int) -> dict:
  load = os.getloadavg()[0]
  about = f"--shape={name}", f"--dtype={dtype}", f"--optimizer={optimizer}"
  mine = Side(*about, "--side=ours")
  others = [Side(*about, "--side=torch")]
  try:
    others.append(Side(*about, "--side=torch-compiled"))
  except turns.Ended as error:  # no C++ compiler
    print(f"torch.compile is left out: {error}", file=sys.stderr)
  other = min(others, key=lambda side: side.seconds)
  for side in others:
    if side is not other:
      side.close()
  # About three seconds a turn and side.
  shape, sides = SHAPES[name], (mine, other)
  counts = [max(3, round(3 / side.seconds)) for side in sides]
  rates = [
    [
      shape.B * shape.T * n / side.ask(n)[0]
      for side, n in zip(sides, counts, strict=True)
    ]
    for _ in range(n_turns)
  ]
  for side in sides:
    side.close()
  return {
    "shape": name,
    "dtype": dtype,
    "optimizer": optimizer,
    **turns.compared("tokens_per_second", *zip(*rates, strict=True)),
    "torch_compiled": other is not others[0],
    "first_losses": [mine.first_loss, other.first_loss],
    "load_before": load,
  }


STAGES = ("optimizer", "loss", "attention", "mlp", "embed", "norm")


def stage(scope: str) -> str:
  """The stage of an operation, by the named scopes in `scope`."""
  found = next((name for name in STAGES if name in scope), "rest")
  return f"{found}, {'backward' if 'transpose(' in scope else 'forward'}"


def profile(step, compiled) -> None:
  """Prints the step's time by operation, of XLA's own events. An event ends as
  the operation has handed its work to other threads: large products, such as
  the MLP's, take more than their events, up to the time of the step.
  """
  import jax

  step(), step()
  text = compiled.as_text()
  kinds = dict(re.findall(r"%?([\w.\-]+) = [^=]*? ([\w\-]+)\(", text))
  source = dict(re.findall(r"%?([\w.\-]+) = [^\n]*op_name=\"([^\"]*)\"", text))
  spent: collections.Counter = collections.Counter()
  n = 3
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      started = time.perf_counter()
      for _ in range(n):
        step()
      seconds = (time.perf_counter() - started) / n
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
    for plane in data.planes:
      for line in plane.lines:
        for event in line.events:
          if event.name in kinds:
            spent[event.name] += event.duration_ns
  whole = sum(spent.values())
  stages: collections.Counter = collections.Counter()
  for name, t in spent.items():
    what = "products" if kinds[name] == "dot" else "other"
    stages[f"{stage(source.get(name, ''))}, {what}"] += t
  print(f"{1e3 * seconds:.2f} ms a step, in events by stage:")
  for name, t in stages.most_common():
    print(f"{t / n / 1e6:8.3f} ms {t / whole:5.1%}  {name}")
  print(f"{whole / n / 1e6:.2f} ms a step in operations, by time:")
  for name, t in spent.most_common(40):
    print(
      f"{t / n / 1e6:8.3f} ms {t / whole:5.1%}  {kinds[name]:12} {name:32} "
      f"{source.get(name, '')[-60:]}"
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--shape", choices=[*SHAPES], action="append")
  parser.add_argument(
    "--dtype", choices=["float32", "bfloat16"], action="append"
  )
  parser.add_argument("--optimizer", default="adamw")
  parser.add_argument("--turns", type=turns.at_least(1), default=5)
  parser.add_argument("--json", action="store_true")
  parser.add_argument("--profile", action="store_true")
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  options = parser.parse_args()
  names = options.shape or [*SHAPES]
  dtypes = options.dtype or ["float32", "bfloat16"]
  if options.side:
    about = SHAPES[names[0]], dtypes[0]
    compiled = options.side == "torch-compiled"
    turns.serve(
      lambda: runner(
        ours(*about, options.optimizer)[0]
        if options.side == "ours"
        else theirs(*about, compiled)
      )
    )
  elif options.profile:
    for name in names:
      for dtype in dtypes:
        print(name, dtype)
        profile(*ours(SHAPES[name], dtype, options.optimizer))
  else:
    if absent := turns.missing("torch"):
      parser.error(absent)
    results = []
    for name in names:
      for dtype in dtypes:
        found = compare(name, dtype, options.optimizer, options.turns)
        results.append(found)
        if not options.json:
          print(
            f"{name:10} {dtype:8}  ours "
            f"{found['ours_tokens_per_second']:,.0f} tokens/s, PyTorch "
            f"{found['torch_tokens_per_second']:,.0f}"
            f"{' (compiled)' if found['torch_compiled'] else ''}; ratio "
            f"{turns.described(found['ratio'], found['ratio_range'])}",
            flush=True,
          )
    if options.json:
      machine = turns.machine("jax", "jaxlib", "flax", "torch")
      print(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
  turns.run(main)
