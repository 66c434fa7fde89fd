"""Parses and type-checks fields of a JSON request body; raises Refusal."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm import schema

Fields = Mapping[str, Any]

# OpenAI's labels: accepted and ignored, since labels change no response.
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# OpenAI's fields without support here, with the no-op values: only a no-op
# value is accepted.
_ABSENT: dict[str, tuple[Any, ...]] = {
  "best_of": (1,),
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
  """HTTP error response (status >= 400); `param` is the field at fault."""

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    kind: str = "invalid_request_error",
    code: str | None = None,
  ):
    super().__init__(message)
    self.status, self.param, self.kind = status, param, kind
    self.code = code

  def body(self) -> dict[str, Any]:
    """Error body in OpenAI's format; cuts the message at 1000 characters."""
    text = str(self)
    if len(text) > 1000:
      text = text[:1000] + " ..."
    return {
      "error": {
        "message": text,
        "type": self.kind,
        "param": self.param,
        "code": self.code,
      }
    }


def read(body: bytes, model: str, known: Sequence[str]) -> dict[str, Any]:
  """Parses a JSON object; returns the non-null fields among `known`.

  Raises Refusal on invalid JSON, on an unknown or unsupported field (400), and
  if the field `model` names another model (404).
  """
  try:
    fields = json.loads(body, parse_constant=_no_constant)
    # JSON escapes can spell a lone surrogate, invalid in UTF-8.
    json.dumps(fields, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    raise Refusal(400, f"the body holds half a character: {error}") from error
  except (ValueError, RecursionError) as error:
    raise Refusal(400, f"the body is not JSON: {error}") from error
  if not isinstance(fields, dict):
    raise Refusal(400, "the body must be a JSON object, as {...}")
  fields = {name: v for name, v in fields.items() if v is not None}
  if (named := fields.pop("model", model)) != model:
    raise unknown_model(named, model)
  for name, value in list(fields.items()):
    if name in known:
      continue
    if name in _ABSENT:
      if value not in _ABSENT[name]:
        raise Refusal(
          400, f"{name}={short(value)}: not supported here; leave it out", name
        )
    elif name not in _LABELS:
      raise Refusal(
        400, f"{short(name)}: {schema.unknown(name, known)}", name[:100]
      )
    del fields[name]
  return fields


def unknown_model(name: Any, model: str) -> Refusal:
  return Refusal(
    404,
    f"model={short(name)}: not served here; this is {model!r}",
    "model",
    code="model_not_found",
  )


def typed(fields: Fields, name: str, kind: type, default: Any) -> Any:
  if name not in fields:
    return default
  value = fields[name]
  if type(value) is not kind:
    raise Refusal(
      400,
      f"{name}={short(value)}: must be of type {kind.__name__}, not "
      f"{type(value).__name__}",
      name,
    )
  return value


def as_float(name: str, value: Any, kind: Any = float) -> Any:
  """Converts int to float if `kind` is float; raises Refusal if too large."""
  try:
    return float(value) if kind is float and type(value) is int else value
  except OverflowError as error:
    raise Refusal(400, f"{name}={short(value)}: too large", name) from error


def check_list(name: str, value: Any, kinds: Any) -> None:
  if not isinstance(value, list) or not all(
    isinstance(item, kinds) and not isinstance(item, bool) for item in value
  ):
    kind = {str: "texts", int: "ids"}.get(kinds, "numbers")
    raise Refusal(400, f"{name}={short(value)}: must be {kind}", name)


def bias_id(name: str) -> int:
  try:
    return int(name)
  except ValueError as error:
    raise Refusal(
      400, f"logit_bias: {short(name)} is no id of a token", "logit_bias"
    ) from error


def _no_constant(name: str) -> float:
  raise ValueError(f"{name} is no JSON number")


def short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def prompts(value: Any) -> list[str | list[int]]:
  """Prompts from any of OpenAI's four forms: text, texts, ids, lists of ids."""

  def is_ids(form: Any) -> bool:
    return isinstance(form, list) and all(type(i) is int for i in form)

  forms = value if isinstance(value, list) else [value]
  if value and is_ids(value):
    return [value]
  if not forms or not all(isinstance(f, str) or is_ids(f) for f in forms):
    raise Refusal(
      400,
      f"{short(value)}: must be text, a list of texts, a list of "
      "ids or a list of lists of ids, and not empty",
      "prompt",
    )
  return forms


def messages(value: Any) -> list[dict[str, Any]]:
  """Validates chat messages; joins content parts into a single text."""
  if not isinstance(value, list):
    raise Refusal(400, "messages: must be a list of objects", "messages")
  messages = []
  for i, message in enumerate(value):
    where = f"messages[{i}]"
    if not isinstance(message, dict):
      raise Refusal(400, f"{where}: must be an object", "messages")
    for name, part in message.items():
      if name not in ("role", "content") and part is not None:
        known = schema.unknown(name, ["role", "content"])
        raise Refusal(400, f"{where}.{short(name)}: {known}", "messages")
    content = message.get("content")
    if isinstance(content, list):
      for part in content:
        if (
          not isinstance(part, dict)
          or set(part) != {"type", "text"}
          or part["type"] != "text"
          or not isinstance(part["text"], str)
        ):
          raise Refusal(400, f"{where}: holds more than text", "messages")
      content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
      raise Refusal(
        400, f"{where}: needs role and content, both texts", "messages"
      )
    messages.append({"role": message["role"], "content": content})
  return messages
