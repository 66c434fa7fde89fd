"""Reads the files of a Hugging Face vocabulary: tokenizer.json and neighbours.

The tokens for begin, end, padding and masks and the chat template are in
tokenizer_config.json, special_tokens_map.json, generation_config.json and
chat_template.jinja. Only the template is executed, in a child process without
rights (lm/data/template.py).
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from lm import files, schema
from lm.data import template as template_lib

# Bound on token ids: a wrong id would otherwise allocate much memory.
_MOST = 1 << 24
# Role -> keys of tokenizer_config.json for the token of the role.
_ROLES = {
  "bos": ("bos_token", "cls_token"),
  "eos": ("eos_token", "sep_token"),
  "pad": ("pad_token",),
  "unk": ("unk_token",),
  "mask": ("mask_token",),
}
# Role -> usual tokens, for a tokenizer.json without further files.
_USUAL = {
  "bos": "<s> <bos> <|begin_of_text|> [CLS]",
  "eos": "</s> <eos> <|end_of_text|> <|endoftext|> [SEP]",
  "pad": "<pad> [PAD] <|finetune_right_pad_id|>",
  "unk": "<unk> [UNK]",
  "mask": "[MASK] <mask>",
}


@dataclasses.dataclass(frozen=True)
class Source:
  """The `text` of a tokenizer.json, and the settings in the files beside.

  `roles` maps bos, eos, pad, unk and mask to tokens of the vocabulary; bos and
  eos are always present. `template` is the vocabulary's chat template. `added`
  are reserved names with ids after the vocabulary's ids. `stops` are tokens,
  besides eos, at the end of an answer.
  """

  text: str
  roles: Mapping[str, str]
  template: str | None = None
  added: tuple[str, ...] = ()
  stops: tuple[str, ...] = ()


def read(path: str) -> Source:
  """Reads the folder `path`, or the tokenizer.json `path` and the files beside.

  Raises ConfigError if `path` is not local, a file is unreadable or malformed,
  or no token is eos.
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
    if "bos" not in roles:  # As in Qwen, where eos also separates texts.
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


def within(source: Source, rows: int) -> Source:
  """Returns the source without special tokens from id `rows` on, if no role and
  no template needs them and all others are below; else the source itself.

  Gemma 3 of 1B and 270M reads no images, and has the tokenizer.json of its
  siblings with <image_soft_token>, for which its embedding has no row.
  """
  tree = json.loads(source.text)
  added = tree.get("added_tokens") or []
  needed = {*source.roles.values(), *source.stops}
  tree["added_tokens"] = [
    x
    for x in added
    if int(x["id"]) < rows
    or not x.get("special")
    or x["content"] in needed
    or x["content"] in (source.template or "")
  ]
  fits = max(names(tree).values()) < rows
  if not fits or len(tree["added_tokens"]) == len(added):
    return source
  return dataclasses.replace(source, text=json.dumps(tree, ensure_ascii=False))


def from_content(content: Mapping[str, Any]) -> Source:
  """Returns the Source of a checkpoint's JSON `content`. Raises KeyError or
  ValueError on invalid content.
  """
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
  """Returns the id of each token of a tokenizer.json; raises ConfigError if the
  vocabulary is missing, empty, or has ids out of range.
  """
  try:
    model, added = tree["model"], tree.get("added_tokens") or []
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram has (token, score) by id.
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
  """Returns the roles named by a file, if the token is in the vocabulary."""
  found: dict[str, str] = {}
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    tree = _optional(folder, name)
    for role, fields in _ROLES.items():
      for field in fields:
        token = tree.get(field)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocabulary:
          found.setdefault(role, token)
  if "eos" not in found:  # As in GPT-2: only generation_config.json has eos.
    found = {**_generation(folder, vocabulary), **found}
  return found


def _generation(folder: str, vocabulary: Mapping[str, int]) -> dict[str, str]:
  """Returns the roles of generation_config.json, the first of several ids."""
  return {
    role: some[0]
    for role in ("bos", "eos", "pad")
    if (some := _ends(folder, vocabulary, role))
  }


def _ends(
  folder: str, vocabulary: Mapping[str, int], role: str = "eos"
) -> list[str]:
  """Returns the tokens of a role in generation_config.json, maybe several."""
  stated = _optional(folder, "generation_config.json").get(f"{role}_token_id")
  stated = stated if isinstance(stated, list) else [stated]
  by_id = {i: name for name, i in [*vocabulary.items()][::-1]}
  return [by_id[i] for i in stated if isinstance(i, int) and i in by_id]


def _template(folder: str) -> str | None:
  """Returns the chat template, of several the template named `default`. Raises
  ConfigError if the template does not compile.
  """
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
