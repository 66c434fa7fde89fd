"""Adapters (LoRA, arXiv:2106.09685) in the file format of Hugging Face's PEFT.

A folder has adapter_config.json and adapter_model.safetensors. Tensors have the
module names of the model's family in transformers (lm/huggingface/tables.py); a
file has A as [rank, inputs] and B as [outputs, rank]. What is trained whole
(`LoraConfig.full`) is PEFT's modules_to_save. Needs the extra `hf`.

L layers, R rank.
"""

import dataclasses
import functools
import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import config as config_lib
from lm import files, schema
from lm.huggingface import config_json, expressible, table, tables
from lm.huggingface import family as family_lib
from lm.model import decoder, lora

_PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16"}
# Keys without effect on an adapter's outputs, and keys read below. Every other
# key must be empty, as in plain LoRA, since a value may turn on an extension.
_HARMLESS = set(
  "alpha_pattern auto_mapping base_model_name_or_path ensure_weight_tying"
  " exclude_modules fan_in_fan_out inference_mode init_lora_weights"
  " layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core"
  " modules_to_save peft_type peft_version qalora_group_size r rank_pattern"
  " revision target_modules task_type use_rslora".split()
)
# Initialisers without effect on the base weights. PiSSA, OLoRA and others
# change the base weights; an adapter then fits the changed weights only.
_INITIALISERS = (True, False, None, "gaussian", "eva", "orthogonal")
_ALL = config_lib.LoraConfig()  # By default targets are all matrices.


def _family(cfg: config_lib.ModelConfig, base: str | None) -> family_lib.Family:
  """Returns the family of the folder `base` with a Hugging Face checkpoint, or
  else of what is exported. Raises ConfigError if none can express the model.
  """
  if base is not None and config_json.is_there(base):
    return config_json.read(base)[0]
  return expressible.of(lora.base(cfg))


def _rows(
  cfg: config_lib.ModelConfig, family: family_lib.Family
) -> dict[str, tables.Row]:
  """Returns the row of each matrix with a tensor of its own in the family."""
  found = {}
  for row in family.rows:
    if len(row.ours) == 1 and row.theirs.endswith(".weight"):
      found[row.ours[0]] = row
  return {
    name: found[path]
    for name in lora.targets(dataclasses.replace(cfg, lora=_ALL))
    for path in (f"layers/attention/{name}", f"layers/mlp/{name}")
    if path in found
  }


def _whole(
  cfg: config_lib.ModelConfig, family: family_lib.Family
) -> dict[str, table.Place]:
  """Returns the places of embedding and head, which the library can train
  whole. A tied pair is left out: the library would train only the embedding.
  """
  if cfg.tied_embedding:
    return {}
  base = lora.base(cfg)
  places = table.places(family.rows, base).values()
  found = {place.row.ours: place for place in places}
  return {name: found[name,] for name in ("embed", "head")}


def _module(row: tables.Row, layer: int) -> str:
  return _PREFIX + row.theirs.format(layer).removesuffix(".weight")


def _short(row: tables.Row) -> str:
  """Returns the module's name within a layer, such as self_attn.q_proj, and of
  the others without what is before it, such as embed_tokens.
  """
  name = row.theirs.removesuffix(".weight")
  return name.partition("{}.")[2] or name.rpartition(".")[2]


def _target_modules(
  family: family_lib.Family, rows: list[tables.Row]
) -> list[str] | str:
  """Returns the last parts of the modules' names, as q_proj; or, where a module
  that is not adapted ends likewise (BERT's `dense`), a pattern of whole names.
  """
  wanted = {row.theirs: row.theirs.split(".")[-2] for row in rows}
  alike = {
    row.theirs
    for row in family.rows
    if row.theirs.split(".")[-2] in wanted.values()
    and row.theirs.endswith(".weight")
  }
  if alike == wanted.keys():
    return [*dict.fromkeys(wanted.values())]
  modules = [name.removesuffix(".weight") for name in wanted]
  return "|".join(re.escape(x).replace(r"\{\}", r"\d+") for x in modules)


def misfit(cfg: config_lib.ModelConfig, base: str | None = None) -> str | None:
  """Why `save` refuses the adapters of `cfg` to `base`: no family can express
  the model, an adapted matrix shares a tensor with further matrices in the
  family, or an embedding that is also the head is trained. None if `save` would
  write them.
  """
  assert cfg.lora is not None
  targets = lora.targets(cfg)
  try:
    family = _family(cfg, base)
    rows, whole = _rows(cfg, family), _whole(cfg, family)
  except schema.ConfigError as error:
    return str(error)
  if any(name not in whole for name in cfg.lora.full):
    return (
      f"model.lora.full={cfg.lora.full}: the embedding is also the head, and "
      "PEFT would train a copy; write the merged model by --to=huggingface"
    )
  joined = [name for name in targets if name not in rows]
  if not joined:
    return None
  return (
    f"model.lora.targets={targets}: the family {family.model_type!r} of "
    f"transformers has {', '.join(joined)} joined with others in one matrix, "
    "which this adapter would not fit; adapt other matrices, or write the "
    "merged model by --to=huggingface"
  )


