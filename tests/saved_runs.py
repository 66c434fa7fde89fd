"""Runs of one checkpoint that were never trained."""

import dataclasses

import families
import numpy as np
import reference

from lm import checkpoint
from lm import config as config_lib


def save(
  path, tokenizer, context, validation, *, uniform=True, spoken=None, **data
):
  """A run with one checkpoint, of random weights; each prediction uniform over
  the vocabulary, if `uniform`, or with logits of the ids `spoken` alone. `data`
  are fields of its DataConfig.
  """
  model = dataclasses.replace(
    families.LLAMA3,
    vocab_size=tokenizer.size,
    context_length=context,
    loss_chunk=5,
  )
  params = reference.random_params(model)
  if spoken is not None:
    params["head"] *= np.isin(np.arange(tokenizer.size), spoken)
  elif uniform:
    params["head"][:] = 0
  config = config_lib.Config(
    model=model,
    data=config_lib.DataConfig(
      validation=validation, cache_dir=str(path / "cache"), **data
    ),
    train=config_lib.TrainConfig(batch_size=8, sequence_length=context),
  )
  checkpoints = checkpoint.Checkpoints(str(path), config.checkpoint)
  meta = checkpoint.Meta(7, config, tokenizer.to_json(), "none")
  checkpoints.save({"params": params, "rest": {"step": np.zeros(())}}, meta)
  checkpoints.close()
  return str(path)
