"""Text files: glob matching, decompression, byte order marks.

Compressed files (.gz, .bz2, .xz, .zst) are read to the end of the last
concatenated stream. A truncated, corrupt or misnamed file raises ConfigError:
no file is read in part.
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
# First bytes of files that are not UTF-8 text, though parts may decode.
_NOT_TEXT = (
  (codecs.BOM_UTF16_LE, "UTF-16 or UTF-32 text: convert it, as by iconv"),
  (codecs.BOM_UTF16_BE, "UTF-16 text: convert it, as by iconv"),
  (codecs.BOM_UTF32_BE, "UTF-32 text: convert it, as by iconv"),
  (b"\x1f\x8b\x08", "compressed: end its name in .gz"),
  (b"\x28\xb5\x2f\xfd", "compressed: end its name in .zst"),
  (b"\xfd7zXZ\0", "compressed: end its name in .xz"),
  (b"PK\x03\x04", "a zip archive: unpack it"),
)


# --- glob matching -----------------------------------------------------------


def matching(pattern: str) -> list[str]:
  """Regular files that match the glob `pattern`, sorted by path.

  The rules of glob.glob apply, `**` included, with two exceptions: an
  unreadable folder or a dangling link raises OSError, and `**` follows no link
  back into a folder on the current path. A file reachable by several symbolic
  links is listed once, under the first path. Hard links count as separate
  files, as copies on another disk would.
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
  """Yields paths in `folder` that match the pattern components `parts`.

  `above` holds the folders that `**` came through, to detect link loops.
  """
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
    if error.errno == errno.ELOOP:  # Symbolic link loop.
      return False
    raise


def _matches(folder: str, part: str) -> list[str]:
  """Paths in `folder` with a name that matches the component `part`."""
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
  """Hint to escape glob characters if the literal path exists, else ""."""
  heads = itertools.accumulate(pattern.split("/"), "{}/{}".format)
  there = [h for h in heads if glob.has_magic(h) and os.path.lexists(h)]
  if not there:
    return ""
  escaped = glob.escape(there[-1]) + pattern[len(there[-1]) :]
  return f"; {there[-1]!r} is there by that very name: write {escaped!r}"


# --- reading and decompression -----------------------------------------------


def is_compressed(path: str) -> bool:
  """Whether `opened` decompresses: to begin at an offset then takes long."""
  return os.path.splitext(path)[1] in (".gz", *_STREAMS)


@contextlib.contextmanager
def opened(path: str, offset: int = 0) -> Iterator[io.BufferedIOBase]:
  """Opens a file, decompressed, at byte `offset` of the decompressed content.

  Raises ConfigError if the file is damaged or not of the format of the suffix.
  """
  suffix = os.path.splitext(path)[1]
  file: Any
  with named(path, suffix), open(path, "rb") as file:
    if is_compressed(path):
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
  """Adds the path to read errors; decompression errors become ConfigError."""
  try:
    yield
  except (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError, OSError) as e:
    # On invalid data, gzip and bz2 raise OSError without an errno.
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
  """Yields the decompressed bytes of all concatenated streams of `file`.

  The last stream must end at the end of the file, else EOFError or an error of
  the decompressor. bz2.open and the like ignore invalid data after a stream.
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
    while raw and not raw.strip(b"\0"):  # NUL padding, allowed in xz.
      raw = file.read(_CHUNK)
    raw = raw.lstrip(b"\0")


class _Chunks(io.RawIOBase):
  """Raw read-only file over an iterator of byte chunks."""

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
  """Strips a UTF-8 byte order mark from `raw`, the first bytes of a file.

  Raises ConfigError if `raw` starts like UTF-16, UTF-32 or a compressed file.
  """
  for start, what in _NOT_TEXT:
    if raw.startswith(start):
      raise schema.ConfigError(f"{path}: is {what}")
  return raw.removeprefix(codecs.BOM_UTF8)
