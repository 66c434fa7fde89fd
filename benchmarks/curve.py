"""Draws docs/quickstart.png: a run's loss, and its bits per byte beside
compressors' on the same documents, each alone.

  PYTHONPATH=. python benchmarks/curve.py --workdir=runs/quickstart \
    --output=docs/quickstart.png
"""

import compressors
import matplotlib.figure
from absl import flags

from lm import checkpoint, cli
from lm.train import metrics

_WORKDIR = cli.define_path("workdir", "Run directory of lm.train.")
_OUTPUT = cli.define_path("output", "Picture, .png.")


def main() -> None:
  reports = metrics.read(_WORKDIR.value)
  config = checkpoint.load_meta(_WORKDIR.value).config
  evaluated = [r for r in reports if "eval/loss" in r]
  bits = compressors.bits_per_byte(config) | {
    f"model, {r['tokens'] / 1e6:.1f}M tokens": r["eval/bits_per_byte"]
    for r in evaluated
  }
  figure = matplotlib.figure.Figure(figsize=(9, 2.8), layout="constrained")
  left, right = figure.subplots(1, 2)
  left.plot(
    [r["tokens"] / 1e6 for r in reports],
    [r["train/loss"] for r in reports],
    linewidth=1,
    label="training",
  )
  left.plot(
    [r["tokens"] / 1e6 for r in evaluated],
    [r["eval/loss"] for r in evaluated],
    "o",
    color="tab:orange",
    label="validation",
  )
  left.set_xlabel("million tokens")
  left.set_ylabel("loss, nats per token")
  left.legend()
  left.grid(alpha=0.3)
  bars = right.barh(
    list(bits)[::-1],
    list(bits.values())[::-1],
    color=["tab:orange"] * len(evaluated) + ["tab:gray"] * 2,
  )
  right.bar_label(bars, fmt="%.2f", padding=3)
  right.set_xlim(0, max(bits.values()) * 1.15)
  right.set_xlabel("bits per byte of the validation documents")
  figure.savefig(_OUTPUT.value, dpi=110, format="png")


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir", "output"])
  cli.run(main, takes_config=False)
