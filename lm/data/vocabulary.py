"""What a tokenizer stands on: how text becomes ids, and what each id means."""

import abc
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm import schema

# How SentencePiece and its like write a space.
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
# Vocabulary of the bytes tokenizer: reserved ids and 256 bytes, rounded up to a
# multiple of 128 to let a mesh axis shard the embedding.
BYTES_SIZE = 384


class Vocabulary(abc.ABC):
  """Ids of a tokenizer: `kind`, and per id the bytes of text, `pieces`.

  `reserved` and `special` are ids by name; their pieces are b"". `reserved` may
  lack names of RESERVED, though never <pad>, <bos> and <eos>.

  Text that `encode` begins gets a dummy `prefix` if that is not b"":
  `prefix + text` is what its ids stand for. `prefix_once` says that text behind
  a special token gets none. `lossy` says which texts do not come back from
  their ids, and None means that all do.
  """

  kind: str
  pieces: list[bytes]
  reserved: dict[str, int]
  special: dict[str, int]
  prefix: bytes = b""
  prefix_once: bool = False
  lossy: str | None = None
  # Special ids that take with them the spaces before and behind them.
  strips: Mapping[int, tuple[bool, bool]] = types.MappingProxyType({})
  # Whether a conversation begins with bos even if its template writes none.
  chats_begin_with_bos: bool = True

  @abc.abstractmethod
  def encode(
    self, texts: Sequence[str], threads: int, continues: bool
  ) -> list[np.ndarray]:
    """Token ids of each text, int32; `continues`: without the prefix."""

  def names(self) -> dict[int, str]:
    """Name of each reserved and special id."""
    return {i: name for name, i in {**self.special, **self.reserved}.items()}

  @abc.abstractmethod
  def content(self) -> Mapping[str, Any]:
    """The vocabulary as JSON, which a checkpoint holds and a fingerprint
    covers; without the names of special tokens.
    """


class Bytes(Vocabulary):
  """An id per byte, after the reserved ids; special tokens take spare ids.

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
