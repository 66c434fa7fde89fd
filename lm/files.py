"""Files: whole or absent, in directories that can be written, and whether one
that cannot be read is damaged. Paths are local, or of an object store (gs://,
s3://).
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lm import schema

T = TypeVar("T")

# What reads each object store, beside etils and TensorStore.
_STORES = {"gs": "gcsfs", "s3": "s3fs"}


def user_path(text: str, name: str) -> str:
  """The path that `text` spells: `~` is the user's home.

  Raises ConfigError, naming the flag or field `name`, on an empty path, and on
  an object store that is unknown or whose package is not installed.
  """
  if not text:
    raise schema.ConfigError(f"{name}={text!r}: empty; name a path")
  scheme, found, _ = text.partition("://")
  if not found:
    return os.path.expanduser(text)
  if scheme not in _STORES:
    raise schema.ConfigError(
      f"{name}={text}: object stores are gs:// and s3://; write a path of this "
      "machine without a scheme"
    )
  package = _STORES[scheme]
  if importlib.util.find_spec(package) is None:
    raise schema.ConfigError(
      f"{name}={text}: needs the package {package}: pip install {package}"
    )
  return text


def is_local(path: Any) -> bool:
  return "://" not in os.fspath(path)


def local_path(text: str, name: str) -> str:
  """`user_path` for what must lie on this machine; else ConfigError."""
  if not is_local(text):
    raise schema.ConfigError(
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
    raise schema.ConfigError(
      f"{name}={path[:100]}: its name is not UTF-8, as TensorStore wants; name "
      "another directory"
    ) from error
  try:
    nearest = pathlib.Path(path).absolute()
    while not _is_there(nearest):
      nearest = nearest.parent
    if not nearest.is_dir():
      raise schema.ConfigError(
        f"{name}={path}: {nearest} is not a directory; name another"
      )
    if not os.access(nearest, os.W_OK | os.X_OK):
      raise schema.ConfigError(
        f"{name}={path}: {nearest} cannot be written; name a directory of yours"
      )
  except (OSError, ValueError) as error:  # a name too long, a NUL
    said = getattr(error, "strerror", None) or error
    raise schema.ConfigError(f"{name}={path[:100]}: {said}") from error


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
    raise schema.ConfigError(
      f"{name}={path[:100]}: {error.strerror}"
    ) from error
  if not os.path.isdir(directory):
    raise schema.ConfigError(
      f"{name}={path}: no directory {directory!r}; create it"
    )
  if os.path.isdir(path) or not os.access(directory, os.W_OK):
    raise schema.ConfigError(
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


class Damaged(schema.RunError):
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
    except schema.UserError:
      raise
    except Exception as error:
      if type(error).__name__ == "JaxRuntimeError":  # jax is not imported here
        raise
      why, said = reason(error), first_line(error)
      if why == "corrupt" or (why is None and isinstance(error, corrupt)):
        raise Damaged(f"{path} is damaged: {said}") from error
      if why is None or pause is None:
        raise schema.RunError(
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


# --- JSON that knows whether it is whole --------------------------------------


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
  """`content` with a digest of itself, to be written as JSON."""
  return {**content, "digest": json_digest(content)}


def unseal(raw: bytes, without: Iterable[str] = ()) -> dict[str, Any]:
  """The content of sealed JSON.

  One with the keys `without` may have no digest: files had none once. Raises
  ValueError where it is not what was written.
  """
  content = json.loads(raw)
  if not isinstance(content, dict):
    raise ValueError("not an object")
  if set(content) == set(without):
    return content
  if content.pop("digest", None) != json_digest(content):
    raise ValueError("its digest is another")
  return content


def json_digest(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
