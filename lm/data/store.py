"""The token store: a corpus, tokenized once, with random access.

A token store is a directory with a manifest and TensorStore zarr3 arrays in
sharded chunks: `tokens` (uint16 or uint32 by vocabulary; a document is bos,
text, eos) and, per document, `ends` (cumulative tokens), `n_bytes` (of UTF-8
text), `names` and `name_ends`. Writing goes to a temporary directory, renamed
at the end: a store is whole or absent. The directory is named by source and
tokenizer: a store is never stale. Chunks have checksums; the manifest has file
sizes, digests of array metadata and a digest of the manifest. A store damaged
later raises RunError and is never read as other tokens.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.markup
import rich.progress

from lm import config as config_lib
from lm import files, locks, schema
from lm.data import arrays
from lm.data import sources as sources_lib
from lm.data import tokenizer as tokenizer_lib

_VERSION = 2
# Characters tokenized at a time; bounds the memory.
_BATCH_CHARACTERS = 1 << 22
_PARTIAL = ".partial"
# Dtype of each array; None: uint16 or uint32, by vocabulary size.
_ARRAYS = {
  "tokens": None,
  "ends": "int64",
  "n_bytes": "int64",
  "names": "uint8",
  "name_ends": "int64",
}
# Required fields. A manifest without further fields predates the digest.
_FIELDS = {
  **{"version": int, "spec": str, "source": str, "tokenizer": str},
  **{"n_tokens": int, "n_documents": int, "n_bytes": int, "files": dict},
}


class TokenStore:
  """Reads a tokenized source; opened by `open_store`."""

  def __init__(self, path: str, manifest: dict[str, Any], pad: int, bos: int):
    self.path = path
    self.spec: str = manifest["spec"]
    self.fingerprint: str = manifest["source"]
    self.n_tokens: int = manifest["n_tokens"]
    self.n_documents: int = manifest["n_documents"]
    # UTF-8 bytes of all documents.
    self.n_bytes: int = manifest["n_bytes"]
    self._pad, self._bos = pad, bos
    self._tokens = self._open("tokens", self.n_tokens)

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

  def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and document numbers, int32 [length], from token `start` on.

    Documents are numbered from 1 within the window; past the end of the store
    comes padding: the pad token, document 0.
    """
    n = max(0, min(length, self.n_tokens - start))
    tokens = np.full(length, self._pad, np.int32)
    if n:
      tokens[:n] = self._tokens.read(start, start + n)
    documents = np.zeros(length, np.int32)
    # Text never holds bos: each bos starts a document.
    opened = np.cumsum(tokens[:n] == self._bos)
    documents[:n] = opened - opened[:1] + 1
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
  train = [sources_lib.open_source(spec, data) for spec in data.train]
  validation = [sources_lib.open_source(spec, data) for spec in data.validation]
  tokenizer = tokenizer or _make_tokenizer(config, train)
  stores = _make_stores([*train, *validation], tokenizer, data)
  n = len(train)
  return Prepared(tokenizer, stores[:n], stores[n:])


def prepare_sources(
  specs: Sequence[str],
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
) -> list[TokenStore]:
  """Token stores of the sources `specs`, for an existing tokenizer."""
  sources = [sources_lib.open_source(spec, data) for spec in specs]
  return _make_stores(sources, tokenizer, data)


def open_store(path: str, tokenizer: tokenizer_lib.Tokenizer) -> TokenStore:
  """Opens a store. Raises ConfigError if the tokenizer or version differs, and
  RunError if the store is damaged.
  """
  manifest = _read_manifest(path)
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
  sizes = _file_sizes(path)
  for name, size in manifest["files"].items():
    if sizes.get(name) != size:
      found = "missing" if name not in sizes else f"{sizes[name]} bytes"
      raise arrays.damaged(path, f"{name} is {found}, and was {size} bytes")
  there = _array_metadata(path)
  if manifest.get("arrays", there) != there:  # Absent in old manifests.
    raise arrays.damaged(path, "a zarr.json is not what was written")
  return TokenStore(path, manifest, tokenizer.pad, tokenizer.bos)