def save(
  folder: str, cfg: config_lib.ModelConfig, params: Any, base: str | None
) -> None:
  """Writes the trained ones of a model's parameters: the adapters, and what
  `cfg.lora.full` names.

  `base` is the base model's name in the file, and if it is a folder with a
  Hugging Face checkpoint, the adapters are for its family. Raises ConfigError
  if the model has no adapters, or as `misfit` says.
  """
  if cfg.lora is None:
    raise schema.ConfigError(
      "model.lora=None: the run has no adapters that could be written; train "
      "one with --config.model.lora.rank=8 and --config.init_from"
    )
  if (why := misfit(cfg, base)) is not None:
    raise schema.ConfigError(why)
  targets, tensors = lora.targets(cfg), {}
  family = _family(cfg, base)
  rows, whole = _rows(cfg, family), _whole(cfg, family)
  for name in cfg.lora.full:
    value = np.asarray(params[name], np.float32)
    tensors[_PREFIX + whole[name].name] = whole[name].theirs([value])
  for name in targets:
    factors = params["layers"][lora.NAME][name]
    a, b = (np.asarray(factors[key], np.float32) for key in "ab")
    for i in range(cfg.n_layers):
      key = _module(rows[name], i)
      rank = cfg.lora.rank
      tensors[f"{key}.lora_A.weight"] = a[i].reshape(-1, rank).T
      tensors[f"{key}.lora_B.weight"] = b[i].reshape(rank, -1).T
  alpha = cfg.lora.alpha
  content = {
    "peft_type": "LORA",
    # PEFT has no type for masked tokens, and asks a CAUSAL_LM to generate.
    "task_type": "CAUSAL_LM" if cfg.causal else None,
    "base_model_name_or_path": base,
    "inference_mode": True,
    "r": cfg.lora.rank,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "lora_dropout": cfg.lora.dropout,
    "use_rslora": cfg.lora.rank_stabilized,
    "target_modules": _target_modules(family, [rows[n] for n in targets]),
    "bias": "none",
    "fan_in_fan_out": not rows[targets[0]].linear,
    "init_lora_weights": True,
    "modules_to_save": [_short(whole[n].row) for n in cfg.lora.full] or None,
    "use_dora": False,
  }
  # The library writes an array's memory and ignores the strides.
  tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  packed = _library().numpy.save(tensors, metadata={"format": "pt"})
  os.makedirs(folder, exist_ok=True)
  files.replace(os.path.join(folder, TENSORS), packed)
  files.replace(os.path.join(folder, CONFIG), json.dumps(content, indent=2))


def load(
  folder: str, cfg: config_lib.ModelConfig
) -> tuple[config_lib.LoraConfig, Any]:
  """Returns (config, trained parameters) in `folder` for the model `cfg`:
  float32 arrays in a tree as of `weights.split`; layers without an adapter get
  zeros.

  Raises ConfigError if a file is missing or invalid, if the adapter goes beyond
  plain LoRA, as DoRA does, or if a tensor does not fit the model.
  """
  content = _config(folder)
  tensors = _tensors(os.path.join(folder, TENSORS))
  try:
    rows = _rows(cfg, _family(cfg, None))
  except schema.ConfigError as error:
    raise schema.ConfigError(
      f"adapter {folder}: does not fit the model, since {error}"
    ) from error
  full = _taken(folder, cfg, tensors, content.get("modules_to_save") or [])
  known = {
    f"{_module(row, i)}.lora_{factor}.weight": (name, i, factor)
    for name, row in rows.items()
    for i in range(cfg.n_layers)
    for factor in "AB"
  }
  # Target -> (layer, "A" or "B") -> matrix.
  found: dict[str, dict[tuple[int, str], np.ndarray]] = {}
  for key, value in sorted(tensors.items()):
    if key not in known:
      raise schema.ConfigError(
        f"adapter {folder}: tensor {key!r} fits no matrix of the "
        f"{cfg.n_layers} layers; only adapters of {', '.join(rows)} can be read"
      )
    name, i, factor = known[key]
    found.setdefault(name, {})[i, factor] = value
  config = config_lib.LoraConfig(
    rank=content["r"],
    alpha=float(content["lora_alpha"]),
    rank_stabilized=bool(content.get("use_rslora", False)),
    dropout=float(content.get("lora_dropout", 0.0)),
    targets=tuple(n for n in rows if n in found),  # type: ignore[arg-type]
    full=tuple(full),  # type: ignore[arg-type]
  )
  schema.check_types(config, config_lib.LoraConfig, f"adapter {folder}")
  model = dataclasses.replace(cfg, lora=config)
  if lora.targets(model) != config.targets:
    raise schema.ConfigError(
      f"adapter {folder}: is for the matrices {config.targets}, of which the "
      f"model has {lora.targets(model)}; name the adapter's own base"
    )
  make = functools.partial(decoder.init_params, model)
  like = jax.eval_shape(make, jax.random.key(0))["layers"][lora.NAME]
  adapters = {
    name: _stacked(
      folder, _short(rows[name]), found[name], like[name], config.rank
    )
    for name in config.targets
  }
  return config, {**full, "layers": {lora.NAME: adapters}}


