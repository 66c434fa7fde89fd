"""Files of a run: whole or absent, in directories that can be written, and in
one owner's hands. Paths are local, or those of an object store (gs://, s3://).
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from lm import config as config_lib

T = TypeVar("T")

# What reads each object store, beside etils and TensorStore.
_STORES = {"gs": "gcsfs", "s3": "s3fs"}


def user_path(text: str, name: str) -> str:
  """The path that `text` spells: `~` is the user's home.

  Raises ConfigError, naming the flag or field `name`, on an empty path, and on
  an object store that is unknown or whose package is not installed.
  """
  if not text:
    raise config_lib.ConfigError(f"{name}={text!r}: empty; name a path")
  scheme, found, _ = text.partition("://")
  if not found:
    return os.path.expanduser(text)
  if scheme not in _STORES:
    raise config_lib.ConfigError(
      f"{name}={text}: object stores are gs:// and s3://; write a path of this "
      "machine without a scheme"
    )
  package = _STORES[scheme]
  if importlib.util.find_spec(package) is None:
    raise config_lib.ConfigError(
      f"{name}={text}: needs the package {package}: pip install {package}"
    )
  return text


def is_local(path: Any) -> bool:
  return "://" not in os.fspath(path)


def local_path(text: str, name: str) -> str:
  """`user_path` for what must lie on this machine; else ConfigError."""
  if not is_local(text):
    raise config_lib.ConfigError(
      f"{name}={text}: must lie on a disk of this machine; object stores are "
      "for run directories"
    )
  return user_path(text, name)


def check_directory(path: str, name: str) -> None:
  """Raises ConfigError, naming the flag or field `name`, unless files can be
  written in the directory `path`, which need not exist. Writes nothing.
  """
  if not is_local(path):
    return
  try:
    os.path.abspath(path).encode()
  except UnicodeEncodeError as error:
    raise config_lib.ConfigError(
      f"{name}={path[:100]}: its name is not UTF-8, as TensorStore wants; name "
      "another directory"
    ) from error
  try:
    nearest = pathlib.Path(path).absolute()
    while not _is_there(nearest):
      nearest = nearest.parent
    if not nearest.is_dir():
      raise config_lib.ConfigError(
        f"{name}={path}: {nearest} is not a directory; name another"
      )
    if not os.access(nearest, os.W_OK | os.X_OK):
      raise config_lib.ConfigError(
        f"{name}={path}: {nearest} cannot be written; name a directory of yours"
      )
  except (OSError, ValueError) as error:  # a name too long, a NUL
    said = getattr(error, "strerror", None) or error
    raise config_lib.ConfigError(f"{name}={path[:100]}: {said}") from error


def _is_there(path: Any) -> bool:
  """As `os.path.lexists`, but raises OSError on what cannot be a name."""
  try:
    os.lstat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def check_output(path: str, name: str) -> None:
  """Raises ConfigError unless the file `path` can be written in a directory
  that is there. Writes nothing.
  """
  directory = os.path.dirname(path) or "."
  try:
    _is_there(f"{path}.{os.getpid()}.partial")  # as `replace` calls it first
  except OSError as error:
    raise config_lib.ConfigError(
      f"{name}={path[:100]}: {error.strerror}"
    ) from error
  if not os.path.isdir(directory):
    raise config_lib.ConfigError(
      f"{name}={path}: no directory {directory!r}; create it"
    )
  if os.path.isdir(path) or not os.access(directory, os.W_OK):
    raise config_lib.ConfigError(
      f"{name}={path}: cannot be written; name a file in a directory of yours"
    )


def replace(path: Any, content: str | bytes) -> None:
  """Writes a file whole or not at all: a reader finds the old one or this.

  `path` is an `epath.Path` or a local path. Of several processes that write
  the same file at once the last one stays.
  """
  from etils import epath

  path = epath.Path(path)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  try:
    if isinstance(content, str):
      content = content.encode()
    partial.write_bytes(content)
    partial.replace(path)
  except BaseException as error:
    partial.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.filename is None:
      error.filename = os.fspath(path)  # a full disk does not say for whom
    raise


# --- reading: damage, or the world's failure ----------------------------------


class Damaged(config_lib.RunError):
  """A file that is not what was written."""


# Seconds between the tries of a read that fails for an outside reason.
_PAUSES = (1.0, 4.0)
# How TensorStore's errors begin, and those that tell of wrong contents; an
# INVALID_ARGUMENT comes without its name.
_STATUS = re.compile(r"(?:([A-Z_]{5,}): |Error (?:opening|reading|decoding) )")
_CORRUPT = {
  *("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND"),
  *("FAILED_PRECONDITION", None),
}


# Where an error of TensorStore has the operating system's number.
_NUMBER = re.compile(r"os_error_code='(\d+)'|OS error (\d+)")


def system_error(error: BaseException | None, path: str) -> OSError | None:
  """The operating system's error about `path` that TensorStore's tells of."""
  if (found := _NUMBER.search(str(error))) is None:
    return None
  code = int(found[1] or found[2])
  return OSError(code, os.strerror(code), path)


def reason(error: BaseException | None) -> str | None:
  """`corrupt` where an error says that files are not what was written,
  `outside` where a disk, a network or memory failed; None: it says neither.

  Looks at the errors that caused this one, too.
  """
  found = None
  while error is not None:
    system = system_error(error, "") or error
    if isinstance(system, OSError | MemoryError) and not isinstance(
      system, FileNotFoundError
    ):
      return "outside"
    if isinstance(
      error,
      FileNotFoundError
      | UnicodeDecodeError
      | json.JSONDecodeError
      | KeyError
      | EOFError,
    ):
      found = "corrupt"
    elif status := _STATUS.match(str(error)):
      if status[1] not in _CORRUPT:
        return "outside"
      found = "corrupt"
    error = error.__cause__ or error.__context__
  return found


def attempt(
  path: Any,
  read: Callable[[], T],
  corrupt: tuple[type[Exception], ...] = (),
) -> T:
  """`read()` of what lies at `path`, tried again where it failed for an outside
  reason.

  Raises Damaged, or RunError where nothing says that the file is to blame;
  errors of the devices are let through. Errors of the types `corrupt` say so,
  unless they have an outside reason.
  """
  for pause in (*_PAUSES, None):
    try:
      return read()
    except config_lib.UserError:
      raise
    except Exception as error:
      if type(error).__name__ == "JaxRuntimeError":  # jax is not imported here
        raise
      why, said = reason(error), first_line(error)
      if why == "corrupt" or (why is None and isinstance(error, corrupt)):
        raise Damaged(f"{path} is damaged: {said}") from error
      if why is None or pause is None:
        raise config_lib.RunError(
          f"{path} could not be read: {said}. Nothing was moved; once the "
          "cause is gone, the same command goes on"
        ) from error
      print(f"{path}: {said}; trying again in {pause:g} s", file=sys.stderr)
      time.sleep(pause)
  raise AssertionError


def first_line(error: BaseException) -> str:
  """Of the cause behind it all, some 300 characters at most: libraries add
  whole specifications.
  """
  while error.__cause__ is not None:
    error = error.__cause__
  line = re.split(r" \[(?:tensorstore_spec|source)", str(error).split("\n")[0])[
    0
  ]
  # What the operating system said stands at the end, behind many paths.
  if (system := system_error(error, "")) is not None:
    line = f"{system.strerror}: {line}"
  if len(line) > 300:
    line = f"{line[:150]} ... {line[-150:]}"
  return f"{type(error).__name__}: {line}"


# --- one owner ----------------------------------------------------------------

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
    if is_local(directory):
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
    if not is_local(self._directory):
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

  def _in_use(self, record: dict[str, Any] | None) -> config_lib.RunError:
    owner = "another process" if record is None else _owner(record)
    return config_lib.RunError(
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