def _read_manifest(path: str) -> dict[str, Any]:
  try:
    with open(os.path.join(path, "manifest.json"), "rb") as file:
      manifest = files.unseal(file.read(), without=_FIELDS)
    if not all(isinstance(manifest.get(k), t) for k, t in _FIELDS.items()):
      raise ValueError(f"lacks one of {', '.join(_FIELDS)}")
    return manifest
  except (FileNotFoundError, NotADirectoryError) as error:
    raise arrays.damaged(path, "manifest.json is missing") from error
  except ValueError as error:
    raise arrays.damaged(path, f"manifest.json: {error}") from error


def _file_sizes(path: str) -> dict[str, int]:
  """Bytes of each file below `path` except the manifest, by relative path."""
  return {
    os.path.relpath(os.path.join(folder, name), path): os.path.getsize(
      os.path.join(folder, name)
    )
    for folder, _, names in os.walk(path)
    for name in names
    if name != "manifest.json"
  }


def _array_metadata(path: str) -> dict[str, str]:
  """SHA-256 of the zarr.json (metadata) of each array."""
  found = {}
  for name in _ARRAYS:
    with open(os.path.join(path, name, "zarr.json"), "rb") as file:
      found[name] = hashlib.sha256(file.read()).hexdigest()
  return found


def _make_tokenizer(
  config: config_lib.Config, sources: Sequence[sources_lib.Source]
) -> tokenizer_lib.Tokenizer:
  """Loads the config's tokenizer, or trains and caches a tokenizer once."""
  if config.tokenizer.kind == "bytes" or config.tokenizer.path is not None:
    return tokenizer_lib.load(config)
  if config.init_from is not None:
    raise schema.ConfigError(
      f"config.init_from={config.init_from}: the tokenizer is that of this "
      "run, which lm.train reads and then prepares the data; use that, or name "
      "a tokenizer.path"
    )
  made_of = [
    _VERSION,
    tokenizer_lib.TRAINER,
    config.model.vocab_size,
    config.tokenizer.train_bytes,
    [source.fingerprint() for source in sources],
  ]
  template = tokenizer_lib.read_template(config)
  directory = sources_lib.cache_directory(config.data)
  path = os.path.join(directory, f"tokenizer-{_key(made_of)}.json")
  if not os.path.exists(path):
    files.check_directory(directory, "config.data.cache_dir")
    with locks.exclusive(directory):
      if not os.path.exists(path):
        texts = list(_sample(sources, config.tokenizer.train_bytes))
        _require_text(texts, sources)
        with rich.console.Console(stderr=True).status("training tokenizer"):
          tokenizer = tokenizer_lib.train(config, texts)
        sealed = files.seal(json.loads(tokenizer.to_json()))
        files.replace(path, json.dumps(sealed, indent=2))
  return tokenizer_lib.Tokenizer(_read_tokenizer(path).model, template)


def _read_tokenizer(path: str) -> tokenizer_lib.Tokenizer:
  try:
    with open(path, "rb") as file:
      content = files.unseal(file.read(), without=("kind", "model"))
    return tokenizer_lib.Tokenizer.from_json(json.dumps(content))
  except (ValueError, schema.ConfigError) as error:
    raise schema.RunError(
      f"tokenizer {path} is damaged: {error}. Remove it, and the next start "
      "trains it again, the same to the id"
    ) from error


def _sample(
  sources: Sequence[sources_lib.Source], n_bytes: int
) -> Iterator[str]:
  """Yields documents spread evenly over sources, at most `n_bytes` in total."""
  ends = np.cumsum([len(source) for source in sources])
  n = int(ends[-1])
  # A step near the golden section of n, and coprime to n, visits every document
  # once; the documents visited are evenly spread at any stopping point.
  step = max(1, round(n * 0.6180339887))
  while math.gcd(step, n) > 1:
    step += 1
  for k in range(n):
    i = k * step % n
    s = int(np.searchsorted(ends, i, side="right"))
    document = sources[s][i - (int(ends[s - 1]) if s else 0)]
    if document is None:
      continue
    raw = document.text.encode()
    if len(raw) > n_bytes:
      yield raw[:n_bytes].decode(errors="ignore")
      return
    n_bytes -= len(raw)
    yield document.text