def _taken(folder, cfg, tensors, asked) -> dict[str, np.ndarray]:
  """Takes what was trained whole out of `tensors`; returns it by our names."""
  whole, full = _whole(cfg, _family(cfg, None)), {}
  for place in whole.values():
    if (value := tensors.pop(_PREFIX + place.name, None)) is None:
      continue
    if value.shape != place.shape:
      raise schema.ConfigError(
        f"adapter {folder}: {place.name} is {list(value.shape)}, and of this "
        f"model {list(place.shape)}; name the adapter's own base"
      )
    full |= place.ours(value)
  names = [_short(whole[name].row) for name in full]
  if sorted(asked) != sorted(names):
    raise schema.ConfigError(
      f"adapter {folder}: modules_to_save={asked}, and the file has {names}; "
      f"of this model {' and '.join(whole) or 'none'} can be read"
    )
  return full


def _stacked(folder, module, parts, like, rank):
  """Stacks PEFT's matrices: {"a": [L, *inputs, R], "b": [L, R, *outputs]}."""
  stacked = {key: np.zeros(x.shape, np.float32) for key, x in like.items()}
  n_layers = len(stacked["a"])
  flat = {
    "A": stacked["a"].reshape(n_layers, -1, rank),
    "B": stacked["b"].reshape(n_layers, rank, -1),
  }
  for (i, key), value in parts.items():
    if value.T.shape != flat[key][i].shape:
      raise schema.ConfigError(
        f"adapter {folder}: lora_{key} of {module}, layer {i}, is "
        f"{list(value.shape)}, and of this model "
        f"{list(flat[key][i].T.shape)}; name the adapter's own base"
      )
    if (i, "AB".replace(key, "")) not in parts:
      raise schema.ConfigError(
        f"adapter {folder}: layer {i} has only lora_{key} of {module}"
      )
    flat[key][i] = value.T
  return stacked


def _config(folder: str) -> dict[str, Any]:
  path = os.path.join(folder, CONFIG)
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
    plain = content["peft_type"] == "LORA" and content.get("bias") in (
      *("none", None),
    )
    extra = sorted(
      name
      for name, value in content.items()
      if value
      and (
        name in ("rank_pattern", "alpha_pattern")
        or name not in _HARMLESS | {"bias"}
      )
    )
    if content.get("init_lora_weights") not in _INITIALISERS:
      extra.append("init_lora_weights")
    numbers = content["lora_alpha"], content.get("lora_dropout", 0.0)
    _ = content["r"], *map(float, numbers)
  except OSError as error:
    raise schema.ConfigError(
      f"adapter {path}: {error.strerror}; name a folder with {CONFIG} and "
      f"{TENSORS}"
    ) from error
  except files.MALFORMED as error:
    raise schema.ConfigError(
      f"adapter {path}: not a config of PEFT ({files.first_line(error)})"
    ) from error
  if extra or not plain:
    said = ", ".join(extra) or "another peft_type or bias"
    raise schema.ConfigError(
      f"adapter {path}: has more than plain LoRA ({said}), which this program "
      "does not compute; merge the adapter with PEFT"
    )
  return content


def _tensors(path: str) -> dict[str, np.ndarray]:
  """Returns the tensors of a safetensors file by name, in float32."""
  library, found = _library(), {}
  try:
    with open(path, "rb") as file:
      parts = library.deserialize(file.read())
  except (OSError, library.SafetensorError) as error:
    said = getattr(error, "strerror", None) or error
    raise schema.ConfigError(f"adapter {path}: {said}") from error
  for name, part in parts:
    # safetensors.numpy cannot read bfloat16.
    dtype = _DTYPES.get(part["dtype"])
    if dtype is None and part["dtype"] != "BF16":
      raise schema.ConfigError(
        f"adapter {path}: {name} is of dtype {part['dtype']}; must be one of "
        f"BF16, {', '.join(_DTYPES)}"
      )
    kind = jnp.bfloat16 if dtype is None else np.dtype(dtype)
    flat = np.frombuffer(part["data"], kind)
    found[name] = flat.reshape(part["shape"]).astype(np.float32)
  return found


def _library() -> Any:
  try:
    import safetensors.numpy
  except ImportError as error:
    raise schema.ConfigError(
      "adapters in PEFT's format: need safetensors; pip install -e '.[hf]'"
    ) from error
  return safetensors
