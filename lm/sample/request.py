"""Sampling requests and results, as plain dataclasses."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np

from lm import schema

DEFAULT_NEW_TOKENS = 256
# Most alternatives per token; sizes the buffers of the decode loop.
MAX_ALTERNATIVES = 20
# Most stop ids of a row, eos included.
MAX_ENDS = 8
# All samples of a request are held in memory until its last one ends.
MAX_SAMPLES = 1 << 16


_KEEPS_ALL = "1 keeps all ids"
_Share = Annotated[float, schema.Within(0, 1, _KEEPS_ALL, open_below=True)]


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and the sampling parameters (lm/sample/rules.py).

  The defaults draw from the model's own distribution. Each field but `prompt`
  is also a flag, with the comment above the field as help, and a field of the
  server's JSON.
  """

  # Text, to which the tokenizer prepends bos; or ids, used unchanged.
  prompt: str | Sequence[int] = ""
  # Divides the logits; 0 is greedy: the likeliest token is drawn.
  temperature: schema.NotNegative = 1.0
  # Draws from the k likeliest tokens; 0: from all.
  top_k: schema.Natural = 0
  # Draws from the likeliest tokens of this total probability.
  top_p: _Share = 1.0
  # Removes tokens less likely than this share of the likeliest.
  min_p: Annotated[float, schema.Within(0, 1, "0 keeps all ids")] = 0.0
  # Locally typical sampling (arXiv:2202.00666): the probability to keep.
  typical_p: _Share = 1.0
  # Divides logits above 0 of tokens of prompt and output, and multiplies those
  # below (arXiv:1909.05858); 1 changes nothing.
  repetition_penalty: schema.Positive = 1.0
  # Subtracted from a logit for each time that the token was drawn.
  frequency_penalty: float = 0.0
  # Subtracted once from the logit of each token drawn.
  presence_penalty: float = 0.0
  # Added to the logits of these ids; a flag is ID:VALUE.
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  # Ids never drawn.
  forbidden: Sequence[int] = ()
  # Applies min-p, top-k, top-p and typical before the temperature, as llama.cpp
  # does.
  temperature_last: bool = False
  # Most tokens to draw; None: 256, or the rest of the context if shorter.
  max_new_tokens: schema.Natural | None = None
  # No stop id or eos is drawn before this many tokens.
  min_tokens: schema.Natural = 0
  # Stop strings: the text ends before the first one completed.
  stop: Sequence[str] = ()
  # Stop ids besides eos.
  stop_ids: Sequence[int] = ()
  # Sample i of the request has the noise of `seed` + i.
  seed: schema.Seed = 0
  # Continuations of the prompt.
  n_samples: schema.Count = 1
  # Number of likeliest ids to report for each token drawn.
  alternatives: schema.Natural = 0
  # Reports log-probabilities after the rules, not the model's own.
  processed: bool = False
  # The prompt is read in both directions; for a model trained so (prefix LM,
  # span corruption): any other model writes noise.
  bidirectional_prompt: bool = False


# Fields without a single number; checked by `_check_sequences`.
_SEQUENCES = ("prompt", "logit_bias", "forbidden", "stop", "stop_ids")


@dataclasses.dataclass(frozen=True)
class Alternative:
  """A likely id, with the natural log-probability."""

  id: int
  log_probability: float


@dataclasses.dataclass(frozen=True)
class Result:
  """The continuation of a sample.

  `token_ids` includes a final stop id or eos; `text` excludes the stop id, and
  ends before a stop string. `log_probabilities` are natural, an entry per
  token, from the raw logits unless the request sets `processed`.
  `alternatives` lists the likeliest ids at each token, likeliest first.

  Finish reasons: "eos" covers every stop id, "stop" a stop string. "error"
  means NaN logits, and the last token is meaningless. "cancelled" means
  `Engine.cancel`.
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
  """Streaming output of a job: tokens and text since the previous piece.

  `text` holds whole characters that cannot begin a stop string any more, and
  may lag behind the tokens. Only the last piece has a `result`.
  """

  job: int
  text: str
  token_ids: list[int]
  log_probabilities: list[float]
  alternatives: list[list[Alternative]]
  result: Result | None


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A possible next token.

  `rank` counts from 1 by the model's own logits; `cumulative` is the model's
  probability of all ids up to this rank. `stages` maps each of `rules.STAGES`,
  in order, to the id's probability after the stage, 0 once removed.
  """

  id: int
  piece: str
  rank: int
  probability: float
  cumulative: float
  stages: dict[str, float]


@dataclasses.dataclass(frozen=True)
class NextToken:
  """Next-token distribution: `candidates` by rank, `entropy` of the raw
  distribution in bits, and the id `chosen` by the request's rules and seed.
  `chosen` may rank below all `candidates`.
  """

  prompt_ids: list[int]
  candidates: list[Candidate]
  entropy: float
  chosen: Candidate


@dataclasses.dataclass(frozen=True)
class Masked:
  """A masked position: the likeliest ids for it, likeliest first, and the
  entropy of the distribution in bits. `place` counts tokens from 0, the bos.
  """

  place: int
  candidates: list[Alternative]
  entropy: float


@dataclasses.dataclass(frozen=True)
class Score:
  """Log-probabilities of a text: lists with an entry per scored token.

  Text: the first token is conditioned on bos. Ids: the first id is not scored.
  `log_probabilities` are natural; `ranks` count from 1. `alternatives` are the
  likeliest ids at each token.
  """

  token_ids: list[int]
  pieces: list[str]
  log_probabilities: list[float]
  ranks: list[int]
  alternatives: list[list[Alternative]]
  n_bytes: int

  @property
  def total(self) -> float:
    """Natural log-probability of the text: the sum over all tokens."""
    return math.fsum(self.log_probabilities)


def check(request: Request, n_ids: int) -> None:
  """Validates a request; raises ConfigError on the first invalid field."""
  r = request
  for name, hint in schema.hints(Request).items():
    if name not in _SEQUENCES:
      schema.check_types(getattr(r, name), hint, name)
  _check_sequences(r, n_ids)
  most = min(MAX_ALTERNATIVES, n_ids)
  for name, holds, rule in (
    (
      "min_tokens",
      r.max_new_tokens is None or r.min_tokens <= r.max_new_tokens,
      f"must be at most {r.max_new_tokens}, the most tokens to draw",
    ),
    (
      "n_samples",
      r.n_samples <= MAX_SAMPLES,
      f"must be at most {MAX_SAMPLES}, since all are held in memory; ask again "
      "from a later seed for more",
    ),
    (
      "seed",
      r.seed + r.n_samples <= 2**32,
      f"must be at most {2**32 - r.n_samples}, so that "
      f"{schema.counted(r.n_samples, 'sample')} have seeds below 2**32",
    ),
    ("alternatives", r.alternatives <= most, f"must be at most {most}"),
  ):
    schema.require(holds, name, getattr(r, name), rule)


def _check_sequences(request: Request, n_ids: int) -> None:
  def refuse(name: str, value: object, rule: str):
    raise schema.ConfigError(f"{name}={schema.shown(value)}: {rule}")

  if isinstance(request.prompt, str):
    schema.check_text("prompt", request.prompt)
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
    schema.check_text("stop", text)
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
