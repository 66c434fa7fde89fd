"""Tables: Parquet and CSV files, whose rows are documents.

Needs pyarrow. Of a Parquet file one row group is in memory at a time, of a CSV
file, whose first row names the columns, all of it.
"""

import bisect
import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow
from pyarrow import csv, parquet

from lm import config as config_lib
from lm import files, schema
from lm.data import contents, conversations, json_lines, sources


class TableSource:
  """Documents of the rows of the tables that match a glob, sorted by path.

  With `field`, a document is the text in that column (`a.b` is a field of a
  struct); without, a row is a conversation (lm/data/conversations.py). `kind`
  is "parquet" or "csv". Raises ConfigError if a file is no such table, or has
  no such column.
  """

  def __init__(
    self,
    spec: str,
    kind: str,
    pattern: str,
    field: str | None,
    data: config_lib.DataConfig,
  ):
    self.spec, self.chat = spec, field is None
    self._kind, self._field, self._data = kind, field, data
    self._paths = sources.find(spec, files.local_path(pattern, "source"))
    self._contents = contents.Contents(
      spec,
      self._paths,
      f"{kind} {field} {data.invalid_utf8} {data.invalid_documents}",
      sources.cache_directory(data),
    )
    # (path, row group), and the number of rows up to the end of each.
    self._parts: list[tuple[str, int]] = []
    self._ends: list[int] = []
    for path in self._paths:
      for part, n in enumerate(self._sizes(path)):
        self._parts.append((path, part))
        self._ends.append(n + (self._ends[-1] if self._ends else 0))
    self._loaded: tuple[int, Any] = -1, None

  def __getstate__(self) -> dict[str, Any]:
    return {**vars(self), "_loaded": (-1, None)}

  def fingerprint(self) -> str:
    return self._contents.fingerprint

  def changed(self) -> str | None:
    return self._contents.changed()

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(
    self, i: int
  ) -> sources.Document | sources.Conversation | None:
    if not 0 <= i < len(self):
      raise IndexError(f"document {i} of {len(self)}")
    p = bisect.bisect_right(self._ends, i)
    path, part = self._parts[p]
    if self._loaded[0] != p:
      self._loaded = p, self._read(path, part)
    first = self._ends[p - 1] if p else 0
    before = bisect.bisect_left(self._parts, (path, 0))
    where = f"{path}:{i - (self._ends[before - 1] if before else 0) + 1}"
    try:
      (row,) = self._loaded[1].slice(i - first, 1).to_pylist()
    except UnicodeDecodeError as error:
      if self._data.invalid_utf8 == "skip":
        return None
      raise schema.ConfigError(
        f"{where}: invalid UTF-8; correct it, or set invalid_utf8 to 'skip' "
        "(in tables it is not replaced)"
      ) from error
    except (OverflowError, ValueError) as error:  # Such as dates beyond 9999.
      what = f"has a value that cannot be read ({files.first_line(error)})"
      return sources.invalid(where, schema.ConfigError(what), self._data)
    try:
      if self._field is None:
        return sources.Conversation(where, conversations.parse(row))
      return sources.Document(where, json_lines.text(row, self._field))
    except schema.ConfigError as error:
      return sources.invalid(where, error, self._data)

  def _sizes(self, path: str) -> list[int]:
    """Rows of each row group; checks the column."""
    with _named(path, self._kind):
      if self._kind == "csv":
        table = self._read(path, 0)
        names, sizes = table.column_names, [table.num_rows]
      else:
        with parquet.ParquetFile(path) as file:
          names, meta = file.schema_arrow.names, file.metadata
          groups = range(meta.num_row_groups)
          sizes = [meta.row_group(group).num_rows for group in groups]
    field = self._field
    if field and names.count(field) > 1:
      raise schema.ConfigError(
        f"{path}: has {names.count(field)} columns {field!r}; rename them"
      )
    if field and field not in names and field.split(".")[0] not in names:
      raise schema.ConfigError(
        f"{path}: no column {field!r}; its columns: "
        f"{', '.join(map(repr, names))[:300]}"
      )
    return sizes

  def _read(self, path: str, part: int) -> Any:
    """A table of the columns that are read."""
    with _named(path, self._kind):
      if self._kind == "csv":
        try:
          return _read_csv(path, self._field)
        except pyarrow.ArrowInvalid as error:
          if "block size" not in str(error):
            raise
          # A row reaches over a block of 1 MiB, as that of a book may.
          return _read_csv(path, self._field, block_size=2**31 - 1)
      with parquet.ParquetFile(path) as file:
        names, field = file.schema_arrow.names, self._field
        columns = None
        if field is not None:
          columns = [field if field in names else field.split(".")[0]]
        return file.read_row_group(part, columns)


def _read_csv(path: str, field: str | None, **options: int) -> pyarrow.Table:
  """The column `field` of a CSV file, or all columns if it has no such."""
  read = csv.ReadOptions(**options)
  parse = csv.ParseOptions(newlines_in_values=True)
  with csv.open_csv(path, read, parse) as reader:
    names = reader.schema.names
  return csv.read_csv(
    path,
    read,
    parse,
    csv.ConvertOptions(
      # Texts as they are written: neither numbers nor nulls.
      column_types={name: pyarrow.string() for name in names},
      include_columns=[field] if names.count(field) == 1 else None,
      check_utf8=False,  # Of each row, as it is read.
    ),
  )


@contextlib.contextmanager
def _named(path: str, kind: str) -> Iterator[None]:
  """Errors of pyarrow as ConfigError, those of the system with the path."""
  try:
    yield
  # Names of columns must be UTF-8.
  except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
    if isinstance(error, OSError) and error.errno is not None:
      error.filename = error.filename or path
      raise
    raise schema.ConfigError(
      f"{path}: damaged, or not a {kind} file: {files.first_line(error)}"
    ) from error
