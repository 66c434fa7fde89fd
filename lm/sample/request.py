"""What is asked of a sampler and what it answers: plain data."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from lm import schema
from lm.data import tokenizer as tokenizer_lib

DEFAULT_NEW_TOKENS = 256
# Alternatives per token at most: the decode loop has room for so many.
MAX_ALTERNATIVES = 20
# Ids that end a row at most, eos among them.
MAX_ENDS = 4
# All samples of a request are held in memory until its last one ends.
MAX_SAMPLES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and the rules by which it is continued (lm/sample/rules.py).

  The defaults draw from the model's own distribution.
  """

  # Text, in front of which the tokenizer's bos is put; or ids, as they are.
  prompt: str | Sequence[int] = ""
  # 0 is greedy.
  temperature: float = 1.0
  # 0 keeps every id.
  top_k: int = 0
  top_p: float = 1.0
  # Removes ids less likely than this share of the likeliest.
  min_p: float = 0.0
  # Locally typical sampling (arXiv:2202.00666); 1 keeps every id.
  typical_p: float = 1.0
  # Over prompt and output (arXiv:1909.05858); 1 changes nothing.
  repetition_penalty: float = 1.0
  # Over the output: for each time that an id was drawn, and once.
  frequency_penalty: float = 0.0
  presence_penalty: float = 0.0
  # Added to the logits of these ids.
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  # Ids that are never drawn.
  forbidden: Sequence[int] = ()
  # Cuts before it divides by the temperature, as llama.cpp does.
  temperature_last: bool = False
  # None: 256, or what the context leaves if that is less.
  max_new_tokens: int | None = None
  # Tokens before which no end is drawn.
  min_tokens: int = 0
  # Texts that end the continuation, which is cut before them.
  stop: Sequence[str] = ()
  # Ids that end it besides eos.
  stop_ids: Sequence[int] = ()
  seed: schema.Seed = 0
  # Sample i is what a request of one sample with `seed + i` gets.
  n_samples: int = 1
  # Likeliest ids to report for each token drawn.
  alternatives: int = 0
  # Log-probabilities after the rules, not the model's own.
  processed: bool = False
  # The prompt's tokens see one another both ways, as in a prefix LM.
  bidirectional_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Alternative:
  """An id that might have been drawn, and its natural log-probability."""

  id: int
  log_probability: float


@dataclasses.dataclass(frozen=True)
class Result:
  """One continuation.

  `token_ids` ends with the id that ended it, where one did; `text` has no trace
  of it, nor of a stop text and what was drawn after it. `log_probabilities` are
  natural, one per token, of the raw logits unless the request says `processed`;
  `alternatives` has the likeliest ids of each place, likeliest first.

  `error` is a row whose logits became NaN: its last token means nothing.
  `cancelled` is a row that was called off.
  """

  request: Request
  seed: int
  text: str
  token_ids: list[int]
  log_probabilities: list[float]
  finish_reason: Literal["eos", "stop", "length", "error", "cancelled"]
  alternatives: list[list[Alternative]] = dataclasses.field(
    default_factory=list
  )


