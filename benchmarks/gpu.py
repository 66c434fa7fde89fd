"""Training and decoding on one GPU, beside PyTorch: python benchmarks/gpu.py

Needs the `bench` extra for PyTorch's side; without it ours is measured alone.
Takes ten minutes at most (`--seconds`): what is left out then is null.

Training: a Llama of configs/llama_1b.py, and one of the width of
configs/llama3_8b.py with as many layers (four at most) as the card holds, at
4096 and 8192 tokens a row. Ours has the lightest remat that fits. PyTorch's is
transformers' LlamaForCausalLM with scaled_dot_product_attention, torch.compile,
fused AdamW and bfloat16 by autocast. Both keep parameters in float32.

Decoding: the 1B Llama in bfloat16, greedily, by lm.sample and by transformers'
`generate` with a static cache and torch.compile, beside the steps per second
that the card's memory allows, if a step reads the weights, and the keys and
values of the tokens so far, once.

Each measurement is a process of its own, which has the whole card; the sides
take turns, as many of `--turns` as there is time for. `--json` prints JSON with
hardware and versions. `--small` has tiny shapes, to test this program on a CPU.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator

import decode
import numpy as np
import turns

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lm import cli
from lm import config as config_lib
from lm.model import counts

SIDES = ("ours", "torch")
# Layers: the most that fit, in this order.
MODELS = {"llama_1b": (16,), "llama3_8b": (4, 3, 2, 1)}
SMALL = (
  *("model.vocab_size=512", "model.d_model=64", "model.d_mlp=128"),
  *("model.n_heads=4", "model.n_kv_heads=2", "model.d_head=16"),
)
# Part of the card's memory for JAX; the rest is the driver's and libraries'.
SHARE = 0.92


@dataclasses.dataclass(frozen=True)
class Job:
  """What a process measures, for each of `asks`: of training (rows, tokens of a
  row, steps), of decoding (rows, new tokens, those at the start not timed).
  """

  work: str  # training or decoding
  model: str
  n_layers: int
  small: bool
  asks: tuple[tuple[int, int, int], ...] = ()

  @property
  def rules(self) -> decode.Rules:
    return decode.Rules(n_prompt=8 if self.small else 128)

  def config(self, rows=1, length=1, remat="none") -> config_lib.Config:
    fields = [
      f"model.n_layers={self.n_layers}",
      f"model.remat={remat}",
      f"train.batch_size={rows}",
      f"train.sequence_length={length}",
      *(SMALL if self.small else ()),
    ]
    path = os.path.join(sys.path[0], "configs", f"{self.model}.py")
    return cli.load(path, [f"--config.{field}" for field in fields])

  def tokens(self, rows: int, length: int) -> np.ndarray:
    """Random tokens [rows, length]."""
    rng = np.random.default_rng(0)
    n_vocab = self.config().model.vocab_size
    return rng.integers(0, n_vocab, (rows, length), np.int32)


# --- turns --------------------------------------------------------------------


def bytes_needed(cfg: config_lib.ModelConfig, tokens: int) -> int:
  """Estimate for a step without remat: 18 bytes a parameter (itself, gradient
  and AdamW's moments in float32, a bfloat16 copy), activations and logits.
  """
  layer = 2 * (8 * cfg.d_model + 3 * cfg.d_mlp)
  saved = tokens * (cfg.n_layers * layer + 8 * cfg.vocab_size)
  return 18 * counts.parameter_count(cfg) + saved


def training_job(
  model: str, memory_bytes: int | None, small: bool, notes: list[str]
) -> Job | None:
  """The largest training of `model` that fits; None if none does."""
  if small:
    return Job("training", model, 2, small, ((4, 64, 2), (2, 128, 2)))
  sizes = [(n, tokens) for n in MODELS[model] for tokens in (16384, 8192)]
  for n_layers, tokens in sizes:
    asks = tuple((tokens // length, length, 10) for length in (4096, 8192))
    job = Job("training", model, n_layers, small, asks)
    needed = bytes_needed(job.config().model, tokens)
    if memory_bytes is None or needed <= memory_bytes:
      if (n_layers, tokens) != sizes[0]:
        notes.append(f"{model}: {n_layers} layers, {tokens} tokens a step fit")
      return job
  notes.append(f"{model}: left out, since no training step fits the memory")


def jobs_for(found: dict, small: bool, notes: list[str]) -> list[Job]:
  first, second = (
    training_job(model, found["memory_bytes"], small, notes) for model in MODELS
  )
  batches, lengths = ((1, 2), (8, 2)) if small else ((1, 8, 64), (256, 32))
  n_layers = 2 if small else MODELS["llama_1b"][0]
  asks = tuple((n, *lengths) for n in batches)
  decoding = Job("decoding", "llama_1b", n_layers, small, asks)
  return [job for job in (first, second, decoding) if job is not None]


def ask_all(
  job: Job, side: str, environment: dict, seconds: float, notes: list[str]
) -> list[dict | None]:
  """Answers of a process of its own, None from where it failed on."""
  answers: list[dict | None] = [None] * len(job.asks)
  child = turns.Side(
    f"--side={side}",
    f"--work={job.work}",
    f"--model={job.model}",
    f"--layers={job.n_layers}",
    *(["--small"] if job.small else []),
    environment=environment,
    seconds=seconds,
  )
  try:
    for i, ask in enumerate(job.asks):
      answers[i] = child.ask(*ask)
    child.close()
  except turns.Ended as error:
    notes.append(str(error))
  return answers


def measure(
  jobs: list[Job], sides: list[str], options, environment: dict, notes: list
) -> dict[tuple[Job, str], list[list[dict | None]]]:
  """Answers of each job and side, turn by turn, until the time is over."""
  found = {(job, side): [] for job in jobs for side in SIDES}
  lasted = dict.fromkeys(jobs, 2.0)  # seconds: less is not worth a start
  for turn in range(options.turns):
    for job in jobs:
      started = time.monotonic()
      if options.deadline - started < lasted[job]:
        notes.append(f"{job.work} {job.model}: no time for turn {turn + 1}")
        continue
      for side in SIDES:
        answers: list[dict | None] = [None] * len(job.asks)
        if side in sides:
          left = max(1.0, options.deadline - time.monotonic())
          answers = ask_all(job, side, environment, left, notes)
        found[job, side].append(answers)
      lasted[job] = time.monotonic() - started
  return found


# --- results ------------------------------------------------------------------


def first(answers: list[dict], name: str):
  """The first turn's value: later programs come from a cache on disk."""
  return next((answer[name] for answer in answers if name in answer), None)


def compared(found: dict, job: Job, i: int, unit: str, limit, of: str) -> dict:
  """Both sides' answers to the i-th question, and their rates over `limit`,
  under the name `of`.
  """
  mine, theirs = (
    [answers[i] or {} for answers in found[job, side]] for side in SIDES
  )
  rates = [[answer.get(unit) for answer in side] for side in (mine, theirs)]
  results = {
    "model": job.model,
    "n_layers": job.n_layers,
    "turns": len(mine),
    **turns.compared(unit, *rates),
  }
  for side, answers in zip(SIDES, (mine, theirs), strict=True):
    rate = results[f"{side}_{unit}"]
    known = rate is not None and limit is not None
    results[f"{side}_{of}"] = rate / limit if known else None
    results[f"{side}_peak_bytes"] = first(answers, "peak_bytes")
    name = "first_loss" if job.work == "training" else "first_token_seconds"
    results[f"{side}_{name}"] = first(answers, name)
  return results | {"checks": first(mine, "checks")}


def training_results(found: dict, job: Job, card: dict) -> Iterator[dict]:
  for i, (rows, length, _) in enumerate(job.asks):
    flops = counts.train_flops(job.config(rows, length).model, length)
    peak = card["peak_flops"]
    limit = None if peak is None else peak / flops
    mine = [answers[i] or {} for answers in found[job, "ours"]]
    yield {
      "batch_size": rows,
      "sequence_length": length,
      "remat": first(mine, "remat"),
      **compared(found, job, i, "tokens_per_second", limit, "mfu"),
    }


def decoding_results(found: dict, job: Job, card: dict) -> Iterator[dict]:
  cfg = job.config().model
  vector = cfg.n_kv_heads * cfg.d_head * decode.itemsize(cfg)
  for i, (rows, n_new, n_start) in enumerate(job.asks):
    n_tokens = job.rules.n_prompt + (n_start + n_new) / 2  # on average
    cache = rows * n_tokens * 2 * cfg.n_layers * vector
    n_bytes = decode.weight_bytes(cfg) + cache
    bandwidth = card["memory_bandwidth"]
    limit = None if bandwidth is None else bandwidth / n_bytes
    yield {
      "batch_size": rows,
      "bytes_per_step": n_bytes,
      **compared(found, job, i, "steps_per_second", limit, "of_hbm"),
    }


def print_rates(title: str, results: list[dict], unit: str, of: str) -> None:
  length = "sequence_length"
  columns = ("model", "layers", "batch", length, unit, of, "peak bytes")
  columns += ("PyTorch", of, "peak bytes", "ours over PyTorch's", "turns")
  rows = []
  for found in results:
    row = [found["model"], str(found["n_layers"]), str(found["batch_size"])]
    row.append(turns.shown(found.get(length)))
    for side in SIDES:
      row.append(turns.shown(found[f"{side}_{unit}"], "{:,.1f}"))
      row.append(turns.shown(found[f"{side}_{of}"], "{:.1%}"))
      row.append(turns.shown(found[f"{side}_peak_bytes"], "{:,}"))
    row.append(turns.described(found["ratio"], found["ratio_range"]))
    rows.append([*row, str(found["turns"])])
  turns.print_table(title, columns, rows)


def print_checks(results: list[dict]) -> None:
  names = ("compilations_after_warmup", "state_donated", "alias_bytes")
  names += ("attention", "attention_is_fused", "attention_calls")
  rows = []
  for found in results:
    what = (found["model"], found["batch_size"], found.get("sequence_length"))
    checks = found["checks"] or {}
    rows.append(
      [*map(turns.shown, what), *(turns.shown(checks.get(n)) for n in names)]
    )
  turns.print_table("checks", ("model", "batch", "length", *names), rows)


def run(options) -> dict:
  """All results, as printed by `--json`."""
  started, notes = time.monotonic(), []
  options.deadline = started + options.seconds
  with tempfile.TemporaryDirectory() as cache:
    environment = {
      "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
      "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, "jax"),
      "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "torch"),
      "XLA_PYTHON_CLIENT_MEM_FRACTION": str(SHARE),
    }
    child = turns.Side("--work=card", "--side=ours", environment=environment)
    card = child.ask()
    child.close()
    if card["platform"] != "gpu" and not options.small:
      raise SystemExit(f"no GPU but {card['device']}: write --small")
    sides = list(SIDES)
    if absent := turns.missing("torch", "transformers"):
      sides.remove("torch")
      notes.append(f"PyTorch is left out: {absent}")
    jobs = [
      job
      for job in jobs_for(card, options.small, notes)
      if options.only in (None, job.work)
    ]
    found = measure(jobs, sides, options, environment, notes)
  results: dict[str, list] = {"training": [], "decoding": []}
  makers = {"training": training_results, "decoding": decoding_results}
  for job in jobs:
    results[job.work] += makers[job.work](found, job, card)
  packages = "jax", "jaxlib", "flax", "tokamax", "torch", "transformers"
  return {
    "machine": {**turns.machine(*packages), **card},
    **results,
    "seconds": time.monotonic() - started,
    "notes": notes,
  }


def serve(options) -> None:
  """Runs the side and the work that the parent chose."""

  def make():
    if options.side == "torch":
      import gpu_torch as side

      if side.DEVICE == "cpu" and not options.small:
        raise SystemExit("this PyTorch sees no GPU")
    else:
      import gpu_ours as side
    if options.work == "card":
      return side.card
    job = Job(options.work, options.model, options.layers, options.small)
    return getattr(side, job.work)(job)

  turns.serve(make)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--small", action="store_true", help="tiny shapes, on a CPU too")
  add("--turns", type=turns.at_least(1), default=3, help="at most")
  add("--seconds", type=turns.at_least(1), default=570)
  add("--only", choices=("training", "decoding"), help="else both")
  add("--json", action="store_true")
  hidden = {"help": argparse.SUPPRESS}
  add("--side", choices=SIDES, **hidden)
  add("--work", choices=("card", "training", "decoding"), **hidden)
  add("--model", choices=MODELS, **hidden)
  add("--layers", type=int, **hidden)
  options = parser.parse_args()
  if options.side:
    return serve(options)
  results = run(options)
  if options.json:
    return print(json.dumps(results, indent=2))
  machine, seconds = results["machine"], results["seconds"]
  print(f"{machine['device']}, {seconds:.0f} s, {machine['versions']}")
  training, decoding = results["training"], results["decoding"]
  print_rates("training", training, "tokens_per_second", "mfu")
  print_rates("decoding", decoding, "steps_per_second", "of_hbm")
  print_checks(training + decoding)
  print("\n".join(results["notes"]))


if __name__ == "__main__":
  turns.run(main)
