"""Training speed of each objective beside causal.

  python benchmarks/objectives.py

A process for each objective, in turns, idle between: batches from the token
store and the compiled step of configs/quickstart.py. Prints, for each, the
median ratio of the turns (its rows per second over causal's) and its range.
"""

import argparse
import os
import sys
import time

import turns

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

OBJECTIVES = ("causal", "prefix", "span_corruption", "fim", "masked", "chat")
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def side(config_path: str, objective: str):
  """Returns the answer of one side: a number of steps to rows per second."""
  import jax

  from lm import cli, sharding
  from lm import mesh as mesh_lib
  from lm.data import pipeline, store, tokenizer
  from lm.train import programs

  config = cli.load(config_path)
  config.data.validation = ()
  # More would be made while the side idles, and count as made in no time.
  config.data.prefetch_rows = config.train.batch_size
  source, made = config.data.train[0], None
  if objective == "chat":
    text = tokenizer.read_template("configs/chat.jinja", "template")
    made = store.prepare(config).tokenizer.with_template(text)
    source = "instruct:python_stdlib:train"
  config.data.train = (f"{source}|{objective}",)
  mesh = mesh_lib.make(config)
  batches = pipeline.train_batches(config, store.prepare(config, made))
  step = programs.compile_step(config, mesh)
  state = programs.create_state(config, mesh)
  where = programs.batch_sharding(config, mesh)
  n_rows = config.train.batch_size

  def rows_per_second(n: int) -> float:
    nonlocal state
    started, metrics = time.perf_counter(), None
    for _ in range(n):
      batch = sharding.place(next(batches), where, n_rows)
      state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    return n * n_rows / (time.perf_counter() - started)

  rows_per_second(8)  # warm-up
  return rows_per_second


def main() -> None:
  from lm import cli

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/quickstart.py")
  parser.add_argument("--turns", type=turns.at_least(1), default=5)
  parser.add_argument("--steps", type=turns.at_least(1), default=40)
  parser.add_argument("--side", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.side:
    return turns.serve(lambda: side(options.config, options.side))
  cli.load(options.config)  # a mistake is told once
  sides = {
    name: turns.Side(
      f"--config={options.config}", f"--side={name}", environment=ENVIRONMENT
    )
    for name in OBJECTIVES
  }
  rates: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
  for _ in range(options.turns):
    for name, one in sides.items():
      rates[name].append(one.ask(options.steps))
  for one in sides.values():
    one.close()
  for name, found in rates.items():
    print(f"{name}: {turns.described(*turns.ratios(found, rates['causal']))}")


if __name__ == "__main__":
  turns.run(main)
