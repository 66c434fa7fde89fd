"""The provenance of a result: checkpoint, tokenizer, code, date."""

import datetime
import importlib.metadata
import json
import os
import subprocess
from typing import Any

import lm
from lm import checkpoint
from lm.data import tokenizer as tokenizer_lib

END_OF_DOCUMENT = (
  "bos is read and not scored. eos is scored: nll, n_tokens, loss, perplexity, "
  "word_perplexity and bits_per_byte include it, and it stands for 0 bytes. "
  "What is named without_eos leaves it out of both sums; "
  "lm-evaluation-harness cuts windows without it, too (lm/data/windows.py)."
)


def of(
  meta: checkpoint.Meta,
  tokenizer: tokenizer_lib.Tokenizer,
  adapter: str | None,
) -> dict[str, Any]:
  """Returns, for JSON, the origin of a checkpoint's scores: code, tokenizer,
  adapter, training sources, treatment of eos, and the time of the call.
  """
  return {
    "date": now(),
    "code": code(),
    "tokenizer": {
      "kind": json.loads(meta.tokenizer)["kind"],
      "fingerprint": tokenizer.fingerprint,
      "size": tokenizer.size,
    },
    "adapter": adapter,
    "trained_on": {
      "sources": list(meta.trained_on),
      "fingerprint": meta.fingerprint,
    },
    "end_of_document": END_OF_DOCUMENT,
  }


def now() -> str:
  """Returns the time in UTC, in ISO 8601 to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def code() -> dict[str, str | None]:
  """Returns the git commit of this code, with the suffix `-dirty` if tracked
  files were changed, and versions of packages; None for an unknown value.
  """
  return {
    "commit": commit(os.path.dirname(os.path.dirname(lm.__file__))),
    "jax": _version("jax"),
    "next-token": _version("next-token"),
  }


def commit(root: str) -> str | None:
  """Returns the commit if `root` is the top of a git checkout, else None: a
  package installed below a checkout of another project has no commit.
  """
  git = ["git", "--no-optional-locks", "-C", root]
  # --exclude ignores tags: the output is the hash alone.
  describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  try:
    top = _output([*git, "rev-parse", "--show-toplevel"])
    if os.path.realpath(top) != os.path.realpath(root):
      return None
    return _output([*git, *describe])
  except (OSError, subprocess.SubprocessError):
    return None


def _output(command: list[str]) -> str:
  done = subprocess.run(
    command, capture_output=True, text=True, check=True, timeout=20
  )
  return done.stdout.strip()


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
