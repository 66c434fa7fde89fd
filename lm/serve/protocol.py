"""Request bodies: parses and validates the fields of each endpoint.

The sampling rules keep their field names of `Request`, whether OpenAI's API has
the field or not. An unknown field is refused with the nearest name, and an
OpenAI field without support here is refused unless the value is a no-op. Only
labels, e.g. `user`, and nulls are ignored (fields.py).
"""

import dataclasses
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm import schema
from lm.data import chat as chat_lib
from lm.data import fim
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib
from lm.serve import fields as fields_lib

# OpenAI's default `max_tokens` for completions.
DEFAULT_TOKENS = 16
# Fields of Request with another name in the API.
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
_HINTS = schema.hints(request_lib.Request)
_KINDS = {name: schema.bare(_HINTS[name])[0] for name in _RULES}
_LISTS = {"stop": str, "forbidden": int, "stop_ids": int}
# Limit on the ids in a response: prompt tokens with their alternatives.
MAX_LISTED = 1 << 20
_OUTPUT = ("max_tokens", "n", "stream", "stream_options", "logprobs")
COMPLETION = (
  *("prompt", "suffix", "fim_order", "add_bos", "add_special_tokens"),
  *("echo", "max_new_tokens", *_OUTPUT, *_RULES),
)
CHAT = ("messages", "max_completion_tokens", "top_logprobs", *_OUTPUT, *_RULES)
NEXT_TOKEN = ("prompt", "add_bos", "candidates", *_RULES)
SCORE = ("input", "add_bos", "alternatives")


@dataclasses.dataclass(frozen=True)
class Plan:
  """A parsed completion or chat call: `n` samples of each request.

  `prompts` are ids; the first `n_hidden` ids of each prompt (an added bos, or
  none) are not shown. `logprobs` is the number of alternatives, or None. No
  samples are drawn if `samples` is False, allowed only with `echo`.
  """

  requests: list[request_lib.Request]
  prompts: list[list[int]]
  n: int
  samples: bool
  stream: bool
  usage: bool
  logprobs: int | None
  echo: bool = False
  n_hidden: list[int] = dataclasses.field(default_factory=list)


def completion(
  sampler: sampler_lib.Sampler, model: str, body: bytes, add_bos: bool = False
) -> Plan:
  """Parses /v1/completions. With `add_bos`, prompts of ids get a bos, too, if
  they have none and the context has room for it; `add_bos` of the call counts
  before it.
  """
  fields = fields_lib.read(body, model, COMPLETION)
  echo = fields_lib.typed(fields, "echo", bool, False)
  logprobs = fields_lib.typed(fields, "logprobs", int, None)
  # The first is the name in lm-eval's tasks, which its client sends beside its
  # own default.
  limit, name = _limit(fields, "max_new_tokens", "max_tokens")
  if limit == 0 and not echo:
    raise fields_lib.Refusal(
      400, f"{name}=0: must be at least 1, but for echo=true", name
    )
  if "prompt" not in fields:
    raise fields_lib.Refusal(400, "prompt: missing", "prompt")
  shown = fields_lib.prompts(fields["prompt"])
  requests, prompts, n_hidden = [], [], []
  infill = _infill(sampler, fields, shown, echo)
  for prompt in shown:
    ids, hidden = (infill or _encode)(sampler, fields, prompt)
    if add_bos and not hidden and _lacks_bos(sampler, fields, ids, limit or 1):
      ids, hidden = [sampler.tokenizer.bos, *ids], 1
    room = max(sampler.cfg.context_length - len(ids), 1)
    n_tokens = min(DEFAULT_TOKENS, room) if limit is None else limit
    prompts.append(ids)
    n_hidden.append(hidden)
    requests.append(_request(fields, ids, n_tokens, logprobs))
  names = {**_RENAMED, "max_new_tokens": name}
  plan = _plan(sampler, fields, requests, prompts, logprobs, shown, names)
  if echo:
    _check_listed("prompt", plan.n * sum(map(len, prompts)), logprobs or 0)
  return dataclasses.replace(plan, echo=echo, n_hidden=n_hidden)


def chat(sampler: sampler_lib.Sampler, model: str, body: bytes) -> Plan:
  fields = fields_lib.read(body, model, CHAT)
  # In chats, `logprobs` is a bool and `top_logprobs` counts alternatives.
  wanted = fields_lib.typed(fields, "logprobs", bool, False)
  top = fields_lib.typed(fields, "top_logprobs", int, 0)
  if top and not wanted:
    raise fields_lib.Refusal(
      400, f"top_logprobs={top}: needs logprobs=true", "top_logprobs"
    )
  logprobs = top if wanted else None
  limit, name = _limit(fields, "max_completion_tokens", "max_tokens")
  if limit == 0:
    raise fields_lib.Refusal(400, f"{name}=0: must be at least 1", name)
  if "messages" not in fields:
    raise fields_lib.Refusal(400, "messages: missing", "messages")
  try:
    messages = fields_lib.messages(fields["messages"])
    ids = chat_lib.chat_ids(sampler.tokenizer, messages)
  except schema.ConfigError as error:
    raise fields_lib.Refusal(400, str(error), "messages") from error
  if isinstance(more := fields.get("stop_ids", []), list):
    # The client's may be no ids, and any number; `_request` checks them.
    ends = chat_lib.stop_ids(sampler.tokenizer)
    fields["stop_ids"] = [*more, *(i for i in ends if i not in more)]
  request = _request(fields, ids, limit, logprobs)
  said = "".join(message["content"] for message in messages)
  names = {**_RENAMED, "max_new_tokens": name, "alternatives": "top_logprobs"}
  return _plan(sampler, fields, [request], [ids], logprobs, [said], names)


