"""Write locks: a lease on a run directory, an flock on a cache directory."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from lm import files, schema

# An owner that has not renewed its lease for this many seconds counts as dead.
LEASE_SECONDS = 60.0


class Lock:
  """Lease on a run directory: a second owner is refused with RunError.

  The record `lock.json` names the owner: host, process, start time. The owner
  renews the record; an owner without a renewal for LEASE_SECONDS is dead. On a
  disk the owner also holds an flock, by which a process on the same host sees
  the owner's death at once. `lost` is True after another owner has taken the
  record, as after a long sleep of this process.
  """

  def __init__(self, directory: str):
    import tensorstore

    self.lost = False
    self._directory = directory
    self._file: Any = None
    self._released = threading.Event()
    self._renewing = threading.Lock()
    self._record = {
      "host": socket.gethostname(),
      "boot": _boot(),
      "process": os.getpid(),
      "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
      "token": uuid.uuid4().hex,
      "renewals": 0,
    }
    place: Any = directory + "/"
    if files.is_local(directory):
      os.makedirs(directory, exist_ok=True)
      # Not by file://, in which %, # and ? have meanings of their own.
      place = {"driver": "file", "path": os.path.abspath(directory) + "/"}
    # KvStore has compare-and-swap: writes conditional on the record last read.
    self._store = tensorstore.KvStore.open(place).result()
    try:
      self._take(self._lock_file())
    except BaseException:
      self._close_file()
      raise
    self._renewing_thread = threading.Thread(
      target=self._renew, name="lease", daemon=True
    )
    self._renewing_thread.start()

  def release(self) -> None:
    """Releases the lease; a second call does nothing."""
    if self._released.is_set():
      return
    self._released.set()
    with self._renewing:  # not in the middle of a renewal
      if not self.lost:
        with contextlib.suppress(Exception):  # the lease expires anyway
          self._store.write("lock.json", None, if_equal=self._seen).result()
    self._close_file()

  def _lock_file(self) -> bool:
    """Takes an flock on `.lock`. Returns True if the flock proves that no other
    process on this host, or on any host of a shared disk, holds the directory;
    False if flock is not supported. Raises RunError if the directory is in use.
    """
    if not files.is_local(self._directory):
      return False
    self._file = open(os.path.join(self._directory, ".lock"), "w")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise self._in_use(self._read()[0]) from None
    except OSError:  # a file system without flock
      return False
    return True

  def _take(self, alone: bool) -> None:
    """Takes the lease, after waiting LEASE_SECONDS if the last owner may be
    alive. Raises RunError if the last owner renews, or a new owner appears.
    """
    before, self._seen = self._read()
    here = before is not None and all(
      before.get(name) == self._record[name] for name in ("host", "boot")
    )
    if before is not None and not (here and alone):
      print(
        f"{self._directory}: last held by {_owner(before)}; waiting "
        f"{LEASE_SECONDS:g} s for a sign of life",
        file=sys.stderr,
      )
      ends = time.monotonic() + LEASE_SECONDS
      while time.monotonic() < ends:
        time.sleep(min(1.0, LEASE_SECONDS / 4))
        now, self._seen = self._read()
        if now is None:
          break
        if now != before:
          raise self._in_use(now)
    if not self._write():
      raise self._in_use(self._read()[0])

  def _read(self) -> tuple[dict[str, Any] | None, bytes]:
    """(record, generation) of `lock.json`; record None if absent or invalid."""
    found = self._store.read("lock.json").result()
    try:
      record = json.loads(found.value)
      _owner(record)
    except (ValueError, TypeError, KeyError):  # cut short, or absent
      record = None
    return record, found.stamp.generation

  def _write(self) -> bool:
    """Compare-and-swap: replaces the record last seen. Returns False, without
    writing, if another owner has written since.
    """
    content = json.dumps(self._record)
    stamp = self._store.write("lock.json", content, if_equal=self._seen)
    if generation := stamp.result().generation:
      self._seen = generation
      return True
    # An earlier write may have succeeded although the reply was lost.
    record, self._seen = self._read()
    return record is not None and record.get("token") == self._record["token"]

  def _renew(self) -> None:
    while not self._released.wait(LEASE_SECONDS / 4):
      with self._renewing, contextlib.suppress(Exception):  # a full disk
        self._record["renewals"] += 1
        if not self._released.is_set() and not self._write():
          self.lost = True
          return

  def _in_use(self, record: dict[str, Any] | None) -> schema.RunError:
    owner = "another process" if record is None else _owner(record)
    return schema.RunError(
      f"--workdir={self._directory}: in use by {owner}; wait for its end, stop "
      "it, or name another workdir"
    )

  def _close_file(self) -> None:
    if self._file is not None:
      self._file.close()


def _owner(record: dict[str, Any]) -> str:
  return (
    f"process {record['process']} on {record['host']}, started "
    f"{record['started']}"
  )


def _boot() -> str:
  """Boot id, which tells apart hosts of the same name; "" if unavailable."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:
    return ""


@contextlib.contextmanager
def exclusive(directory: str) -> Iterator[None]:
  """Exclusive flock on `directory`; other processes wait.

  The operating system drops the flock when the process dies. On exit the lock
  file is removed, and the directory too if empty.
  """
  path = os.path.join(directory, ".lock")
  while True:
    os.makedirs(directory, exist_ok=True)
    try:
      file = open(path, "w")
    except FileNotFoundError:  # the last holder removed the directory
      continue
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"waiting for another process in {directory}", file=sys.stderr)
      fcntl.flock(file, fcntl.LOCK_EX)
    # The last holder removes the file; an flock on a removed file is no lock.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        break
    file.close()
  try:
    yield
  finally:
    os.unlink(path)
    file.close()
    with contextlib.suppress(OSError):  # not empty: the usual case
      os.rmdir(directory)
