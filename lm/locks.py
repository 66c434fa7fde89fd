"""Who may write: one owner of a run, one process at a time of a cache."""

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

# Seconds after which an owner that has not renewed its lease is taken for dead.
LEASE_SECONDS = 60.0


class Lock:
  """Holds a run directory for one owner; a second one is refused (RunError).

  The record `lock.json` says who: host, process, start. Its owner renews it;
  one that was not renewed for LEASE_SECONDS is of a dead owner. On a disk the
  owner also holds a lock of the operating system, so that on its own host its
  death is seen at once. `lost` is True once somebody else has the record, as
  after a long sleep of this process.
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
    if files.is_local(directory):
      os.makedirs(directory, exist_ok=True)
      directory = "file://" + os.path.abspath(directory)
    # Writes there can be bound to what was read before.
    self._store = tensorstore.KvStore.open(directory + "/").result()
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
    """Gives the directory back; a second call does nothing."""
    if self._released.is_set():
      return
    self._released.set()
    with self._renewing:  # not between its reading and its writing
      if not self.lost:
        with contextlib.suppress(Exception):  # the lease ends by itself
          self._store.write("lock.json", None, if_equal=self._seen).result()
    self._close_file()

  def _lock_file(self) -> bool:
    """Whether the operating system says that no process of this host, or of
    any on a shared disk, holds the directory. False where it cannot tell.
    """
    if not files.is_local(self._directory):
      return False
    self._file = open(os.path.join(self._directory, ".lock"), "w")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise self._in_use(self._read()[0]) from None
    except OSError:  # a file system without such locks
      return False
    return True

  def _take(self, alone: bool) -> None:
    """Writes the record, once the one that is there is of a dead owner."""
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
    """The record and its generation; None where there is none to be read."""
    found = self._store.read("lock.json").result()
    try:
      record = json.loads(found.value)
      _owner(record)
    except (ValueError, TypeError, KeyError):  # cut short, or there is none
      record = None
    return record, found.stamp.generation

  def _write(self) -> bool:
    """Writes the record in the place of the one last seen, and of no other."""
    content = json.dumps(self._record)
    stamp = self._store.write("lock.json", content, if_equal=self._seen)
    if generation := stamp.result().generation:
      self._seen = generation
      return True
    # An earlier write may have been done and its answer lost.
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
  """Tells apart hosts of one name, where the system says it."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:
    return ""


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
