"""Compile time of the train step by depth, in one run.

  python benchmarks/compile.py

Layers are one scanned body, so 48 of them should cost what 4 do.
"""

import time

import jax

from lm import config as config_lib
from lm import sharding
from lm.train import programs

DEPTHS = (4, 48)
ROUNDS = 3


def seconds(n_layers: int) -> float:
  config = config_lib.Config()
  config.model.n_layers = n_layers
  mesh = sharding.make_mesh(config)
  jax.clear_caches()
  started = time.perf_counter()
  programs.compile_step(config, mesh)
  return time.perf_counter() - started


def main() -> None:
  seconds(2)  # what only the first compilation pays
  # In turns, and the best of each, since other work shares the machine.
  times = {depth: [] for depth in DEPTHS}
  for _ in range(ROUNDS):
    for depth in DEPTHS:
      times[depth].append(seconds(depth))
  shallow, deep = (min(times[depth]) for depth in DEPTHS)
  print(
    f"trace and compile: {DEPTHS[0]} layers {shallow:.2f} s, "
    f"{DEPTHS[1]} layers {deep:.2f} s, ratio {deep / shallow:.2f}"
  )


if __name__ == "__main__":
  main()
