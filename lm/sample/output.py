"""Sampler output as text for a terminal, and as JSON for programs."""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterable
from typing import Any

from lm.data import tokenizer as tokenizer_lib
from lm.sample import request as request_lib


def printable(text: str) -> str:
  """`text` safe for a terminal: control characters become escapes."""
  return "".join(
    c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text
  )


def write(text: str, bold: bool = False) -> None:
  """Writes to stdout and flushes.

  Only on a terminal is `text` escaped by `printable` and set in bold.
  """
  if sys.stdout.isatty():
    text = printable(text)
    text = f"\x1b[1m{text}\x1b[0m" if bold else text
  print(text, end="", flush=True)


def dumps(value: Any) -> str:
  """JSON, dataclasses included; NaN and infinities become null."""
  return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = {
      field.name: getattr(value, field.name)
      for field in dataclasses.fields(value)
    }
  if isinstance(value, dict):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


@dataclasses.dataclass(frozen=True)
class Choice:
  """A candidate id and the id's probability."""

  id: int
  piece: str
  probability: float


def choices(
  tokenizer: tokenizer_lib.Tokenizer,
  alternatives: Iterable[request_lib.Alternative],
) -> list[Choice]:
  return [
    Choice(a.id, tokenizer.piece(a.id), math.exp(a.log_probability))
    for a in alternatives
  ]


def tokens(
  said: request_lib.Score | request_lib.Result,
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[dict[str, Any]]:
  """One dict per token; `running` is the cumulative log-probability, the token
  included. Tokens of a `Score` also have a rank.
  """
  logs = said.log_probabilities
  rows = [
    {
      "id": token,
      "piece": tokenizer.piece(token),
      "probability": math.exp(log),
      "log_probability": log,
      "bits": -log / math.log(2),
      "running": running,
      "alternatives": choices(tokenizer, others),
    }
    for token, log, running, others in zip(
      said.token_ids,
      logs,
      itertools.accumulate(logs),
      said.alternatives or [[]] * len(logs),
      strict=True,
    )
  ]
  if isinstance(said, request_lib.Score):
    for row, rank in zip(rows, said.ranks, strict=True):
      row["rank"] = rank
  return rows


def results(
  found: Iterable[request_lib.Result], tokenizer: tokenizer_lib.Tokenizer
) -> list[dict[str, Any]]:
  """Continuations as dicts, for JSON."""
  return [
    {
      "request": result.request,
      "seed": result.seed,
      "text": result.text,
      "finish_reason": result.finish_reason,
      "tokens": tokens(result, tokenizer),
    }
    for result in found
  ]


def refuse_nan(where: str) -> int:
  """Says on stderr where logits are NaN; returns the exit code, 1."""
  print(f"error: NaN logits {where}", file=sys.stderr)
  return 1
