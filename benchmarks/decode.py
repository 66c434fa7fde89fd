"""Decoding against what the machine's memory allows, and against Hugging Face.

JAX_PLATFORMS=cpu python benchmarks/decode.py [--batch=1,8,32] [--n_new=64]
    [--temperature=1 --top_k=50 --top_p=0.9] [--config=configs/llama_1b.py]
JAX_PLATFORMS=cpu python benchmarks/decode.py --queue

A GPT-2 of random weights (124M, float32) continues a prompt of 32 tokens,
greedily, by lm.sample and by `transformers.generate` (where the `bench` extra
is installed), each in a process of its own that idles while the others run, in
turns. PyTorch's side has scaled_dot_product_attention, inference mode and all
cores, and is eager with a growing cache or by torch.compile with a static one,
whichever is faster. The ceiling is a third process: a product of a vector with
as many bytes of matrices as a step reads.

Prints medians of the turns, and ratios with their range; `--json` prints the
same as JSON, with versions, cores and load.

`--queue` serves 64 samples of 10 to 500 tokens (as many below 70 as above:
log-uniform) through 8 slots, by continuous batching and in batches of 8 that
each last as long as their longest sample.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np
import turns

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lm import config as config_lib

SIDES = ("ours", "torch", "torch-compiled", "ceiling")
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
  biases=("qkv", "o", "mlp", "norm"),
  positions="learned",
)


@dataclasses.dataclass(frozen=True)
class Rules:
  """How both sides continue a prompt; a temperature of 0 is greedy."""

  n_prompt: int = 32
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0


def weight_bytes(cfg: config_lib.ModelConfig) -> int:
  """Bytes of the matrices that a step reads, the head among them."""
  D, H = cfg.d_model, cfg.d_head
  heads = 2 * cfg.n_heads + 2 * cfg.n_kv_heads
  mlp = (3 if cfg.gated else 2) * cfg.d_mlp
  layer = D * (heads * H + mlp)
  return (cfg.n_layers * layer + D * cfg.vocab_size) * itemsize(cfg)


def itemsize(cfg: config_lib.ModelConfig) -> int:
  return {"float32": 4, "bfloat16": 2}[cfg.dtype]


# --- our side -----------------------------------------------------------------


def make_sampler(cfg: config_lib.ModelConfig):
  import jax

  from lm.data import tokenizer
  from lm.model import decoder
  from lm.sample import sampler

  init = jax.jit(functools.partial(decoder.init_params, cfg))
  return sampler.Sampler(cfg, init(jax.random.key(0)), tokenizer.Tokenizer())


def make_request(rules: Rules, n_new: int, seed: int):
  """A request of exactly `n_new` tokens."""
  from lm.sample import request

  return request.Request(
    [i % 200 + 120 for i in range(rules.n_prompt)],
    temperature=rules.temperature,
    top_k=rules.top_k,
    top_p=rules.top_p,
    max_new_tokens=n_new,
    min_tokens=n_new,
    seed=seed,
  )


def ours(cfg: config_lib.ModelConfig, rules: Rules):
  """Answers a number of rows, of new tokens and of those at the start by the
  seconds to the first token and the steps per second after the start.
  """
  from lm.sample import engine as engine_lib

  sampler = make_sampler(cfg)

  def run(n_rows: int, n_new: int, n_start: int = 1) -> tuple[float, float]:
    requests = [make_request(rules, n_new, i) for i in range(n_rows)]
    n_places = engine_lib.bucket(rules.n_prompt + n_new, 128)
    started = time.perf_counter()
    engine = sampler.engine(n_rows, n_places)
    for request in requests:
      engine.submit(request)
    engine.step(1)
    first = time.perf_counter() - started
    if n_start > 1:
      engine.step(n_start - 1)
    started = time.perf_counter()
    while not engine.idle:
      engine.step()
    return first, (n_new - n_start) / (time.perf_counter() - started)

  return run


# --- Hugging Face's side ------------------------------------------------------


def gpt2(cfg: config_lib.ModelConfig):
  import transformers

  return transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      vocab_size=cfg.vocab_size,
      bos_token_id=None,
      eos_token_id=None,
      attn_implementation="sdpa",
    )
  )


def theirs(model, rules: Rules, compiled: bool):
  """Answers as `ours` does, by `generate`; `compiled` has a static cache."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  torch.set_num_threads(os.cpu_count() or 1)
  model = model.eval()
  prompt = torch.arange(rules.n_prompt, device=model.device)[None]
  options = {"do_sample": False}
  if rules.temperature > 0:
    options = {
      "do_sample": True,
      "temperature": rules.temperature,
      "top_k": rules.top_k,
      "top_p": rules.top_p,
    }
  if compiled:
    compile_config = transformers.CompileConfig(dynamic=False)
    compile_config._compile_all_devices = True  # CPUs too
    options |= {
      "cache_implementation": "static",
      "compile_config": compile_config,
    }

  class Clock(transformers.StoppingCriteria):
    """Stops nothing, and notes when the tokens numbered `marks` are drawn."""

    def __init__(self, n_rows: int, *marks: int):
      self.marks, self.n_drawn, self.times = marks, 0, []
      self.no = torch.zeros(n_rows, dtype=torch.bool, device=model.device)

    def __call__(self, ids, scores, **_):
      self.n_drawn += 1
      if self.n_drawn in self.marks:
        if model.device.type == "cuda":
          torch.cuda.synchronize()
        self.times.append(time.perf_counter())
      return self.no

  def run(n_rows: int, n_new: int, n_start: int = 1) -> tuple[float, float]:
    ids = prompt.repeat(n_rows, 1)
    clock = Clock(n_rows, 1, n_start, n_new)
    started = time.perf_counter()
    with torch.inference_mode():
      model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n_new,
        pad_token_id=0,
        stopping_criteria=[clock],
        **options,
      )
    first, *_, start, end = clock.times[0], *clock.times
    return first - started, (n_new - n_start) / (end - start)

  return run


