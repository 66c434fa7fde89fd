"""Arrays of a token store: TensorStore zarr3, in sharded chunks with checksums.

TensorStore raises one exception type for every failure. This module raises
OSError if the operating system reported an error, otherwise RunError: the store
is damaged, or cannot be written.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore

from lm import files, schema

# Items per inner chunk (the smallest read) and per shard (a file).
CHUNK = 1 << 14
SHARD = 1 << 24
# Each inner chunk has a crc32c checksum.
_CODEC = {
  "driver": "zarr3",
  "codecs": [
    {
      "name": "sharding_indexed",
      "configuration": {
        "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
      },
    }
  ],
}
# Cache of chunks read: at most 256 MiB, shared by all stores.
_CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 28}})


def damaged(path: str, cause: str) -> schema.RunError:
  return schema.RunError(
    f"token store {path} is damaged: {cause}. Remove it, and the next start "
    "makes it again from its source, the same to the token"
  )


class Array:
  """Reads the array `name` of the token store at `path`."""

  def __init__(self, path: str, name: str):
    self._path, self._name = path, name
    with self._errors():
      # A store never changes: cached chunks stay valid.
      self._array = tensorstore.open(
        {**_spec(path, name), "recheck_cached_data": False},
        context=_CONTEXT,
        open=True,
        read=True,
      ).result()

  def __reduce__(self):
    return Array, (self._path, self._name)  # for other processes

  def __len__(self) -> int:
    return self._array.shape[0]

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns items [start, stop); raises RunError if they are damaged."""
    return self.read_many([(start, stop)])[0]

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """`read` of each (start, stop), all at a time."""
    with self._errors():
      futures = [self._array[start:stop].read() for start, stop in ranges]
      return [future.result() for future in futures]

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      where = os.path.join(self._path, self._name)
      if (system := files.system_error(error, where)) is not None:
        raise system from error
      raise damaged(self._path, f"{self._name}: {_cause(error)}") from error


class Column:
  """Writes one array by appending; `close` sets the final length."""

  def __init__(self, path: str, name: str, dtype: str):
    self.n = 0
    self._held: list[np.ndarray] = []
    self._path, self._dtype = os.path.join(path, name), dtype
    with self._errors():
      self._store = tensorstore.open(
        _spec(path, name),
        create=True,
        dtype=dtype,
        shape=[1 << 56],
        codec=tensorstore.CodecSpec(_CODEC),
        chunk_layout=tensorstore.ChunkLayout(
          write_chunk_shape=[SHARD], read_chunk_shape=[CHUNK]
        ),
      ).result()

  def append(self, values: np.ndarray) -> None:
    self._held.append(values.astype(self._dtype))
    self.n += len(values)
    if sum(map(len, self._held)) >= SHARD:
      self._write(self.n // SHARD * SHARD)

  def close(self) -> None:
    self._write(self.n)
    with self._errors():
      self._store.resize(
        exclusive_max=[self.n], resize_metadata_only=True
      ).result()

  def _write(self, end: int) -> None:
    """Writes buffered items up to item `end`; each shard is written once."""
    values = np.concatenate(self._held)
    start = self.n - len(values)
    with self._errors():
      self._store[start:end].write(values[: end - start]).result()
    self._held = [values[end - start :]]

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      if (system := files.system_error(error, self._path)) is not None:
        raise system from error
      raise schema.RunError(
        f"{self._path}: cannot be written: {_cause(error)}"
      ) from error


def _cause(error: Exception) -> str:
  """Root cause of a TensorStore error, without the appended spec."""
  text = re.split(r" \[[a-z_]+=|\[source", str(error), maxsplit=1)[0]
  return text.rpartition('": ')[2].strip()


def _spec(path: str, name: str) -> dict[str, Any]:
  return {
    "driver": "zarr3",
    "kvstore": {
      "driver": "file",
      "path": os.path.abspath(os.path.join(path, name)) + "/",
    },
  }
