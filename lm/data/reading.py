"""Files that hold text: which a glob names, and what each of them holds.

Compressed files (.gz, .bz2, .xz, .zst) are read to the end of their last
stream. What is cut short, corrupt or named wrongly is refused: nothing is read
by half.
"""

import bz2
import codecs
import contextlib
import errno
import fnmatch
import functools
import glob
import gzip
import io
import itertools
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from backports import zstd

from lm import schema

_CHUNK = 1 << 17
_STREAMS: dict[str, Callable[[], Any]] = {
  ".bz2": bz2.BZ2Decompressor,
  ".xz": lzma.LZMADecompressor,
  ".zst": zstd.ZstdDecompressor,
}
# How files begin that are no UTF-8 text, although some of their bytes are.
_NOT_TEXT = (
  (codecs.BOM_UTF16_LE, "UTF-16 or UTF-32 text: convert it, as by iconv"),
  (codecs.BOM_UTF16_BE, "UTF-16 text: convert it, as by iconv"),
  (codecs.BOM_UTF32_BE, "UTF-32 text: convert it, as by iconv"),
  (b"\x1f\x8b\x08", "compressed: end its name in .gz"),
  (b"\x28\xb5\x2f\xfd", "compressed: end its name in .zst"),
  (b"\xfd7zXZ\0", "compressed: end its name in .xz"),
  (b"PK\x03\x04", "a zip archive: unpack it"),
)


# --- which files -------------------------------------------------------------


def matching(pattern: str) -> list[str]:
  """Regular files that `pattern` names, in the order of their names.

  The rules are those of glob.glob, `**` included, but a folder that cannot be
  read and a link to nothing raise OSError, and `**` follows no link back into
  a folder that it came through. A file that several names lead to by symbolic
  links has the first of them. Hard links are files of their own, as the copies
  are that another disk would make of them.
  """
  start = "/" if pattern.startswith("/") else ""
  parts = [part for part in pattern.split("/") if part]
  if not parts or pattern.endswith("/"):
    return []
  real = functools.cache(os.path.realpath)
  files: dict[str, str] = {}
  for path in sorted(set(_walk(start, parts, ()))):
    if stat.S_ISREG(os.stat(path).st_mode):
      folder, name = os.path.split(path)
      linked = os.path.islink(path)
      files.setdefault(real(path) if linked else f"{real(folder)}/{name}", path)
  return list(files.values())


def _walk(
  folder: str, parts: Sequence[str], above: tuple[os.stat_result, ...]
) -> Iterator[str]:
  """Paths that `parts` lead to from `folder`; `**` has come through `above`."""
  part, rest = parts[0], parts[1:]
  if part == "**":
    yield from _walk(folder, rest or ["*"], ())
    above = above or (os.stat(folder or "."),) if _is_folder(folder) else ()
    for path in _matches(folder, "*"):
      if _is_folder(path):
        here = os.stat(path)
        if not any(os.path.samestat(here, other) for other in above):
          yield from _walk(path, parts, (*above, here))
  else:
    for path in _matches(folder, part):
      if not rest:
        yield path
      elif _is_folder(path):
        yield from _walk(path, rest, ())


def _is_folder(path: str) -> bool:
  try:
    return stat.S_ISDIR(os.stat(path or ".").st_mode)
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return False
  except OSError as error:
    if error.errno == errno.ELOOP:  # A link to itself.
      return False
    raise


def _matches(folder: str, part: str) -> list[str]:
  """Paths in `folder` whose names `part` names."""
  try:
    if not glob.has_magic(part):
      path = os.path.join(folder, part)
      os.lstat(path)
      return [path]
    names = os.listdir(folder or ".")
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return []
  if not part.startswith("."):
    names = [name for name in names if not name.startswith(".")]
  return [os.path.join(folder, name) for name in fnmatch.filter(names, part)]


def bracket_hint(pattern: str) -> str:
  """What to write where a name holds what a glob reads as a set of letters."""
  heads = itertools.accumulate(pattern.split("/"), "{}/{}".format)
  there = [h for h in heads if glob.has_magic(h) and os.path.lexists(h)]
  if not there:
    return ""
  escaped = glob.escape(there[-1]) + pattern[len(there[-1]) :]
  return f"; {there[-1]!r} is there by that very name: write {escaped!r}"


# --- what they hold ----------------------------------------------------------


@contextlib.contextmanager
def opened(path: str, offset: int = 0) -> Iterator[io.BufferedIOBase]:
  """The file, decompressed, at byte `offset` of what it holds.

  Raises ConfigError where it is not what its name says.
  """
  suffix = os.path.splitext(path)[1]
  file: Any
  with named(path, suffix), open(path, "rb") as file:
    if suffix == ".gz" or suffix in _STREAMS:
      if os.fstat(file.fileno()).st_size == 0:
        raise EOFError("it is empty")
      file = _decompressed(file, suffix)
      while offset > 0:
        skipped = len(file.read(min(offset, _CHUNK)))
        offset -= skipped or offset
    else:
      file.seek(offset)
    yield file


@contextlib.contextmanager
def named(path: str, suffix: str = "") -> Iterator[None]:
  """Errors of reading, with the file's name."""
  try:
    yield
  except (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError, OSError) as e:
    # What gzip and bz2 refuse is an OSError without the system's number.
    if isinstance(e, OSError) and e.errno is not None:
      e.filename = e.filename or path
      raise
    raise schema.ConfigError(
      f"{path}: damaged, or not a {suffix} file: {e}; fetch it again, or "
      "correct its name"
    ) from e


def _decompressed(file: BinaryIO, suffix: str) -> io.BufferedIOBase:
  if suffix == ".gz":
    return gzip.GzipFile(fileobj=file)
  return io.BufferedReader(_Chunks(_decompress(file, _STREAMS[suffix])), _CHUNK)


def _decompress(file: BinaryIO, start: Callable[[], Any]) -> Iterator[bytes]:
  """Yields what the streams of `file` hold, one after another.

  Only the end of a stream at the end of the file is an end. To bz2.open and
  its kin, whatever follows the first stream may be one too.
  """
  raw = file.read(_CHUNK)
  while raw:
    stream = start()
    while not stream.eof:
      if stream.needs_input and not raw:
        raise EOFError("it ends before its end mark")
      yield stream.decompress(raw, _CHUNK)
      raw = file.read(_CHUNK) if stream.needs_input else b""
    raw = stream.unused_data.lstrip(b"\0") or file.read(_CHUNK)
    while raw and not raw.strip(b"\0"):  # Padding, as xz allows.
      raw = file.read(_CHUNK)
    raw = raw.lstrip(b"\0")


class _Chunks(io.RawIOBase):
  """A file of the bytes that an iterator yields."""

  def __init__(self, chunks: Iterator[bytes]):
    self._chunks, self._held = chunks, memoryview(b"")

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._held:
      if (chunk := next(self._chunks, None)) is None:
        return 0
      self._held = memoryview(chunk)
    n = min(len(buffer), len(self._held))
    buffer[:n], self._held = self._held[:n], self._held[n:]
    return n


def without_mark(raw: bytes, path: str) -> bytes:
  """`raw`, with which a file starts, without a byte order mark.

  Raises ConfigError where it shows that the file is no UTF-8 text.
  """
  for start, what in _NOT_TEXT:
    if raw.startswith(start):
      raise schema.ConfigError(f"{path}: is {what}")
  return raw.removeprefix(codecs.BOM_UTF8)
