"""The vocabulary of a tokenizer.json, with the `tokenizers` library.

Token ids equal the library's, except that names of special tokens in a text
stay text. A reserved token of this program takes an equivalent token of the
vocabulary (`_reserved`), else an unused token (`_UNUSED`), else is absent or
gets an id after the vocabulary's ids.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from lm import schema
from lm.data import huggingface_files, pretokenizing
from lm.data import vocabulary as vocabulary_lib
from lm.data.huggingface_files import Source

# Fill-in-the-middle tokens (prefix, middle, suffix): StarCoder, SantaCoder,
# Qwen2.5-Coder and CodeGemma, Code Llama (two), DeepSeek-Coder, Codestral.
_FIM = (
  ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
  ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
  ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
  ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>"),
  ("<PRE>", "<MID>", "<SUF>"),
  (
    "<\uff5cfim\u2581begin\uff5c>",
    "<\uff5cfim\u2581end\uff5c>",
    "<\uff5cfim\u2581hole\uff5c>",
  ),
  ("[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
)
# Unused tokens, kept free for users of a vocabulary: Llama 3, Gemma, BERT and
# ModernBERT, Phi-3, Phi-4, Qwen 1, Mistral.
_UNUSED = re.compile(
  r"<\|reserved_special_token_\d+\|>|<unused\d+>|\[unused\d+\]"
  r"|<\|placeholder\d+\|>|<\|dummy_\d+\|>|<\|extra_\d+\|>|<SPECIAL_\d+>"
)


class HuggingFace(vocabulary_lib.Vocabulary):
  """The vocabulary of `source`; `special_tokens` missing there get ids after
  the vocabulary's ids. Raises ConfigError on an invalid tokenizer.json, and on
  a special token needed for encoding ordinary text.
  """

  kind = "huggingface"

  def __init__(self, source: Source, special_tokens: Sequence[str] = ()):
    self.source = source
    try:
      tree = json.loads(source.text)
      if not isinstance(tree, dict):
        raise schema.ConfigError("not a tokenizer.json (not an object)")
      ids = huggingface_files.names(tree)
      # A file may ask for these steps; pretraining must not apply them.
      tree["truncation"] = tree["padding"] = None
      tree["model"]["dropout"] = None
      self._tree = tree
      self._tokenizer = _load(tree)
      steps = pretokenizing.read(tree, ids)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
      raise schema.ConfigError(
        f"not a tokenizer.json ({type(error).__name__}: {error})"
      ) from error
    self.prefix, self.prefix_once = steps.prefix, steps.prefix_once
    self.lossy = steps.lossy
    # The vocabulary's own tokens, and the first id after these tokens.
    self.tokens, self.n_own = ids, 1 + max(ids.values())
    added = {x["content"]: x for x in tree.get("added_tokens") or []}
    self.special = {n: ids[n] for n, x in added.items() if x.get("special")}
    self.reserved = _reserved(ids, source.roles, set(self.special))
    self.strips = {
      int(x["id"]): (bool(x.get("lstrip")), bool(x.get("rstrip")))
      for x in added.values()
      if x.get("lstrip") or x.get("rstrip")
    }
    # Published models were trained on chats as written by their templates.
    self.chats_begin_with_bos = set(vocabulary_lib.RESERVED) <= {*self.special}
    # Only templates write tokens with a role: their names in text stay text.
    for role, name in source.roles.items():
      if role != "unk" or steps.unknown is None:
        self.special[name] = ids[name]
    n = self.n_own
    for name in special_tokens:
      self.special[name] = ids.get(name, n)
      n += name not in ids
    for name in source.added:
      self.reserved.setdefault(name, n)
      n += self.reserved[name] == n
    closed = {*self.special.values(), *self.reserved.values()}
    closed |= {ids[steps.unknown]} if steps.unknown in ids else set()
    self.pieces = [b""] * n
    for name, i in ids.items():
      if i not in closed:
        self.pieces[i] = steps.bytes_of(name, name in added)
    self._spelt = self._spellings(ids, closed, steps)
    own = set(special_tokens) & ids.keys() if steps.unknown is None else ()
    for name in own:
      spelt = b"".join(self.pieces[i] for i in self._spelt[ids[name]])
      if spelt != name.encode():
        raise schema.ConfigError(
          f"config.tokenizer.special_tokens: {name!r} is a token that ordinary "
          "text needs; choose another"
        )
    self._is_spelt = np.isin(np.arange(n), list(self._spelt))

  def encode(
    self, texts: Sequence[str], threads: int, continues: bool
  ) -> list[np.ndarray]:
    tokenizer = self._continuing if continues else self._tokenizer
    found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [self._row(encoding.ids) for encoding in found]

  def _row(self, ids: list[int]) -> np.ndarray:
    row = np.array(ids, np.int32)
    if not self._is_spelt[row].any():
      return row
    spelt = [self._spelt.get(i, [i]) for i in ids]
    return np.array([i for some in spelt for i in some], np.int32)

  @functools.cached_property
  def _continuing(self) -> tokenizers.Tokenizer:
    if not self.prefix:
      return self._tokenizer
    return _load(pretokenizing.without_prefix(self._tree))

  def _spellings(
    self,
    ids: Mapping[str, int],
    closed: set[int],
    steps: pretokenizing.Steps,
  ) -> dict[int, list[int]]:
    """Returns, for each special id, the ids of the characters of the token's
    name. `encode` replaces special ids by these ids, since a model may produce
    special tokens from text: a Unigram model matches all tokens.
    """
    letters: dict[bytes, int] = {}
    for i, piece in enumerate(self.pieces):
      if piece:
        letters.setdefault(piece, i)
    unknown = ids.get(steps.unknown or "")
    found = {}
    for name, i in ids.items():
      if i not in closed or i == unknown:
        continue
      spelt = []
      spaces = vocabulary_lib.SPACE if steps.marks_spaces else " "
      for letter in name.replace(spaces, " "):
        raw = letter.encode()
        one = (
          [letters[raw]]
          if raw in letters
          else [letters.get(bytes([byte]), unknown) for byte in raw]
        )
        spelt += [j for j in one if j is not None]
      found[i] = spelt
    return found

  def names(self) -> dict[int, str]:
    """Returns the vocabulary's own names of special ids, except that reserved
    names replace the names of unused tokens.
    """
    own = {n: i for n, i in self.special.items() if not _UNUSED.fullmatch(n)}
    unused = {i: name for name, i in self.special.items()}
    ours = {i: name for name, i in self.reserved.items()}
    return {**unused, **ours, **{i: name for name, i in own.items()}}

  def content(self) -> Mapping[str, Any]:
    source = self.source
    return {
      "kind": self.kind,
      "text": source.text,
      "roles": dict(source.roles),
      "added": list(source.added),
    }

  def with_added(self, names: Sequence[str], room: int) -> Source:
    """Returns the source with ids added for missing reserved `names`.

    Raises ConfigError if the vocabulary would exceed `room` ids.
    """
    missing = [name for name in names if name not in self.reserved]
    size = len(self.pieces) + len(missing)
    if missing and size > room:
      some = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
      raise schema.ConfigError(
        f"config.model.vocab_size={room}: the objectives of the sources need "
        f"{schema.counted(len(missing), 'token')} that the vocabulary of "
        f"tokenizer.path lacks ({some}), and has no unused ids for; set it "
        f"to at least {size}, or choose other objectives"
      )
    return dataclasses.replace(
      self.source, added=(*self.source.added, *missing)
    )


def _load(tree: Mapping[str, Any]) -> tokenizers.Tokenizer:
  try:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tree))
  except Exception as error:  # The library raises no narrower class.
    raise schema.ConfigError(f"not a tokenizer.json ({error})") from error
  tokenizer.encode_special_tokens = True  # Encodes their names as text.
  return tokenizer


def _reserved(
  ids: Mapping[str, int], roles: Mapping[str, str], special: set[str]
) -> dict[str, int]:
  """Returns ids of reserved tokens: equivalent tokens, then unused tokens."""
  wanted = vocabulary_lib.RESERVED
  found = {name: ids[name] for name in wanted if name in special}
  sentinels = [f"<extra_id_{i}>" for i in range(len(vocabulary_lib.SENTINELS))]
  for own, ours in (
    *((names, vocabulary_lib.FIM) for names in reversed(_FIM)),
    (sentinels, vocabulary_lib.SENTINELS),  # T5.
  ):
    if all(name in ids for name in own):
      found |= {name: ids[x] for name, x in zip(ours, own, strict=True)}
  for role in ("bos", "eos", "mask"):
    if role in roles:
      found[f"<{role}>"] = ids[roles[role]]
  # Padding is masked everywhere, so any id serves.
  found["<pad>"] = ids[roles.get("pad", roles["eos"])]
  used = set(found.values())
  unused = sorted(
    i for name, i in ids.items() if _UNUSED.fullmatch(name) and i not in used
  )
  missing = [name for name in wanted if name not in found]
  return found | dict(zip(missing, unused, strict=False))
