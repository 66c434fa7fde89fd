"""Texts with gaps: <mask> (masked LM), <sentinel_0>, ... (span corruption).

Only here does a spelling in a text become a reserved id.
"""

import re
from collections.abc import Sequence

from lm import schema
from lm.data import tokenizer as tokenizer_lib

# Odd parts of `split` are the marks.
_MASK = re.compile("(<mask>)")
_SENTINEL = re.compile(r"(<sentinel_\d+>)")


def mask_ids(tokenizer: tokenizer_lib.Tokenizer, text: str) -> list[int]:
  """Token ids of a document for a masked LM: bos, the text with each <mask> as
  the reserved id, eos. A <mask> stands for one token.

  Raises ConfigError unless the text, and the vocabulary, have a <mask>.
  """
  schema.check_text("fill", text)
  if _MASK.search(text) is None:
    raise schema.ConfigError(
      f"fill={schema.shown(text)}: has no <mask>; write one for each token "
      "to fill in"
      + (
        " (lm.sample --fill fills sentinels)" if _SENTINEL.search(text) else ""
      )
    )
  return [tokenizer.bos, *_encode(tokenizer, _MASK.split(text)), tokenizer.eos]


def sentinel_ids(tokenizer: tokenizer_lib.Tokenizer, text: str) -> list[int]:
  """Prompt of span corruption (T5, arXiv:1910.10683): bos, then the text with
  each sentinel as the reserved id. The model continues with <sentinel_0>, the
  text of gap 0, <sentinel_1>, the text of gap 1, ..., eos.

  Raises ConfigError unless the sentinels are <sentinel_0>, <sentinel_1>, ... in
  order, each once.
  """
  schema.check_text("fill", text)
  parts = _SENTINEL.split(text)
  names = tokenizer_lib.SENTINELS
  found = parts[1::2]
  if not found or tuple(found) != names[: len(found)]:
    raise schema.ConfigError(
      f"fill={schema.shown(text)}: the gaps must be <sentinel_0>, "
      f"<sentinel_1>, ... in order, each once, at least one and at most "
      f"{len(names)}"
      + (" (lm.explain --fill fills <mask>)" if _MASK.search(text) else "")
    )
  return [tokenizer.bos, *_encode(tokenizer, parts)]


def spans(
  tokenizer: tokenizer_lib.Tokenizer, drawn: Sequence[int]
) -> dict[str, str]:
  """Sentinel -> text of the gap, from the ids drawn after `sentinel_ids`.

  Of a sentinel drawn twice the first counts; ids before the first sentinel
  belong to no gap.
  """
  names = dict(zip(tokenizer.sentinels, tokenizer_lib.SENTINELS, strict=True))
  found: dict[str, list[int]] = {}
  ids: list[int] = []
  for token in drawn:
    if token in names:
      ids = []
      found.setdefault(names[token], ids)
    else:
      ids.append(token)
  return {
    name: tokenizer.decode(ids, continues=True) for name, ids in found.items()
  }


def filled(text: str, gaps: dict[str, str]) -> list[tuple[str, bool]]:
  """`text` in parts, (part, whether it fills a gap); a sentinel without an
  entry in `gaps` stays as it is.
  """
  return [
    (gaps.get(part, part), part in gaps)
    for part in _SENTINEL.split(text)
    if part
  ]


def fill_masks(
  tokenizer: tokenizer_lib.Tokenizer, text: str, ids: Sequence[int]
) -> str:
  """`text` with id `ids[i]` in place of mask i; a reserved id by its name."""
  own, spelled = iter(ids), []
  for i, part in enumerate(_MASK.split(text)):
    if i % 2:
      token = next(own)
      spelled.append(
        tokenizer.decode_bytes([token]) or tokenizer.piece(token).encode()
      )
    else:
      spelled.append(part.encode())
  # Joined as bytes: several ids may spell one character.
  return b"".join(spelled).decode(errors="replace")


def _encode(
  tokenizer: tokenizer_lib.Tokenizer, parts: Sequence[str]
) -> list[int]:
  ids = []
  for i, part in enumerate(parts):
    if i % 2:
      ids.append(tokenizer.require(part))
    else:
      ids += tokenizer.encode(part, continues=i > 0)
  return ids