def medians(run, *ask: int) -> dict:
  """Medians of three runs of a side."""
  firsts, rates = zip(*[run(*ask) for _ in range(3)], strict=True)
  return {
    "first_token_seconds": turns.median(firsts),
    "steps_per_second": turns.median(rates),
  }


# --- the ceiling --------------------------------------------------------------


def ceiling(cfg: config_lib.ModelConfig):
  """Answers a number of steps by steps per second: reads what a step reads, in
  squares of the model's width.
  """
  import jax
  import jax.numpy as jnp

  D = cfg.d_model
  n = weight_bytes(cfg) // (D * D * itemsize(cfg))
  matrices = [
    jax.random.normal(jax.random.key(i), (4 * D, D), cfg.dtype)
    for i in range(n // 4)
  ]

  @jax.jit
  def product(x, matrices):
    return [matrix @ x for matrix in matrices]

  x = jnp.ones(D, cfg.dtype)

  def run(n_steps: int) -> float:
    started = time.perf_counter()
    for _ in range(n_steps):
      jax.block_until_ready(product(x, matrices))
    seconds = time.perf_counter() - started
    return n_steps * len(matrices) * 4 / n / seconds

  return run


# --- turns --------------------------------------------------------------------


def compare(sides: dict[str, turns.Side], cfg, n_rows: int, options) -> dict:
  """Rates of one batch size, by the sides that are there."""
  load, n_new = os.getloadavg()[0], options.n_new
  mine, top = sides["ours"], sides["ceiling"]
  others = [side for name, side in sides.items() if name.startswith("torch")]
  mine.ask(n_rows, n_new)  # compiles
  speeds = []
  for side in others:
    side.ask(n_rows, n_new)
    speeds.append(side.ask(n_rows, n_new)[1])
  other = others[int(np.argmax(speeds))] if others else None
  firsts, rates = [], []
  for _ in range(options.turns):
    highest = top.ask(n_new)
    first, steps = mine.ask(n_rows, n_new)
    firsts.append(first)
    theirs = other.ask(n_rows, n_new)[1] if other else None
    rates.append((highest, steps, theirs))
  highest, steps, theirs = zip(*rates, strict=True)
  share, share_range = turns.ratios(steps, highest)
  found = turns.compared("steps_per_second", steps, theirs)
  return {
    "batch": n_rows,
    **found,
    "torch_compiled": other and other is sides.get("torch-compiled"),
    "weight_bytes_per_second": weight_bytes(cfg) * turns.median(steps),
    "of_matrix_vector": share,
    "of_matrix_vector_range": share_range,
    "first_token_seconds": turns.median(firsts),
    "load_before": load,
  }


def compare_all(options, arguments: list[str]) -> list[dict]:
  cfg, names = config_of(options), ["ours", "ceiling"]
  if not options.noreference and options.config is None:
    if absent := turns.missing("torch", "transformers"):
      print(f"Hugging Face is left out: {absent}", file=sys.stderr)
    else:
      names += ["torch", "torch-compiled"]
  sides = {name: turns.Side(*arguments, f"--side={name}") for name in names}
  sides["ceiling"].ask(1)  # compiles
  for name in names[2:]:
    try:
      sides[name].ask(1, 4)
    except turns.Ended as error:  # for torch-compiled, no C++ compiler
      print(f"{name} is left out: {error}", file=sys.stderr)
      del sides[name]
  results = [compare(sides, cfg, n_rows, options) for n_rows in options.batch]
  for side in sides.values():
    side.close()
  return results


def print_results(results: list[dict]) -> None:
  columns = (
    "batch",
    "steps/s",
    "weights GB/s",
    "of matrix-vector",
    "first token ms",
    "Hugging Face steps/s",
    "times Hugging Face",
  )
  rows = []
  for found in results:
    low, high = found["of_matrix_vector_range"]
    theirs = found["torch_steps_per_second"]
    kind = " (compiled)" if found["torch_compiled"] else ""
    rows.append(
      (
        str(found["batch"]),
        f"{found['ours_steps_per_second']:.1f}",
        f"{found['weight_bytes_per_second'] / 1e9:.1f}",
        f"{found['of_matrix_vector']:.0%} ({low:.0%} to {high:.0%})",
        f"{1e3 * found['first_token_seconds']:.0f}",
        turns.shown(theirs, "{:.1f}") + kind,
        turns.described(found["ratio"], found["ratio_range"]),
      )
    )
  turns.print_table(f"load {results[0]['load_before']:.1f}", columns, rows)


def compare_queue(rules: Rules, n_turns: int) -> Iterator[dict]:
  """Tokens per second of the same requests, both ways, turn by turn."""
  rng = np.random.default_rng(0)
  lengths = np.exp(rng.uniform(np.log(10), np.log(500), 64)).astype(int)
  requests = [make_request(rules, int(n), i) for i, n in enumerate(lengths)]
  sampler, n_slots, n_places = make_sampler(GPT2), 8, rules.n_prompt + 512

  def serve(requests):
    engine = sampler.engine(n_slots, n_places)
    for request in requests:
      engine.submit(request)
    n_tokens = 0
    while not engine.idle:
      n_tokens += sum(len(piece.token_ids) for piece in engine.step())
    return n_tokens

  def rate_of(batches):
    start = time.perf_counter()
    n_tokens = sum(serve(batch) for batch in batches)
    return n_tokens / (time.perf_counter() - start)

  serve(requests[:1])  # compiles
  static = [requests[i : i + n_slots] for i in range(0, 64, n_slots)]
  for _ in range(n_turns):
    yield {
      "tokens": int(lengths.sum()),
      "static_tokens_per_second": rate_of(static),
      "continuous_tokens_per_second": rate_of([requests]),
      "load": os.getloadavg()[0],
    }


def print_queue(results: Iterable[dict]) -> None:
  for turn, found in enumerate(results):
    fixed = found["static_tokens_per_second"]
    continuous = found["continuous_tokens_per_second"]
    print(
      f"turn {turn}: {found['tokens']} tokens; static {fixed:.1f} tokens/s, "
      f"continuous {continuous:.1f}: {continuous / fixed:.2f} times, "
      f"load {found['load']:.1f}",
      flush=True,
    )


def config_of(options) -> config_lib.ModelConfig:
  if options.config is None:
    return GPT2
  from lm import cli

  return dataclasses.replace(cli.load(options.config).model, dtype="float32")


def serve(options, rules: Rules) -> None:
  """Runs `options.side`, of the parent's choice."""
  cfg, side = config_of(options), options.side
  makers = {
    "ours": lambda: ours(cfg, rules),
    "ceiling": lambda: ceiling(cfg),
    "torch": lambda: theirs(gpt2(cfg), rules, False),
    "torch-compiled": lambda: theirs(gpt2(cfg), rules, True),
  }
  turns.serve(makers[side])


def numbers(text: str) -> list[int]:
  return [turns.at_least(1)(n) for n in text.split(",")]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--batch", type=numbers, default=[1, 8, 32], help="samples at once")
  add(
    "--n_new", type=turns.at_least(2), default=64, help="tokens to draw of each"
  )
  add("--turns", type=turns.at_least(1), default=3)
  add("--temperature", type=float, default=0.0, help="0 is greedy")
  add("--top_k", type=int, default=0)
  add("--top_p", type=float, default=1.0)
  add("--noreference", action="store_true", help="leaves Hugging Face out")
  add("--config", help="its model, in float32, in place of GPT-2; ours alone")
  add("--queue", action="store_true", help="continuous and static batches")
  add("--json", action="store_true")
  add("--side", choices=SIDES, help=argparse.SUPPRESS)
  options = parser.parse_args()
  rules = Rules(
    temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
  )
  if options.side:
    return serve(options, rules)
  if options.queue:
    results, show = compare_queue(rules, options.turns), print_queue
  else:
    results, show = compare_all(options, sys.argv[1:]), print_results
  if not options.json:
    return show(results)
  machine = turns.machine("jax", "jaxlib", "flax", "torch", "transformers")
  print(json.dumps({"machine": machine, "results": [*results]}, indent=2))


if __name__ == "__main__":
  turns.run(main)
