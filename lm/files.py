"""File I/O: path checks, atomic writes, retried reads, damage detection.

Paths are local or in an object store (gs://, s3://).
"""

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from lm import schema

T = TypeVar("T")

# Package that reads each object store, beside etils and TensorStore.
_STORES = {"gs": "gcsfs", "s3": "s3fs"}


def user_path(text: str, name: str) -> str:
  """Returns the path `text` with `~` expanded to the user's home.

  Raises ConfigError, naming the flag or field `name`, on an empty path, a `~`
  of nobody, an unknown object store, or one without its package installed.
  """
  if not text:
    raise schema.ConfigError(f"{name}={text!r}: empty; name a path")
  scheme, found, _ = text.partition("://")
  if not found:
    if (path := os.path.expanduser(text)).startswith("~"):
      raise schema.ConfigError(
        f"{name}={text}: no such user; a name that begins with ~ is ./~NAME"
      )
    return path
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
  """`user_path` of a local path; raises ConfigError on an object store."""
  if not is_local(text):
    raise schema.ConfigError(
      f"{name}={text}: must lie on a disk of this machine; object stores are "
      "for run directories"
    )
  return user_path(text, name)


def check_directory(path: str, name: str) -> None:
  """Raises ConfigError, naming the flag or field `name`, unless files can be
  written in the directory `path`. The directory need not exist. Writes nothing.
  """
  check_name(path, name)
  if not is_local(path):
    return
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


def check_name(path: str, name: str) -> None:
  """Raises ConfigError, naming the flag or field `name`, if TensorStore would
  not find the local directory `path`: it wants UTF-8, and takes \\ for /.
  """
  if not is_local(path):
    return
  whole = os.path.abspath(path)
  if "\\" in whole:
    raise schema.ConfigError(
      f"{name}={path}: {whole} has a \\ in it, and TensorStore takes that for "
      "a /; name another directory"
    )
  schema.check_text(name, whole)


def check_run_directory(path: str, name: str) -> None:
  """`check_directory` of a run. Orbax lists the parts of a checkpoint by a glob
  below the absolute path: with `[x]` in it, it would find none, and save a
  checkpoint that nobody can read.
  """
  check_directory(path, name)
  whole = os.path.abspath(path) if is_local(path) else path
  if glob.has_magic(whole):
    raise schema.ConfigError(
      f"{name}={path}: {whole} has one of the characters * ? [, by which "
      "Orbax would not find its own files again; name another directory"
    )


def _is_there(path: Any) -> bool:
  """Like `os.path.lexists`, but raises OSError on an invalid file name."""
  try:
    os.lstat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def check_output(path: str, name: str) -> None:
  """Raises ConfigError, naming the flag `name`, unless the file `path` can be
  written in an existing directory. Writes nothing.
  """
  directory = os.path.dirname(path) or "."
  try:
    _is_there(_partial(path))
  except OSError as error:
    raise schema.ConfigError(
      f"{name}={path[:100]}: {error.strerror}"
    ) from error
  if not os.path.isdir(directory):
    raise schema.ConfigError(
      f"{name}={path}: no directory {directory!r}; create it"
    )
  # `replace` would put a file in the place of a device or a pipe, too.
  other = os.path.exists(path) and not os.path.isfile(path)
  if other or not os.access(directory, os.W_OK):
    raise schema.ConfigError(
      f"{name}={path}: cannot be written; name a file in a directory of yours"
    )


def check_apart(paths: Iterable[tuple[str, Any]]) -> None:
  """Raises ConfigError if two flags, of (name, path), name one file, which the
  later one would overwrite. What is no path is passed over.
  """
  known: dict[str, str] = {}
  for name, path in paths:
    if isinstance(path, str):
      other = known.setdefault(os.path.realpath(path), name)
      if other != name:
        raise schema.ConfigError(
          f"{name}={path}: is the file of {other}; name another"
        )


