"""Finds the Hugging Face families able to express a ModelConfig, for export.

A family expresses a model if the config.json written by the family reads back
as the same model.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from lm import config as config_lib
from lm import schema, validation
from lm.huggingface import families, parts
from lm.huggingface import family as family_lib

# Fields of ModelConfig without effect on the logits of given parameters.
_FREE = (
  "init_scale embedding_dropout residual_dropout lora dtype attention remat"
  " remat_offload scan_layers loss_chunk".split()
)


def canonical(m: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """Returns an equivalent ModelConfig in canonical form.

  Layer patterns are shortest, biases are in order, and fields without effect on
  the logits have their defaults.
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
  """Returns the fields through which the logits differ: path -> (in a, in b).

  Equivalent configs, with equal `canonical` forms, give {}.
  """
  trees = [config_lib.Config(model=canonical(m)) for m in (a, b)]
  return validation.differences(trees[0], trees[1])


def lost(
  family: family_lib.Family, m: config_lib.ModelConfig
) -> dict[str, tuple[Any, Any]]:
  """Returns the fields of the model beyond the family: path -> (value, value
  after export and import); {} if the family expresses the model.
  """
  return differences(m, family.map(family.write(m)))


def of(m: config_lib.ModelConfig, name: str | None = None) -> family_lib.Family:
  """Returns the family `name`, or the first family, able to express the model.

  Raises ConfigError with the fields beyond this family, or, without `name`,
  beyond the family with the fewest differences.
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
      continue  # The family has no scaling at all: `kind` says enough.
    yield f"{path}={value!r} (it would become {other!r})"
