"""The token store: a corpus, tokenized once, with random access.

A token store is a directory with a manifest and TensorStore zarr3 arrays in
sharded chunks: `tokens` (uint16 or uint32 by vocabulary; a document is bos,
text, eos) and, per document, `ends` (cumulative tokens), `n_bytes` (of UTF-8
text), `names` and `name_ends`. A store of chats also has `scored` (uint8 per
token, 1 at training targets); its documents are what lm/data/chat.py makes of
conversations.

Writing goes to a temporary directory, renamed at the end: a store is whole or
absent. The directory is named by source, tokenizer and, for chats, chat
template: a store is never stale. Chunks have checksums; the manifest has file
sizes, digests of array metadata and a digest of the manifest. A store damaged
later raises RunError and is never read as other tokens.
"""

import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.markup
import rich.progress

from lm import config as config_lib
from lm import files, locks, schema
from lm import objective as objective_lib
from lm.data import arrays, chat_layout, tokenizer_cache, tokenizing
from lm.data import manifest as manifest_lib
from lm.data import sources as sources_lib
from lm.data import tokenizer as tokenizer_lib

_VERSION = 2
# Characters tokenized at a time; bounds the memory.
_BATCH_CHARACTERS = 1 << 22
_PARTIAL = ".partial"
# Changes with the ids and targets that lm/data/chat.py makes of messages.
_CHAT_VERSION = 1


