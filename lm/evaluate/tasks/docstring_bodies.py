"""Data of the task `docstring_bodies`, for lm-evaluation-harness.

  python -m lm.evaluate --workdir=RUN --tasks=docstring_bodies

The questions are the held-out pairs of `instruct:python_stdlib:validation`: a
model trained on `tfds:python_stdlib:train` has seen none of them.
"""

import hashlib
import json
from typing import Any

from lm import config as config_lib
from lm import files
from lm.data import instructions, sources

N_CHOICES = 4


def load(
  stdlib_cache_dir: str | None = None, path: str | None = None, **metadata: Any
) -> dict[str, Any]:
  """The split `test`, as lm-eval's `custom_dataset`.

  `stdlib_cache_dir` is where the corpus is built (default: DataConfig's). A
  JSONL file `path` is written, if given.
  """
  import datasets

  del metadata
  config = config_lib.DataConfig()
  if stdlib_cache_dir is not None:
    config.cache_dir = stdlib_cache_dir
  found = questions(config)
  if path is not None:
    lines = [json.dumps(one, ensure_ascii=False) for one in found]
    files.replace(path, "\n".join([*lines, ""]))
  return {"test": datasets.Dataset.from_list(found)}


def questions(config: config_lib.DataConfig) -> list[dict[str, Any]]:
  """A question per pair: `head`, four `choices`, and the index `gold`.

  The wrong bodies are those of the pairs next in length, so that length tells
  little; `gold` follows from the text alone.
  """
  source = instructions.InstructionSource(
    "instruct:python_stdlib:validation", "python_stdlib", "validation", config
  )
  pairs = [_pair(source[i]) for i in range(len(source))]
  order = sorted(pairs, key=lambda pair: (len(pair[1]), pair))
  found = []
  for i, (head, body) in enumerate(order):
    near = sorted(range(len(order)), key=lambda j: (abs(i - j), j))
    others = dict.fromkeys(order[j][1] for j in near if order[j][1] != body)
    choices = [*others][: N_CHOICES - 1]
    digest = hashlib.sha256(head.encode()).digest()
    gold = digest[0] % N_CHOICES
    choices.insert(gold, body)
    # Not by length: the first questions (--limit) should be like all.
    found.append((digest, {"head": head, "choices": choices, "gold": gold}))
  return [question for _, question in sorted(found, key=lambda pair: pair[0])]


def _pair(conversation: sources.Conversation) -> tuple[str, str]:
  """(signature and docstring, body) of a pair of signature and docstring, and
  signature and body.
  """
  head, function = (m["content"] for m in conversation.messages)
  lines, answer = head.split("\n"), function.split("\n")
  same = [a == b for a, b in zip(lines, answer, strict=False)]
  n = same.index(False)
  return head, "\n".join(answer[n:])
