"""Starts a run from the parameters of another run: `config.init_from`.

Only a fresh run reads the source run: the averages if that run keeps an
average, as sampling does, and the tokenizer. A folder with a Hugging Face
checkpoint counts as a run of one checkpoint, but its model must be the
config's. Optimizer, schedule, data and step
start afresh. A run that has a checkpoint goes on without the source run, which
may be gone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from lm import checkpoint, files, items, processes, schema, validation
from lm import config as config_lib
from lm.data import huggingface_files
from lm.data import tokenizer as tokenizer_lib
from lm.huggingface import config_json, expressible, imported, peft
from lm.huggingface import folder as folder_lib
from lm.model import decoder, lora, weights
from lm.train import programs


@dataclasses.dataclass
class Source:
  """The checkpoint that `config.init_from` names: its run directory and
  metadata; `folder` of a Hugging Face checkpoint.
  """

  workdir: str
  meta: checkpoint.Meta
  folder: folder_lib.Folder | None = None

  @property
  def model(self) -> config_lib.ModelConfig:
    return self.meta.config.model

  @property
  def identity(self) -> str:
    """Text that differs between checkpoints; reads little of a folder."""
    if self.folder is not None:
      return folder_lib.fingerprint(self.folder)
    return f"step {self.meta.step}, digests {self.meta.digests}"


def find(name: str) -> Source:
  """The checkpoint `RUN`, `RUN@STEP` or `FOLDER`; its arrays are not read.

  Raises ConfigError if the run has no checkpoint, or none of that step, or as
  `folder.find`.
  """
  workdir, step = checkpoint.split_name(name)
  said = f"config.init_from={schema.shown(name)}"
  workdir = files.user_path(workdir, "config.init_from")
  steps = checkpoint.steps(workdir)
  if not steps and config_json.is_there(workdir):
    try:
      folder = folder_lib.find(workdir)
      return Source(workdir, imported.meta(folder), folder)
    except schema.ConfigError as error:
      raise schema.ConfigError(f"{said}: {error}") from error
  if not steps:
    raise schema.ConfigError(
      f"{said}: {workdir} has no checkpoint; name a run directory of lm.train, "
      "RUN or RUN@STEP, or a folder with a Hugging Face checkpoint"
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
    named = _named(config, stored).fingerprint
    remedy = "name that run's tokenizer"
  else:
    kind = "huggingface" if c.kind == "bpe" else c.kind
    named = stored.fingerprint if stored.kind == kind else None
    remedy = f"set tokenizer.kind={stored.kind!r}"
  if named != stored.fingerprint:
    raise schema.ConfigError(
      f"config.tokenizer.kind={c.kind!r}, path={c.path!r}: not the tokenizer "
      f"of {where} (kind {stored.kind!r}, fingerprint {stored.fingerprint}), "
      "with which the parameters of config.init_from were trained; "
      f"{remedy}"
    )
  if c.special_tokens not in ((), stored.special_tokens):
    raise schema.ConfigError(
      f"config.tokenizer.special_tokens={c.special_tokens}: {where} has "
      f"{stored.special_tokens}, and a vocabulary keeps its ids; leave it at ()"
    )
  template = tokenizer_lib.config_template(config) or stored.chat_template
  return stored.with_template(template)


def _named(
  config: config_lib.Config, stored: tokenizer_lib.Tokenizer
) -> tokenizer_lib.Tokenizer:
  """The tokenizer that the config names, with the ids that `stored` added."""
  special = stored.special_tokens
  fields = dataclasses.replace(config.tokenizer, special_tokens=special)
  named = tokenizer_lib.load(dataclasses.replace(config, tokenizer=fields))
  if isinstance(stored.model, huggingface_files.Source) and isinstance(
    named.model, huggingface_files.Source
  ):
    added = dataclasses.replace(named.model, added=stored.model.added)
    return tokenizer_lib.Tokenizer(added, None, special)
  return named


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
  source = processes.on_all(functools.partial(find, config.init_from))
  mine = config.model.lora
  _check_model(config, source)
  theirs = dataclasses.replace(config, model=source.model)
  state = programs.abstract_state(theirs, mesh)
  like = weights.join(state.params, state.frozen)
  if source.folder is not None:
    read = functools.partial(folder_lib.load, source.folder, like)
    loaded = processes.on_all(read)
    for note in source.folder.notes:
      say(f"{source.workdir}: {note}")
  else:
    loaded = checkpoint.restore_params(
      source.workdir, source.meta, source.model, like
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
  converted = mine is not None and source.folder is not None
  why = peft.misfit(config.model, source.workdir) if converted else None
  if why is not None:
    say(f"lm.convert --to=peft will refuse these adapters: {why}")
  for line in _differences(config, source):
    say(f"another model than at {source.workdir}: {line}")
  return loaded


def _check_model(config: config_lib.Config, source: Source) -> None:
  """Raises ConfigError unless the arrays of both models have the same names and
  shapes, adapters aside if only one has them, and of a Hugging Face checkpoint
  unless the models compute the same. Computes and reads nothing.
  """
  if source.folder is not None:
    _check_same(config, source)
    return
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
    f"shapes: {items.describe({'params': arrays}, 3)}. Set the fields of "
    "config.model that decide shapes as in that run; these differ: "
    f"{'; '.join(_differences(config, source))}"
  )


def _check_same(config: config_lib.Config, source: Source) -> None:
  """Raises ConfigError unless the models have the same arrays and logits. The
  context may be another one where positions are rotary.
  """
  different = expressible.differences(config.model, source.model)
  scaling = source.model.rope_scaling
  if source.model.positions == "rope" and not (
    scaling is not None and scaling.kind == "longrope"
  ):
    different.pop("config.model.context_length", None)
  lines = [
    f"{name}={mine!r}, must be {theirs!r}"
    for name, (mine, theirs) in different.items()
  ]
  if lines:
    raise schema.ConfigError(
      f"config.init_from={config.init_from}: config.model is another model "
      f"than config.json there: {'; '.join(lines)}. Set these fields, or all "
      "by config.model = config_json.read(FOLDER)[1] of lm.huggingface"
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
  if source.folder is not None:
    changed = expressible.differences(source.model, config.model)
  else:
    changed = validation.differences(source.meta.config, config)
  both = None not in (source.model.lora, config.model.lora)
  return [
    f"{name} is {new!r}, was {old!r}"
    for name, (old, new) in changed.items()
    if name.startswith("config.model.")
    and (both or not name.startswith("config.model.lora."))
  ]
