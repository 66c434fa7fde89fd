"""The model card, README.md, of an exported checkpoint."""

import dataclasses
import json

from lm import checkpoint
from lm.evaluate import provenance
from lm.model import counts
from lm.train import metrics

_LOSSES = ("train/loss", "eval/loss", "eval/bits_per_byte")


def text(
  workdir: str, meta: checkpoint.Meta, model_type: str, dtype: str
) -> str:
  """Returns the card: model, training data, losses, config and commit."""
  config, commit = meta.config, provenance.code()["commit"]
  parameters = counts.parameter_count(config.model)
  causal = config.model.causal
  started = f" from `{config.init_from}`" if config.init_from else ""
  lines = [
    "---",
    "library_name: transformers",
    f"pipeline_tag: {'text-generation' if causal else 'fill-mask'}",
    "---",
    "",
    f"A `{model_type}` with {parameters:,} parameters in {dtype}, at step "
    f"{meta.step} of the run `{workdir}`{started}.",
    "",
    "## Data",
    "",
    *(_data(meta) or ["Unknown: it was converted, and not trained here."]),
    "",
    "## Losses",
    "",
    *(_losses(workdir, meta) or ["None were reported."]),
    "",
    "## Config",
    "",
    "```json",
    json.dumps(dataclasses.asdict(config), indent=2),
    "```",
    "",
    f"Written by next-token, commit {commit or 'unknown'}.",
    "",
  ]
  return "\n".join(lines)


def _data(meta: checkpoint.Meta) -> list[str]:
  """Returns a line per source, [] if the training sources are unknown."""
  held_out = meta.config.data.validation if meta.trained_on else ()
  return [f"- training: `{source}`" for source in meta.trained_on] + [
    f"- validation: `{source}`" for source in held_out
  ]


def _losses(workdir: str, meta: checkpoint.Meta) -> list[str]:
  """Returns a line per loss: the last value reported up to the checkpoint."""
  last: dict[str, tuple[int, float]] = {}
  for report in metrics.read(workdir):
    if report["step"] <= meta.step:
      last |= {
        k: (report["step"], report[k])
        for k in _LOSSES
        if report.get(k) is not None
      }
  return [
    f"- {name}: {value:.4f}, at step {step}"
    for name, (step, value) in last.items()
  ]
