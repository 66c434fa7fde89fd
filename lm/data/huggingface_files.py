"""The files of a Hugging Face vocabulary: tokenizer.json and those beside it.

Which token begins and ends a text, pads, masks, and the chat template stand in
tokenizer_config.json, special_tokens_map.json, generation_config.json and
chat_template.jinja. Nothing in these files is run but the template, in a child
process without rights (lm/data/template.py).
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from lm import files, schema
from lm.data import template as template_lib

# Bounds the memory that a wrong id takes.
_MOST = 1 << 24
# Tokens with a role, in tokenizer_config.json, by our name of the role.
_ROLES = {
  "bos": ("bos_token", "cls_token"),
  "eos": ("eos_token", "sep_token"),
  "pad": ("pad_token",),
  "unk": ("unk_token",),
  "mask": ("mask_token",),
}
# Their names where no file says which they are, as in a tokenizer.json alone.
_USUAL = {
  "bos": "<s> <bos> <|begin_of_text|> [CLS]",
  "eos": "</s> <eos> <|end_of_text|> <|endoftext|> [SEP]",
  "pad": "<pad> [PAD] <|finetune_right_pad_id|>",
  "unk": "<unk> [UNK]",
  "mask": "[MASK] <mask>",
}


@dataclasses.dataclass(frozen=True)
class Source:
  """A tokenizer.json, as `text`, and what the files beside it say.

  `roles`: bos, eos, pad, unk, mask -> a token of the vocabulary; bos and eos
  are always there. `template` is the vocabulary's own chat template. `added`
  are reserved names of this program, which get ids after the vocabulary's own.
  `stops` are further tokens that end an answer.
  """

  text: str
  roles: Mapping[str, str]
  template: str | None = None
  added: tuple[str, ...] = ()
  stops: tuple[str, ...] = ()


def read(path: str) -> Source:
  """Reads the folder `path`, or the tokenizer.json `path` and files beside it.

  Raises ConfigError if a file cannot be read, is not what its name says, or no
  token ends a text.
  """
  where = "config.tokenizer.path"
  path = files.local_path(path, where)
  if os.path.isdir(path):
    path = os.path.join(path, "tokenizer.json")
  folder = os.path.dirname(path)
  try:
    text = _text(path)
    tree = _json(path)
    vocabulary = names(tree)
    stated = _stated(folder, vocabulary)
    usual = {
      role: name
      for role, some in _USUAL.items()
      for name in some.split()[::-1]
      if name in vocabulary
    }
    roles = stated if "eos" in stated else {**usual, **stated}
    if "eos" not in roles:
      raise schema.ConfigError(
        "no token ends a text; name the vocabulary's eos_token in "
        "tokenizer_config.json beside it"
      )
    if "bos" not in roles:  # As of Qwen: what ends a text is before the next.
      generation = _generation(folder, vocabulary)
      roles["bos"] = generation.get("bos", roles["eos"])
    stops = [x for x in _ends(folder, vocabulary) if x != roles["eos"]]
    return Source(text, roles, _template(folder), stops=tuple(stops))
  except OSError as error:
    raise schema.ConfigError(
      f"{where}={path!r}: {error.strerror}; name a tokenizer.json, or a folder "
      "that has one"
    ) from error
  except schema.ConfigError as error:
    raise schema.ConfigError(f"{where}={path!r}: {error}") from error


def from_content(content: Mapping[str, Any]) -> Source:
  """What a checkpoint holds. Raises KeyError or ValueError if it is not."""
  text, roles, added = (content[name] for name in ("text", "roles", "added"))
  template, stops = content.get("own_template"), content.get("stops", [])
  texts = [
    text,
    *roles.values(),
    *added,
    *stops,
    *([] if template is None else [template]),
  ]
  if not all(isinstance(x, str) for x in texts) or not {"bos", "eos"} <= {
    *roles
  }:
    raise ValueError("not the text, roles and template of a vocabulary")
  return Source(text, roles, template, tuple(added), tuple(stops))


def names(tree: Mapping[str, Any]) -> dict[str, int]:
  """Id of each token of a tokenizer.json. Raises ConfigError if it has none."""
  try:
    model, added = tree["model"], tree.get("added_tokens") or []
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: (token, score) in order.
      vocabulary = {item[0]: i for i, item in enumerate(vocabulary)}
    found = {str(name): int(i) for name, i in vocabulary.items()}
    found |= {str(x["content"]): int(x["id"]) for x in added}
    if not found or not 0 <= min(found.values()) <= max(found.values()) < _MOST:
      raise ValueError(f"ids must be from 0 to {_MOST}, and there must be some")
    return found
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    raise schema.ConfigError(
      f"not a tokenizer.json ({type(error).__name__}: {error})"
    ) from error


def _text(path: str) -> str:
  try:
    with open(path, encoding="utf-8-sig") as file:
      return file.read()
  except UnicodeDecodeError as error:
    raise schema.ConfigError(f"{path}: not UTF-8: {error}") from error


def _json(path: str) -> dict[str, Any]:
  try:
    tree = json.loads(_text(path))
  except (ValueError, RecursionError) as error:
    raise schema.ConfigError(f"{path}: not JSON: {error}") from error
  if not isinstance(tree, dict):
    raise schema.ConfigError(f"{path}: must hold an object")
  return tree


def _optional(folder: str, name: str) -> dict[str, Any]:
  path = os.path.join(folder, name)
  return _json(path) if os.path.exists(path) else {}


def _stated(folder: str, vocabulary: Mapping[str, int]) -> dict[str, str]:
  """Roles that a file names, of tokens that the vocabulary has."""
  found: dict[str, str] = {}
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    tree = _optional(folder, name)
    for role, fields in _ROLES.items():
      for field in fields:
        token = tree.get(field)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocabulary:
          found.setdefault(role, token)
  if "eos" not in found:  # As of GPT-2, whose other files are silent.
    found = {**_generation(folder, vocabulary), **found}
  return found


def _generation(folder: str, vocabulary: Mapping[str, int]) -> dict[str, str]:
  """Roles of generation_config.json, which has ids: of several, the first."""
  return {
    role: some[0]
    for role in ("bos", "eos", "pad")
    if (some := _ends(folder, vocabulary, role))
  }


def _ends(
  folder: str, vocabulary: Mapping[str, int], role: str = "eos"
) -> list[str]:
  """Tokens of a role in generation_config.json: several may end a text."""
  stated = _optional(folder, "generation_config.json").get(f"{role}_token_id")
  stated = stated if isinstance(stated, list) else [stated]
  by_id = {i: name for name, i in [*vocabulary.items()][::-1]}
  return [by_id[i] for i in stated if isinstance(i, int) and i in by_id]


def _template(folder: str) -> str | None:
  """The chat template, checked to compile: of several named, `default`."""
  path = os.path.join(folder, "chat_template.jinja")
  if os.path.exists(path):
    template = _text(path)
  else:
    path = os.path.join(folder, "tokenizer_config.json")
    template = _optional(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
      by_name = {x.get("name"): x for x in template if isinstance(x, dict)}
      template = by_name.get("default", {}).get("template")
  if template is None:
    return None
  if not isinstance(template, str):
    raise schema.ConfigError(f"{path}: chat_template must be a text")
  try:
    template_lib.check(template)
  except schema.ConfigError as error:
    raise schema.ConfigError(f"{path}: {error}") from error
  return template