def _make_stores(
  sources: Sequence[sources_lib.Source],
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
) -> list[TokenStore]:
  """Token store of each source; existing stores are only opened."""
  directory = sources_lib.cache_directory(data)
  paths = [
    os.path.join(
      directory,
      "tokens-" + _key([_VERSION, source.fingerprint(), tokenizer.fingerprint]),
    )
    for source in sources
  ]
  if not all(os.path.lexists(path) for path in paths):
    files.check_directory(directory, "config.data.cache_dir")
    with locks.exclusive(directory):
      _remove_leftovers(directory)
      for path, source in zip(paths, sources, strict=True):
        if not os.path.lexists(path):
          _build(path, source, tokenizer, data)
  return [open_store(path, tokenizer) for path in paths]


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
  n_bytes = 0
  try:
    columns = {
      name: arrays.Column(partial, name, dtype or tokens_dtype)
      for name, dtype in _ARRAYS.items()
    }
    for documents in _batches(source):
      n_bytes += _append(columns, documents, tokenizer, data)
    if n_bytes == 0:
      raise schema.ConfigError(f"source {source.spec!r}: empty, holds no text")
    for column in columns.values():
      column.close()
    if (changed := source.changed()) is not None:
      raise schema.RunError(
        f"{changed}: has changed while it was read; start again"
      )
    manifest = {
      "version": _VERSION,
      "spec": source.spec,
      "source": source.fingerprint(),
      "tokenizer": tokenizer.fingerprint,
      "n_tokens": columns["tokens"].n,
      "n_documents": columns["ends"].n,
      "n_bytes": n_bytes,
      "files": _file_sizes(partial),
      "arrays": _array_metadata(partial),
    }
    with open(os.path.join(partial, "manifest.json"), "w") as file:
      json.dump(files.seal(manifest), file, indent=2)
    os.rename(partial, path)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _batches(
  source: sources_lib.Source,
) -> Iterator[list[sources_lib.Document]]:
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
      if document is not None and document.text:
        documents.append(document)
        n_characters += len(document.text)
      if n_characters >= _BATCH_CHARACTERS or i == len(source) - 1:
        yield documents
        documents, n_characters = [], 0
        progress.update(task, completed=i + 1)


def _append(
  columns: dict[str, arrays.Column],
  documents: list[sources_lib.Document],
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
) -> int:
  """Tokenizes and writes `documents`; returns the bytes of text."""
  if not documents:
    return 0
  encoded = tokenizer.encode_batch(
    [document.text for document in documents],
    threads=data.workers or os.cpu_count() or 1,
  )
  n_bytes = np.array([len(document.text.encode()) for document in documents])
  assert n_bytes.sum() == sum(tokenizer.n_bytes(ids) for ids in encoded)
  names = [os.fsencode(document.name) for document in documents]
  bos, eos = [tokenizer.bos], [tokenizer.eos]
  pieces = [part for ids in encoded for part in (bos, ids, eos)]
  tokens, name_ends = columns["tokens"], columns["names"].n
  ends = tokens.n + np.cumsum([len(ids) + 2 for ids in encoded])
  columns["ends"].append(ends)
  columns["n_bytes"].append(n_bytes)
  columns["name_ends"].append(name_ends + np.cumsum([len(n) for n in names]))
  columns["names"].append(np.frombuffer(b"".join(names), np.uint8))
  tokens.append(np.concatenate(pieces))
  return int(n_bytes.sum())


def _key(parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _require_text(
  texts: Sequence[str], sources: Sequence[sources_lib.Source]
) -> None:
  if not any(texts):
    specs = ", ".join(repr(source.spec) for source in sources)
    raise schema.ConfigError(f"sources {specs}: empty, hold no text")
