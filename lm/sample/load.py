"""The model of a checkpoint, for sampling and evaluation: plain weights.

Adapters (LoRA), the run's own and those named beside it, are merged in float32
before any cast or quantisation.
"""

import dataclasses
import functools
import os

import jax

from lm import checkpoint, schema, sharding
from lm import config as config_lib
from lm.huggingface import peft
from lm.model import decoder, lora, weights


def model(
  workdir: str,
  meta: checkpoint.Meta,
  mesh: jax.sharding.Mesh | None = None,
  adapter: str | None = None,
) -> tuple[config_lib.ModelConfig, decoder.Params]:
  """(config, parameters) of the checkpoint of `meta` in the run `workdir`, both
  without adapters: the averages if the run keeps an average.

  `adapter` is a folder in PEFT's format, or a run with `model.lora`, of which
  only the adapters are read. Raises ConfigError if it is neither or does not
  fit the model, and ConfigError or Damaged as `checkpoint.load_params`.
  """
  cfg, found = meta.config.model, None
  if adapter is not None:
    found = _adapter(adapter, lora.base(cfg), mesh)
  params = checkpoint.load_params(workdir, cfg, meta.step, mesh)
  cfg, params = lora.merge_on(mesh, cfg, params)
  if found is not None:
    adapted, arrays = found
    cfg, params = lora.merge_on(mesh, adapted, weights.join(params, arrays))
  return cfg, params


def _adapter(
  path: str, base: config_lib.ModelConfig, mesh: jax.sharding.Mesh | None
) -> tuple[config_lib.ModelConfig, decoder.Params]:
  """(`base` with the adapters at `path`, their arrays on `mesh`)."""
  if os.path.exists(os.path.join(path, peft.CONFIG)):
    config, arrays = peft.load(path, base)
    cfg, like = _like(base, config, mesh)
    here = weights.split(like, decoder.declared(cfg))[0]
    return cfg, jax.tree.map(
      lambda x, to: jax.device_put(x, to.sharding), arrays, here
    )
  meta = checkpoint.load_meta(path) if checkpoint.steps(path) else None
  if meta is None or meta.config.model.lora is None:
    raise schema.ConfigError(
      f"--adapter={path}: neither a folder with {peft.CONFIG} nor a run that "
      "was trained with model.lora"
    )
  cfg, like = _like(base, meta.config.model.lora, mesh)
  return cfg, checkpoint.restore_params(
    path, meta, cfg, like, with_frozen=False
  )


def _like(base, config, mesh):
  """(`base` with adapters of `config`, its abstract parameters on `mesh`)."""
  cfg = dataclasses.replace(base, lora=config)
  make = functools.partial(decoder.init_params, cfg)
  return cfg, sharding.abstract(make, jax.random.key(0), mesh=mesh)
