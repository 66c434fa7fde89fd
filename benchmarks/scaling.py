"""How the cost of a step grows: python benchmarks/scaling.py [--part=tokens]

Parts, all by default:
  tokens      a train step by the tokens of its batch (rows of 128), fitted by a
              line
  depth       a train step by its layers, scanned, fitted by a line
  scan        scanned layers (model.scan_layers) beside unrolled ones: the step,
              and its compilation
  optimizer   a step of the quickstart's shape with Muon beside one with AdamW
  devices     what the host does for a step, by the number of local devices,
              which XLA simulates; beside it the dispatch of `x + 1` with as
              many inputs and outputs, which is JAX's own
  evaluation  a batch of the quickstart's evaluation beside matrix products of
              as many FLOPs

All times are CPU seconds, since these hardly depend on what else the machine
does (in `optimizer` also by the clock): of the process, but in `devices` of the
one thread that places a batch, dispatches the step and reads the metrics,
without the computation of the devices. What is compared takes turns; a time is
the least of the turns, since other work only adds to it, and a ratio the median
of those of the turns.
`--json` prints the same as JSON, with versions and cores.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import train
import turns

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

LENGTH = 128
ROWS = (2, 4, 8, 16, 32)
DEPTHS = (2, 4, 8, 16, 24)
SCANNED = (4, 12, 24)
DEVICES = (1, 2, 4, 8, 16, 32, 64)
CONFIG = "configs/quickstart.py"


def narrow(n_layers: int, n_rows: int) -> train.Shape:
  return train.Shape(n_layers, 128, 2, 512, LENGTH, n_rows)


class Step:
  """A compiled train step of a GPT-2, its state and a batch.

  `compile_seconds` are CPU seconds, tracing included.
  """

  def __init__(
    self, shape: train.Shape, *, scan: bool = True, optimizer: str = "adamw"
  ):
    from lm import mesh as mesh_lib
    from lm.train import programs

    config = train.our_config(shape, "float32", optimizer)
    config.model.scan_layers = scan
    config.mesh.data, config.mesh.fsdp = None, 1
    mesh = mesh_lib.make(config)
    began = time.process_time()
    self._program = programs.compile_step(config, mesh)
    self.compile_seconds = time.process_time() - began
    self._state = programs.create_state(config, mesh)
    self._place = functools.partial(
      train.placed, config, mesh, train.rows(shape)
    )
    self._batch = self._place()
    self._copies = None

  def seconds(
    self, n_steps: int = 1, clock: Callable[[], float] = time.process_time
  ) -> float:
    """CPU seconds of a step, of `n_steps` in a row."""
    import jax

    began = clock()
    for _ in range(n_steps):
      self._state, metrics = self._program(self._state, self._batch)
    jax.block_until_ready(metrics)
    return (clock() - began) / n_steps

  def host_seconds(self) -> dict[str, float]:
    """CPU seconds of this thread, by what it does for a step."""
    import jax

    def spent(work: Callable[[], Any]) -> tuple[float, Any]:
      began = time.thread_time()
      done = work()
      seconds = time.thread_time() - began
      jax.block_until_ready(done)
      return seconds, done

    place, batch = spent(self._place)
    dispatch, out = spent(lambda: self._program(self._state, batch))
    self._state, metrics = out
    read, _ = spent(lambda: jax.device_get(metrics))
    if self._copies is None:
      self._copies = jax.tree.map(lambda x: x.copy(), self._state)
    arguments = self._copies, batch, metrics
    plain, (self._copies, _) = spent(lambda: self._plain(*arguments))
    return {"place": place, "dispatch": dispatch, "read": read, "plain": plain}

  @functools.cached_property
  def _plain(self) -> Callable:
    """`x + 1` of the step's inputs and outputs, laid out and donated as there:
    what JAX takes to dispatch them.
    """
    import jax

    def plus_one(state, batch, metrics):
      return jax.tree.map(lambda x: x + 1, (state, metrics))

    where = self._program.output_shardings
    how = {"donate_argnums": 0, "keep_unused": True, "out_shardings": where}
    return jax.jit(plus_one, **how)


def in_turns(
  work: Mapping[Any, Callable[[int], float]], n_turns: int
) -> dict[Any, list[float]]:
  """Seconds of each turn; a function takes a number of calls, and returns the
  seconds of one. A turn is about a quarter of a second of each.
  """
  calls = {}
  for key, seconds in work.items():
    seconds(1)
    calls[key] = max(2, round(0.25 / seconds(2)))
  found = {key: [] for key in work}
  for _ in range(n_turns):
    for key, seconds in work.items():
      found[key].append(seconds(calls[key]))
  return found


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
  """The line of least relative deviation from y(x), and the largest one."""
  xs, ys = np.asarray(x, float), np.asarray(y)
  slope, intercept = np.polyfit(xs, ys, 1, w=1 / ys)
  worst = float(np.max(np.abs((slope * xs + intercept) / ys - 1)))
  return {
    "slope": float(slope),
    "intercept": float(intercept),
    "largest_deviation": worst,
  }


def by_size(name: str, steps: Mapping[int, Step], n_turns: int) -> dict:
  times = in_turns({n: step.seconds for n, step in steps.items()}, n_turns)
  least = {n: min(found) for n, found in times.items()}
  return {
    "by": name,
    "seconds": least,
    **line([*least], [*least.values()]),
  }


def tokens(n_turns: int) -> dict:
  steps = {n * LENGTH: Step(narrow(4, n)) for n in ROWS}
  return by_size("tokens", steps, n_turns)


def depth(n_turns: int) -> dict:
  return by_size("layers", {n: Step(narrow(n, 8)) for n in DEPTHS}, n_turns)


def scan(n_turns: int) -> dict:
  rows = []
  for n in SCANNED:
    sides = {scan: Step(narrow(n, 8), scan=scan) for scan in (True, False)}
    times = in_turns({k: step.seconds for k, step in sides.items()}, n_turns)
    ratio, span = turns.ratios(times[True], times[False])
    scanned, unrolled = (sides[k].compile_seconds for k in (True, False))
    rows.append(
      {
        "layers": n,
        "step_ratio": ratio,
        "step_ratio_range": span,
        "compile_scanned": scanned,
        "compile_unrolled": unrolled,
      }
    )
  return {"rows": rows}


def optimizer(n_turns: int) -> dict:
  shape = train.SHAPES["quickstart"]
  steps = {
    name: Step(shape, scan=False, optimizer=name) for name in ("muon", "adamw")
  }
  found = {}
  for name, clock in (("cpu", time.process_time), ("clock", time.perf_counter)):
    work = {
      k: functools.partial(step.seconds, clock=clock)
      for k, step in steps.items()
    }
    times = in_turns(work, n_turns)
    ratio, span = turns.ratios(times["muon"], times["adamw"])
    found |= {f"{name}_ratio": ratio, f"{name}_ratio_range": span}
  return found


def devices(n_turns: int) -> dict:
  found = {}
  for n in DEVICES:
    flag = f"--xla_force_host_platform_device_count={n}"
    side = turns.Side(
      "--side=devices",
      environment={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
    )
    side.ask()  # warm-up
    answers = [side.ask() for _ in range(n_turns)]
    side.close()
    found[n] = {
      name: min(answer[name] for answer in answers) for name in answers[0]
    }
  sums = [sum(parts.values()) - parts["plain"] for parts in found.values()]
  return {"seconds": found, **line(DEVICES, sums)}


def evaluation(n_turns: int) -> dict:
  import jax
  import jax.numpy as jnp

  from lm import chips, cli
  from lm import mesh as mesh_lib
  from lm.evaluate import perplexity
  from lm.model import counts, decoder

  config = cli.load(CONFIG)
  model, t = config.model, config.train
  mesh = mesh_lib.make(config)
  shape = t.batch_size, t.sequence_length + 1
  ids = np.random.default_rng(0).integers(0, model.vocab_size, shape)
  batch = train.placed(config, mesh, ids.astype(np.int32))
  with jax.set_mesh(mesh):
    params = jax.jit(functools.partial(decoder.init_params, model))(
      jax.random.key(0)
    )
  lengths = np.ones(model.vocab_size, np.int32)
  step = perplexity.eval_step(model)
  n_tokens = batch.targets.size
  x = jnp.ones((n_tokens, model.d_model))
  up = jnp.ones((model.d_model, model.d_mlp))
  product = (
    jax.jit(lambda x, up: x @ up)
    .lower(x, up)
    .compile(compiler_options=chips.compiler_options("cpu"))
  )

  def evaluated(n: int) -> float:
    began = time.process_time()
    with jax.set_mesh(mesh):
      perplexity.evaluate_batches(step, params, [batch] * n, lengths)
    return (time.process_time() - began) / n

  def multiplied(n: int) -> float:
    began = time.process_time()
    for _ in range(n):
      done = product(x, up)
    jax.block_until_ready(done)
    return (time.process_time() - began) / n

  times = in_turns({"batch": evaluated, "product": multiplied}, n_turns)
  flops = n_tokens * counts.forward_flops(model, t.sequence_length)
  share = flops / (2 * n_tokens * up.size)
  limit = [share * seconds for seconds in times["product"]]
  ratio, span = turns.ratios(times["batch"], limit)
  return {
    "tokens": n_tokens,
    "seconds": min(times["batch"]),
    "limit_seconds": min(limit),
    "ratio": ratio,
    "ratio_range": span,
  }


# --- printing -----------------------------------------------------------------


def say_fit(found: dict) -> None:
  rows = [
    [f"{n:,}", f"{1e3 * seconds:.1f}"]
    for n, seconds in found["seconds"].items()
  ]
  turns.print_table("step, ms of CPU", [found["by"], "ms"], rows)
  print(
    f"slope {1e3 * found['slope']:.3g} ms, intercept "
    f"{1e3 * found['intercept']:.3g} ms; largest deviation from the line "
    f"{found['largest_deviation']:.1%}"
  )


def say_scan(found: dict) -> None:
  rows = [
    [
      str(row["layers"]),
      turns.described(row["step_ratio"], row["step_ratio_range"]),
      f"{row['compile_scanned']:.1f}",
      f"{row['compile_unrolled']:.1f}",
    ]
    for row in found["rows"]
  ]
  columns = ["layers", "step, scanned / unrolled", "compile scanned, s"]
  turns.print_table("scan_layers", [*columns, "unrolled, s"], rows)


def say_optimizer(found: dict) -> None:
  for name, said in (("cpu", "CPU time"), ("clock", "by the clock")):
    ratio = turns.described(
      found[f"{name}_ratio"], found[f"{name}_ratio_range"]
    )
    print(f"step with Muon over one with AdamW, {said}: {ratio}")


def say_devices(found: dict) -> None:
  rows = [
    [str(n), *(f"{1e3 * parts[name]:.2f}" for name in parts)]
    for n, parts in found["seconds"].items()
  ]
  columns = ["devices", "place", "dispatch", "read", "dispatch of x + 1"]
  turns.print_table("host, ms of CPU for a step", columns, rows)
  print(
    f"{1e3 * found['intercept']:.2f} ms, and {1e3 * found['slope']:.3f} ms a "
    "device"
  )


def say_evaluation(found: dict) -> None:
  ratio = turns.described(found["ratio"], found["ratio_range"])
  print(
    f"evaluation of {found['tokens']} tokens: {1e3 * found['seconds']:.0f} ms "
    f"of CPU, as many FLOPs in products {1e3 * found['limit_seconds']:.0f}; "
    f"ratio {ratio}"
  )


PARTS = {
  "tokens": (tokens, say_fit),
  "depth": (depth, say_fit),
  "scan": (scan, say_scan),
  "optimizer": (optimizer, say_optimizer),
  "devices": (devices, say_devices),
  "evaluation": (evaluation, say_evaluation),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--part", choices=[*PARTS], action="append")
  parser.add_argument("--turns", type=turns.at_least(1), default=5)
  parser.add_argument("--json", action="store_true")
  parser.add_argument("--side", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.side:
    turns.serve(lambda: Step(narrow(2, 64)).host_seconds)
    return
  results = {}
  for name in options.part or PARTS:
    measure, say = PARTS[name]
    results[name] = measure(options.turns)
    if not options.json:
      say(results[name])
  if options.json:
    machine = turns.machine("jax", "jaxlib", "flax")
    print(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
  turns.run(main)
