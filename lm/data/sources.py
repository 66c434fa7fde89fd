"""Corpora: opens a source spec and reads documents by index.

A source is `tfds:NAME[/CONFIG][:VERSION]:SPLIT[#FEATURE]`, `text:GLOB` or
`jsonl:GLOB#FIELD`; files may be compressed (.gz, .bz2, .xz, .zst). Documents
are read one at a time: memory does not grow with the corpus.
"""

import bisect
import codecs
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lm import config as config_lib
from lm import files, schema
from lm.data import contents, reading

_GRAMMAR = (
  "write tfds:NAME[/CONFIG]:SPLIT[#FEATURE], text:GLOB or jsonl:GLOB#FIELD"
)
_SPEC = re.compile(
  r"(?P<tfds>tfds):(?P<name>[^:#]+(:\d+\.\d+\.\d+)?):(?P<split>[^#]+)"
  r"(#(?P<feature>\w+))?"
  r"|text:(?P<text>.+)"
  r"|jsonl:(?P<jsonl>[^#]+)#(?P<field>.+)",
  re.DOTALL,
)
# Documents between two offsets that the index of a file stores.
_STRIDE = 256


class Document(NamedTuple):
  name: str
  text: str


@runtime_checkable
class Source(Protocol):
  """Corpus interface: documents in a fixed order; picklable."""

  spec: str

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Document | None:
    """Document `i`, or None for a document skipped as invalid UTF-8."""
    ...

  def fingerprint(self) -> str:
    """Hash of the contents and of the options for reading."""
    ...

  def changed(self) -> str | None:
    """Path of a file changed since the fingerprint was taken, or None."""
    ...


def open_source(spec: str, data: config_lib.DataConfig) -> Source:
  """Opens the source `spec`; builds a missing TFDS dataset.

  Raises ConfigError if the spec is malformed, a file or the dataset is not
  available, or the source holds no document.
  """
  match = _SPEC.fullmatch(spec)
  if match is None:
    raise schema.ConfigError(f"source {spec!r}: malformed; {_GRAMMAR}")
  if match["tfds"]:
    # Imported here because the import takes half a second.
    from lm.data import tfds_source

    source: Source = tfds_source.TfdsSource(
      spec, match["name"], match["split"], match["feature"] or "text", data
    )
  elif match["text"]:
    source = FileSource(spec, match["text"], data.text_unit, None, data)
  else:
    source = FileSource(spec, match["jsonl"], "line", match["field"], data)
  if len(source) == 0:
    raise schema.ConfigError(f"source {spec!r}: empty, holds no document")
  return source


def cache_directory(data: config_lib.DataConfig) -> str:
  return files.local_path(data.cache_dir, "config.data.cache_dir")


def decode(
  raw: bytes, where: str, offset: int, data: config_lib.DataConfig
) -> str | None:
  """Decodes UTF-8 `raw`, from byte `offset` of `where`, by `invalid_utf8`.

  On invalid bytes "replace" gives U+FFFD, "skip" gives None and "error" raises
  ConfigError.
  """
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    if data.invalid_utf8 == "replace":
      return raw.decode(errors="replace")
    if data.invalid_utf8 == "skip":
      return None
    raise schema.ConfigError(
      f"{where}: invalid UTF-8 at byte {offset + error.start}; correct it, or "
      "set config.data.invalid_utf8 to 'replace' or 'skip'"
    ) from error


# --- files -------------------------------------------------------------------


class _Unit(NamedTuple):
  line: int  # Number of the first line, from 1.
  offset: int  # Byte offset in the decompressed file.
  raw: bytes