def next_token(
  sampler: sampler_lib.Sampler, model: str, body: bytes
) -> tuple[request_lib.Request, int]:
  """Parses /v1/next_token into a Request and the number of candidates."""
  fields = fields_lib.read(body, model, NEXT_TOKEN)
  n = fields_lib.typed(fields, "candidates", int, 20)
  if not 1 <= n <= 1000:
    raise fields_lib.Refusal(
      400, f"candidates={n}: must be in [1, 1000]", "candidates"
    )
  if "prompt" not in fields:
    raise fields_lib.Refusal(400, "prompt: missing", "prompt")
  (prompt, *more) = fields_lib.prompts(fields["prompt"])
  if more:
    raise fields_lib.Refusal(400, "prompt: one only, as text or ids", "prompt")
  ids, _ = _encode(sampler, fields, prompt)
  request = _request(fields, ids, None, None)
  checked(sampler.resolve, request, None, prompt)
  return request, min(n, sampler.tokenizer.size)


def score(
  sampler: sampler_lib.Sampler, model: str, body: bytes
) -> tuple[list[int], int]:
  """Parses /v1/score into ids, the first not scored, and `alternatives`."""
  fields = fields_lib.read(body, model, SCORE)
  n = fields_lib.typed(fields, "alternatives", int, 0)
  if "input" not in fields:
    raise fields_lib.Refusal(400, "input: missing", "input")
  (text, *more) = fields_lib.prompts(fields["input"])
  if more:
    raise fields_lib.Refusal(400, "input: one only, as text or ids", "input")
  most = min(request_lib.MAX_ALTERNATIVES, sampler.tokenizer.size)
  if not 0 <= n <= most:
    raise fields_lib.Refusal(
      400, f"alternatives={n}: at most {most}", "alternatives"
    )
  ids, _ = _encode(sampler, fields, text)
  _check_listed("input", len(ids), n)
  return ids, n


def _encode(
  sampler: sampler_lib.Sampler,
  fields: fields_lib.Fields,
  prompt: str | list[int],
) -> tuple[list[int], int]:
  """Ids of a prompt, and how many are hidden from the client: the added bos, or
  none. Text gets a bos and ids do not, unless `add_bos` says otherwise.
  """
  is_text = isinstance(prompt, str)
  with_bos = _with_bos(fields, is_text)
  ids = checked(sampler.encode, prompt)
  if is_text and not with_bos:
    return ids[1:] or ids, 0
  if not is_text and with_bos and prompt:  # no ids are bos already
    ids = [sampler.tokenizer.bos, *ids]
  return ids, int(with_bos)


def _with_bos(fields: fields_lib.Fields, default: Any) -> Any:
  """`add_bos`, or vLLM's name for it."""
  said = fields_lib.typed(fields, "add_special_tokens", bool, default)
  with_bos = fields_lib.typed(fields, "add_bos", bool, said)
  if "add_special_tokens" in fields and with_bos != said:
    raise fields_lib.Refusal(
      400, "add_bos: contradicts add_special_tokens; give one", "add_bos"
    )
  return with_bos


def _lacks_bos(sampler, fields, ids: list[int], n_new: int) -> bool:
  fits = len(ids) + 1 + n_new <= sampler.cfg.context_length
  is_silent = _with_bos(fields, None) is None
  return is_silent and fits and ids[:1] != [sampler.tokenizer.bos]


