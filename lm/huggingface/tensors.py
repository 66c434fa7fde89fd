"""Reads and writes safetensors files, single or in shards with an index.

A file has the length of the header in 8 bytes, the header in JSON (name ->
dtype, shape, offsets), and the tensors' bytes without gaps
(github.com/huggingface/safetensors). Tensors are read and written one at a
time, by plain reads: a memory map would count as resident memory, and is slow
on network file systems. Nothing is unpickled.
"""

import collections
import contextlib
import dataclasses
import glob
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lm import files, schema

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Supported dtypes, by their names in the format.
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype.name: code for code, dtype in DTYPES.items()}
_MOST_HEADER = 100_000_000  # bytes, the limit of the format
SHARD_BYTES = 5_000_000_000
_BLOCK = 1024  # rows that are compared at a time


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file; `start` is the byte offset within the file."""

  path: str
  dtype: str
  shape: tuple[int, ...]
  start: int

  def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
    """Reads the rows [first, last) of the first axis into an array of the whole
    shape. The other rows are undefined, and not touched: they take no memory.

    Raises ConfigError if the file is too short, KeyError if the dtype is not in
    `DTYPES`.
    """
    whole = np.empty(self.shape, DTYPES[self.dtype])
    rows = whole[first:last].reshape(-1).view(np.uint8).data
    with open(self.path, "rb") as file:
      file.seek(self.start + first * whole.strides[0])
      if file.readinto(rows) < len(rows):
        raise schema.ConfigError(
          f"{self.path}: became shorter while it was read"
        )
    return whole


def equal(a: Stored, b: Stored) -> bool:
  """Whether two tensors of one dtype and shape are the same to the bit."""
  for first in range(0, a.shape[0], _BLOCK):
    last = first + _BLOCK
    pair = (x.read(first, last)[first:last].tobytes() for x in (a, b))
    if len({*pair}) > 1:
      return False
  return True


def find(folder: str) -> dict[str, list[Stored]]:
  """Returns the tensors in `folder` by name, from the headers alone; a name has
  several entries if several shards hold the tensor.

  Raises ConfigError if the folder has no safetensors, and if a file is corrupt,
  truncated, missing, or outside the folder.
  """
  if os.path.lexists(os.path.join(folder, SINGLE)):
    names = [SINGLE]
  elif os.path.lexists(os.path.join(folder, INDEX)):
    names = _indexed(folder)
  else:
    pickled = glob.glob(os.path.join(glob.escape(folder), "*.bin"))
    pickled += glob.glob(os.path.join(glob.escape(folder), "*.pt*"))
    said = "neither there; name a folder of a Hugging Face checkpoint"
    if pickled:
      said = (
        f"neither there, only {os.path.basename(pickled[0])}: a pickle runs "
        "code when it is read, and this program reads none. If you trust it, "
        "let transformers write it as safetensors: AutoModelForCausalLM."
        "from_pretrained(FOLDER).save_pretrained(OTHER)"
      )
    raise schema.ConfigError(f"{folder}: {SINGLE} and {INDEX}: {said}")
  found = collections.defaultdict(list)
  for name in names:
    for tensor, stored in _header(_inside(folder, name)):
      found[tensor].append(stored)
  return dict(found)


def _indexed(folder: str) -> list[str]:
  """Returns the file names in the index of shards."""
  path = os.path.join(folder, INDEX)
  try:
    with open(_inside(folder, INDEX), encoding="utf-8") as file:
      names = json.load(file)["weight_map"].values()
    names = sorted(set(names))
    if not names or not all(isinstance(name, str) for name in names):
      raise ValueError("weight_map names no files")
  except files.MALFORMED as error:
    raise schema.ConfigError(
      f"{path}: not an index of safetensors ({files.first_line(error)}); "
      "download it again"
    ) from error
  return names


def _inside(folder: str, name: str) -> str:
  """Returns the path of the file `name` in `folder`. Raises ConfigError if
  `name` is not a plain name of a regular file, or is a link out of the folder.

  Links of Hugging Face's cache, snapshots/REVISION/NAME -> ../../blobs/HASH,
  are accepted.
  """
  plain = name == os.path.basename(name) and name not in ("", ".", "..")
  if not plain or "\\" in name or "\0" in name:
    raise schema.ConfigError(
      f"{folder}: {INDEX} names {name!r}, which is outside the folder; only "
      "plain file names are read"
    )
  path = os.path.join(folder, name)
  real, home = os.path.realpath(path), os.path.realpath(folder)
  homes = [home]
  if os.path.basename(os.path.dirname(home)) == "snapshots":
    homes.append(os.path.join(os.path.dirname(os.path.dirname(home)), "blobs"))
  if os.path.dirname(real) not in homes:
    raise schema.ConfigError(
      f"{path}: is a link to {real}, outside the folder; copy the file there"
    )
  try:
    regular = stat.S_ISREG(os.stat(real).st_mode)
  except OSError as error:
    raise schema.ConfigError(
      f"{path[:200]}: {error.strerror}; download it"
    ) from error
  if not regular:
    raise schema.ConfigError(f"{path}: is not a regular file")
  return path


def _header(path: str) -> Iterator[tuple[str, Stored]]:
  """Yields (name, tensor) of a file; raises ConfigError on a corrupt file."""
  size = os.path.getsize(path)
  try:
    with open(path, "rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if size < 8 or length > min(size - 8, _MOST_HEADER):
        raise ValueError(f"{size} bytes, with a header of {length}")
      pairs = json.loads(file.read(length), object_pairs_hook=list)
    last, found = 8 + length, []
    entries = [(k, dict(v)) for k, v in pairs if k != "__metadata__"]
    for name, entry in sorted(entries, key=lambda e: e[1]["data_offsets"]):
      shape = tuple(entry["shape"])
      start, end = (8 + length + int(x) for x in entry["data_offsets"])
      dtype = entry["dtype"]
      if not isinstance(dtype, str) or not all(
        isinstance(n, int) and n >= 0 for n in shape
      ):
        raise ValueError(f"{name} has dtype {dtype!r} and shape {shape}")
      known = dtype in DTYPES
      n_bytes = math.prod(shape) * (DTYPES[dtype].itemsize if known else 0)
      if start != last or end < start or (known and end - start != n_bytes):
        raise ValueError(
          f"{name} is {dtype} {list(shape)} at bytes {entry['data_offsets']}, "
          f"where {last - 8 - length} comes next"
        )
      found.append((name, Stored(path, dtype, shape, start)))
      last = end
  except OSError as error:
    raise schema.ConfigError(f"{path}: {error.strerror}") from error
  except files.MALFORMED as error:
    raise schema.ConfigError(
      f"{path}: not a safetensors file ({files.first_line(error)}); download "
      "it again"
    ) from error
  if last != size:
    said = "truncated: download it again" if last > size else "corrupt"
    raise schema.ConfigError(
      f"{path}: has {size} bytes, and by its header {last}: it is {said}"
    )
  yield from found


# --- writing -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planned:
  """A tensor to write; `read` returns the array, of any float dtype."""

  name: str
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


def write(
  folder: str,
  planned: Sequence[Planned],
  dtype: str,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes tensors into an existing folder: one file, or, beyond `shard_bytes`,
  shards with an index. Memory holds one tensor at a time.
  """
  size = np.dtype(DTYPES[_CODES[dtype]]).itemsize
  shards: list[list[Planned]] = [[]]
  held = 0
  for tensor in planned:
    n_bytes = math.prod(tensor.shape) * size
    if shards[-1] and held + n_bytes > shard_bytes:
      shards.append([])
      held = 0
    shards[-1].append(tensor)
    held += n_bytes
  if len(shards) == 1:
    _write_file(os.path.join(folder, SINGLE), shards[0], dtype)
    return
  places: dict[str, str] = {}
  for i, shard in enumerate(shards, 1):
    name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    _write_file(os.path.join(folder, name), shard, dtype)
    places |= {tensor.name: name for tensor in shard}
  total = sum(math.prod(tensor.shape) for tensor in planned)
  index = {
    "metadata": {"total_parameters": total, "total_size": total * size},
    "weight_map": dict(sorted(places.items())),
  }
  files.replace(os.path.join(folder, INDEX), json.dumps(index, indent=2))


def _write_file(path: str, tensors: Sequence[Planned], dtype: str) -> None:
  kind = DTYPES[_CODES[dtype]]
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for tensor in tensors:
    start, end = end, end + math.prod(tensor.shape) * kind.itemsize
    header[tensor.name] = {
      "dtype": _CODES[dtype],
      "shape": list(tensor.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
  with _created(path) as file:
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for tensor in tensors:
      value = tensor.read()
      assert value.shape == tensor.shape, tensor.name
      # ndarray.tofile would bypass the buffer of `file`.
      file.write(np.ascontiguousarray(value, kind).reshape(-1).view(np.uint8))


@contextlib.contextmanager
def _created(path: str) -> Iterator[Any]:
  try:
    with open(path, "xb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    error.filename = error.filename or path  # Absent if the disk is full.
    raise
