"""Lines of JSON: one object each, of which a field is the document."""

import json
from typing import Any

from lm import schema

_KINDS = {
  dict: "an object",
  list: "a list",
  str: "text",
  int: "a number",
  float: "a number",
  bool: "true or false",
  type(None): "null",
}


def parse(line: str, holding: str) -> dict[str, Any]:
  """The object of a line; raises ConfigError with the reason if it is none.
  `holding` says in the error what the object should hold.
  """
  try:
    value = json.loads(line)
  except json.JSONDecodeError as error:
    raise schema.ConfigError(
      f"invalid JSON, {error.msg} at column {error.colno}"
    ) from error
  except (RecursionError, ValueError) as error:  # Too deep, too many digits.
    reason = str(error).split(";")[0]
    raise schema.ConfigError(f"JSON beyond reason, {reason}") from error
  if not isinstance(value, dict):
    raise schema.ConfigError(f"is {_kind(value)}, not an object with {holding}")
  return value


def text(row: dict[str, Any], field: str) -> str:
  """The text of field `field`; `a.b` is the field b of the object a, unless a
  field is itself named `a.b`. Raises ConfigError if it is absent, or not text.
  """
  value: Any = row
  for name in [field] if field in row else field.split("."):
    if not isinstance(value, dict):
      raise schema.ConfigError(
        f"no field {field!r}: what should hold {name!r} is "
        f"{_kind(value)}, not an object"
      )
    if name not in value:
      names = ", ".join(map(repr, value)) or "none"
      names = names if len(names) < 200 else f"{names[:200]}..."
      inside = "" if value is row else f" with {name!r}"
      raise schema.ConfigError(
        f"no field {field!r}{inside}; its fields: {names}"
      )
    value = value[name]
  if not isinstance(value, str):
    raise schema.ConfigError(f"field {field!r} is {_kind(value)}, not text")
  return value


def _kind(value: Any) -> str:
  """What `value` is; a row of a table may hold more than JSON does."""
  return _KINDS.get(type(value), f"of type {type(value).__name__}")
