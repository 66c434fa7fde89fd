"""Fill-in-the-middle (FIM): training rows, and the prompt that fills a gap
(arXiv:2207.14255).
"""

import re

import numpy as np

from lm import objective as objective_lib
from lm import schema
from lm.data import tokenizer as tokenizer_lib

# Prefix, suffix, middle; or suffix, prefix, middle.
ORDERS = ("psm", "spm")

# Tokens that reordering adds at most: three sentinels, bos and eos of a piece
# of a longer document, and what the two cuts add where they fall inside tokens.
_SLACK = 8
EXTRA = 3 + 2 + _SLACK


def sentinels(tokenizer: tokenizer_lib.Tokenizer) -> list[int]:
  return [tokenizer.fim_prefix, tokenizer.fim_suffix, tokenizer.fim_middle]


def reorder(
  objective: objective_lib.Fim,
  tokenizer: tokenizer_lib.Tokenizer,
  tokens: np.ndarray,
  rng: np.random.Generator,
) -> np.ndarray:
  """A document or a piece of one, as `fim_ids` prompts for its middle and goes
  on with it and eos; or, by `rate`, unchanged but for a bos at the start.

  Prefix, middle and suffix are cut from the text and encoded each for itself,
  in both orders: the model learns to go on from inside a token. (Code Llama,
  arXiv:2308.12950, encodes prefix and middle together in SPM; its prompt may
  then not end inside a token.) Where the text is no whole UTF-8, or its cuts
  add more than _SLACK tokens, the cuts are between tokens.
  """
  opens = tokens[:1].tolist() == [tokenizer.bos]
  text = tokens[(tokens != tokenizer.bos) & (tokens != tokenizer.eos)]
  draws = rng.random(4)
  ends = tokens[-1:][tokens[-1:] == tokenizer.eos]
  if not len(text) or draws[0] >= objective.rate:
    return np.concatenate([[tokenizer.bos], text, ends])
  psm, cuts = bool(draws[1] >= objective.spm), np.sort(draws[2:])
  parts: list[np.ndarray] | None = None
  if objective.cut != "token":
    parts = _cut_text(objective.cut, tokenizer, text, cuts, opens)
  if parts is None:
    first, last = (int(cut * (len(text) + 1)) for cut in cuts)
    parts = [text[:first], text[first:last], text[last:]]
  before, between, after = parts
  opening, gap, end = sentinels(tokenizer)
  if psm:
    pieces = [[opening], before, [gap], after, [end], between]
  else:
    pieces = [[opening, gap], after, [end], before, between]
  return np.concatenate([[tokenizer.bos], *pieces, [tokenizer.eos]])


def _cut_text(
  where: str,
  tokenizer: tokenizer_lib.Tokenizer,
  ids: np.ndarray,
  cuts: np.ndarray,
  opens: bool,
) -> list[np.ndarray] | None:
  """Ids of prefix, middle and suffix; None if cuts between tokens are needed.
  `opens`: a document begins here.
  """
  raw = tokenizer.decode_bytes(ids.tolist())
  try:
    text = (raw.removeprefix(tokenizer.prefix) if opens else raw).decode()
  except UnicodeDecodeError:  # the piece starts or ends inside a character
    return None
  if where == "line":
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    places = np.cumsum([0, *map(len, lines)])
    first, last = (int(places[int(cut * len(places))]) for cut in cuts)
  else:
    first, last = (int(cut * (len(text) + 1)) for cut in cuts)
  parts = [text[:first], text[first:last], text[last:]]
  encoded = tokenizer.encode_batch(parts, continues=True)
  if opens and tokenizer.prefix:
    encoded[0] = tokenizer.encode_batch(parts[:1])[0]
  if sum(map(len, encoded)) > len(ids) + _SLACK:
    return None
  return encoded


def fim_ids(
  tokenizer: tokenizer_lib.Tokenizer,
  prefix: str,
  suffix: str,
  order: str = "psm",
) -> list[int]:
  """Fill-in-the-middle (FIM) prompt: bos, then prefix and suffix ("psm") or
  suffix and prefix ("spm"). The model continues with the text in between, then
  eos.

  Output of a model trained without FIM is worthless. Raises ConfigError on any
  other `order`, and if the vocabulary lacks the three FIM tokens.
  """
  if order not in ORDERS:
    raise schema.ConfigError(
      f"order={order!r}: must be 'psm' (prefix first) or 'spm'"
    )
  before = tokenizer.encode(prefix)
  after = tokenizer.encode(suffix, continues=True)
  start, hole, end = (
    [tokenizer.bos, tokenizer.fim_prefix],
    [tokenizer.fim_suffix],
    [tokenizer.fim_middle],
  )
  if order == "psm":
    return start + before + hole + after + end
  return start + hole + after + end + before