def _infill(
  sampler: sampler_lib.Sampler,
  fields: fields_lib.Fields,
  shown: Sequence[str | list[int]],
  echo: bool,
) -> Callable | None:
  """`_encode` for prompts with a `suffix`: the completion is what belongs
  between the two (lm/data/fim.py). None without a suffix, or with an empty one.

  Raises Refusal beside `echo`, and on a prompt of ids.
  """
  suffix = fields_lib.typed(fields, "suffix", str, "")
  order = fields_lib.typed(fields, "fim_order", str, "psm")
  if order not in fim.ORDERS or ("fim_order" in fields and not suffix):
    raise fields_lib.Refusal(
      400,
      f"fim_order={fields_lib.short(order)}: must be one of "
      f"{', '.join(fim.ORDERS)}, beside a suffix",
      "fim_order",
    )
  if not suffix:
    return None
  if echo:
    raise fields_lib.Refusal(
      400, "echo: has no part in infilling; leave out echo or suffix", "echo"
    )
  if not all(isinstance(prompt, str) for prompt in shown):
    raise fields_lib.Refusal(
      400, "suffix: needs a prompt of text, not of ids", "suffix"
    )
  checked(schema.check_text, "suffix", suffix)

  def encode(sampler, fields, prompt):
    checked(schema.check_text, "prompt", prompt)
    try:
      ids = fim.fim_ids(sampler.tokenizer, prompt, suffix, order)
    except schema.ConfigError as error:
      raise fields_lib.Refusal(400, f"suffix: {error}", "suffix") from error
    with_bos = _with_bos(fields, True)
    return ids[not with_bos :], int(with_bos)

  return encode


def _limit(fields: fields_lib.Fields, *names: str) -> tuple[int | None, str]:
  """The first of the limits `names` that is given, and its name."""
  found = [(fields_lib.typed(fields, name, int, None), name) for name in names]
  return next((one for one in found if one[0] is not None), found[-1])


def _check_listed(name: str, n_tokens: int, n_alternatives: int) -> None:
  most = MAX_LISTED // (1 + n_alternatives)
  if n_tokens > most:
    raise fields_lib.Refusal(
      413,
      f"{name}: {n_tokens} tokens to list with {n_alternatives} alternatives "
      f"each; at most {most} such tokens fit an answer: send less text, or ask "
      "for fewer alternatives",
      name,
    )


def _plan(
  sampler: sampler_lib.Sampler,
  fields: fields_lib.Fields,
  requests: list[request_lib.Request],
  prompts: list[list[int]],
  logprobs: int | None,
  shown: Sequence[str | list[int]],
  names: Mapping[str, str],
) -> Plan:
  """Validates and builds a Plan; errors quote `shown`, the client's prompts,
  and `names`, the client's names of fields.
  """
  stream = fields_lib.typed(fields, "stream", bool, False)
  options = fields_lib.typed(fields, "stream_options", dict, None)
  if options is not None and not stream:
    raise fields_lib.Refusal(
      400, "stream_options: needs stream=true", "stream_options"
    )
  options = options or {}
  for name in options:
    if name != "include_usage":
      known = schema.unknown(name, ["include_usage"])
      raise fields_lib.Refusal(
        400, f"stream_options.{name}: {known}", "stream_options"
      )
  samples = requests[0].max_new_tokens != 0
  for request, prompt in zip(requests, shown, strict=True):
    if samples:
      checked(sampler.resolve, request, None, prompt, names=names)
    else:
      # A prompt that is only scored may exceed the context length.
      checked(request_lib.check, request, sampler.tokenizer.size, names=names)
  usage = fields_lib.typed(options, "include_usage", bool, False)
  n = requests[0].n_samples
  return Plan(requests, prompts, n, samples, stream, usage, logprobs)


def _request(
  fields: fields_lib.Fields,
  ids: list[int],
  limit: int | None,
  logprobs: int | None,
) -> request_lib.Request:
  """Builds a Request: checks types, and leaves bounds to `Sampler.resolve`.

  Without a seed, a random seed is drawn; the response reports the seed.
  """
  rules = {name: fields[name] for name in _RULES if name in fields}
  if isinstance(rules.get("stop"), str):
    rules["stop"] = [rules["stop"]]
  for name, value in rules.items():
    if name in _LISTS:
      fields_lib.check_list(name, value, _LISTS[name])
    elif name != "logit_bias":
      rules[name] = value = fields_lib.as_float(name, value, _KINDS[name])
      checked(schema.check_types, value, _HINTS[name], name)
  if "logit_bias" in rules:
    bias = fields_lib.typed(rules, "logit_bias", dict, {})
    fields_lib.check_list("logit_bias", list(bias.values()), (int, float))
    rules["logit_bias"] = {
      fields_lib.bias_id(i): fields_lib.as_float("logit_bias", value)
      for i, value in bias.items()
    }
  n = fields_lib.typed(fields, "n", int, 1)
  if "seed" not in rules:
    rules["seed"] = secrets.randbelow(2**32 - min(max(n, 1), 2**31))
  return request_lib.Request(
    prompt=ids,
    max_new_tokens=limit,
    n_samples=n,
    alternatives=logprobs or 0,
    **rules,
  )


def checked(
  function: Callable, *arguments: Any, names: Mapping[str, str] = _RENAMED
) -> Any:
  """Calls `function`; a ConfigError becomes a Refusal (400) with API names."""
  try:
    return function(*arguments)
  except schema.ConfigError as error:
    text = str(error)
    name = re.split(r"[=\[:]", text, maxsplit=1)[0]
    said = names.get(name, name)
    raise fields_lib.Refusal(
      400, said + text.removeprefix(name), said
    ) from error
