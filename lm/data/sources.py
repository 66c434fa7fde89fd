"""Corpora: opens a source spec and reads documents by index.

A source is `tfds:NAME[/CONFIG][:VERSION]:SPLIT[#FEATURE]`, `text:GLOB` or
`jsonl:GLOB#FIELD`; files may be compressed (.gz, .bz2, .xz, .zst). Tables are
`parquet:GLOB#COLUMN` or `csv:GLOB#COLUMN`. A source of chats is `jsonl:GLOB`,
`parquet:GLOB` or `csv:GLOB`, whose rows are conversations in one of the formats
of lm/data/conversations.py, or `instruct:python_stdlib:SPLIT`. Documents are
read one at a time, tables in parts: memory does not grow with the corpus.
"""

import bisect
import codecs
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lm import config as config_lib
from lm import files, schema
from lm import objective as objective_lib
from lm.data import contents, conversations, json_lines, reading

_GRAMMAR = (
  "write tfds:NAME[/CONFIG]:SPLIT[#FEATURE], text:GLOB, jsonl:GLOB#FIELD, "
  "parquet:GLOB#COLUMN or csv:GLOB#COLUMN"
)
_SPEC = re.compile(
  r"(?P<tfds>tfds):(?P<name>[^:#]+(:\d+\.\d+\.\d+)?):(?P<split>[^#]+)"
  r"(#(?P<feature>\w+))?"
  r"|text:(?P<text>.+)"
  r"|jsonl:(?P<jsonl>[^#]+)#(?P<field>.+)"
  r"|(?P<table>parquet|csv):(?P<tables>[^#]+)#(?P<column>.+)",
  re.DOTALL,
)
_CHAT_GRAMMAR = (
  "write jsonl:GLOB, parquet:GLOB or csv:GLOB, whose rows are conversations, "
  "or instruct:python_stdlib:SPLIT"
)
_CHAT_SPEC = re.compile(
  r"instruct:(?P<name>[^:#]+):(?P<split>[^:#]+)|jsonl:(?P<jsonl>[^#]+)"
  r"|(?P<table>parquet|csv):(?P<tables>[^#]+)",
  re.DOTALL,
)
# Changes with the messages that conversations.parse makes of a row.
_CHATS_VERSION = 1
# Documents between two offsets that the index of a file stores.
_STRIDE = 256


class Document(NamedTuple):
  name: str
  text: str


class Conversation(NamedTuple):
  """`messages` have roles and contents, as in lm/data/chat.py."""

  name: str
  messages: list[conversations.Message]

  @property
  def text(self) -> str:
    """The contents, without a layout: for counts, and to train tokenizers."""
    return "\n".join(message["content"] for message in self.messages)


@runtime_checkable
class Source(Protocol):
  """Corpus interface: documents in a fixed order; picklable.

  `chat` says whether the documents are conversations.
  """

  spec: str
  chat: bool

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Document | Conversation | None:
    """Document `i`, or None for a document that is skipped, as invalid."""
    ...

  def fingerprint(self) -> str:
    """Hash of the contents and of the options for reading."""
    ...

  def changed(self) -> str | None:
    """Path of a file changed since the fingerprint was taken, or None."""
    ...


def open_source(
  spec: str, data: config_lib.DataConfig, *, chat: bool = False
) -> Source:
  """Opens the source `spec`, of chats or of texts; builds a missing TFDS
  dataset.

  Raises ConfigError if the spec is malformed, a file or the dataset is not
  available, or the source holds no document.
  """
  if chat:
    return _open_chats(spec, data)
  match = _SPEC.fullmatch(spec)
  if match is None:
    hint = ""
    if _CHAT_SPEC.fullmatch(spec):
      hint = f"; for conversations write {spec}|chat"
    raise schema.ConfigError(f"source {spec!r}: malformed; {_GRAMMAR}{hint}")
  if match["tfds"]:
    # Imported here because the import takes half a second.
    from lm.data import tfds_source

    source: Source = tfds_source.TfdsSource(
      spec, match["name"], match["split"], match["feature"] or "text", data
    )
  elif match["text"]:
    source = FileSource(spec, match["text"], data.text_unit, None, data)
  elif match["table"]:
    source = _open_tables(spec, match, match["column"], data)
  else:
    source = FileSource(spec, match["jsonl"], "line", match["field"], data)
  if len(source) == 0:
    raise schema.ConfigError(f"source {spec!r}: empty, holds no document")
  return source


def _open_chats(spec: str, data: config_lib.DataConfig) -> Source:
  match = _CHAT_SPEC.fullmatch(spec)
  if match is None:
    raise schema.ConfigError(
      f"source {spec!r}: malformed for chats; {_CHAT_GRAMMAR}"
    )
  if match["name"]:
    from lm.data import instructions  # Imports TFDS, as above.

    # Not counted here: that reads all of it, and a store may be there.
    return instructions.InstructionSource(
      spec, match["name"], match["split"], data
    )
  if match["table"]:
    source = _open_tables(spec, match, None, data)
  else:
    source = ChatFileSource(spec, match["jsonl"], "line", None, data)
  if len(source) == 0:
    raise schema.ConfigError(f"source {spec!r}: empty, holds no conversation")
  return source


