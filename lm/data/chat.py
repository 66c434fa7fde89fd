"""Chats as token ids, by the checkpoint's chat template.

A message is `{"role": ..., "content": ...}`. The checkpoint's chat template
renders messages as text. Reserved tokens named in the template (<user>,
<end_of_turn>, ...) become special ids; the same spelling in a message stays
ordinary text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm import schema
from lm.data import template as template_lib
from lm.data import tokenizer as tokenizer_lib

# During rendering a surrogate replaces each reserved token in the template's
# text. Messages hold none: `_check` refuses text that UTF-8 cannot encode.
_MARKS = {
  name: chr(0xD800 + i) for i, name in enumerate(tokenizer_lib.RESERVED)
}
_NAMES = {mark: name for name, mark in _MARKS.items()}
_SPELLING = re.compile("|".join(map(re.escape, tokenizer_lib.RESERVED)))
_SURROGATE = re.compile("([\ud800-\udfff])")


def chat_ids(
  tokenizer: tokenizer_lib.Tokenizer, messages: Sequence[Any]
) -> list[int]:
  """Token ids of a conversation, up to the start of the assistant's answer.

  bos comes first even if the template omits bos. Raises ConfigError without a
  chat template, on a malformed message, and on messages refused by the
  template.
  """
  if tokenizer.chat_template is None:
    raise schema.ConfigError(
      "chat: this checkpoint has no chat template; train one with "
      "--config.tokenizer.chat_template=FILE.jinja, or ask it for a completion"
    )
  _check(messages)
  text = _render(tokenizer.chat_template, messages)
  # Even parts are text, odd parts are marks.
  parts = _SURROGATE.split(text)
  _check_parts(parts[::2], messages)
  ids = tokenizer.encode(parts[0])
  for mark, part in zip(parts[1::2], parts[2::2], strict=True):
    ids += [tokenizer.reserved[_NAMES[mark]], *tokenizer.encode(part)]
  return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def stop_ids(tokenizer: tokenizer_lib.Tokenizer) -> list[int]:
  """Stop ids of the assistant's turn, besides eos: <end_of_turn>, <user> and
  <system>, each only if named in the chat template.
  """
  names = ("<end_of_turn>", "<user>", "<system>")
  template = tokenizer.chat_template or ""
  return [tokenizer.reserved[name] for name in names if name in template]


def _check(messages: Sequence[Any]) -> None:
  if not messages:
    raise schema.ConfigError("messages=[]: must hold at least one message")
  for i, item in enumerate(messages):
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
      raise schema.ConfigError(
        f"messages[{i}]={schema.shown(item)}: must be an object with role and "
        "content, and nothing else"
      )
    for name, value in item.items():
      if not isinstance(value, str):
        raise schema.ConfigError(
          f"messages[{i}].{name}={schema.shown(value)}: must be a text"
        )
      tokenizer_lib.check_text(f"messages[{i}].{name}", value)


def _render(template: str, messages: Sequence[Any]) -> str:
  """Rendered text, with marks in place of the template's reserved tokens."""
  marked = _SPELLING.sub(lambda match: _MARKS[match[0]], template)
  values = {
    "messages": [dict(item) for item in messages],
    "bos_token": _MARKS["<bos>"],
    "eos_token": _MARKS["<eos>"],
    "add_generation_prompt": True,
  }
  return template_lib.render(marked, values)


def _check_parts(texts: Sequence[str], messages: Sequence[Any]) -> None:
  """Raises ConfigError if the template assembles a token: `<{{ role }}>`.

  Only reserved tokens written whole become ids.
  """
  said = [value for item in messages for value in item.values()]
  for text in texts:
    for name in _SPELLING.findall(text):
      if not any(name in value for value in said):
        raise schema.ConfigError(
          f"chat template: puts {name} together out of parts, which would be "
          "ordinary text; write the token whole"
        )
