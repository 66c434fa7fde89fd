"""Reads an exported checkpoint with transformers, and compares the logits."""

import dataclasses
import importlib.util

import jax
import ml_dtypes
import numpy as np

from lm import batch as batch_lib
from lm import config as config_lib
from lm import schema
from lm.model import decoder

# Largest allowed difference of logits in float32, relative to their scale.
TOLERANCE = 1e-4
_LENGTH = 64


def missing() -> str | None:
  """Returns the first required package not installed, or None."""
  for name in ("transformers", "torch"):
    if importlib.util.find_spec(name) is None:
      return name
  return None


def compare(
  path: str, cfg: config_lib.ModelConfig, params: decoder.Params, dtype: str
) -> float:
  """Returns the largest difference between logits of the folder `path`, read by
  transformers, and logits of `params` rounded to `dtype`. Both are computed in
  float32 on random token ids. The difference is divided by the root mean square
  of the logits where the latter is above 1.

  Raises RunError if the difference is above `TOLERANCE`, or if transformers
  cannot read the folder.
  """
  inputs = np.random.default_rng(0).integers(
    cfg.vocab_size, size=(2, _length(cfg)), dtype=np.int32
  )
  try:
    theirs = _transformers(path, inputs, cfg.causal)
  except Exception as error:  # transformers raises many types of errors.
    raise schema.RunError(
      f"transformers cannot read the export: {type(error).__name__}: {error}"
    ) from error
  ours = _ours(cfg, params, inputs, dtype)
  scale = max(1.0, float(np.sqrt(np.mean(np.square(ours)))))
  worst = float(np.max(np.abs(theirs - ours))) / scale
  if not worst <= TOLERANCE:
    raise schema.RunError(
      f"the export, read by transformers, has other logits: they differ by up "
      f"to {worst:.2g}, and may by {TOLERANCE:g}; nothing was written. This is "
      "an error in the program: report it"
    )
  return worst


def _length(cfg: config_lib.ModelConfig) -> int:
  """Returns the number of tokens to compare on. For longrope, transformers must
  take the same factors as lm.model: see `rotary._scaled`.
  """
  r = cfg.rope_scaling
  least = r.original_length + 1 if r and r.kind == "longrope" else 0
  return min(max(_LENGTH, least), cfg.context_length)


def _transformers(path: str, inputs: np.ndarray, causal: bool) -> np.ndarray:
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  kind = (
    transformers.AutoModelForCausalLM
    if causal
    else transformers.AutoModelForMaskedLM
  )
  model = kind.from_pretrained(
    path,
    dtype=torch.float32,
    attn_implementation="eager",
    local_files_only=True,
    trust_remote_code=False,
  )
  with torch.no_grad():
    return model.eval()(torch.tensor(inputs, dtype=torch.int64)).logits.numpy()


def _ours(cfg, params, inputs, dtype) -> np.ndarray:
  cfg = dataclasses.replace(cfg, dtype="float32", attention="reference")

  def logits(params, batch):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rounded = jax.tree.map(lambda x: x.astype(kind).astype(x.dtype), params)
    x, _ = decoder.forward(cfg, rounded, batch)
    return decoder.bind(cfg, rounded).logits(x)

  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(logits)(params, batch_lib.unscored(inputs)))
