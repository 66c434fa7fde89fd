"""The manifest of a token store, and the files that it lists."""

import hashlib
import os
from typing import Any

from lm import files
from lm.data import arrays

# Dtype of each array; None: uint16 or uint32, by vocabulary size.
ARRAYS = {
  "tokens": None,
  "ends": "int64",
  "n_bytes": "int64",
  "names": "uint8",
  "name_ends": "int64",
}
SCORED = {"scored": "uint8"}
# Required fields. A manifest without further fields predates the digest.
_FIELDS = {
  **{"version": int, "spec": str, "source": str, "tokenizer": str},
  **{"n_tokens": int, "n_documents": int, "n_bytes": int, "files": dict},
}


def read(path: str) -> dict[str, Any]:
  """The manifest of the store at `path`; raises RunError if damaged."""
  try:
    with open(os.path.join(path, "manifest.json"), "rb") as file:
      manifest = files.unseal(file.read(), without=_FIELDS)
    if not all(isinstance(manifest.get(k), t) for k, t in _FIELDS.items()):
      raise ValueError(f"lacks one of {', '.join(_FIELDS)}")
    return manifest
  except (FileNotFoundError, NotADirectoryError) as error:
    raise arrays.damaged(path, "manifest.json is missing") from error
  except ValueError as error:
    raise arrays.damaged(path, f"manifest.json: {error}") from error


def array_dtypes(chat: bool) -> dict[str, str | None]:
  """Names and dtypes of the arrays of a store, of chats or of texts."""
  return ARRAYS | SCORED if chat else ARRAYS


def file_sizes(path: str) -> dict[str, int]:
  """Bytes of each file below `path` except the manifest, by relative path."""
  return {
    os.path.relpath(os.path.join(folder, name), path): os.path.getsize(
      os.path.join(folder, name)
    )
    for folder, _, names in os.walk(path)
    for name in names
    if name != "manifest.json"
  }


def array_metadata(path: str, chat: bool) -> dict[str, str]:
  """SHA-256 of the zarr.json (metadata) of each array."""
  found = {}
  for name in array_dtypes(chat):
    with open(os.path.join(path, name, "zarr.json"), "rb") as file:
      found[name] = hashlib.sha256(file.read()).hexdigest()
  return found
