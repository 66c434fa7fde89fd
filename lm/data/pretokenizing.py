"""Analyses the steps of a tokenizer.json: the bytes of a token, a space put
before a text, and losses of text.

A tokenizer.json has a normalizer and a pre-tokenizer, each a step or a Sequence
of steps, and a model: https://huggingface.co/docs/tokenizers/components.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lm.data import vocabulary as vocabulary_lib

_BYTE = re.compile("<0x([0-9A-F]{2})>")
# Pre-tokenizers without loss of text, besides Split and Punctuation.
_KEEPS = ("ByteLevel", "Digits", "UnicodeScripts", "Metaspace", "FixedLength")
_SPACES = "spaces of the text are not kept"
_SPACE_MARK = f"a {vocabulary_lib.SPACE} of the text becomes a space"


@dataclasses.dataclass(frozen=True)
class Steps:
  """`prefix`, `prefix_once` and `lossy` are as in vocabulary.Vocabulary.
  `unknown` is the token for text outside the vocabulary; None if every text can
  be spelt.
  """

  byte_level: bool
  byte_fallback: bool
  marks_spaces: bool
  word_mark: str | None  # WordPiece's "##"; tokens without "##" open a word.
  end_mark: str | None  # The suffix of a word's last token, such as "</w>".
  prefix: bytes
  prefix_once: bool
  lossy: str | None
  unknown: str | None

  def bytes_of(self, token: str, added: bool) -> bytes:
    """Returns the UTF-8 bytes of a token; an `added` token is literal text."""
    if self.byte_level:
      letters = [] if added else [_BYTES.get(c) for c in token]
      if added or None in letters:
        return token.encode()
      return bytes(b for b in letters if b is not None)
    if self.byte_fallback and (found := _BYTE.fullmatch(token)):
      return bytes([int(found[1], 16)])
    if self.marks_spaces:
      token = token.replace(vocabulary_lib.SPACE, " ")
    if self.word_mark and not added:
      opens = not token.startswith(self.word_mark)
      token = " " + token if opens else token.removeprefix(self.word_mark)
    if self.end_mark and token.endswith(self.end_mark):
      token = token.removesuffix(self.end_mark) + " "
    return token.encode()


def read(tree: Mapping[str, Any], ids: Mapping[str, int]) -> Steps:
  """Returns the steps of a tokenizer.json; `ids` has the id of each token.

  Raises KeyError, TypeError or ValueError on a malformed `tree`.
  """
  model = tree["model"]
  normal = [*steps(tree.get("normalizer"))]
  pre = [*steps(tree.get("pre_tokenizer"))]
  kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
  byte_level = any(step["type"] == "ByteLevel" for step in (*normal, *pre))
  byte_fallback = bool(model.get("byte_fallback")) and all(
    f"<0x{i:02X}>" in ids for i in range(256)
  )
  spells_all = byte_fallback or (byte_level and all(c in ids for c in _BYTES))
  marks_spaces = not byte_level and any(
    step["type"] == "Metaspace" or _replaces_space(step)
    for step in (*normal, *pre)
  )
  prefix, once = b"", False
  # Reasons in order and without repetition; the keys are read below.
  lossy = dict.fromkeys(
    [*map(_lost_by_normalizer, normal), *map(_lost_by_pre_tokenizer, pre)]
  )
  for step in (*normal, *pre):
    scheme = _prefix_scheme(step)
    if scheme is not None:
      prefix, once = b" ", scheme == "first"
      if step["type"] != "Prepend":
        lossy["one space at the start of a text is not kept"] = None
  word_mark = end_mark = None
  if kind == "WordPiece":
    word_mark, prefix = model.get("continuing_subword_prefix", "##"), b" "
  elif kind == "BPE":
    end_mark = model.get("end_of_word_suffix") or None
    if model.get("continuing_subword_prefix"):
      lossy["tokens within words are marked"] = None
  if not spells_all:
    lossy["text outside the vocabulary becomes its unknown token"] = None
  if word_mark or end_mark:
    lossy[_SPACES] = None
  for x in tree.get("added_tokens") or []:
    if not x.get("special") and (x.get("lstrip") or x.get("rstrip")):
      lossy[f"{x['content']!r} takes the spaces around it"] = None
  if kind == "Unigram" and byte_fallback:
    lossy["a byte token that the text spells, as <0x41>, becomes the byte"] = (
      None
    )
  return Steps(
    byte_level=byte_level,
    byte_fallback=byte_fallback,
    marks_spaces=marks_spaces,
    word_mark=word_mark,
    end_mark=end_mark,
    prefix=prefix,
    prefix_once=once,
    lossy="; ".join(why for why in lossy if why) or None,
    unknown=None if spells_all else _unknown(model, kind),
  )


def _unknown(model: Mapping[str, Any], kind: str) -> str | None:
  """The unknown token, which stands for text outside the vocabulary."""
  if kind == "Unigram" and model.get("unk_id") is not None:
    return model["vocab"][model["unk_id"]][0]
  return model.get("unk_token")


def without_prefix(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a copy of the tokenizer.json without a space before a text."""
  changed = copy.deepcopy(dict(tree))
  for step in (*steps(changed["normalizer"]), *steps(changed["pre_tokenizer"])):
    if step["type"] == "Prepend":
      step.clear()
      step |= {"type": "Sequence", "normalizers": []}
    elif step["type"] == "Metaspace":
      step["prepend_scheme"] = "never"
      step.pop("add_prefix_space", None)
    elif step["type"] == "ByteLevel":
      step["add_prefix_space"] = False
  return changed


