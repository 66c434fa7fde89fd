"""Fill-in-the-middle for free?

  python benchmarks/fim.py [--seeds=3] [--steps=N] [--config.FIELD=VALUE ...]

Trains configs/quickstart.py twice for each seed, causal and with half of the
documents reordered (`|fim`), at the same budget, both packed best-fit. Prints
the causal validation loss of both and their ratio, and the share of held-out
single-line gaps whose text the first line of each one's greedy answer is: the
FIM model reads prefix and suffix, in both orders, the causal model only the
prefix; and the bits per byte that these gaps cost. A gap is the rest of a line,
from its first letter ("line") or from a random place inside a token ("token").
"""

import argparse
import math
import os
import random
import sys
import tempfile

import turns

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Characters of a gap.
SHORTEST, LONGEST = 4, 40
ORDERS = {"causal": (None,), "fim": ("psm", "spm")}
KINDS = ("line", "token", "span")


def train(
  fields: list[str], steps: int | None, seed: int, suffix: str, workdir: str
) -> float:
  """Trains one run; returns the validation loss of the causal source."""
  from lm import cli
  from lm.train import loop, metrics

  config = cli.load("configs/quickstart.py", fields)
  config.seed += seed
  config.data.train = tuple(spec + suffix for spec in config.data.train)
  config.data.packing = "best_fit"
  if steps is not None:
    config.train.steps = steps
  config.train.eval_every = config.checkpoint.save_every = config.train.steps
  if code := loop.train(config, workdir):
    sys.exit(code)
  return metrics.read(workdir)[-1]["eval/loss"]


def n_new(length: int) -> int:
  """Tokens to answer with, of a row of `length`."""
  return min(32, length // 3)


def gaps(workdir: str, n: int) -> list[tuple[str, str, str, str]]:
  """(kind, prefix, gap, suffix) of held-out lines. Prefix and suffix have 25/32
  characters for a token of a row.
  """
  from lm import checkpoint
  from lm.data import sources
  from lm.data import tokenizer as tokenizer_lib

  meta = checkpoint.load_meta(workdir)
  length = meta.config.train.sequence_length
  around, most_tokens = 25 * length // 32, length - n_new(length) - 4
  tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  source = sources.open_source(meta.config.data.validation[0], meta.config.data)
  draw, found = random.Random(0), []
  texts = [source[i].text for i in range(len(source))]
  while len(found) < n:
    text = draw.choice(texts)
    line = text.rfind("\n", 0, draw.randrange(len(text))) + 1
    stop = text.find("\n", line)
    start = line + len(text[line:stop]) - len(text[line:stop].lstrip())
    kind = KINDS[len(found) % len(KINDS)]
    if kind == "span":
      if stop - start <= SHORTEST + 2:
        continue
      start = draw.randrange(start + 1, stop - SHORTEST - 1)
      stop = draw.randrange(start + SHORTEST, stop)
    if kind == "token" and stop - start > SHORTEST + 1:
      start = draw.randrange(start + 1, stop - SHORTEST)
      before = text[line : start + 1]
      ids = tokenizer.encode(before)
      if len(tokenizer.decode(ids[-1:])) < 2:
        continue  # the cut is between tokens
    gap = text[start:stop]
    if line >= around and SHORTEST <= len(gap) <= LONGEST:
      sides = text[start - around : start], text[stop : stop + around]
      if sum(map(len, map(tokenizer.encode, sides))) < most_tokens:
        found.append((kind, sides[0], gap, sides[1]))
  return found


def judge(
  workdir: str, order: str | None, n: int
) -> dict[str, tuple[float, float]]:
  """For each kind of gap: the share that the run fills exactly, and the bits
  per byte that the gap's text costs. FIM's prompt has its parts in `order`; by
  None the prompt is the prefix alone.
  """
  from lm import checkpoint
  from lm.data import fim as fim_lib
  from lm.sample import sampler as sampler_lib

  sampler = sampler_lib.Sampler.from_checkpoint(workdir)
  tokenizer, prompts, wanted = sampler.tokenizer, [], gaps(workdir, n)
  for _, prefix, _, suffix in wanted:
    ids = [tokenizer.bos, *tokenizer.encode(prefix)]
    if order is not None:
      ids = fim_lib.fim_ids(tokenizer, prefix, suffix, order)
    prompts.append(ids)
  new = n_new(checkpoint.load_meta(workdir).config.train.sequence_length)
  results = sampler.generate(
    [
      sampler_lib.Request(ids, temperature=0.0, max_new_tokens=new)
      for ids in prompts
    ]
  )
  hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
  bits: dict[str, list[float]] = {kind: [] for kind in KINDS}
  n_bytes = dict.fromkeys(hits, 0)
  for (kind, _, gap, _), ids, result in zip(
    wanted, prompts, results, strict=True
  ):
    text = tokenizer.decode(result.token_ids).split("\n")[0]
    hits[kind].append(text.startswith(gap) if kind == "span" else text == gap)
    middle = tokenizer.encode(gap, continues=True)
    logs = sampler.score([*ids, *middle]).log_probabilities[-len(middle) :]
    bits[kind].append(-sum(logs) / math.log(2))
    n_bytes[kind] += len(gap.encode())
  return {
    kind: (sum(hits[kind]) / len(hits[kind]), sum(bits[kind]) / n_bytes[kind])
    for kind in hits
  }


def main() -> None:
  from lm import schema

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=turns.at_least(1), default=3)
  parser.add_argument("--steps", type=turns.at_least(1))
  parser.add_argument("--gaps", type=turns.at_least(len(KINDS)), default=200)
  parser.add_argument("--only", choices=ORDERS, help="else both")
  parser.add_argument("--workdir", help="where runs are kept and resumed")
  fields, own = schema.split_arguments(sys.argv[1:], "config")
  options = parser.parse_args(own)
  with tempfile.TemporaryDirectory() as folder:
    folder = options.workdir or folder
    for seed in range(options.seeds):
      losses = {}
      for name in ORDERS if options.only is None else (options.only,):
        workdir = os.path.join(folder, f"{name}-{seed}")
        losses[name] = train(fields, options.steps, seed, f"|{name}", workdir)
        print(f"seed {seed} {name}: causal loss {losses[name]:.4f}", flush=True)
        for order in ORDERS[name]:
          found = judge(workdir, order, options.gaps)
          said = ", ".join(
            f"{kind} {share:.1%} ({bits:.2f} bits per byte)"
            for kind, (share, bits) in found.items()
          )
          print(f"  {order or 'prefix only'}: exact gaps: {said}", flush=True)
      if options.only is None:
        print(f"seed {seed} ratio {losses['fim'] / losses['causal']:.4f}")


if __name__ == "__main__":
  turns.run(main)
