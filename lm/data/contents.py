"""Corpus fingerprint: a SHA-256 over the names and bytes of the files."""

import codecs
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import mmap
import os
import sys
import time

import rich.console
import rich.markup
import rich.progress
from backports import zstd

from lm import files, locks
from lm.data import reading

# Above this size (256 MiB) file hashes are cached: hashing takes long.
_KEPT_BYTES = 1 << 28
# Two changes within this time may leave a file's timestamps and size equal.
_CLOCK_SECONDS = 2


class Contents:
  """Fingerprint of files, as they are when `fingerprint` is first read.

  The fingerprint depends on names, bytes and `options`, never on timestamps.
  Above _KEPT_BYTES in total, the hash of each file is cached in `cache_dir`
  with size and timestamps: all files are read once, and again only after any
  file was touched.
  """

  def __init__(self, spec: str, paths: list[str], options: str, cache_dir: str):
    self._spec, self._paths, self._options = spec, paths, options
    self._cache_dir = cache_dir

  @functools.cached_property
  def _stats(self) -> list[os.stat_result]:
    return [os.stat(path) for path in self._paths]

  @functools.cached_property
  def fingerprint(self) -> str:
    digest = hashlib.sha256(self._options.encode())
    large = sum(s.st_size for s in self._stats) > _KEPT_BYTES
    hashes = self._hashes() if large else [None] * len(self._paths)
    for path, stat, known in zip(self._paths, self._stats, hashes, strict=True):
      with reading.named(path), open(path, "rb") as file:
        chunk = file.read(1 << 20)
        about = f" {stat.st_size}{_read_otherwise(path, chunk)}"
        digest.update(os.fsencode(os.path.basename(path)) + about.encode())
        if known is not None:
          digest.update(known.encode())
          continue
        while chunk:
          digest.update(chunk)
          chunk = file.read(1 << 20)
    return digest.hexdigest()[:16]

  def changed(self) -> str | None:
    """Path of a file changed (by stat) since the fingerprint, or None."""
    for path, before in zip(self._paths, self._stats, strict=True):
      if _times(os.stat(path)) != _times(before):
        return path
    return None

  def _hashes(self) -> list[str]:
    """SHA-256 of each file, from the cache or computed now."""
    paths = [os.path.abspath(path) for path in self._paths]
    name = files.json_digest({"options": self._options, "paths": paths})
    where = os.path.join(self._cache_dir, f"contents-{name}.json")
    if (found := self._kept(where)) is not None:
      return found
    with contextlib.ExitStack() as lock:
      try:
        lock.enter_context(locks.exclusive(self._cache_dir))
      except OSError as error:
        said = f"{error}: the next start reads {self._spec} again"
        print(said, file=sys.stderr)
        return self._read()
      # Another process may have written the cache during the wait.
      if (found := self._kept(where)) is None:
        found = self._read()
        newest = max(s.st_ctime for s in self._stats)
        if time.time() - newest > _CLOCK_SECONDS:
          times = [_times(stat) for stat in self._stats]
          sealed = files.seal({"times": times, "hashes": found})
          files.replace(where, json.dumps(sealed))
    return found

  def _kept(self, where: str) -> list[str] | None:
    times = [_times(stat) for stat in self._stats]
    try:
      with open(where, "rb") as file:
        kept = files.unseal(file.read())
    except (FileNotFoundError, ValueError):  # Absent or corrupt: hash again.
      return None
    return kept["hashes"] if kept["times"] == times else None

  def _read(self) -> list[str]:
    console = rich.console.Console(stderr=True)
    n_bytes = sum(s.st_size for s in self._stats)
    about = f"hashing {rich.markup.escape(self._spec)}"
    with (
      rich.progress.Progress(console=console, transient=True) as progress,
      concurrent.futures.ThreadPoolExecutor() as pool,
    ):
      task, found = progress.add_task(about, total=n_bytes), []
      for stat, known in zip(
        self._stats, pool.map(_hash, self._paths), strict=True
      ):
        found.append(known)
        progress.advance(task, stat.st_size)
    return found


def _hash(path: str) -> str:
  with reading.named(path), open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _times(stat: os.stat_result) -> list[int]:
  return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_otherwise(path: str, head: bytes) -> str:
  """Fingerprint suffix for files read differently by an earlier version.

  An .xz or .bz2 file, a UTF-8 byte order mark or a .zst file of several frames
  now gives a different text and needs a different fingerprint.
  """
  if path.endswith((".xz", ".bz2")):
    return " decompressed"
  if path.endswith((".gz", ".zst")):
    with reading.opened(path) as file:
      head = file.read(3)
  if head.startswith(codecs.BOM_UTF8):
    return " marked"
  if path.endswith(".zst") and not _is_one_frame(path):
    return " frames"
  return ""


def _is_one_frame(path: str) -> bool:
  with open(path, "rb") as file:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      try:
        return zstd.get_frame_size(content) == len(content)
      except zstd.ZstdError:  # Truncated: reading reports the error.
        return False
