"""From tokens to text while they come: whole characters, cut at stop texts."""

import codecs
from collections.abc import Sequence

from lm.data import tokenizer as tokenizer_lib


class Stream:
  """Takes the tokens of one continuation and gives out its text.

  A character is given out once all its bytes are there, and once no stop text
  can begin with it any more. Of several stop texts the one that is complete
  first counts, among equals the first of the list. All that was given out is
  what `Tokenizer.decode` says of all tokens, up to the stop text.
  """

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, stop: Sequence[str]):
    self.text = ""
    self.stopped = False
    self._tokenizer, self._stop = tokenizer, tuple(stop)
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self._n_given = 0

  def add(self, token_id: int) -> bool:
    """Whether this token completes a stop text."""
    self._grow(self._decoder.decode(self._tokenizer.decode_bytes([token_id])))
    return self.stopped

  def end(self) -> None:
    """No more tokens follow: what is left of a character is U+FFFD."""
    if not self.stopped:
      self._grow(self._decoder.decode(b"", final=True))
    self._stop = ()

  def take(self) -> str:
    """What may be given out since the last time."""
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
  """Characters at the end of `text` that may be the beginning of `stop`."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
