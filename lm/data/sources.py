"""Corpora: a spec to documents by index.

A source is `tfds:NAME[/CONFIG][:VERSION]:SPLIT[#FEATURE]`, `text:GLOB` or
`jsonl:GLOB#FIELD`; files may be compressed (.gz, .zst). Documents come one at
a time, so that memory does not grow with the corpus.
"""

import bisect
import contextlib
import fcntl
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from absl import logging

from lm import config as config_lib

_GRAMMAR = (
  "write tfds:NAME[/CONFIG]:SPLIT[#FEATURE], text:GLOB or jsonl:GLOB#FIELD"
)
_SPEC = re.compile(
  r"(?P<tfds>tfds):(?P<name>[^:#]+(:\d+\.\d+\.\d+)?):(?P<split>[^#]+)"
  r"(#(?P<feature>\w+))?"
  r"|text:(?P<text>.+)"
  r"|jsonl:(?P<jsonl>[^#]+)#(?P<field>.+)"
)
# A source whose files hold at most this is known by their bytes, a larger one
# by their names, sizes and times.
_HASHED_BYTES = 1 << 28
# Documents between two remembered offsets of a file.
_STRIDE = 256


class Document(NamedTuple):
  name: str
  text: str


@runtime_checkable
class Source(Protocol):
  """Documents in a fixed order; picklable."""

  spec: str

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Document | None:
    """Document `i`, or None where the policy on invalid UTF-8 skips it."""
    ...

  def fingerprint(self) -> str:
    """Changes with the contents and with the options that read them."""
    ...


def open_source(spec: str, data: config_lib.DataConfig) -> Source:
  """The documents of `spec`; builds a TFDS dataset that is not there yet.

  Raises ConfigError where the spec, a file or the dataset is not to be had, or
  holds no document.
  """
  match = _SPEC.fullmatch(spec)
  if match is None:
    raise config_lib.ConfigError(f"source {spec!r}: malformed; {_GRAMMAR}")
  if match["tfds"]:
    with _without_info_logs():
      source: Source = TfdsSource(
        spec, match["name"], match["split"], match["feature"] or "text", data
      )
  elif match["text"]:
    source = FileSource(spec, match["text"], data.text_unit, None, data)
  else:
    source = FileSource(spec, match["jsonl"], "line", match["field"], data)
  if len(source) == 0:
    raise config_lib.ConfigError(f"source {spec!r}: empty, holds no document")
  return source


@contextlib.contextmanager
def exclusive(directory: str) -> Iterator[None]:
  """Holds `directory` for this process alone; others wait.

  The lock dies with its process. What it creates, lock file and directory, it
  removes again where nothing else was written.
  """
  path = os.path.join(directory, ".lock")
  while True:
    os.makedirs(directory, exist_ok=True)
    try:
      file = open(path, "w")
    except FileNotFoundError:  # The last holder removed the directory.
      continue
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"waiting for another process in {directory}", file=sys.stderr)
      fcntl.flock(file, fcntl.LOCK_EX)
    # The last holder removes the file: a lock on the old one is worth nothing.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        break
    file.close()
  try:
    yield
  finally:
    os.unlink(path)
    file.close()
    with contextlib.suppress(OSError):  # Not empty, as it should be.
      os.rmdir(directory)


def _decode(
  raw: bytes, where: str, offset: int, data: config_lib.DataConfig
) -> str | None:
  """Text of `raw`, which starts at byte `offset` of `where`, by the policy."""
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    if data.invalid_utf8 == "replace":
      return raw.decode(errors="replace")
    if data.invalid_utf8 == "skip":
      return None
    raise config_lib.ConfigError(
      f"{where}: invalid UTF-8 at byte {offset + error.start}; correct it, or "
      "set config.data.invalid_utf8 to 'replace' or 'skip'"
    ) from error


# --- files -------------------------------------------------------------------


class _Unit(NamedTuple):
  line: int  # Number of its first line, from 1.
  offset: int  # Bytes before it in the file.
  raw: bytes


def _open(path: str, offset: int = 0) -> io.BufferedIOBase:
  """The file, decompressed, at byte `offset` of what it holds."""
  if path.endswith(".zst"):
    import zstandard

    file: Any = zstandard.open(path, "rb")
    file.seek(offset)
    return io.BufferedReader(file)
  file = gzip.open(path) if path.endswith(".gz") else open(path, "rb")
  file.seek(offset)
  return file