@dataclasses.dataclass(frozen=True)
class Piece:
  """What a row gained since its last piece.

  `text` is whole characters of which no stop text can take anything back, so
  it may lag behind the tokens. `result` comes with the last piece.
  """

  job: int
  text: str
  token_ids: list[int]
  log_probabilities: list[float]
  alternatives: list[list[Alternative]]
  result: Result | None


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One possible next token.

  `rank` counts from 1 by the model's own logits; `cumulative` is the model's
  probability of all ids up to this rank. `stages` tells, for each stage of the
  rules by name and in order ("raw", "penalties", "temperature", "min_p",
  "top_k", "top_p", "typical_p"), the probability there, 0 where it is removed.
  """

  id: int
  piece: str
  rank: int
  probability: float
  cumulative: float
  stages: dict[str, float]


@dataclasses.dataclass(frozen=True)
class NextToken:
  """The distribution of the next token: `candidates` by rank; entropy of the
  raw distribution in bits; the id that the request's rules and seed draw here,
  and its own candidate, which may rank below the others.
  """

  prompt_ids: list[int]
  candidates: list[Candidate]
  entropy: float
  chosen: Candidate


@dataclasses.dataclass(frozen=True)
class Score:
  """How likely a text is: lists with an entry for each of its tokens.

  A text's first is conditioned on bos; of ids the first is not scored.
  `log_probabilities` are natural; `ranks` count from 1. `alternatives` are the
  likeliest ids of each place.
  """

  token_ids: list[int]
  pieces: list[str]
  log_probabilities: list[float]
  ranks: list[int]
  alternatives: list[list[Alternative]]
  n_bytes: int

  @property
  def total(self) -> float:
    """Natural log-probability of the whole: the sum of conditionals."""
    return math.fsum(self.log_probabilities)


def check(request: Request, n_ids: int) -> None:
  """Raises ConfigError on the first field that breaks its rule."""
  r = request
  hints = schema.hints(Request)
  for name in ("prompt", "logit_bias", "forbidden", "stop", "stop_ids"):
    hints.pop(name)
  for name, hint in hints.items():
    schema.check_types(getattr(request, name), hint, f"request.{name}")
  _check_sequences(request, n_ids)
  share = "must be in (0, 1]; 1 keeps all ids"
  for name, holds, rule in (
    (
      "temperature",
      r.temperature >= 0,
      "must be at least 0; 0 is greedy",
    ),
    ("top_k", r.top_k >= 0, "must be at least 0; 0 keeps all ids"),
    ("top_p", 0 < r.top_p <= 1, share),
    ("min_p", 0 <= r.min_p <= 1, "must be in [0, 1]; 0 keeps all ids"),
    ("typical_p", 0 < r.typical_p <= 1, share),
    (
      "repetition_penalty",
      r.repetition_penalty > 0,
      "must be above 0; 1 changes nothing",
    ),
    (
      "max_new_tokens",
      r.max_new_tokens is None or r.max_new_tokens >= 0,
      "must be at least 0, or None for what the context leaves",
    ),
    (
      "min_tokens",
      0 <= r.min_tokens
      and (r.max_new_tokens is None or r.min_tokens <= r.max_new_tokens),
      "must be at least 0 and at most max_new_tokens",
    ),
    (
      "n_samples",
      1 <= r.n_samples <= MAX_SAMPLES,
      f"must be at least 1 and at most {MAX_SAMPLES}, since all are held in "
      "memory; ask again from a later seed for more",
    ),
    (
      "seed",
      0 <= r.seed <= 2**32 - max(r.n_samples, 1),
      "must be at least 0, and seed + n_samples at most 2**32",
    ),
    (
      "alternatives",
      0 <= r.alternatives <= min(MAX_ALTERNATIVES, n_ids),
      f"must be in [0, {min(MAX_ALTERNATIVES, n_ids)}]",
    ),
  ):
    if not holds:
      raise schema.ConfigError(f"{name}={getattr(r, name)!r}: {rule}")


def _check_sequences(request: Request, n_ids: int) -> None:
  def refuse(name: str, value: object, rule: str):
    raise schema.ConfigError(f"{name}={value!r}: {rule}")

  if isinstance(request.prompt, str):
    tokenizer_lib.check_text("prompt", request.prompt)
  elif not isinstance(request.prompt, Sequence) or not all(
    isinstance(i, numbers.Integral) for i in request.prompt
  ):
    refuse("prompt", request.prompt, "must be text, or a sequence of ids")
  for name in ("stop", "forbidden", "stop_ids"):
    value = getattr(request, name)
    if isinstance(value, str) or not isinstance(value, Sequence):
      refuse(name, value, "must be a sequence; put it into a list")
  for text in request.stop:
    if not isinstance(text, str) or not text:
      refuse("stop", text, "must be texts of at least one character")
    tokenizer_lib.check_text("stop", text)
  if len(request.stop_ids) >= MAX_ENDS:
    refuse("stop_ids", request.stop_ids, f"at most {MAX_ENDS - 1} ids")
  if not isinstance(request.logit_bias, Mapping):
    refuse("logit_bias", request.logit_bias, "must map ids to floats")
  for name in ("forbidden", "stop_ids", "logit_bias"):
    for i in getattr(request, name):
      if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n_ids:
        refuse(name, i, f"ids must be integers in [0, {n_ids})")
  if len(set(request.forbidden)) >= n_ids:
    refuse("forbidden", "all ids", "must leave one to draw")
  for i, bias in request.logit_bias.items():
    number = isinstance(bias, int | float) and not isinstance(bias, bool)
    if not number or not abs(bias) <= float(np.finfo(np.float32).max):
      refuse(f"logit_bias[{i}]", bias, "must be a finite float32")
