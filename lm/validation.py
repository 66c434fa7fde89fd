"""Valid configs: rules between fields, fields without effect, stored configs.

A broken rule raises ConfigError with the field, the value, the rule and the
remedy. Rules of one field alone are its annotation in lm/config.py. This module
does not import JAX.
"""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from lm import config as config_lib
from lm import objective as objective_lib
from lm import schema


def validate(config: config_lib.Config) -> config_lib.Config:
  """Returns `config` if a run may start with `config`. Raises ConfigError with
  the first broken rule, or the first changed field that has no effect.
  """
  check(config)
  o, steps = config.optimizer, config.train.steps
  flat = (1 - o.decay_fraction) * steps
  schema.require(
    o.schedule != "wsd" or o.warmup_steps <= flat + 1e-6,  # rounding of flat
    "config.optimizer.warmup_steps",
    o.warmup_steps,
    f"must be at most {flat:.0f}: schedule='wsd' decays from that step on, "
    f"the last decay_fraction={o.decay_fraction} of train.steps={steps}",
  )
  for source in (*config.data.train, *config.data.validation):
    schema.require(
      config.model.causal
      or isinstance(objective_lib.of(source), objective_lib.Masked),
      "config.model.causal",
      False,
      f"every token sees the one that it should predict in source {source!r}; "
      "write SOURCE|masked",
    )
  for path, value, default, reader in _without_effect(config):
    schema.require(
      value == default,
      path,
      value,
      f"has no effect: only {reader} reads it; leave it at {default!r}",
    )
  return config


def check(config: config_lib.Config) -> config_lib.Config:
  """Returns `config` if valid as a stored config; raises ConfigError with the
  first broken rule. A stored config may have fields without effect, and more
  warm-up than `wsd` allows.
  """
  schema.check_types(config, config_lib.Config, "config")
  _validate_model(config.model)
  _validate_data(config.data)
  _validate_run(config)
  return config


