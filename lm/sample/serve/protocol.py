"""What a client may say: the fields of each endpoint, and how they are refused.

The sampling rules are fields of `Request` under their own names, whether
OpenAI's API has them or not. No field is ignored in silence: an unknown one is
refused with the nearest name, and one of OpenAI's that is not to be had here is
refused unless its value asks for nothing.
"""

import dataclasses
import json
import secrets
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm import config as config_lib
from lm.sample import chat as chat_lib
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib

Fields = Mapping[str, Any]

# OpenAI's default for completions.
DEFAULT_TOKENS = 16
# Fields of Request, and what the API calls those that it names otherwise.
_RENAMED = {
  "max_new_tokens": "max_tokens",
  "n_samples": "n",
  "alternatives": "logprobs",
}
_RULES = tuple(
  field.name
  for field in dataclasses.fields(request_lib.Request)
  if field.name not in ("prompt", *_RENAMED)
)
_HINTS = typing.get_type_hints(request_lib.Request)
_LISTS = {"stop": str, "forbidden": int, "stop_ids": int}
# They name somebody or something, and change no answer.
_LABELS = ("model", "user", "metadata", "safety_identifier", "prompt_cache_key")
_OUTPUT = ("max_tokens", "n", "stream", "stream_options", "logprobs")
COMPLETION = ("prompt", "echo", *_OUTPUT, *_RULES)
CHAT = ("messages", "max_completion_tokens", "top_logprobs", *_OUTPUT, *_RULES)
NEXT_TOKEN = ("prompt", "candidates", *_RULES)
SCORE = ("input", "alternatives")
# OpenAI's fields that are not to be had, with the values that ask for nothing.
_ABSENT: dict[str, tuple[Any, ...]] = {
  "best_of": (1,),
  "suffix": ("",),
  "tools": ([],),
  "tool_choice": ("none", "auto"),
  "parallel_tool_calls": (True, False),
  "functions": ([],),
  "function_call": ("none", "auto"),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
  "audio": (),
  "moderation": (),
  "prediction": (),
  "prompt_cache_retention": (),
  "reasoning_effort": ("none",),
  "service_tier": ("auto", "default"),
  "store": (False,),
  "verbosity": ("medium",),
  "web_search_options": (),
}


