"""Finds contamination: passages of held-out text present in training sources.

Two texts overlap where N consecutive words are equal (N-grams; GPT-3 used 13,
arXiv:2005.14165 appendix C). A word is a run of letters, digits and `_`, with
case ignored; a Chinese or Japanese character is a word. Characters between
words are ignored, and a document with fewer than N words has no overlap.

The held-out text is indexed, with some 100 bytes of memory per word; the
training text is read once. Hashes find candidates, and the words of candidates
are compared: the results are exact.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from lm import config as config_lib
from lm import objective as objective_lib
from lm.data import sources as sources_lib

DEFAULT_N = 13
# Kana and Han are written without spaces between words.
_HAN = (
  "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+")


class Match(NamedTuple):
  """A passage of `n_words` words: bytes [start, stop) of the UTF-8 text of a
  held-out document, equal word for word to bytes [training_start,
  training_stop) of a training document.
  """

  start: int
  stop: int
  n_words: int
  training_source: str
  training_document: str
  training_start: int
  training_stop: int


@dataclasses.dataclass
class Touched:
  """A held-out document with overlap: `n_covered` of the `n_bytes` bytes lie in
  N-grams of the training text. Matches are in order, and may share words; a
  match names the first place in the training sources.
  """

  name: str
  n_bytes: int
  n_covered: int
  matches: list[Match]


@dataclasses.dataclass
class HeldOut:
  """A held-out source; `n_short` documents have fewer than N words."""

  source: str
  fingerprint: str
  n_documents: int
  n_bytes: int
  n_short: int
  touched: list[Touched]

  @property
  def n_covered(self) -> int:
    return sum(document.n_covered for document in self.touched)


def open_source(name: str, data: config_lib.DataConfig) -> sources_lib.Source:
  """Opens a source, with or without an objective, as a source of text."""
  spec, objective = objective_lib.split_source(name)
  chat = isinstance(objective, objective_lib.Chat)
  return sources_lib.open_source(spec, data, chat=chat)


def spec_of(source: sources_lib.Source) -> str:
  """Returns the name of a source, as an argument for `open_source`."""
  return f"{source.spec}|chat" if source.chat else source.spec


Document = sources_lib.Document | sources_lib.Conversation
# Reads a source and shows the progress.
Watch = Callable[[sources_lib.Source], Iterable[Document]]


def read(source: sources_lib.Source) -> Iterator[Document]:
  """Returns the documents of a source, without skipped documents."""
  found = (source[i] for i in range(len(source)))
  return (document for document in found if document is not None)


def find(
  held_out: Sequence[sources_lib.Source],
  training: Sequence[sources_lib.Source],
  n: int = DEFAULT_N,
  watch: Watch = read,
) -> list[HeldOut]:
  """Finds N-grams, N = `n`, of each held-out source in the training sources.

  The result has a HeldOut for each of `held_out`, in order; `watch` reads the
  documents of a source.
  """
  index = _Index(n)
  ends = [index.add_all(watch(source)) for source in held_out]
  index.finish()
  for source in training:
    for document in watch(source):
      index.search(spec_of(source), document.name, document.text)
  results = index.results()
  return [
    HeldOut(
      spec_of(source),
      source.fingerprint(),
      n_documents=stop - start,
      n_bytes=sum(index.n_bytes[start:stop]),
      n_short=sum(size < n for size in index.sizes[start:stop]),
      touched=[d for d in results[start:stop] if d.matches],
    )
    for source, start, stop in zip(held_out, [0, *ends], ends, strict=False)
  ]


def words(text: str) -> Iterator[str]:
  return map(str.casefold, _WORD.findall(text))


def places(text: str) -> Int[np.ndarray, "W 2"]:
  """Returns bytes [start, stop) of each of W words of `text` in UTF-8."""
  spans = [match.span() for match in _WORD.finditer(text)]
  characters = np.array(spans, np.int64).reshape(-1, 2)
  if text.isascii():
    return characters
  points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
  sizes = 1 + sum(
    (points >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000)
  )
  return np.concatenate([[0], np.cumsum(sizes)])[characters]


class _Index:
  """N-grams of held-out documents, each with the first place in training."""

  def __init__(self, n: int):
    self.n = n
    self.names: list[str] = []
    self.n_bytes: list[int] = []
    self.sizes: list[int] = []  # words of each document
    self._vocabulary: dict[str, int] = {}
    self._ids: list[np.ndarray] = []
    self._places: list[np.ndarray] = []
    self._training: list[tuple[str, str]] = []  # (source, document)

  def add_all(self, documents: Iterable[Document]) -> int:
    """Adds documents; returns the number of documents in the index."""
    for document in documents:
      vocabulary = self._vocabulary
      ids = [
        vocabulary.setdefault(word, len(vocabulary))
        for word in words(document.text)
      ]
      self.names.append(document.name)
      self.n_bytes.append(len(document.text.encode()))
      self.sizes.append(len(ids))
      self._ids.append(np.array(ids, np.int32))
      self._places.append(places(document.text))
    return len(self.names)

  def finish(self) -> None:
    """Groups equal N-grams. `_group` [words] is the group of the N-gram from
    each word on, -1 where the document has fewer than N words left.
    """
    self._all = np.concatenate([*self._ids, np.zeros(0, np.int32)])
    whole = np.zeros(len(self._all), bool)
    for stop, size in zip(np.cumsum(self.sizes), self.sizes, strict=True):
      whole[stop - size : max(stop - size, stop - self.n + 1)] = True
    starts = np.flatnonzero(whole)
    # If the hashes of two N-grams collide, the next seed is tried.
    for self._seed in itertools.count():
      hashes = _hashes(self._all, self.n, self._seed)[starts]
      self._hashes, first, group = np.unique(
        hashes, return_index=True, return_inverse=True
      )
      self._first = starts[first]  # a word where each group begins
      if self._equal(self._all, starts, group).all():
        break
    self._group = np.full(len(self._all), -1)
    self._group[starts] = group
    # For each group, the first place in training: document, word, bytes [start,
    # stop); -1 if absent. The last row, always -1, serves group -1.
    self._found = np.full((len(first) + 1, 4), -1, np.int64)

  def search(self, source: str, name: str, text: str) -> None:
    """Records the place of each N-gram not found in training before."""
    known = self._vocabulary
    ids = np.array([known.get(word, -1) for word in words(text)], np.int32)
    if len(ids) < self.n or not len(self._hashes):
      return
    strange = np.concatenate([[0], np.cumsum(ids < 0)])
    starts = np.flatnonzero(strange[self.n :] == strange[: -self.n])
    hashes = _hashes(ids, self.n, self._seed)[starts]
    group = np.searchsorted(self._hashes, hashes)
    group = np.minimum(group, len(self._hashes) - 1)
    new = (self._hashes[group] == hashes) & (self._found[group, 0] < 0)
    starts, group = starts[new], group[new]
    same = self._equal(ids, starts, group)
    group, first = np.unique(group[same], return_index=True)
    starts = starts[same][first]
    if not len(starts):
      return
    where = places(text)
    self._found[group, 0] = len(self._training)
    self._found[group, 1] = starts
    self._found[group, 2] = where[starts, 0]
    self._found[group, 3] = where[starts + self.n - 1, 1]
    self._training.append((source, name))

  def _equal(self, ids, starts, group) -> np.ndarray:
    """Whether the N-grams of `ids` at `starts` equal the N-grams of `group`."""
    equal = np.ones(len(starts), bool)
    for k in range(self.n):
      equal &= ids[starts + k] == self._all[self._first[group] + k]
    return equal

  def results(self) -> list[Touched]:
    """Returns a Touched for each held-out document, in order."""
    ends = np.cumsum(self.sizes)
    return [
      self._result(i, int(end) - size)
      for i, (end, size) in enumerate(zip(ends, self.sizes, strict=True))
    ]

  def _result(self, i: int, start: int) -> Touched:
    found = self._found[self._group[start : start + self.sizes[i]]]
    (hits,) = np.nonzero(found[:, 0] >= 0)
    matches, where = [], self._places[i]
    n_covered = reached = 0
    for first, last in _passages(hits, found[hits, 0], found[hits, 1]):
      begin, end = int(where[first, 0]), int(where[last + self.n - 1, 1])
      n_covered += max(0, end - max(begin, reached))
      reached = max(reached, end)
      source, document = self._training[found[first, 0]]
      matches.append(
        Match(
          begin,
          end,
          n_words=last - first + self.n,
          training_source=source,
          training_document=document,
          training_start=int(found[first, 2]),
          training_stop=int(found[last, 3]),
        )
      )
    return Touched(self.names[i], self.n_bytes[i], n_covered, matches)


def _passages(
  hits: np.ndarray, document: np.ndarray, word: np.ndarray
) -> Iterator[tuple[int, int]]:
  """Yields (first, last) of each run of `hits`, the words of a held-out
  document with N-grams found in training. In a run, both the held-out and the
  training `word` advance by 1 within one training `document`.
  """
  goes_on = (np.diff(hits) == 1) & (np.diff(word) == 1)
  goes_on &= np.diff(document) == 0
  for run in np.split(hits, np.flatnonzero(~goes_on) + 1):
    if len(run):
      yield int(run[0]), int(run[-1])


def _hashes(
  ids: Int[np.ndarray, "W"], n: int, seed: int
) -> UInt64[np.ndarray, "W"]:
  """Hashes the `n` ids from each position on, fewer ids at the end."""
  mixed = (ids.astype(np.uint64) + np.uint64(seed + 1)) * np.uint64(
    0x9E3779B97F4A7C15
  )
  mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  mixed ^= mixed >> np.uint64(27)
  found = np.zeros(len(ids), np.uint64)
  for k in range(min(n, len(ids))):
    found *= np.uint64(0x94D049BB133111EB)
    found[: len(ids) - k] += mixed[k:]
  return found
