"""Response bodies: OpenAI's formats for completions and chat completions.

A token is named by its text; by `bytes:\\xe2\\x80`, as OpenAI does, if the
bytes are not whole characters; or by its reserved name, e.g. `<eos>`. The lists
hold all drawn tokens, including the stop id and tokens cut off by a stop text:
log-probabilities then sum to the log-probability of the drawn tokens.
"""

import abc
import json
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from lm.data import tokenizer as tokenizer_lib
from lm.sample import request as request_lib
from lm.sample import stream as stream_lib
from lm.serve import fields, protocol

# OpenAI's number for a log-probability of minus infinity.
LEAST = -9999.0
_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}

# List items per call of json.dumps; see `dump`.
_PIECE = 256

Object = dict[str, Any]


def token_bytes(tokenizer: tokenizer_lib.Tokenizer, i: int) -> list[int]:
  """Bytes of token `i`; empty for reserved ids and vocabulary padding."""
  return list(tokenizer.decode_bytes([i])) if i < tokenizer.size else []


def token_name(tokenizer: tokenizer_lib.Tokenizer, i: int) -> str:
  content = bytes(token_bytes(tokenizer, i))
  if not content:
    return tokenizer.piece(i) or f"<{i}>"
  try:
    return content.decode()
  except UnicodeDecodeError:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Answer(abc.ABC):
  """Builds a response, whole or as stream chunks; a subclass per endpoint."""

  object: str
  chunk_object: str
  prefix: str

  def __init__(
    self, plan: protocol.Plan, tokenizer: tokenizer_lib.Tokenizer, model: str
  ):
    self.plan, self.tokenizer = plan, tokenizer
    self._head = {
      "id": f"{self.prefix}-{uuid.uuid4().hex}",
      "created": int(time.time()),
      "model": model,
    }
    self.n_choices = len(plan.requests) * plan.n
    self._n_drawn = 0

  def whole(
    self, results: Sequence[request_lib.Result | None], scores: Sequence[Any]
  ) -> Object:
    """Builds the whole response from a Result per choice (None if no tokens
    were requested) and a Score per prompt (empty if prompts are not scored).
    """
    choices = []
    for i, result in enumerate(results):
      score = scores[i // self.plan.n] if scores else None
      choices.append(self._choice(i, result, score))
      self._n_drawn += len(result.token_ids) if result else 0
    return {
      "object": self.object,
      **self._head,
      "choices": choices,
      "usage": self._usage(),
    }

  @abc.abstractmethod
  def opening(self, scores: Sequence[Any]) -> list[Object]:
    """Stream chunks before the first token."""

  @abc.abstractmethod
  def chunks(self, i: int, piece: request_lib.Piece) -> list[Object]:
    """Stream chunks for a Piece of choice `i`; empty if nothing is ready."""

  def closing(self) -> list[Object]:
    """The chunk with the token usage, if the client requested usage."""
    if not self.plan.usage:
      return []
    return [{**self._chunk([]), "usage": self._usage()}]

  @abc.abstractmethod
  def _choice(self, i: int, result: Any, score: Any) -> Object:
    """A whole choice of an answer that is not streamed."""

  def _end(self, i: int, result: request_lib.Result | None) -> Object:
    """Finish reason of choice `i`, and the seed to reproduce the choice. Raises
    Refusal (500) on NaN logits or a cancelled request.
    """
    request = self.plan.requests[i // self.plan.n]
    if result is None:
      return {"finish_reason": "length", "seed": request.seed + i % self.plan.n}
    if result.finish_reason not in _REASONS:
      raise fields.Refusal(
        500,
        "the model's logits became NaN"
        if result.finish_reason == "error"
        else "the request was cancelled",
        kind="server_error",
      )
    return {
      "finish_reason": _REASONS[result.finish_reason],
      "seed": result.seed,
    }

  def _chunk(self, choices: list[Object]) -> Object:
    return {"object": self.chunk_object, **self._head, "choices": choices}

  def _usage(self) -> Object:
    n_prompt = sum(len(prompt) for prompt in self.plan.prompts)
    return {
      "prompt_tokens": n_prompt,
      "completion_tokens": self._n_drawn,
      "total_tokens": n_prompt + self._n_drawn,
    }

  def _top(self, gained: Any, place: int) -> list[tuple[int, float]]:
    """(id, log-probability) of the alternatives at `place`, then of the token
    itself unless the alternatives include the token.
    """
    pairs = []
    if gained.alternatives:
      pairs = [(a.id, a.log_probability) for a in gained.alternatives[place]]
    own = gained.token_ids[place], gained.log_probabilities[place]
    if all(i != own[0] for i, _ in pairs):
      pairs.append(own)
    return [(i, max(value, LEAST)) for i, value in pairs]


class Completion(Answer):
  """Completion response; `text_offset` counts characters of a choice's `text`.

  With `echo`, the prompt tokens come first, without the bos added before the
  prompt. The first token is conditioned on the added bos; without an added
  bos, the first token's log-probability is null.
  """

  object = chunk_object = "text_completion"
  prefix = "cmpl"

  def __init__(self, *arguments):
    super().__init__(*arguments)
    plan = self.plan
    self._offsets = [
      _Offsets(self.tokenizer, () if plan.echo else prompt)
      for prompt in plan.prompts
      for _ in range(plan.n)
    ]

  def opening(self, scores: Sequence[Any]) -> list[Object]:
    if not self.plan.echo:
      return []
    chunks = []
    for i in range(self.n_choices):
      choice = self._echo(i, scores[i // self.plan.n] if scores else None)
      end = {"finish_reason": None}
      if not self.plan.samples:
        end = self._end(i, None)
      chunks.append(self._chunk([{**choice, **end}]))
    return chunks

  def chunks(self, i: int, piece: request_lib.Piece) -> list[Object]:
    self._n_drawn += len(piece.token_ids)
    wanted = self.plan.logprobs is not None and piece.token_ids
    if not (piece.text or wanted or piece.result):
      return []
    end = {"finish_reason": None}
    if piece.result:
      end = self._end(i, piece.result)
    logprobs = self._logprobs(i, piece) if wanted else None
    choice = {"index": i, "text": piece.text, "logprobs": logprobs, **end}
    return [self._chunk([choice])]

  def _choice(self, i: int, result: Any, score: Any) -> Object:
    choice = {"index": i, "text": "", "logprobs": None}
    if self.plan.echo:
      choice = self._echo(i, score)
    end = self._end(i, result)
    if result is None:
      return {**choice, **end}
    choice["text"] += result.text
    if self.plan.logprobs is not None:
      mine = self._logprobs(i, result)
      before = choice["logprobs"]
      choice["logprobs"] = {
        name: [*before[name], *mine[name]] if before else mine[name]
        for name in mine
      }
    return {**choice, **end}

  def _echo(self, i: int, score: request_lib.Score | None) -> Object:
    prompt = self.plan.prompts[i // self.plan.n]
    text, logprobs = self.tokenizer.decode(prompt), None
    if score is not None:
      first = {}
      if not self.plan.n_hidden[i // self.plan.n]:
        first = {
          "tokens": [token_name(self.tokenizer, prompt[0])],
          "token_logprobs": [None],
          "top_logprobs": [None],
          "text_offset": [self._offsets[i].of(prompt[0])],
        }
      rest = self._logprobs(i, score)
      logprobs = {name: first.get(name, []) + rest[name] for name in rest}
    return {"index": i, "text": text, "logprobs": logprobs}

  def _logprobs(self, i: int, gained: Any) -> Object:
    """OpenAI's `logprobs` object for a Result, Piece or Score."""
    tops = []
    for place in range(len(gained.token_ids)):
      names: dict[str, float] = {}
      for other, value in self._top(gained, place):
        # Two ids may have the same name: the dict keeps the likelier id.
        names.setdefault(token_name(self.tokenizer, other), value)
      tops.append(names)
    ids = gained.token_ids
    return {
      "tokens": [token_name(self.tokenizer, j) for j in ids],
      "token_logprobs": [max(v, LEAST) for v in gained.log_probabilities],
      "top_logprobs": tops,
      "text_offset": [self._offsets[i].of(j) for j in ids],
    }


class Chat(Answer):
  object, chunk_object = "chat.completion", "chat.completion.chunk"
  prefix = "chatcmpl"

  def opening(self, scores: Sequence[Any]) -> list[Object]:
    delta = {"role": "assistant", "content": ""}
    return [
      self._chunk(
        [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}]
      )
      for i in range(self.n_choices)
    ]

  def chunks(self, i: int, piece: request_lib.Piece) -> list[Object]:
    self._n_drawn += len(piece.token_ids)
    wanted = self.plan.logprobs is not None and piece.token_ids
    found = []
    if piece.text or wanted:
      logprobs = self._logprobs(piece) if wanted else None
      delta = {"content": piece.text}
      found.append({"delta": delta, "logprobs": logprobs})
      found[-1]["finish_reason"] = None
    if piece.result:
      end = self._end(i, piece.result)
      found.append({"delta": {}, "logprobs": None, **end})
    return [self._chunk([{"index": i, **choice}]) for choice in found]

  def _choice(self, i: int, result: Any, score: Any) -> Object:
    end = self._end(i, result)
    message = {"role": "assistant", "content": result.text, "refusal": None}
    wanted = self.plan.logprobs is not None
    logprobs = self._logprobs(result) if wanted else None
    return {"index": i, "message": message, "logprobs": logprobs, **end}

  def _logprobs(self, gained: Any) -> Object:
    content = []
    for place, i in enumerate(gained.token_ids):
      entry = self._entry(i, gained.log_probabilities[place])
      top = [] if not self.plan.logprobs else self._top(gained, place)
      entry["top_logprobs"] = [
        self._entry(*pair) for pair in top[: self.plan.logprobs]
      ]
      content.append(entry)
    return {"content": content, "refusal": None}

  def _entry(self, i: int, value: float) -> Object:
    return {
      "token": token_name(self.tokenizer, i),
      "logprob": max(value, LEAST),
      "bytes": token_bytes(self.tokenizer, i) or None,
    }


class _Offsets:
  """Text offset of each token, in characters; call `of` in token order. The
  ids `before` are not part of the text.
  """

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, before: Sequence[int]):
    self._reader, self._n = stream_lib.Reader(tokenizer, before), 0

  def of(self, i: int) -> int:
    start = self._n
    self._n += len(self._reader.read(i))
    return start


def dump(value: Any) -> bytes:
  """JSON, serialized in short pieces to let other threads take the GIL."""
  return "".join(_pieces(value)).encode()


def _pieces(value: Any) -> Iterator[str]:
  if isinstance(value, dict):
    for i, (name, part) in enumerate(value.items()):
      yield f"{',' if i else '{'}{json.dumps(name)}:"
      yield from _pieces(part)
    yield "}" if value else "{}"
  elif isinstance(value, list) and any(map(_nested, value[:1])):
    for i, part in enumerate(value):
      yield "," if i else "["
      yield from _pieces(part)
    yield "]"
  elif isinstance(value, list) and len(value) > _PIECE:
    for i in range(0, len(value), _PIECE):
      yield "," if i else "["
      yield json.dumps(value[i : i + _PIECE], allow_nan=False)[1:-1]
    yield "]"
  else:
    yield json.dumps(value, allow_nan=False)


def _nested(value: Any) -> bool:
  return isinstance(value, dict) and any(
    isinstance(part, dict | list) for part in value.values()
  )


def next_token(
  found: request_lib.NextToken,
  tokenizer: tokenizer_lib.Tokenizer,
  model: str,
) -> Object:
  """Body of /v1/next_token; entropy is in bits (see lm/sample/request.py)."""

  def candidate(c: request_lib.Candidate) -> Object:
    return {
      "id": c.id,
      "token": token_name(tokenizer, c.id),
      "bytes": token_bytes(tokenizer, c.id),
      "ends": c.id == tokenizer.eos,
      "rank": c.rank,
      "probability": c.probability,
      "cumulative": c.cumulative,
      "stages": c.stages,
    }

  return {
    "object": "next_token",
    "model": model,
    "prompt_ids": found.prompt_ids,
    "entropy": found.entropy,
    "chosen": candidate(found.chosen),
    "candidates": [candidate(c) for c in found.candidates],
  }


def score(
  found: request_lib.Score, tokenizer: tokenizer_lib.Tokenizer, model: str
) -> Object:
  """Body of /v1/score: lists with an entry per scored token. `total` is a
  natural log-probability; `bits_per_byte` is null without text.
  """
  bits = -found.total / (found.n_bytes or 1) / math.log(2)
  return {
    "object": "score",
    "model": model,
    "token_ids": found.token_ids,
    "tokens": [token_name(tokenizer, i) for i in found.token_ids],
    "bytes": [token_bytes(tokenizer, i) for i in found.token_ids],
    "log_probabilities": [max(v, LEAST) for v in found.log_probabilities],
    "ranks": found.ranks,
    "alternatives": [
      [
        {
          "id": a.id,
          "token": token_name(tokenizer, a.id),
          "log_probability": max(a.log_probability, LEAST),
        }
        for a in place
      ]
      for place in found.alternatives
    ],
    "total": found.total,
    "n_bytes": found.n_bytes,
    "bits_per_byte": bits if found.n_bytes else None,
  }