class Refusal(Exception):
  """An answer of a status from 400 on; `param` is the field to blame."""

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    kind: str = "invalid_request_error",
  ):
    super().__init__(message)
    self.status, self.param, self.kind = status, param, kind

  def body(self) -> dict[str, Any]:
    """OpenAI's form of an error."""
    text = str(self)
    if len(text) > 1000:
      text = text[:1000] + " ..."
    return {
      "error": {
        "message": text,
        "type": self.kind,
        "param": self.param,
        "code": None,
      }
    }


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one call for text asks: `n` samples of each request.

  The `prompts` are ids, with bos; `bos_given` says for each whether the client
  sent it. `logprobs` is None, or how many alternatives. No samples are drawn
  where `samples` is False, which needs `echo`.
  """

  requests: list[request_lib.Request]
  prompts: list[list[int]]
  n: int
  samples: bool
  stream: bool
  usage: bool
  logprobs: int | None
  echo: bool = False
  bos_given: list[bool] = dataclasses.field(default_factory=list)


def read(body: bytes, known: Sequence[str]) -> dict[str, Any]:
  """Fields of a JSON object that are set, all of them among `known`."""
  try:
    fields = json.loads(body, parse_constant=_no_constant)
    # JSON can spell half a surrogate pair, which is no text.
    json.dumps(fields, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    raise Refusal(400, f"the body holds half a character: {error}") from error
  except (ValueError, RecursionError) as error:
    raise Refusal(400, f"the body is not JSON: {error}") from error
  if not isinstance(fields, dict):
    raise Refusal(400, "the body must be a JSON object, as {...}")
  fields = {name: v for name, v in fields.items() if v is not None}
  for name, value in list(fields.items()):
    if name in known:
      continue
    if name in _ABSENT:
      if value not in _ABSENT[name]:
        raise Refusal(
          400, f"{name}={_short(value)}: not supported here; leave it out", name
        )
    elif name not in _LABELS:
      raise Refusal(
        400, f"{_short(name)}: {config_lib.unknown(name, known)}", name[:100]
      )
    del fields[name]
  return fields


def completion(sampler: sampler_lib.Sampler, body: bytes) -> Plan:
  fields = read(body, COMPLETION)
  echo = _typed(fields, "echo", bool, False)
  logprobs = _typed(fields, "logprobs", int, None)
  limit = _typed(fields, "max_tokens", int, None)
  if limit == 0 and not echo:
    raise Refusal(
      400, "max_tokens=0: must be at least 1, but for echo=true", "max_tokens"
    )
  if "prompt" not in fields:
    raise Refusal(400, "prompt: missing", "prompt")
  requests, prompts, bos_given = [], [], []
  for prompt in _prompts(fields["prompt"]):
    bos_given.append(prompt[:1] == [sampler.tokenizer.bos])
    ids = _checked(sampler.encode, prompt)
    room = max(sampler.cfg.context_length - len(ids), 1)
    n_tokens = min(DEFAULT_TOKENS, room) if limit is None else limit
    prompts.append(ids)
    requests.append(_request(fields, ids, n_tokens, logprobs))
  plan = _plan(sampler, fields, requests, prompts, logprobs)
  return dataclasses.replace(plan, echo=echo, bos_given=bos_given)


def chat(sampler: sampler_lib.Sampler, body: bytes) -> Plan:
  fields = read(body, CHAT)
  # Here `logprobs` says whether and `top_logprobs` how many.
  wanted = _typed(fields, "logprobs", bool, False)
  top = _typed(fields, "top_logprobs", int, 0)
  if top and not wanted:
    raise Refusal(
      400, f"top_logprobs={top}: needs logprobs=true", "top_logprobs"
    )
  logprobs = top if wanted else None
  limits = ("max_completion_tokens", "max_tokens")
  limit = next((fields[name] for name in limits if name in fields), None)
  if limit == 0:
    raise Refusal(400, "max_tokens=0: must be at least 1", "max_tokens")
  if "messages" not in fields:
    raise Refusal(400, "messages: missing", "messages")
  try:
    ids = chat_lib.chat_ids(sampler.tokenizer, _messages(fields["messages"]))
  except config_lib.ConfigError as error:
    raise Refusal(400, str(error), "messages") from error
  if isinstance(more := fields.get("stop_ids", []), list):
    stops = [*more, *chat_lib.stop_ids(sampler.tokenizer)]
    fields["stop_ids"] = [i for n, i in enumerate(stops) if i not in stops[:n]]
  request = _request(fields, ids, limit, logprobs)
  return _plan(sampler, fields, [request], [ids], logprobs)


def next_token(
  sampler: sampler_lib.Sampler, body: bytes
) -> tuple[request_lib.Request, int]:
  """The request and how many candidates to show."""
  fields = read(body, NEXT_TOKEN)
  n = _typed(fields, "candidates", int, 20)
  if not 1 <= n <= 1000:
    raise Refusal(400, f"candidates={n}: must be in [1, 1000]", "candidates")
  if "prompt" not in fields:
    raise Refusal(400, "prompt: missing", "prompt")
  (prompt, *more) = _prompts(fields["prompt"])
  if more:
    raise Refusal(400, "prompt: one only, as text or ids", "prompt")
  ids = _checked(sampler.encode, prompt)
  request = _request(fields, ids, 1, None)
  _checked(sampler.check, request)
  return request, min(n, sampler.tokenizer.size)


def score(sampler: sampler_lib.Sampler, body: bytes) -> tuple[list[int], int]:
  """Ids, with bos, and how many alternatives to show."""
  fields = read(body, SCORE)
  n = _typed(fields, "alternatives", int, 0)
  if "input" not in fields:
    raise Refusal(400, "input: missing", "input")
  (text, *more) = _prompts(fields["input"])
  if more:
    raise Refusal(400, "input: one only, as text or ids", "input")
  most = min(request_lib.MAX_ALTERNATIVES, sampler.tokenizer.size)
  if not 0 <= n <= most:
    raise Refusal(400, f"alternatives={n}: at most {most}", "alternatives")
  return _checked(sampler.encode, text), n


def _plan(
  sampler: sampler_lib.Sampler,
  fields: Fields,
  requests: list[request_lib.Request],
  prompts: list[list[int]],
  logprobs: int | None,
) -> Plan:
  stream = _typed(fields, "stream", bool, False)
  options = _typed(fields, "stream_options", dict, None)
  if options is not None and not stream:
    raise Refusal(400, "stream_options: needs stream=true", "stream_options")
  options = options or {}
  for name in options:
    if name != "include_usage":
      known = config_lib.unknown(name, ["include_usage"])
      raise Refusal(400, f"stream_options.{name}: {known}", "stream_options")
  samples = requests[0].max_new_tokens != 0
  for request in requests:
    if samples:
      _checked(sampler.check, request)
    else:
      # A text to be scored may be longer than the context.
      _checked(request_lib.check, request, sampler.tokenizer.size)
  usage = _typed(options, "include_usage", bool, False)
  n = requests[0].n_samples
  return Plan(requests, prompts, n, samples, stream, usage, logprobs)


def _request(
  fields: Fields, ids: list[int], limit: int | None, logprobs: int | None
) -> request_lib.Request:
  """Types are checked here, and bounds left to `Sampler.check`.

  Without a seed, one is drawn; the answer tells it.
  """
  rules = {name: fields[name] for name in _RULES if name in fields}
  if isinstance(rules.get("stop"), str):
    rules["stop"] = [rules["stop"]]
  for name, value in rules.items():
    if name in _LISTS:
      _check_list(name, value, _LISTS[name])
    elif name != "logit_bias":
      rules[name] = value = _float(name, value, _HINTS[name])
      _checked(config_lib.check_types, value, _HINTS[name], name)
  if "logit_bias" in rules:
    bias = _typed(rules, "logit_bias", dict, {})
    _check_list("logit_bias", list(bias.values()), (int, float))
    rules["logit_bias"] = {
      _bias_id(i): _float("logit_bias", value) for i, value in bias.items()
    }
  if limit is not None:
    _checked(config_lib.check_types, limit, int, "max_tokens")
  n = _typed(fields, "n", int, 1)
  if "seed" not in rules:
    rules["seed"] = secrets.randbelow(2**32 - min(max(n, 1), 2**31))
  return request_lib.Request(
    prompt=ids,
    max_new_tokens=limit,
    n_samples=n,
    alternatives=logprobs or 0,
    **rules,
  )


def _checked(function: Callable, *arguments: Any) -> Any:
  """Calls it; a ConfigError is told in the client's own words."""
  try:
    return function(*arguments)
  except config_lib.ConfigError as error:
    text = str(error).removeprefix("request.")
    for name, said in _RENAMED.items():
      text = text.replace(name, said)
    param = text.partition("=")[0].partition("[")[0].partition(":")[0]
    raise Refusal(400, text, param) from error


