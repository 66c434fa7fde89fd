"""What tells one corpus from another: the bytes of its files."""

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

# The hashes of a source that holds more are kept, since reading it takes long.
_KEPT_BYTES = 1 << 28
# A file that changes twice within this time may keep the same times and size.
_CLOCK_SECONDS = 2


class Contents:
  """Files as they are when their fingerprint is first asked for.

  The fingerprint follows names and bytes, never times. For more than
  _KEPT_BYTES the hash of each file is kept in `cache_dir` beside its size and
  times, so that the files are read once, and again where one was touched.
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
    """A file that is no longer what the fingerprint was taken of."""
    for path, before in zip(self._paths, self._stats, strict=True):
      if _times(os.stat(path)) != _times(before):
        return path
    return None

  def _hashes(self) -> list[str]:
    """SHA-256 of each file, as it was kept or anew."""
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
      if (found := self._kept(where)) is None:  # Nobody else was at it.
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
    except (FileNotFoundError, ValueError):  # None, or to be made again.
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
  """Names what an earlier version read otherwise; the text of such a file is
  another now, and so must its fingerprint be.
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
      except zstd.ZstdError:  # Cut short: its reader says so.
        return False
