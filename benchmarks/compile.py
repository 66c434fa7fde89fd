"""Compile times in one run: the train step by depth, and the initial state.

  python benchmarks/compile.py

Layers are one scanned body, so 48 of them should cost what 4 do. The initial
state compiles with and without the options of a program that runs once
(lm/chips.py), to the same bits.
"""

import functools
import time

import jax
import numpy as np

from lm import chips, cli, sharding
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm.train import programs
from lm.train import step as step_lib

DEPTHS = (4, 48)
ROUNDS = 3


def config_of(n_layers: int) -> config_lib.Config:
  config = config_lib.Config()
  config.model.n_layers = n_layers
  return config


def step_seconds(n_layers: int) -> float:
  config = config_of(n_layers)
  mesh = mesh_lib.make(config)
  jax.clear_caches()
  started = time.perf_counter()
  programs.compile_step(config, mesh)
  return time.perf_counter() - started


def compare_depths() -> None:
  step_seconds(2)  # what only the first compilation pays
  # In turns, and the best of each, since other work shares the machine.
  times = {depth: [] for depth in DEPTHS}
  for _ in range(ROUNDS):
    for depth in DEPTHS:
      times[depth].append(step_seconds(depth))
  shallow, deep = (min(times[depth]) for depth in DEPTHS)
  print(
    f"trace and compile: {DEPTHS[0]} layers {shallow:.2f} s, "
    f"{DEPTHS[1]} layers {deep:.2f} s, ratio {deep / shallow:.2f}"
  )


def compare_options() -> None:
  config = config_of(DEPTHS[0])
  times, states = {True: [], False: []}, {}
  with jax.set_mesh(mesh_lib.make(config)):
    for _ in range(ROUNDS):
      for once in times:
        jax.clear_caches()
        make = functools.partial(step_lib.init_state, config)
        lowered = jax.jit(make).lower()
        options = chips.compiler_options(sharding.platform(), runs_once=once)
        started = time.process_time()
        compiled = lowered.compile(compiler_options=options)
        times[once].append(time.process_time() - started)
        states[once] = jax.tree.map(np.asarray, jax.tree.leaves(compiled()))
  same = all(
    a.tobytes() == b.tobytes() for a, b in zip(*states.values(), strict=True)
  )
  quick, slow = (min(times[once]) for once in (True, False))
  print(
    f"compile the initial state: {slow:.1f} s of CPU, by the options of a "
    f"program that runs once {quick:.1f} s, ratio {slow / quick:.1f}; "
    f"{'the same' if same else 'OTHER'} bits"
  )


def main() -> None:
  compare_depths()
  compare_options()


if __name__ == "__main__":
  cli.run(main, takes_config=False)