def _open_tables(
  spec: str,
  match: re.Match[str],
  column: str | None,
  data: config_lib.DataConfig,
) -> Source:
  try:
    from lm.data import tables
  except ImportError as error:
    raise schema.ConfigError(
      f"source {spec!r}: needs the package pyarrow: pip install pyarrow"
    ) from error
  return tables.TableSource(spec, match["table"], match["tables"], column, data)


def check_unread(path: str, name: str, specs: Iterable[str]) -> None:
  """Raises ConfigError if one of the sources `specs` reads the file `path`,
  which the flag `name` would overwrite.
  """
  for spec in specs:
    bare, _ = objective_lib.split_source(spec)
    match = _SPEC.fullmatch(bare) or _CHAT_SPEC.fullmatch(bare)
    found = match.groupdict() if match else {}
    pattern = found.get("text") or found.get("jsonl") or found.get("tables")
    paths = find(bare, files.local_path(pattern, "source")) if pattern else ()
    if os.path.realpath(path) in map(os.path.realpath, paths):
      raise schema.ConfigError(
        f"{name}={path}: is a file of the source {spec!r}; name another"
      )


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
      "set invalid_utf8 to 'replace' or 'skip'"
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

  With `field`, each line is a JSON object and the field is the document (`a.b`
  is a field of a field); otherwise `unit` says whether a document is a file, a
  line or a block. An index of every _STRIDE-th line or block is made on first
  use. Reading in order needs no seek; in compressed files, whose seeks are
  slow, neither does reading on, past others.
  """

  chat = False

  def __init__(
    self,
    spec: str,
    pattern: str,
    unit: str,
    field: str | None,
    data: config_lib.DataConfig,
  ):
    self.spec, self._unit, self._field, self._data = spec, unit, field, data
    self._paths = find(spec, files.local_path(pattern, "source"))
    self._contents = contents.Contents(
      spec,
      self._paths,
      self._options(),
      cache_directory(data),
    )
    self._ends = list(range(1, len(self._paths) + 1))
    self._index: list[list[_Unit]] | None = None
    # Last group read: ((file, group), units). `_rest` yields the units after.
    self._group: tuple[tuple[int, int], list[_Unit]] = (-1, -1), []
    self._rest: Iterator[_Unit] = iter(())

  def _options(self) -> str:
    """What the documents depend on beside the files, for the fingerprint."""
    options = f"{self._unit} {self._field} {self._data.invalid_utf8}"
    skips = self._field and self._data.invalid_documents == "skip"
    return f"{options} skip" if skips else options

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

  def __getitem__(self, i: int) -> Document | Conversation | None:
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
      return None if text is None else self._document(where, text)
    except schema.ConfigError:
      self._rest = iter(())  # Closes the file, else held by the traceback.
      raise

  def _document(self, where: str, text: str) -> Document | Conversation | None:
    """The document that line or block `text` is, or holds."""
    if self._field is None:
      return Document(where, text)
    try:
      row = json_lines.parse(text, f"field {self._field!r}")
      text = json_lines.text(row, self._field)
    except schema.ConfigError as error:
      return invalid(where, error, self._data)
    found = _half_characters(text, where, self._data)
    return None if found is None else Document(where, found)

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
    group, (at, last) = k // _STRIDE, self._group[0]
    if (at, last) != (f, group):
      path, n = self._paths[f], (group - last - 1) * _STRIDE
      if at == f and (n == 0 or n > 0 and reading.is_compressed(path)):
        next(itertools.islice(self._rest, n, n), None)  # Skips n units.
      else:
        self._rest = _units(path, self._unit, self._index[f][group])
      self._group = (f, group), list(itertools.islice(self._rest, _STRIDE))
    if k % _STRIDE >= len(self._group[1]):
      raise schema.RunError(
        f"{self._paths[f]}: has changed while it was read; start again"
      )
    return self._group[1][k % _STRIDE]


class ChatFileSource(FileSource):
  """Conversations of files of JSON lines; see lm/data/conversations.py."""

  chat = True

  def _options(self) -> str:
    data = self._data
    return f"chat {_CHATS_VERSION} {data.invalid_utf8} {data.invalid_documents}"

  def _document(self, where: str, text: str) -> Conversation | None:
    try:
      messages = conversations.parse(json_lines.parse(text, "a conversation"))
    except schema.ConfigError as error:
      return invalid(where, error, self._data)
    for message in messages:
      content = _half_characters(message["content"], where, self._data)
      if content is None:
        return None
      message["content"] = content
    return Conversation(where, messages)


def _half_characters(
  text: str, where: str, data: config_lib.DataConfig
) -> str | None:
  """`decode` for JSON, which allows lone surrogates where UTF-8 does not."""
  return decode(text.encode(errors="surrogatepass"), where, 0, data)


def invalid(
  where: str, error: schema.ConfigError, data: config_lib.DataConfig
) -> None:
  """None, which skips a document, or `error` with its place."""
  if data.invalid_documents == "error":
    raise schema.ConfigError(
      f"{where}: {error}; correct it, or set invalid_documents to 'skip'"
    ) from error


def find(spec: str, pattern: str) -> list[str]:
  """Files that match `pattern`, sorted; raises ConfigError if there is none."""
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
