"""Vocabularies: the map from text to token ids, and the bytes of each id."""

import abc
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm import schema

# The character for a space in SentencePiece and similar vocabularies.
SPACE = "\u2581"
SENTINELS = tuple(f"<sentinel_{i}>" for i in range(100))
FIM = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
RESERVED = (
  "<pad>",
  "<bos>",
  "<eos>",
  "<mask>",
  *FIM,
  *SENTINELS,
  "<system>",
  "<user>",
  "<assistant>",
  "<end_of_turn>",
)
# Vocabulary size of the bytes tokenizer: reserved ids and 256 bytes, rounded up
# to a multiple of 128 to let a mesh axis shard the embedding.
BYTES_SIZE = 384


class Vocabulary(abc.ABC):
  """The token ids of a tokenizer; `pieces` are the UTF-8 bytes of each id.

  `reserved` and `special` are ids by name, with pieces b"". `reserved` may lack
  names of RESERVED, though never <pad>, <bos> and <eos>.

  `encode` puts a dummy `prefix`, if not b"", before a text: the token ids then
  stand for `prefix + text`. With `prefix_once`, text after a special token gets
  no prefix. `lossy` describes texts changed by encoding and decoding; None
  means none.
  """

  kind: str
  pieces: list[bytes]
  reserved: dict[str, int]
  special: dict[str, int]
  prefix: bytes = b""
  prefix_once: bool = False
  lossy: str | None = None
  # Id -> whether the token absorbs spaces (before, after) in the text.
  strips: Mapping[int, tuple[bool, bool]] = types.MappingProxyType({})
  # Whether a conversation begins with bos even if its template writes none.
  chats_begin_with_bos: bool = True

  @abc.abstractmethod
  def encode(
    self, texts: Sequence[str], threads: int, continues: bool
  ) -> list[np.ndarray]:
    """Returns token ids [n] (int32) of each text, with `continues` without the
    prefix.
    """

  def names(self) -> dict[int, str]:
    """Returns the name of each reserved and special id."""
    return {i: name for name, i in {**self.special, **self.reserved}.items()}

  @abc.abstractmethod
  def content(self) -> Mapping[str, Any]:
    """Returns the vocabulary for JSON, without the names of special tokens.
    Checkpoints store the content, and fingerprints hash the content.
    """


class Bytes(Vocabulary):
  """Reserved ids, then an id for each byte, then spare ids for special tokens.

  Raises ConfigError on more special tokens than spare ids.
  """

  kind = "bytes"

  def __init__(self, special_tokens: Sequence[str] = ()):
    self.pieces = [b""] * len(RESERVED) + [bytes([i]) for i in range(256)]
    n_text = len(self.pieces)
    if (n_spare := BYTES_SIZE - n_text) < len(special_tokens):
      raise schema.ConfigError(
        f"config.tokenizer.special_tokens: holds {len(special_tokens)} "
        f"tokens, and the bytes tokenizer has {n_spare} spare ids; give at "
        "most as many, or use kind='sentencepiece'"
      )
    self.pieces += [b""] * n_spare
    self.reserved = {name: i for i, name in enumerate(RESERVED)}
    self.special = {name: n_text + i for i, name in enumerate(special_tokens)}

  def encode(
    self, texts: Sequence[str], threads: int, continues: bool
  ) -> list[np.ndarray]:
    return [
      np.frombuffer(text.encode(), np.uint8).astype(np.int32) + len(RESERVED)
      for text in texts
    ]

  def content(self) -> Mapping[str, Any]:
    return {"kind": "bytes"}