def check_model(m: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """Returns `m` if valid by itself; raises ConfigError with the first broken
  rule.
  """
  schema.check_types(m, config_lib.ModelConfig, "config.model")
  _validate_model(m)
  return m


def _validate_model(m: config_lib.ModelConfig) -> None:
  for others, size in (
    ("vocab_size", m.vocab_size),
    ("context_length", m.context_length if m.positions == "learned" else 0),
    ("n_layers * n_heads * d_head", m.n_layers * m.n_heads * m.d_head),
    ("n_layers * d_mlp", m.n_layers * m.d_mlp),
  ):
    schema.require(
      m.d_model * size <= _MOST_WEIGHTS,
      "config.model.d_model",
      m.d_model,
      f"times {others} must be at most {_MOST_WEIGHTS:.0e}, more than any "
      "machine holds; make one of them smaller",
    )
  schema.require(
    m.n_heads % m.n_kv_heads == 0,
    "config.model.n_heads",
    m.n_heads,
    f"must be a multiple of n_kv_heads={m.n_kv_heads}",
  )
  schema.require(
    len(set(m.biases)) == len(m.biases),
    "config.model.biases",
    m.biases,
    "must name each part at most once",
  )
  schema.require(
    m.norm == "layernorm" or "norm" not in m.biases,
    "config.model.biases",
    m.biases,
    "only norm='layernorm' has biases; leave 'norm' out",
  )
  if m.positions == "rope":
    _validate_rope(m)
  schema.require(
    len(m.windows) > 0 and all(w is None or w >= 1 for w in m.windows),
    "config.model.windows",
    m.windows,
    "needs at least one entry, each None or at least 1",
  )
  if m.lora is not None:
    schema.require(
      m.lora.rank <= m.d_model,
      "config.model.lora.rank",
      m.lora.rank,
      f"must be at most d_model={m.d_model}: no update has a higher rank",
    )
    schema.require(
      m.gated or "gate" not in m.lora.targets,
      "config.model.lora.targets",
      m.lora.targets,
      f"mlp={m.mlp!r} has no matrix 'gate'; leave it out",
    )


def _validate_rope(m: config_lib.ModelConfig) -> None:
  schema.require(
    m.rotary_fraction < 1 or m.d_head % 2 == 0,
    "config.model.d_head",
    m.d_head,
    "must be even, since rotary positions turn pairs",
  )
  schema.require(
    m.d_rotary > 0 and m.d_rotary % 2 == 0,
    "config.model.rotary_fraction",
    m.rotary_fraction,
    f"times d_head={m.d_head} must be an even number of dimensions, at least "
    "2, since rotary positions turn pairs",
  )
  schema.require(
    len(m.rope_layers) > 0,
    "config.model.rope_layers",
    m.rope_layers,
    "needs at least one entry",
  )
  r = m.rope_scaling
  if r is None:
    return
  for name, low, high in (
    ("llama3", "low_frequency_factor", "high_frequency_factor"),
    ("yarn", "beta_slow", "beta_fast"),
  ):
    schema.require(
      r.kind != name or getattr(r, low) < getattr(r, high),
      "config.model.rope_scaling",
      r,
      f"{low} must be below {high}",
    )
  if r.kind == "yarn":
    schema.require(
      m.rope_theta > 1,
      "config.model.rope_theta",
      m.rope_theta,
      "must be above 1 with rope_scaling.kind='yarn', which divides by its log",
    )
  if r.kind == "longrope":
    for name in ("short_factors", "long_factors"):
      schema.require(
        len(getattr(r, name)) == m.d_rotary // 2,
        f"config.model.rope_scaling.{name}",
        getattr(r, name),
        f"must be {m.d_rotary // 2} numbers, one per pair of the "
        f"{m.d_rotary} dimensions that rotate",
      )
    schema.require(
      r.original_length > 1 or r.factor <= 1 or r.attention_factor is not None,
      "config.model.rope_scaling.original_length",
      r.original_length,
      "must be above 1, since the attention factor divides by its log; or set "
      "attention_factor",
    )


def _validate_run(config: config_lib.Config) -> None:
  m, t, o = config.model, config.train, config.optimizer
  schema.require(
    config.tokenizer.kind != "huggingface"
    or config.tokenizer.path is not None
    or config.init_from is not None,
    "config.tokenizer.path",
    config.tokenizer.path,
    "must name a tokenizer.json, or a folder that has one, for "
    "tokenizer.kind='huggingface'",
  )
  schema.require(
    t.sequence_length <= m.context_length,
    "config.train.sequence_length",
    t.sequence_length,
    f"must be at most model.context_length={m.context_length}",
  )
  schema.require(
    o.name != "muon" or m.lora is None,
    "config.optimizer.name",
    o.name,
    "makes updates of full matrices, and with model.lora none is trained; set "
    "adamw, with a peak_lr of LoRA's order of 1e-4",
  )
  schema.require(
    t.batch_size % t.microbatches == 0,
    "config.train.batch_size",
    t.batch_size,
    f"must be a multiple of train.microbatches={t.microbatches}",
  )
  schema.require(
    config.tokens_per_step <= 2**31 - 1,
    "config.train.batch_size",
    t.batch_size,
    f"times sequence_length={t.sequence_length} must be at most {2**31 - 1}, "
    "the largest int32: it counts the tokens of a step",
  )
  schema.require(
    config.tasks is None or all(config.tasks.names or [""]),
    "config.tasks.names",
    config.tasks and config.tasks.names,
    "must name one task at least; leave config.tasks out for none",
  )
  schema.require(
    t.profile is None
    or (len(t.profile) == 2 and sum(t.profile) - 1 <= t.steps),
    "config.train.profile",
    t.profile,
    f"must be (first step, number of steps), within train.steps={t.steps}",
  )
  _validate_schedule(o)
  _validate_mesh(config.mesh)


def _validate_schedule(o: config_lib.OptimizerConfig) -> None:
  schema.require(
    0 < o.decay_fraction <= 1,
    "config.optimizer.decay_fraction",
    o.decay_fraction,
    "must be in (0, 1]",
  )
  schema.require(
    0 <= o.final_lr_fraction <= 1,
    "config.optimizer.final_lr_fraction",
    o.final_lr_fraction,
    "must be in [0, 1]",
  )


def _validate_mesh(mesh: config_lib.MeshConfig) -> None:
  axes = mesh.sizes()
  schema.require(
    sum(a is None for a in axes.values()) <= 1,
    "config.mesh",
    axes,
    "at most one axis may be None",
  )
  others = [name for name in axes if name != "data"]
  remedy = " and ".join(f"{name}=1" for name in others)
  schema.require(
    mesh.mode == "jit" or all(axes[name] == 1 for name in others),
    "config.mesh",
    axes,
    f"mode pmap is pure data parallel: set {remedy}",
  )


def _validate_data(d: config_lib.DataConfig) -> None:
  schema.require(
    len(d.train) > 0, "config.data.train", d.train, "names no source"
  )
  for source in (*d.train, *d.validation):
    objective_lib.split_source(source)  # raises on an unknown objective
  schema.require(
    len(d.train_weights) in (0, len(d.train))
    and all(w > 0 for w in d.train_weights),
    "config.data.train_weights",
    d.train_weights,
    f"must be () or {len(d.train)} positive numbers, one per training source",
  )


# Most elements of a weight, over all layers.
_MOST_WEIGHTS = 10**12

# Kinds of sources whose documents are rows, or conversations.
_ROWS = ("jsonl:", "parquet:", "csv:", "instruct:")

# (fields, predicate, reader): fields that only some configs read. The predicate
# says whether a config reads the fields; the reader is named in the error.
_READERS: tuple[tuple[str, Callable[[config_lib.Config], bool], str], ...] = (
  (
    "model.first_attention_norm",
    lambda c: c.model.norm_placement in ("pre", "both"),
    "model.norm_placement='pre' or 'both'",
  ),
  (
    "model.rope_layers",
    lambda c: c.model.positions == "rope",
    "model.positions='rope'",
  ),
  (
    "model.rope_theta model.rope_scaling model.rotary_fraction",
    lambda c: any(rope for _, rope in c.model.layer_pattern),
    "model.positions='rope' in a layer of model.rope_layers",
  ),
  (
    "model.rope_theta_windowed",
    lambda c: any(w is not None and rope for w, rope in c.model.layer_pattern),
    "model.positions='rope' in a layer with one of model.windows",
  ),
  *(
    (
      " ".join(f"model.rope_scaling.{field}" for field in fields.split()),
      lambda c, kinds=kinds: (
        c.model.rope_scaling is None or c.model.rope_scaling.kind in kinds
      ),
      " or ".join(f"model.rope_scaling.kind={kind!r}" for kind in kinds),
    )
    for kinds, fields in (
      (("llama3",), "low_frequency_factor high_frequency_factor"),
      (("llama3", "yarn", "longrope"), "original_length"),
      (("yarn",), "beta_fast beta_slow truncate"),
      (("longrope",), "short_factors long_factors"),
      (("yarn", "longrope"), "attention_factor"),
    )
  ),
  (
    "model.remat_offload",
    lambda c: c.model.remat not in ("none", "full", "dots"),
    "model.remat='minimal_with_context' or one of save_*",
  ),
  (
    "tokenizer.path",
    lambda c: c.tokenizer.kind in ("sentencepiece", "huggingface"),
    "tokenizer.kind='sentencepiece' or 'huggingface'",
  ),
  (
    "tokenizer.train_bytes",
    lambda c: (
      c.tokenizer.kind == "bpe"
      or (c.tokenizer.kind == "sentencepiece" and c.tokenizer.path is None)
    ),
    "tokenizer.kind='bpe', or 'sentencepiece' without tokenizer.path",
  ),
  (
    "data.text_unit",
    lambda c: any(
      source.startswith("text:") for source in c.data.train + c.data.validation
    ),
    "a source text:GLOB",
  ),
  (
    "data.packing",
    lambda c: any(
      objective_lib.of(source).choppable
      for source in c.data.train + c.data.validation
    ),
    "a source of the objective 'causal', 'prefix' or 'masked'",
  ),
  (
    "data.invalid_documents",
    lambda c: any(
      source.startswith(_ROWS) for source in c.data.train + c.data.validation
    ),
    "a source jsonl:GLOB, parquet:GLOB, csv:GLOB or instruct:NAME:SPLIT",
  ),
  (
    "optimizer.adam_peak_lr optimizer.momentum",
    lambda c: c.optimizer.name == "muon",
    "optimizer.name='muon'",
  ),
  (
    "optimizer.b1 optimizer.b2",
    lambda c: c.optimizer.name != "adafactor",
    "optimizer.name='adamw', 'lion' or 'muon'",
  ),
  (
    "optimizer.epsilon",
    lambda c: c.optimizer.name in ("adamw", "muon"),
    "optimizer.name='adamw' or 'muon'",
  ),
  (
    "optimizer.decay_fraction",
    lambda c: c.optimizer.schedule == "wsd",
    "optimizer.schedule='wsd'",
  ),
  (
    "optimizer.final_lr_fraction",
    lambda c: c.optimizer.schedule in ("linear", "cosine", "wsd"),
    "optimizer.schedule='linear', 'cosine' or 'wsd'",
  ),
)


def _without_effect(
  config: config_lib.Config,
) -> Iterator[tuple[str, Any, Any, str]]:
  """Yields (path, value, default, reader) of fields without effect in `config`;
  `reader` names the setting under which the field would have an effect.
  """
  for paths, has_effect, reader in _READERS:
    if has_effect(config):
      continue
    for path in paths.split():
      *rooms, field = path.split(".")
      node = functools.reduce(getattr, rooms, config)
      if node is not None:
        default = getattr(type(node)(), field)
        yield f"config.{path}", getattr(node, field), default, reader


# --- stored configs ----------------------------------------------------------


# Fields of the model that earlier versions stored as a bool: name -> the field
# of today, and its value for False and True.
_FORMER: dict[str, tuple[str, dict[bool, Any]]] = {
  "bias": ("biases", {False: [], True: ["qkv", "o", "mlp", "norm"]}),
  "post_norm": ("norm_placement", {False: "pre", True: "both"}),
  "qk_norm": ("qk_norm", {False: None, True: "head"}),
}


def _translate(model: dict[str, Any]) -> dict[str, Any]:
  """A stored model config of any version, in the fields of today."""
  today = dict(model)
  for former, (name, values) in _FORMER.items():
    value = model.get(former)
    if isinstance(value, bool) and (name == former or name not in model):
      del today[former]
      today[name] = values[value]
  if model.get("bias") is True and model.get("norm") != "layernorm":
    today["biases"] = today["biases"][:-1]  # an RMSNorm never had a bias
  return today


def from_json(text: str | bytes) -> config_lib.Config:
  """Inverse of `config.to_json`; also reads configs of earlier versions. A
  stored config may set fields without effect. Raises ConfigError if `text` is
  not a valid config.
  """
  try:
    tree = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise schema.ConfigError(
      f"config={text[:40]!r}...: not JSON: {error}"
    ) from error
  if isinstance(tree, dict) and isinstance(tree.get("model"), dict):
    tree["model"] = _translate(tree["model"])
  return check(schema.from_dict(config_lib.Config, tree, "config"))


def differences(
  a: config_lib.Config, b: config_lib.Config
) -> dict[str, tuple[Any, Any]]:
  """Fields with different values: path -> (value in a, value in b). Leaves out
  fields without effect in both configs.
  """
  left, right = (
    dict(schema.leaves(a, "config")),
    dict(schema.leaves(b, "config")),
  )
  dead = [{path for path, *_ in _without_effect(tree)} for tree in (a, b)]

  def has_effect(path: str) -> bool:
    return not any(f"{path}.".startswith(f"{x}.") for x in dead[0] & dead[1])

  return {
    path: (left.get(path), right.get(path))
    for path in sorted(left.keys() | right.keys())
    if left.get(path) != right.get(path) and has_effect(path)
  }