def _units(path: str, unit: str, mark: _Unit) -> Iterator[_Unit]:
  """Yields the units of a file from `mark` on.

  A unit is a line that is not blank, or a run of such lines; it does not hold
  the newline that ends it.
  """
  line, offset = mark.line, mark.offset
  first, start, lines = line, offset, []
  with _open(path, offset) as file:
    for raw in itertools.chain(file, [b""]):
      blank = not raw.strip()
      if lines and (blank or unit == "line"):
        yield _Unit(first, start, b"".join(lines).rstrip(b"\r\n"))
        lines = []
      if not blank:
        if not lines:
          first, start = line, offset
        lines.append(raw)
      line, offset = line + 1, offset + len(raw)


class FileSource:
  """Documents of the files that match a glob, in the order of their names.

  The field of a JSON object per line where `field` is given; else whole
  files, lines or blocks as `unit` says. Lines and blocks are found by an
  index that is made on first use and remembers every _STRIDE-th; reading in
  order costs no seek, which compressed files cannot do cheaply.
  """

  def __init__(
    self,
    spec: str,
    pattern: str,
    unit: str,
    field: str | None,
    data: config_lib.DataConfig,
  ):
    self.spec, self._unit, self._field, self._data = spec, unit, field, data
    found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    self._paths = [path for path in found if os.path.isfile(path)]
    if not self._paths:
      raise config_lib.ConfigError(
        f"source {spec!r}: no file matches {pattern!r} in {os.getcwd()}"
      )
    self._ends = list(range(1, len(self._paths) + 1))
    self._index: list[list[_Unit]] | None = None
    # Units last read, of (file, group), and what yields the group after it.
    self._group: tuple[tuple[int, int], list[_Unit]] = (-1, -1), []
    self._rest: Iterator[_Unit] = iter(())

  def __getstate__(self) -> dict[str, Any]:
    return {**vars(self), "_group": ((-1, -1), []), "_rest": iter(())}

  def fingerprint(self) -> str:
    unit = f"{self._unit} {self._field} {self._data.invalid_utf8}"
    return _fingerprint(self._paths, unit)

  def __len__(self) -> int:
    if self._unit != "file":
      self._make_index()
    return self._ends[-1]

  def __getitem__(self, i: int) -> Document | None:
    n = len(self)
    if not 0 <= i < n:
      raise IndexError(f"document {i} of {n}")
    f = bisect.bisect_right(self._ends, i)
    path = self._paths[f]
    if self._unit == "file":
      with _open(path) as file:
        text = _decode(file.read(), path, 0, self._data)
      return None if text is None else Document(path, text)
    unit = self._read_unit(f, i - (self._ends[f - 1] if f else 0))
    where = f"{path}:{unit.line}"
    try:
      text = _decode(unit.raw, path, unit.offset, self._data)
      if text is not None and self._field is not None:
        raw = _json_field(text, self._field, where)
        text = _decode(raw, where, 0, self._data)
    except config_lib.ConfigError:
      self._rest = iter(())  # Closes the file, which the traceback would hold.
      raise
    return None if text is None else Document(where, text)

  def _make_index(self) -> None:
    if self._index is not None:
      return
    index, n = [], 0
    for f, path in enumerate(self._paths):
      marks = []
      k = -1
      for k, unit in enumerate(_units(path, self._unit, _Unit(1, 0, b""))):
        if k % _STRIDE == 0:
          marks.append(unit._replace(raw=b""))
      n += k + 1
      index.append(marks)
      self._ends[f] = n
    self._index = index

  def _read_unit(self, f: int, k: int) -> _Unit:
    """Unit `k` of file `f`, through the group that it is in."""
    assert self._index is not None
    group = k // _STRIDE
    if self._group[0] != (f, group):
      if self._group[0] != (f, group - 1):
        self._rest = _units(self._paths[f], self._unit, self._index[f][group])
      self._group = (f, group), list(itertools.islice(self._rest, _STRIDE))
    return self._group[1][k % _STRIDE]


