"""curves.png, the picture of a run, drawn from metrics.jsonl."""

import io

from etils import epath

from lm import files
from lm.train import metrics


def draw_if_missing(workdir: str) -> None:
  """Draws curves.png if absent or older than metrics.jsonl, as after a kill
  between the last report and the picture.
  """
  picture, reports = (
    epath.Path(workdir) / name for name in ("curves.png", "metrics.jsonl")
  )
  if not picture.exists() or (
    reports.exists() and picture.stat().mtime < reports.stat().mtime
  ):
    draw(workdir)


def draw(workdir: str) -> None:
  """Draws curves.png: loss, bits per byte, learning rate and gradient norm."""
  import matplotlib.figure

  reports = metrics.read(workdir)

  def series(name):
    # Nonfinite numbers are null in metrics.jsonl.
    pairs = [(r.get("tokens"), r.get(name)) for r in reports]
    points = [
      pair for pair in pairs if all(isinstance(x, int | float) for x in pair)
    ]
    return tuple(zip(*points, strict=True)) if points else ((), ())

  figure = matplotlib.figure.Figure(figsize=(10, 6), layout="constrained")
  axes = figure.subplots(2, 2, sharex=True)
  thin = {"linewidth": 0.8, "color": "tab:blue"}
  bold = {"linewidth": 1.5, "color": "tab:orange", "marker": "o", "ms": 3}
  axes[0, 0].plot(
    *series("train/loss"), label="train (mean since the last report)", **thin
  )
  axes[0, 0].plot(*series("eval/loss"), label="validation", **bold)
  axes[0, 0].set_ylabel("loss, nats per token")
  axes[0, 0].legend()
  axes[0, 1].plot(*series("eval/bits_per_byte"), **bold)
  axes[0, 1].set_ylabel("validation bits per byte")
  axes[1, 0].plot(*series("lr"), **thin)
  axes[1, 0].set_ylabel("learning rate")
  axes[1, 1].plot(*series("grad_norm"), **thin)
  axes[1, 1].set_ylabel("gradient norm")
  axes[1, 1].set_yscale("log")
  for axis in axes[1]:
    axis.set_xlabel("tokens")
  for axis in axes.flat:
    axis.grid(alpha=0.3)
  content = io.BytesIO()
  figure.savefig(content, dpi=110, format="png")
  files.replace(epath.Path(workdir) / "curves.png", content.getvalue())