def _units(path: str, unit: str, mark: _Unit) -> Iterator[_Unit]:
  """Yields the units of a file from `mark` on.

  A unit is a non-blank line, or (for blocks) a run of non-blank lines, without
  the final newline.
  """
  line, offset = mark.line, mark.offset
  first, start, lines = line, offset, []
  with reading.opened(path, offset) as file:
    for raw in itertools.chain(file, [b""]):
      if offset == 0:
        offset, raw = len(raw), reading.without_mark(raw, path)
        offset -= len(raw)
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
  """Documents of the files that match a glob, sorted by path.

  With `field`, each line is a JSON object and the field is the document;
  otherwise `unit` says whether a document is a file, a line or a block. An
  index of every _STRIDE-th line or block is made on first use; reading in order
  needs no seek, since seeks are slow in compressed files.
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
    self._paths = _find(spec, files.local_path(pattern, "source"))
    self._contents = contents.Contents(
      spec,
      self._paths,
      f"{unit} {field} {data.invalid_utf8}",
      cache_directory(data),
    )
    self._ends = list(range(1, len(self._paths) + 1))
    self._index: list[list[_Unit]] | None = None
    # Last group read: ((file, group), units). `_rest` yields the units after.
    self._group: tuple[tuple[int, int], list[_Unit]] = (-1, -1), []
    self._rest: Iterator[_Unit] = iter(())

  def __getstate__(self) -> dict[str, Any]:
    return {**vars(self), "_group": ((-1, -1), []), "_rest": iter(())}

  def fingerprint(self) -> str:
    return self._contents.fingerprint

  def changed(self) -> str | None:
    return self._contents.changed()

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
      with reading.opened(path) as file:
        raw = file.read()
      if self._data.invalid_utf8 == "skip":  # other encodings too
        raw = raw.removeprefix(codecs.BOM_UTF8)
      else:
        raw = reading.without_mark(raw, path)
      text = decode(raw, path, 0, self._data)
      return None if text is None else Document(path, text)
    unit = self._read_unit(f, i - (self._ends[f - 1] if f else 0))
    where = f"{path}:{unit.line}"
    try:
      text = decode(unit.raw, path, unit.offset, self._data)
      if text is not None and self._field is not None:
        raw = _json_field(text, self._field, where)
        text = decode(raw, where, 0, self._data)
    except schema.ConfigError:
      self._rest = iter(())  # Closes the file, else held by the traceback.
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
    """Unit `k` of file `f`; reads and caches a whole group of units."""
    assert self._index is not None
    group = k // _STRIDE
    if self._group[0] != (f, group):
      if self._group[0] != (f, group - 1):
        self._rest = _units(self._paths[f], self._unit, self._index[f][group])
      self._group = (f, group), list(itertools.islice(self._rest, _STRIDE))
    if k % _STRIDE >= len(self._group[1]):
      raise schema.RunError(
        f"{self._paths[f]}: has changed while it was read; start again"
      )
    return self._group[1][k % _STRIDE]


def _find(spec: str, pattern: str) -> list[str]:
  try:
    found = reading.matching(pattern)
  except OSError as error:
    raise schema.ConfigError(
      f"source {spec!r}: {error.filename}: {error.strerror}; mend it, or write "
      "a pattern that leaves it out"
    ) from error
  if not found:
    hint = reading.bracket_hint(pattern)
    if spec.startswith("jsonl:") and spec.count("#") > 1:
      hint = "; the path ends at the first '#': write '?' for one that is in it"
    raise schema.ConfigError(
      f"source {spec!r}: no file matches {pattern!r} in {os.getcwd()}{hint}"
    )
  return found


def _json_field(line: str, field: str, where: str) -> bytes:
  try:
    value = json.loads(line)
  except json.JSONDecodeError as error:
    raise schema.ConfigError(
      f"{where}: invalid JSON, {error.msg} at column {error.colno}; correct it"
    ) from error
  except (RecursionError, ValueError) as error:  # Too deep, too many digits.
    reason = str(error).split(";")[0]
    raise schema.ConfigError(
      f"{where}: JSON beyond reason, {reason}; leave the line out"
    ) from error
  if not isinstance(value, dict):
    raise schema.ConfigError(
      f"{where}: is {_KINDS[type(value)]}, not an object with field {field!r}"
    )
  if field not in value:
    names = ", ".join(map(repr, value)) or "none"
    names = names if len(names) < 200 else f"{names[:200]}..."
    raise schema.ConfigError(
      f"{where}: no field {field!r}; its fields: {names}"
    )
  if not isinstance(text := value[field], str):
    raise schema.ConfigError(
      f"{where}: field {field!r} is {_KINDS[type(text)]}, not text"
    )
  # JSON allows lone surrogates, UTF-8 does not: `decode` handles them.
  return text.encode(errors="surrogatepass")


_KINDS = {
  dict: "an object",
  list: "a list",
  str: "text",
  int: "a number",
  float: "a number",
  bool: "true or false",
  type(None): "null",
}
