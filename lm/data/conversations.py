"""Rows of chat data sets as messages: `{"role": ..., "content": ...}`.

The format of a row is that of the first line of this table whose fields it has:

| fields                             | format                                  |
|------------------------------------|-----------------------------------------|
| `messages`                         | roles and contents, as of OpenAI's API  |
| `conversations`                    | ShareGPT: `from` and `value`            |
| `chosen`, `rejected`, (`prompt`)   | preference pairs: the chosen side       |
| `prompt`, `completion`             | texts, or lists of messages             |
| `instruction`, `output`, (`input`) | Alpaca                                  |

A row is refused if something that the answer depends on would be lost: tools,
tool calls, images, separate reasoning, or a turn marked as not to be trained.
Other fields are ignored. All functions raise ConfigError with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm import schema

Message = dict[str, str]

_ROLES = {
  "assistant": "assistant",
  "bing": "assistant",
  "bot": "assistant",
  "chatgpt": "assistant",
  "developer": "system",
  "function": "tool",
  "function_response": "tool",
  "gpt": "assistant",
  "human": "user",
  "ipython": "tool",
  "model": "assistant",
  "observation": "tool",
  "system": "system",
  "tool": "tool",
  "tool_response": "tool",
  "user": "user",
}
# Fields of a message that change what the assistant says or reads.
_LOST = (
  *("tool_calls", "function_call", "reasoning_content", "reasoning"),
  *("thinking", "images", "audio", "videos"),
)
_FORMATS = (
  "messages; conversations; chosen and rejected; prompt and completion; "
  "instruction and output"
)


def parse(row: Any) -> list[Message]:
  """Messages of one row, in the format that its fields tell."""
  if not isinstance(row, Mapping):
    raise schema.ConfigError("is not an object with the fields of a chat")
  for name in ("tools", "functions", "documents", "images"):
    if row.get(name):
      raise schema.ConfigError(
        f"has {name}, which chat templates are not given here; leave it out"
      )
  for names, read in _READERS:
    if all(row.get(name) is not None for name in names):
      messages = read(row)
      if not messages:
        raise schema.ConfigError(f"field {names[0]!r} holds no message")
      return messages
  known = ", ".join(map(repr, row)) or "none"
  known = known if len(known) < 200 else f"{known[:200]}..."
  raise schema.ConfigError(
    f"is in no format of chats ({_FORMATS}); its fields: {known}"
  )


def _openai(row: Mapping[str, Any]) -> list[Message]:
  return _messages(row["messages"], "messages")


def _sharegpt(row: Mapping[str, Any]) -> list[Message]:
  return _with_system(row, _messages(row["conversations"], "conversations"))


def _preference(row: Mapping[str, Any]) -> list[Message]:
  """`chosen` is the whole conversation if the user speaks in it, otherwise the
  answer to `prompt`.
  """
  chosen = _side(row["chosen"], "assistant", "chosen")
  if any(message["role"] == "user" for message in chosen):
    return chosen
  if row.get("prompt") is None:
    raise schema.ConfigError(
      "field 'chosen' has no message of the user, and there is no 'prompt'"
    )
  return _with_system(row, [*_side(row["prompt"], "user", "prompt"), *chosen])


def _prompt_completion(row: Mapping[str, Any]) -> list[Message]:
  prompt = _side(row["prompt"], "user", "prompt")
  completion = _side(row["completion"], "assistant", "completion")
  return _with_system(row, [*prompt, *completion])


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
  if row.get("history"):
    raise schema.ConfigError("has a history; write the turns as 'messages'")
  asked = _text(row["instruction"], "instruction")
  if row.get("input"):
    asked = f"{asked}\n\n{_text(row['input'], 'input')}"
  answer = _text(row["output"], "output")
  return _with_system(
    row, [_message("user", asked), _message("assistant", answer)]
  )


_READERS = (
  (("messages",), _openai),
  (("conversations",), _sharegpt),
  (("chosen", "rejected"), _preference),
  (("prompt", "completion"), _prompt_completion),
  (("instruction", "output"), _alpaca),
)


# --- parts of rows -----------------------------------------------------------


def _side(value: Any, role: str, name: str) -> list[Message]:
  """A text of `role`, or a list of messages."""
  if isinstance(value, str):
    return [_message(role, value)]
  return _messages(value, name)


def _with_system(
  row: Mapping[str, Any], messages: list[Message]
) -> list[Message]:
  """Puts the row's field `system` first, unless a system message is there."""
  if not row.get("system") or messages[:1] and messages[0]["role"] == "system":
    return messages
  return [_message("system", _text(row["system"], "system")), *messages]


def _messages(value: Any, name: str) -> list[Message]:
  if not isinstance(value, Sequence) or isinstance(value, str):
    raise schema.ConfigError(f"field {name!r} is not a list of messages")
  return [_one(item, f"{name}[{i}]") for i, item in enumerate(value)]


def _one(item: Any, where: str) -> Message:
  if not isinstance(item, Mapping):
    raise schema.ConfigError(f"{where} is not an object")
  for name in _LOST:
    if item.get(name):
      raise schema.ConfigError(f"{where} has {name}, which would be lost")
  if item.get("weight", 1) == 0 or item.get("train", True) is False:
    raise schema.ConfigError(
      f"{where} is marked as not to be trained, and every answer is; leave the "
      "conversation out, or the mark"
    )
  for role_name, content_name in (("role", "content"), ("from", "value")):
    if role_name in item:
      role = item[role_name]
      if not isinstance(role, str) or role not in _ROLES:
        raise schema.ConfigError(
          f"{where}.{role_name}={schema.shown(role)}: is none of the roles "
          f"{', '.join(_ROLES)}"
        )
      content = _content(item.get(content_name), f"{where}.{content_name}")
      return _message(_ROLES[role], content)
  raise schema.ConfigError(f"{where} has neither role nor from")


def _content(value: Any, where: str) -> str:
  """A text, or the texts of a list of parts, one after the other."""
  if not isinstance(value, list):
    return _text(value, where)
  texts = []
  for part in value:
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
      raise schema.ConfigError(f"{where} has a part that is not text")
    texts.append(_text(part.get("text"), where))
  return "".join(texts)


def _text(value: Any, where: str) -> str:
  if not isinstance(value, str):
    raise schema.ConfigError(f"{where}={schema.shown(value)}: is not text")
  return value


def _message(role: str, content: str) -> Message:
  return {"role": role, "content": content}
