"""Which tokenizer? python benchmarks/vocabularies.py [--steps=N] [--seeds=2]

Trains configs/quickstart.py once for each seed and kind of tokenizer that is
trained here, at the same vocabulary, steps and tokens a step, and prints bytes
per token and the bits per byte of the validation text. A tokenizer of more
bytes per token reads more text in as many steps: bits per byte weigh both.
"""

import argparse
import os
import sys
import tempfile

import turns

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

KINDS = ("sentencepiece", "bpe")


def train(
  kind: str, steps: int | None, seed: int, workdir: str
) -> tuple[float, float]:
  """Trains one run; returns bytes per token and bits per byte of validation."""
  from lm import cli
  from lm.data import store
  from lm.train import loop, metrics

  config = cli.load("configs/quickstart.py")
  config.seed, config.tokenizer.kind = seed, kind
  if steps is not None:
    config.train.steps = steps
  config.train.eval_every = config.checkpoint.save_every = config.train.steps
  if code := loop.train(config, workdir):
    sys.exit(code)
  text = store.prepare(config).validation[0]
  bits = metrics.read(workdir)[-1]["eval/bits_per_byte"]
  return text.n_bytes / text.n_tokens, bits


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--steps", type=turns.at_least(1), help="default: the config's"
  )
  parser.add_argument("--seeds", type=turns.at_least(1), default=2)
  args = parser.parse_args()
  for seed in range(args.seeds):
    for kind in KINDS:
      with tempfile.TemporaryDirectory() as folder:
        workdir = os.path.join(folder, "run")
        per_token, bits = train(kind, args.steps, seed, workdir)
      print(
        f"{kind:13} seed {seed}  {per_token:.3f} bytes per token  "
        f"{bits:.4f} bits per byte",
        flush=True,
      )


if __name__ == "__main__":
  turns.run(main)
