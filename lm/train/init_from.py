"""Starts a run from the parameters of another run: `config.init_from`.

Only a fresh run reads the source run: the averages if that run keeps an
average, as sampling does, and the tokenizer. Optimizer, schedule, data and step
start afresh. A run that has a checkpoint goes on without the source run, which
may be gone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from lm import checkpoint, files, schema, validation
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder, lora, weights
from lm.train import programs


@dataclasses.dataclass
class Source:
  """The checkpoint that `config.init_from` names: its run directory and
  metadata.
  """

  workdir: str
  meta: checkpoint.Meta

  @property
  def model(self) -> config_lib.ModelConfig:
    return self.meta.config.model


def find(name: str) -> Source:
  """The checkpoint `RUN` or `RUN@STEP`; its arrays are not read.

  Raises ConfigError if the run has no checkpoint, or none of that step.
  """
  workdir, step = checkpoint.split_name(name)
  said = f"config.init_from={schema.shown(name)}"
  workdir = files.user_path(workdir, "config.init_from")
  steps = checkpoint.steps(workdir)
  if not steps:
    raise schema.ConfigError(
      f"{said}: {workdir} has no checkpoint; name a run directory of lm.train, "
      "RUN or RUN@STEP"
    )
  if step is not None and step not in steps:
    raise schema.ConfigError(
      f"{said}: {workdir} has no checkpoint of step {step}; it has {steps}"
    )
  return Source(workdir, checkpoint.load_meta(workdir, step))


def tokenizer(
  config: config_lib.Config, workdir: str | None = None
) -> tokenizer_lib.Tokenizer | None:
  """The tokenizer of the last checkpoint in `workdir`, or before the first (or
  without a workdir) of the source run; None without `config.init_from`.

  A chat template that the config names replaces the stored one. Raises
  ConfigError if the config names another tokenizer, or if the source run's
  model has other shapes than the config's.
  """
  if config.init_from is None:
    return None
  where = workdir
  meta = None if workdir is None else checkpoint.last_undamaged(workdir)
  if meta is None:
    source = find(config.init_from)
    _check_model(config, source)
    where, meta = source.workdir, source.meta
  stored = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  c = config.tokenizer
  if c.kind == "bytes" or c.path is not None:
    named = tokenizer_lib.load(_with_special(config, stored)).fingerprint
    remedy = "name that run's tokenizer"
  else:
    named = None if stored.model is None else stored.fingerprint
    remedy = "set tokenizer.kind='bytes'"
  if named != stored.fingerprint:
    kind = "bytes" if stored.model is None else "sentencepiece"
    raise schema.ConfigError(
      f"config.tokenizer.kind={c.kind!r}, path={c.path!r}: not the tokenizer "
      f"of {where} (kind {kind!r}, fingerprint {stored.fingerprint}), with "
      "which the parameters of config.init_from were trained; "
      f"{remedy}"
    )
  if c.special_tokens not in ((), stored.special_tokens):
    raise schema.ConfigError(
      f"config.tokenizer.special_tokens={c.special_tokens}: {where} has "
      f"{stored.special_tokens}, and a vocabulary keeps its ids; leave it at ()"
    )
  template = tokenizer_lib.config_template(config) or stored.chat_template
  return stored.with_template(template)


def _with_special(
  config: config_lib.Config, stored: tokenizer_lib.Tokenizer
) -> config_lib.Config:
  named = dataclasses.replace(
    config.tokenizer, special_tokens=stored.special_tokens
  )
  return dataclasses.replace(config, tokenizer=named)


def load(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  say: Callable[[str], None],
) -> decoder.Params:
  """Parameters of `config.init_from`, each in its shards of the new state.

  Adapters (LoRA) are part of the parameters if both models have them; those of
  the source run alone are merged, and those of the new run alone start afresh.

  Says what was loaded, what starts afresh, and which fields of the model differ
  from the source run's. Raises ConfigError as `tokenizer`, Damaged if the
  checkpoint is.
  """
  assert config.init_from is not None
  source, mine = find(config.init_from), config.model.lora
  _check_model(config, source)
  theirs = dataclasses.replace(config, model=source.model)
  state = programs.abstract_state(theirs, mesh)
  loaded = checkpoint.restore_params(
    source.workdir,
    source.meta,
    source.model,
    weights.join(state.params, state.frozen),
  )
  arrays = jax.tree.leaves(loaded)
  which = "averages" if "ema" in source.meta.digests else "parameters"
  merged, fresh = "", "optimizer, schedule, data, step"
  if source.model.lora is not None and mine is None:
    merged = ", adapters merged"
    explicit = mesh if config.mesh.mode == "jit" else None
    _, loaded = lora.merge_on(explicit, source.model, loaded)
  if source.model.lora is None and mine is not None:
    fresh = f"adapters of rank {mine.rank}, {fresh}"
  say(
    f"{which} of {source.workdir} at step {source.meta.step}: {len(arrays)} "
    f"arrays, {sum(x.size for x in arrays):,} parameters{merged}; fresh: "
    f"{fresh}"
  )
  for line in _differences(config, source):
    say(f"another model than at {source.workdir}: {line}")
  return loaded


def _check_model(config: config_lib.Config, source: Source) -> None:
  """Raises ConfigError unless the arrays of both models have the same names and
  shapes, adapters aside if only one has them. Computes and reads nothing.
  """
  models = [source.model, config.model]
  if None in (model.lora for model in models):
    models = [lora.base(model) for model in models]
  have, want = map(_shapes, models)
  if have == want:
    return
  arrays = [
    f"{name}: {have.get(name, 'not')} there, {want.get(name, 'not')} here"
    for name in sorted(have.keys() | want.keys())
    if have.get(name) != want.get(name)
  ]
  raise schema.ConfigError(
    f"config.init_from={config.init_from}: config.model has arrays of other "
    f"shapes: {checkpoint.describe({'params': arrays}, 3)}. Set the fields of "
    "config.model that decide shapes as in that run; these differ: "
    f"{'; '.join(_differences(config, source))}"
  )


def _shapes(model: config_lib.ModelConfig) -> dict[str, Any]:
  make = functools.partial(decoder.init_params, model)
  shapes = jax.eval_shape(make, jax.random.key(0))
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): list(x.shape)
    for path, x in jax.tree_util.tree_leaves_with_path(shapes)
  }


def _differences(config: config_lib.Config, source: Source) -> list[str]:
  """Fields of the model with other values than in the source run; of adapters
  only if both models have them.
  """
  changed = validation.differences(source.meta.config, config)
  both = None not in (source.model.lora, config.model.lora)
  return [
    f"{name} is {new!r}, was {old!r}"
    for name, (old, new) in changed.items()
    if name.startswith("config.model.")
    and (both or not name.startswith("config.model.lora."))
  ]