def _json_field(line: str, field: str, where: str) -> bytes:
  try:
    value = json.loads(line)
  except json.JSONDecodeError as error:
    raise config_lib.ConfigError(
      f"{where}: invalid JSON, {error.msg} at column {error.colno}; correct it"
    ) from error
  if not isinstance(value, dict) or not isinstance(value.get(field), str):
    names = ", ".join(map(repr, value)) if isinstance(value, dict) else "none"
    raise config_lib.ConfigError(
      f"{where}: no text field {field!r}; its fields: {names}"
    )
  # JSON can spell halves of surrogate pairs, which UTF-8 cannot.
  return value[field].encode(errors="surrogatepass")


def _fingerprint(paths: list[str], options: str) -> str:
  digest = hashlib.sha256(options.encode())
  stats = [os.stat(path) for path in paths]
  by_content = sum(s.st_size for s in stats) <= _HASHED_BYTES
  for path, stat in zip(paths, stats, strict=True):
    digest.update(f"{os.path.basename(path)} {stat.st_size}".encode())
    if by_content:
      with open(path, "rb") as file:
        digest.update(file.read())
    else:
      digest.update(str(stat.st_mtime_ns).encode())
  return digest.hexdigest()[:16]


# --- TFDS --------------------------------------------------------------------


class TfdsSource:
  """A split of a TFDS dataset, in array_record files and without TensorFlow.

  Datasets lie in `data.cache_dir`/tfds, or in TFDS_DATA_DIR where that is
  set; one that is not there is built, by one process while others wait.
  """

  def __init__(
    self,
    spec: str,
    name: str,
    split: str,
    feature: str,
    data: config_lib.DataConfig,
  ):
    self.spec, self._feature, self._data = spec, feature, data
    builder = _builder(spec, name, data)
    info = builder.info
    if feature not in info.features:
      raise config_lib.ConfigError(
        f"source {spec!r}: no feature {feature!r}; the dataset has "
        f"{', '.join(info.features)}"
      )
    self._named = "name" in info.features
    try:
      instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
      raise config_lib.ConfigError(
        f"source {spec!r}: no split {split!r}; the dataset has "
        f"{', '.join(info.splits)}"
      ) from error
    self._paths = sorted({str(i.filename) for i in instructions})
    self._options = f"{split} {feature} {data.invalid_utf8}"
    self._source = builder.as_data_source(split=split)

  def fingerprint(self) -> str:
    return _fingerprint(self._paths, self._options)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> Document | None:
    example = self._source[i]
    where = f"{self.spec}[{i}]"
    raw = example[self._feature]
    if not isinstance(raw, bytes):
      raise config_lib.ConfigError(
        f"{where}: feature {self._feature!r} is not text but "
        f"{type(raw).__name__}"
      )
    text = _decode(raw, where, 0, self._data)
    name = example["name"].decode() if self._named else where
    return None if text is None else Document(name, text)


@contextlib.contextmanager
def _without_info_logs() -> Iterator[None]:
  """TFDS logs a line for each file that it looks at."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(min(verbosity, logging.WARNING))
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _builder(spec: str, name: str, data: config_lib.DataConfig) -> Any:
  """The dataset's builder, once its files are there."""
  # Imported where used: it takes half a second.
  import tensorflow_datasets as tfds

  from lm.data import python_stdlib

  directory = os.environ.get("TFDS_DATA_DIR") or os.path.join(
    data.cache_dir, "tfds"
  )
  make = functools.partial(
    tfds.builder, name, data_dir=directory, file_format="array_record"
  )
  try:
    builder = make()
  except (tfds.core.DatasetNotFoundError, ValueError) as error:
    raise config_lib.ConfigError(
      f"source {spec!r}: unknown dataset: {str(error).splitlines()[0]}"
    ) from error
  if builder.data_path.exists():
    return builder
  said = sys.stderr
  if builder.name == python_stdlib.PythonStdlib.name:
    tfds.disable_progress_bar()  # Built in a second or two.
    said = io.StringIO()
  with exclusive(directory), contextlib.redirect_stdout(said):
    path = builder.data_path
    for left in path.parent.glob(f"incomplete.*_{path.name}"):
      left.rmtree()  # Of a process that was killed.
    make().download_and_prepare()
  return make()