def steps(node: Any) -> Iterator[dict[str, Any]]:
  """Yields the steps of a normalizer or a pre-tokenizer in order."""
  if node is None:
    return
  if node["type"] != "Sequence":
    yield node
    return
  for inner in node.get("normalizers") or node.get("pretokenizers") or []:
    yield from steps(inner)


def _replaces_space(step: Mapping[str, Any]) -> bool:
  return step["type"] == "Replace" and (
    step["pattern"] == {"String": " "}
    and step["content"] == vocabulary_lib.SPACE
  )


def _prefix_scheme(step: Mapping[str, Any]) -> str | None:
  """Returns "always" or "first", or None if the step puts no space first."""
  if step["type"] == "Prepend":
    return "always"
  if step["type"] == "Metaspace":
    usual = "always" if step.get("add_prefix_space", True) else "never"
    scheme = step.get("prepend_scheme", usual)
    return None if scheme == "never" else scheme
  adds = step["type"] == "ByteLevel" and step.get("add_prefix_space", False)
  return "always" if adds else None


def _lost_by_normalizer(step: Mapping[str, Any]) -> str | None:
  if step["type"] == "ByteLevel" or (
    step["type"] == "Prepend" and step["prepend"] == vocabulary_lib.SPACE
  ):
    return None
  if _replaces_space(step):
    return _SPACE_MARK
  return f"its normalizer is {step['type']}"


def _lost_by_pre_tokenizer(step: Mapping[str, Any]) -> str | None:
  if step["type"] == "Metaspace":
    return _SPACE_MARK
  removes = step.get("behavior", "Isolated") == "Removed"
  if step["type"] in ("Split", "Punctuation"):
    return _SPACES if removes else None
  return None if step["type"] in _KEEPS else _SPACES


def _byte_alphabet() -> dict[str, int]:
  """Returns GPT-2's characters for bytes, used in byte-level vocabularies:
  character -> byte. Printable Latin-1 characters stand for their own byte, and
  characters from U+0100 on for the remaining bytes.
  """
  kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in kept]
  return {chr(b): b for b in kept} | {
    chr(256 + i): b for i, b in enumerate(others)
  }


_BYTES = _byte_alphabet()
LETTERS = {byte: letter for letter, byte in _BYTES.items()}
