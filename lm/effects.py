"""Fields of a config that only some configs read.

`validation.validate` refuses a changed field without effect, and
`validation.differences` leaves it out. This module does not import JAX.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from lm import config as config_lib
from lm import objective as objective_lib

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


def without(
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