def _prompts(value: Any) -> list[str | list[int]]:
  """OpenAI's four forms: text, texts, ids, lists of ids."""

  def is_ids(form: Any) -> bool:
    return isinstance(form, list) and all(type(i) is int for i in form)

  forms = value if isinstance(value, list) else [value]
  if value and is_ids(value):
    return [value]
  if not forms or not all(isinstance(f, str) or is_ids(f) for f in forms):
    raise Refusal(
      400,
      f"{_short(value)}: must be text, a list of texts, a list of ids or a "
      "list of lists of ids, and not empty",
      "prompt",
    )
  return forms


def _messages(value: Any) -> list[dict[str, Any]]:
  """Messages whose content is one text, where it came as parts."""
  if not isinstance(value, list):
    raise Refusal(400, "messages: must be a list of objects", "messages")
  messages = []
  for i, message in enumerate(value):
    where = f"messages[{i}]"
    if not isinstance(message, dict):
      raise Refusal(400, f"{where}: must be an object", "messages")
    for name, part in message.items():
      if name not in ("role", "content") and part is not None:
        known = config_lib.unknown(name, ["role", "content"])
        raise Refusal(400, f"{where}.{_short(name)}: {known}", "messages")
    content = message.get("content")
    if isinstance(content, list):
      for part in content:
        if not isinstance(part, dict) or set(part) != {"type", "text"}:
          raise Refusal(400, f"{where}: holds more than text", "messages")
      content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
      raise Refusal(
        400, f"{where}: needs role and content, both texts", "messages"
      )
    messages.append({"role": message["role"], "content": content})
  return messages


def _typed(fields: Fields, name: str, kind: type, default: Any) -> Any:
  if name not in fields:
    return default
  value = fields[name]
  if type(value) is not kind:
    raise Refusal(
      400,
      f"{name}={_short(value)}: must be of type {kind.__name__}, not "
      f"{type(value).__name__}",
      name,
    )
  return value


def _float(name: str, value: Any, kind: Any = float) -> Any:
  """`value`; as a float where it is an int and a float is wanted."""
  try:
    return float(value) if kind is float and type(value) is int else value
  except OverflowError as error:
    raise Refusal(400, f"{name}={_short(value)}: too large", name) from error


def _check_list(name: str, value: Any, kinds: Any) -> None:
  if not isinstance(value, list) or not all(
    isinstance(item, kinds) and not isinstance(item, bool) for item in value
  ):
    kind = {str: "texts", int: "ids"}.get(kinds, "numbers")
    raise Refusal(400, f"{name}={_short(value)}: must be {kind}", name)


def _bias_id(name: str) -> int:
  try:
    return int(name)
  except ValueError as error:
    raise Refusal(
      400, f"logit_bias: {_short(name)} is no id of a token", "logit_bias"
    ) from error


def _no_constant(name: str) -> float:
  raise ValueError(f"{name} is no JSON number")


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
