"""Files of a run: whole or absent, in directories that can be written, and in
one owner's hands. Paths are local, or those of an object store (gs://, s3://).
"""

import importlib.util
import os
import pathlib
from typing import Any

from lm import config as config_lib

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


def check_directory(path: str, name: str) -> None:
  """Raises ConfigError, naming the flag or field `name`, unless files can be
  written in the directory `path`, which need not exist. Writes nothing.
  """
  if not is_local(path):
    return
  try:
    nearest = pathlib.Path(path).absolute()
    while not os.path.lexists(nearest):
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
    raise config_lib.ConfigError(f"{name}={path[:100]}: {error}") from error


def check_output(path: str, name: str) -> None:
  """Raises ConfigError unless the file `path` can be written in a directory
  that is there. Writes nothing.
  """
  directory = os.path.dirname(path) or "."
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
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