class TokenStore:
  """Reads a tokenized source; opened by `open_store`."""

  def __init__(
    self, path: str, manifest: dict[str, Any], pad: int, bos: int | None
  ):
    """`bos` starts each document and stands nowhere else; None: it may."""
    self.path = path
    # The source as the config names it; `prepare` adds the objective.
    self.spec: str = manifest["spec"]
    self.objective = objective_lib.Causal()
    self.fingerprint: str = manifest["source"]
    self.n_tokens: int = manifest["n_tokens"]
    self.n_documents: int = manifest["n_documents"]
    # UTF-8 bytes of all documents.
    self.n_bytes: int = manifest["n_bytes"]
    # Training targets of chats; None in a store of texts.
    self.n_scored: int | None = manifest.get("n_scored")
    self.pad, self._bos = pad, bos
    self._tokens = self._open("tokens", self.n_tokens)
    self._scored = None
    if self.n_scored is not None:
      self._scored = self._open("scored", self.n_tokens)

  def _open(self, name: str, n: int | None = None) -> arrays.Array:
    array = arrays.Array(self.path, name)
    if n is not None and len(array) != n:
      raise arrays.damaged(
        self.path, f"{name} has {len(array)} items, and the manifest says {n}"
      )
    return array

  def _column(self, name: str) -> np.ndarray:
    return self._open(name, self.n_documents).read(0, self.n_documents)

  @functools.cached_property
  def ends(self) -> np.ndarray:
    """Cumulative tokens at the end of each document: int64 [n_documents]."""
    return self._column("ends")

  @functools.cached_property
  def document_bytes(self) -> np.ndarray:
    """UTF-8 bytes of each document: int64 [n_documents]."""
    return self._column("n_bytes")

  def name(self, i: int) -> str:
    """Name of document `i`; bytes that are not UTF-8 become surrogates."""
    ends = self._open("name_ends", self.n_documents)
    start = int(ends.read(i - 1, i)[0]) if i else 0
    stop = int(ends.read(i, i + 1)[0])
    return os.fsdecode(self._open("names").read(start, stop).tobytes())

  def document(self, i: int) -> np.ndarray:
    """Tokens of document `i`, int32, from bos to eos."""
    start = int(self.ends[i - 1]) if i else 0
    return self._tokens.read(start, int(self.ends[i])).astype(np.int32)

  def pieces(
    self, starts: np.ndarray, sizes: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens [start, start + size) of each pair, joined: int32 [sum of sizes];
    and of chats whether each is a training target, bool, else None.

    Reads all pieces at a time.
    """
    ranges = list(zip(starts.tolist(), (starts + sizes).tolist(), strict=True))
    tokens = np.concatenate(self._tokens.read_many(ranges)).astype(np.int32)
    if self._scored is None:
      return tokens, None
    return tokens, np.concatenate(self._scored.read_many(ranges)).astype(bool)

  def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and document numbers, int32 [length], from token `start` on.

    Documents are numbered from 1 within the window; past the end of the store
    comes padding: the pad token, document 0.
    """
    n = max(0, min(length, self.n_tokens - start))
    tokens = np.full(length, self.pad, np.int32)
    if n:
      tokens[:n] = self._tokens.read(start, start + n)
    documents = np.zeros(length, np.int32)
    if self._bos is not None:
      # Text never holds bos: each bos starts a document.
      opened = np.cumsum(tokens[:n] == self._bos)
      documents[:n] = opened - opened[:1] + 1
    elif n:
      places = np.arange(start, start + n)
      numbers = np.searchsorted(self.ends, places, side="right")
      documents[:n] = numbers - numbers[0] + 1
    return tokens, documents


@dataclasses.dataclass
class Prepared:
  """Data for training: tokenizer and stores, in the order of the config."""

  tokenizer: tokenizer_lib.Tokenizer
  train: list[TokenStore]
  validation: list[TokenStore]


def prepare(
  config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer | None = None
) -> Prepared:
  """Tokenizer and token stores of the config's sources; builds missing stores.

  `tokenizer`, if given, is used in place of the one that the config describes.
  Only one process builds at a time, behind a lock. Raises ConfigError if a
  source, a document or the vocabulary does not fit.
  """
  data = config.data
  names = [*data.train, *data.validation]
  sources = _open_sources(names, data)
  n = len(data.train)
  # A source that stands in a mixture twice is one text for the tokenizer.
  distinct = list(dict.fromkeys(sources[:n]))
  tokenizer = tokenizer or tokenizer_cache.make(config, distinct)
  tokenizer = tokenizer_cache.for_sources(config, names, tokenizer)
  stores = _make_stores(names, sources, tokenizer, data)
  return Prepared(tokenizer, stores[:n], stores[n:])


def prepare_sources(
  names: Sequence[str],
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
) -> list[TokenStore]:
  """Token stores of the sources `names`, for an existing tokenizer.

  Raises ConfigError if a source, a document or the chat template does not fit.
  """
  sources = _open_sources(names, data)
  return _make_stores(names, sources, tokenizer, data)


def _open_sources(
  names: Sequence[str], data: config_lib.DataConfig
) -> list[sources_lib.Source]:
  """The sources; one object for those that differ only in their objective."""
  parts = [objective_lib.split_source(name) for name in names]
  wanted = [(s, isinstance(o, objective_lib.Chat)) for s, o in parts]
  found = {
    (spec, chat): sources_lib.open_source(spec, data, chat=chat)
    for spec, chat in dict.fromkeys(wanted)
  }
  return [found[key] for key in wanted]


def open_store(path: str, tokenizer: tokenizer_lib.Tokenizer) -> TokenStore:
  """Opens a store. Raises ConfigError if the tokenizer or version differs, and
  RunError if the store is damaged.
  """
  manifest = manifest_lib.read(path)
  for key, value in (
    ("version", _VERSION),
    ("tokenizer", tokenizer.fingerprint),
  ):
    if manifest[key] != value:
      raise schema.ConfigError(
        f"token store {path}: made by {key} {manifest[key]}, but this is "
        f"{value}; prepare the corpus again"
      )
  # TensorStore would read a missing file as zeros.
  sizes = manifest_lib.file_sizes(path)
  for name, size in manifest["files"].items():
    if sizes.get(name) != size:
      found = "missing" if name not in sizes else f"{sizes[name]} bytes"
      raise arrays.damaged(path, f"{name} is {found}, and was {size} bytes")
  there = manifest_lib.array_metadata(path, "n_scored" in manifest)
  if manifest.get("arrays", there) != there:  # Absent in old manifests.
    raise arrays.damaged(path, "a zarr.json is not what was written")
  # As of GPT-2, whose one token ends a document and is before the next.
  bos = None if tokenizer.bos == tokenizer.eos else tokenizer.bos
  return TokenStore(path, manifest, tokenizer.pad, bos)


def _make_stores(
  names: Sequence[str],
  sources: Sequence[sources_lib.Source],
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
) -> list[TokenStore]:
  """Token store of each source; existing stores are only opened. Sources that
  differ in their objective have stores of the same directory.
  """
  for name in tokenizer_cache.needs(names, tokenizer):
    tokenizer.require(name)
  directory = sources_lib.cache_directory(data)
  identities = [_identity(source, tokenizer) for source in sources]
  keys = [
    files.json_digest([_VERSION, identity, tokenizer.fingerprint])
    for identity in identities
  ]
  paths = [os.path.join(directory, f"tokens-{key}") for key in keys]
  if not all(os.path.lexists(path) for path in paths):
    files.check_directory(directory, "config.data.cache_dir")
    with locks.exclusive(directory):
      _remove_leftovers(directory)
      for path, source in zip(paths, sources, strict=True):
        if not os.path.lexists(path):
          _build(path, source, tokenizer, data)
  stores = [open_store(path, tokenizer) for path in paths]
  for name, store in zip(names, stores, strict=True):
    store.spec, store.objective = name, objective_lib.of(name)
  return stores


def _identity(
  source: sources_lib.Source, tokenizer: tokenizer_lib.Tokenizer
) -> str:
  """Fingerprint of what is tokenized: the source and, for chats, the chat
  template, which is checked on a probe conversation.
  """
  if not source.chat:
    return source.fingerprint()
  chat_layout.layout(tokenizer)
  template = tokenizer.chat_template or ""
  parts = [_CHAT_VERSION, source.fingerprint(), template]
  if "tojson" in template:  # Its text escaped HTML in an earlier version.
    parts.append("tojson")
  return files.json_digest(parts)


def _remove_leftovers(directory: str) -> None:
  """Removes partial stores of killed processes; the caller holds the lock."""
  for name in os.listdir(directory):
    if name.endswith(_PARTIAL):
      path = os.path.join(directory, name)
      shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def _build(
  path: str,
  source: sources_lib.Source,
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
) -> None:
  """Tokenizes `source` into a new store at `path`; an error leaves no store."""
  partial = path + _PARTIAL
  tokens_dtype = "uint16" if tokenizer.size <= 1 << 16 else "uint32"
  skipped = tokenizing.Skipped()
  try:
    columns = {
      name: arrays.Column(partial, name, dtype or tokens_dtype)
      for name, dtype in manifest_lib.array_dtypes(source.chat).items()
    }
    n_bytes = n_scored = 0
    for documents in _batches(source, skipped):
      encoded = tokenizing.encode(documents, tokenizer, data, skipped)
      _append(columns, encoded)
      n_bytes += sum(document.n_bytes for document in encoded)
      n_scored += sum(int(document.scored.sum()) for document in encoded)
    if columns["ends"].n == 0:
      why = f"; {skipped}" if skipped.n else ""
      raise schema.ConfigError(
        f"source {source.spec!r}: empty, holds no text{why}"
      )
    for column in columns.values():
      column.close()
    if (changed := source.changed()) is not None:
      raise schema.RunError(
        f"{changed}: has changed while it was read; start again"
      )
    manifest = {
      "version": _VERSION,
      "spec": source.spec,
      "source": _identity(source, tokenizer),
      "tokenizer": tokenizer.fingerprint,
      "n_tokens": columns["tokens"].n,
      "n_documents": columns["ends"].n,
      "n_bytes": n_bytes,
      **({"n_scored": n_scored} if source.chat else {}),
      "files": manifest_lib.file_sizes(partial),
      "arrays": manifest_lib.array_metadata(partial, source.chat),
    }
    with open(os.path.join(partial, "manifest.json"), "w") as file:
      json.dump(files.seal(manifest), file, indent=2)
    os.rename(partial, path)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  _print_skipped(source.spec, tokenizer, skipped)


def _print_skipped(
  spec: str, tokenizer: tokenizer_lib.Tokenizer, skipped: tokenizing.Skipped
) -> None:
  """Prints how many documents were skipped as invalid, and how many the
  tokenizer changes.
  """
  if skipped.n:
    print(f"source {spec!r}: {skipped}", file=sys.stderr)
  if skipped.n_changed:
    print(
      f"source {spec!r}: the tokenizer changes the text of "
      f"{schema.counted(skipped.n_changed, 'document')} ({tokenizer.lossy}); "
      "bytes are counted over the text as it is",
      file=sys.stderr,
    )


def _append(
  columns: dict[str, arrays.Column], documents: list[tokenizing.Encoded]
) -> None:
  """Writes tokenized documents."""
  if not documents:
    return
  names = [os.fsencode(document.name) for document in documents]
  lengths = [len(document.tokens) for document in documents]
  name_lengths = [len(name) for name in names]
  columns["ends"].append(columns["tokens"].n + np.cumsum(lengths))
  columns["n_bytes"].append(np.array([d.n_bytes for d in documents]))
  columns["name_ends"].append(columns["names"].n + np.cumsum(name_lengths))
  columns["names"].append(np.frombuffer(b"".join(names), np.uint8))
  columns["tokens"].append(np.concatenate([d.tokens for d in documents]))
  if "scored" in columns:
    columns["scored"].append(np.concatenate([d.scored for d in documents]))


def _batches(
  source: sources_lib.Source, skipped: tokenizing.Skipped
) -> Iterator[list[sources_lib.Document | sources_lib.Conversation]]:
  """Yields lists of non-empty documents, some megabytes each, with a bar."""
  documents, n_characters = [], 0
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(
    console=console, transient=True, disable=not console.is_terminal
  ) as progress:
    about = f"tokenizing {rich.markup.escape(source.spec)}"
    task = progress.add_task(about, total=len(source))
    for i in range(len(source)):
      document = source[i]
      if document is None:
        skipped.add(None)
      elif document.text or source.chat:
        documents.append(document)
        n_characters += len(document.text)
      if n_characters >= _BATCH_CHARACTERS or i == len(source) - 1:
        yield documents
        documents, n_characters = [], 0
        progress.update(task, completed=i + 1)