def replace(path: Any, content: str | bytes) -> None:
  """Atomic write by rename: a reader finds the old content or the new content.

  `path` is an `epath.Path` or a local path. If several threads, processes or
  hosts write the same file at once, the last write wins.
  """
  from etils import epath

  path = epath.Path(path)
  partial = path.with_name(_partial(path.name))
  try:
    if isinstance(content, str):
      content = content.encode()
    with named(path):
      partial.write_bytes(content)
      partial.replace(path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def named(path: Any) -> Iterator[None]:
  """An OSError inside that names no file, as of a full disk, names `path`."""
  try:
    yield
  except OSError as error:
    error.filename = error.filename or os.fspath(path)
    raise


def _partial(path: str) -> str:
  """A name for what is not yet whole, another one for each writer."""
  return f"{path}.{uuid.uuid4().hex[:8]}.partial"


# Glob of such names, and of no file that a user calls *.partial.
PARTIALS = f"*.{8 * '[0-9a-f]'}.partial"


# --- reading: damaged file, or outside failure --------------------------------


class Damaged(schema.RunError):
  """A file is corrupt: the contents differ from the contents written."""


# Seconds between the retries of a read that fails for an outside reason.
_PAUSES = (1.0, 4.0)
# Start of a TensorStore error, with the status in group 1, and the statuses
# that mean wrong contents. INVALID_ARGUMENT comes without a status name: None.
_STATUS = re.compile(r"(?:([A-Z_]{5,}): |Error (?:opening|reading|decoding) )")
_CORRUPT = {
  *("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND"),
  *("FAILED_PRECONDITION", None),
}


# The operating system's errno within the text of a TensorStore error.
_NUMBER = re.compile(r"os_error_code='(\d+)'|OS error (\d+)")


def system_error(error: BaseException | None, path: str) -> OSError | None:
  """The OSError, about `path`, whose errno a TensorStore error reports; None
  if the error reports no errno.
  """
  if (found := _NUMBER.search(str(error))) is None:
    return None
  code = int(found[1] or found[2])
  return OSError(code, os.strerror(code), path)


def reason(error: BaseException | None) -> str | None:
  """Cause of a failed read: `corrupt` if the error says that file contents are
  wrong, `outside` if a disk, a network or memory failed, None if unknown.

  Also inspects the chain of errors behind `error`.
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
  """Returns `read()`, which reads `path`; retries after failures of a disk, a
  network or memory.

  Raises Damaged if the file is corrupt, RunError for any other cause. Device
  errors pass through. Errors of the types `corrupt` mean a corrupt file, unless
  `reason` finds an outside cause.
  """
  for pause in (*_PAUSES, None):
    try:
      return read()
    except schema.UserError:
      raise
    except Exception as error:
      if type(error).__name__ == "JaxRuntimeError":  # avoids importing jax
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
  """First line of the root cause of `error`, cut to some 300 characters and
  without the spec that TensorStore appends.
  """
  while error.__cause__ is not None:
    error = error.__cause__
  line = re.split(r" \[(?:tensorstore_spec|source)", str(error).split("\n")[0])[
    0
  ]
  # The operating system's message stands at the end, behind many paths.
  if (system := system_error(error, "")) is not None:
    line = f"{system.strerror}: {line}"
  if len(line) > 300:
    line = f"{line[:150]} ... {line[-150:]}"
  return f"{type(error).__name__}: {line}"


# What reading JSON of another form than it should have raises.
MALFORMED = (
  *(ValueError, KeyError, TypeError, AttributeError),
  *(OverflowError, RecursionError),
)


# --- JSON sealed with a digest ------------------------------------------------


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
  """`content` with a digest of `content` added, to be written as JSON."""
  return {**content, "digest": json_digest(content)}


def unseal(raw: bytes, without: Iterable[str] = ()) -> dict[str, Any]:
  """Returns the content of sealed JSON after checking the digest.

  JSON with exactly the keys `without` is accepted without a digest: older files
  have none. Raises ValueError if the JSON or the digest is wrong.
  """
  content = json.loads(raw)
  if not isinstance(content, dict):
    raise ValueError("not an object")
  if set(content) == set(without):
    return content
  if content.pop("digest", None) != json_digest(content):
    raise ValueError("its digest is another")
  return content


def json_digest(content: Any) -> str:
  """Hash of what JSON can hold, 16 hexadecimal digits."""
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
