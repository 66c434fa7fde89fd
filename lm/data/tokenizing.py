"""Documents of a source as token ids, and which of them are not valid."""

import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm import config as config_lib
from lm import schema
from lm.data import chat
from lm.data import sources as sources_lib
from lm.data import tokenizer as tokenizer_lib


class Encoded(NamedTuple):
  """`tokens` int32 [n]; `scored` bool [n] (training targets of chats) or [0]
  of a text; `n_bytes` of UTF-8 text that the tokens stand for.
  """

  name: str
  n_bytes: int
  tokens: np.ndarray
  scored: np.ndarray


@dataclasses.dataclass
class Skipped:
  """Number of documents skipped as invalid, and a reason, where it is known;
  and of documents that their tokens do not give back.
  """

  n: int = 0
  first: str | None = None
  n_changed: int = 0

  def add(self, reason: str | None) -> None:
    self.n += 1
    self.first = self.first or reason

  def __str__(self) -> str:
    first = f"; one of them, {self.first}" if self.first else ""
    return (
      f"documents skipped by invalid_documents or invalid_utf8: {self.n}{first}"
    )


def encode(
  documents: Sequence[sources_lib.Document | sources_lib.Conversation],
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
  skipped: Skipped,
) -> list[Encoded]:
  """Tokenizes texts, as bos, text, eos, and conversations, by the chat
  template.

  A conversation that cannot be trained on raises ConfigError with its name, or
  is skipped, by `data.invalid_documents`.
  """
  threads = data.workers or os.cpu_count() or 1
  texts = [d for d in documents if isinstance(d, sources_lib.Document)]
  if texts:
    return _texts(texts, tokenizer, threads, skipped)
  chats = [d for d in documents if isinstance(d, sources_lib.Conversation)]
  if not chats:
    return []
  found = []
  encoded = chat.encode_batch(tokenizer, [d.messages for d in chats], threads)
  for document, result in zip(chats, encoded, strict=True):
    error = _refusal(result)
    if error is None and not isinstance(result, schema.ConfigError):
      tokens, scored = result
      n_bytes = tokenizer.n_bytes(tokens)
      found.append(Encoded(document.name, n_bytes, tokens, scored))
    elif data.invalid_documents == "skip":
      skipped.add(f"{document.name}: {error}")
    else:
      raise schema.ConfigError(
        f"{document.name}: {error}; correct it, or set invalid_documents to "
        "'skip'"
      )
  return found


def _refusal(result: chat.Encoded | schema.ConfigError) -> str | None:
  """Why a conversation cannot be trained on, or None."""
  if isinstance(result, schema.ConfigError):
    return str(result)
  _, scored = result
  if not scored.any():
    return "has no training target: no token of it is the assistant's"
  return None


def _texts(
  texts: Sequence[sources_lib.Document],
  tokenizer: tokenizer_lib.Tokenizer,
  threads: int,
  skipped: Skipped,
) -> list[Encoded]:
  encoded = tokenizer.encode_batch([d.text for d in texts], threads=threads)
  n_bytes = [len(document.text.encode()) for document in texts]
  if tokenizer.lossy is None:
    assert sum(n_bytes) == sum(tokenizer.n_bytes(ids) for ids in encoded)
  else:
    skipped.n_changed += sum(
      tokenizer.decode(ids.tolist()) != document.text
      for document, ids in zip(texts, encoded, strict=True)
    )
  bos, eos = np.array([[tokenizer.bos], [tokenizer.eos]], np.int32)
  unscored = np.zeros(0, bool)
  return [
    Encoded(document.name, n, np.concatenate([bos, ids, eos]), unscored)
    for document, n, ids in zip(texts, n_bytes, encoded, strict=True)
  ]
