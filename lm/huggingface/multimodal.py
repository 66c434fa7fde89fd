"""Multimodal checkpoints, of which only the text part is read.

config.json has the settings of the text part in `text_config`. Tensor names of
the text part have a prefix: language_model.model.layers... in published files,
or model.language_model.layers...; the vision tower has further tensors.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lm import schema
from lm.huggingface import family as family_lib
from lm.huggingface import parts, tensors

_TEXT, _TIED = "text_config", "tie_word_embeddings"
# Prefix of the text part's tensors -> prefix in the text part's family.
_PREFIXES = {"model.language_model.": "model.", "language_model.": ""}


@dataclasses.dataclass(frozen=True)
class Multimodal:
  """A multimodal model_type; `text` is the model_type of the text part.

  `defaults` are values for required settings of the text part. `keys` of
  config.json and tensor names matching `others` concern images only.
  """

  model_type: str
  text: str
  defaults: Mapping[str, Any]
  keys: frozenset[str]
  others: str

  def text_of(self, content: parts.Content) -> dict[str, Any]:
    """Returns config.json of the text part.

    Raises ConfigError without `text_config`, on unknown keys, and if
    tie_word_embeddings has different values inside and outside.
    """
    known = {_TEXT, _TIED} | self.keys
    family_lib.require_known(content, known, self.model_type)
    text = parts.get(content, _TEXT)
    if not isinstance(text, Mapping):
      raise schema.ConfigError(
        f"config.json: {_TEXT}={schema.shown(text)}: must be an object"
      )
    kind = text.get("model_type", self.text)
    parts.check(f"{_TEXT}.model_type", kind, (self.text,))
    tied = {x for c in (content, text) if (x := c.get(_TIED)) is not None}
    if len(tied) > 1:
      raise schema.ConfigError(
        f"config.json: {_TIED}={content[_TIED]!r}, and {text[_TIED]!r} in "
        f"{_TEXT}: say different things; remove one of them"
      )
    same = {"model_type": self.text, **({_TIED: tied.pop()} if tied else {})}
    return {**self.defaults, **text, **same}

  def split(
    self, stored: Mapping[str, list[tensors.Stored]]
  ) -> tuple[dict[str, list[tensors.Stored]], int]:
    """Returns (tensors of the text part, number of image tensors left out).

    The names are translated to names of the text part's family.
    """
    found: dict[str, list[tensors.Stored]] = {}
    left_out = 0
    for name, copies in stored.items():
      if re.fullmatch(self.others, name):
        left_out += 1
        continue
      for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
          name = own + name.removeprefix(prefix)
          break
      found[name] = found.get(name, []) + copies
    return found, left_out


# Tensor names of SigLIP and of the projection of image features.
_LAYER = r"(self_attn\.(q|k|v|out)_proj|layer_norm[12]|mlp\.fc[12])"
_HEAD = r"probe|attention\.in_proj_(weight|bias)"
_HEAD += r"|(attention\.out_proj|layernorm|mlp\.fc[12])\.(weight|bias)"
_SIGLIP = (
  r"(model\.)?(vision_tower\.(vision_model\.)?("
  r"embeddings\.(patch_embedding\.(weight|bias)|position_embedding\.weight)"
  rf"|encoder\.layers\.\d+\.{_LAYER}\.(weight|bias)"
  rf"|post_layernorm\.(weight|bias)|head\.({_HEAD}))"
  r"|multi_modal_projector\.mm_(input_projection_weight|soft_emb_norm\.weight))"
)

GEMMA3 = Multimodal(
  "gemma3",
  "gemma3_text",
  {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
  },
  frozenset(
    "vision_config mm_tokens_per_image boi_token_index eoi_token_index"
    " image_token_index".split()
  ),
  _SIGLIP,
)
BY_NAME = {one.model_type: one for one in (GEMMA3,)}


def of(content: parts.Content) -> Multimodal | None:
  """Returns the Multimodal of a config.json; None for other model types."""
  name = content.get("model_type")
  return BY_NAME.get(name) if isinstance(name, str) else None
