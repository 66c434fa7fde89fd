"""Streaming detokenization: whole characters, cut at stop strings."""

import codecs
from collections.abc import Sequence

from lm.data import tokenizer as tokenizer_lib


class Reader:
  """Text of tokens that come one by one, a character once its bytes are whole.

  `before` are the ids that they go on from: a tokenizer's dummy prefix is no
  text where none of them has text.
  """

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, before: Sequence[int] = ()
  ):
    self._tokenizer = tokenizer
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    begins = not any(tokenizer.byte_lengths[i] for i in before)
    self._prefix = tokenizer.prefix if begins else b""

  def read(self, token_id: int) -> str:
    raw = self._tokenizer.decode_bytes([token_id])
    if raw:
      raw, self._prefix = raw.removeprefix(self._prefix), b""
    return self._decoder.decode(raw)

  def end(self) -> str:
    """U+FFFD if a character is incomplete, else nothing."""
    return self._decoder.decode(b"", final=True)


class Stream:
  """Decodes the tokens of a continuation to text as the tokens arrive.

  A character is released once all bytes of the character are decoded and no
  stop string can begin there. Of several stop strings, the first to be complete
  wins, ties by list order. The released text equals `Tokenizer.decode` of all
  tokens, up to the stop string, going on from those `before`.
  """

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    stop: Sequence[str],
    before: Sequence[int] = (),
  ):
    self.text = ""
    self.stopped = False
    self._reader, self._stop = Reader(tokenizer, before), tuple(stop)
    self._n_given = 0

  def add(self, token_id: int) -> bool:
    """Decodes a token; True once a stop string is complete."""
    self._grow(self._reader.read(token_id))
    return self.stopped

  def end(self) -> None:
    """Ends the stream; an incomplete character becomes U+FFFD."""
    if not self.stopped:
      self._grow(self._reader.end())
    self._stop = ()

  def take(self) -> str:
    """Returns the text released since the previous call."""
    end = len(self.text)
    if not self.stopped:
      end -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
    given = self.text[self._n_given : end]
    self._n_given = max(self._n_given, end)
    return given

  def _grow(self, new: str) -> None:
    before, self.text = len(self.text), self.text + new
    found = []
    for order, stop in enumerate(self._stop):
      start = self.text.find(stop, max(0, before - len(stop) + 1))
      if start >= 0:
        found.append((start + len(stop), order, start))
    if found:
      self.stopped = True
      self.text = self.text[: min(found)[2]]


def _overlap(text: str, stop: str) -> int:
  """Number of characters at the end of `text` that may begin `stop`."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
