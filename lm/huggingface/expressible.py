"""Which family can express a model of ours: for export, and for comparing.

A family expresses a model if the config.json that it writes reads back as the
same model.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from lm import config as config_lib
from lm import schema, validation
from lm.huggingface import families, parts
from lm.huggingface import family as family_lib

# Fields that change no logits of a given set of parameters.
_FREE = (
  "init_scale embedding_dropout residual_dropout lora dtype attention remat"
  " scan_layers loss_chunk".split()
)


def canonical(m: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """The model with one way of saying it: shortest patterns, biases in order,
  and fields that change no logits at their defaults.
  """
  plain = config_lib.ModelConfig()
  scaled = m.rope_scaling is not None
  own = m.rope_theta_windowed
  return dataclasses.replace(
    m,
    **{name: getattr(plain, name) for name in _FREE},
    windows=parts.period(parts.by_layer(m.windows, m.n_layers)),
    rope_layers=parts.period(parts.by_layer(m.rope_layers, m.n_layers)),
    biases=tuple(part for part in family_lib.ALL_BIASES if part in m.biases),
    query_scale_dim=m.query_scale_dim or m.d_head,
    rope_theta_windowed=None if own == m.rope_theta and not scaled else own,
  )


def differences(
  a: config_lib.ModelConfig, b: config_lib.ModelConfig
) -> dict[str, tuple[Any, Any]]:
  """Fields by which two models compute other logits: path -> (in a, in b)."""
  trees = [config_lib.Config(model=canonical(m)) for m in (a, b)]
  return validation.differences(trees[0], trees[1])


def lost(
  family: family_lib.Family, m: config_lib.ModelConfig
) -> dict[str, tuple[Any, Any]]:
  """What the family cannot express of the model: path -> (value, what it would
  become); {} if it can express the model.
  """
  return differences(m, family.map(family.write(m)))


def of(m: config_lib.ModelConfig, name: str | None = None) -> family_lib.Family:
  """The family that expresses the model: the one `name`, or the first.

  Raises ConfigError that names the fields which it, or the nearest family,
  cannot express.
  """
  tried = families.FAMILIES if name is None else (families.find(name),)
  missing = {family.model_type: lost(family, m) for family in tried}
  for family in tried:
    if not missing[family.model_type]:
      return family
  nearest = min(missing, key=lambda name: len(missing[name]))
  said = f"the family {nearest!r} of Hugging Face cannot express this model: it"
  if name is None:
    said = (
      "no family of Hugging Face that this program writes has this model; the "
      f"nearest, {nearest},"
    )
  lines = "; ".join(_said(missing[nearest]))
  raise schema.ConfigError(f"{said} lacks {lines}")


def _said(lines: dict[str, tuple[Any, Any]]) -> Iterator[str]:
  scaling = "config.model.rope_scaling."
  none = lines.get(f"{scaling}kind", (None, ""))[1] is None
  for path, (value, other) in lines.items():
    if none and path.startswith(scaling) and path != f"{scaling}kind":
      continue  # of no scaling at all
    yield f"{path}={value!r} (it would become {other!r})"
