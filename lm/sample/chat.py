"""Chat template and infilling (FIM) prompts, and the terminal chat loop.

A message is `{"role": ..., "content": ...}`. The checkpoint's chat template
renders messages as text. Reserved tokens named in the template (<user>,
<end_of_turn>, ...) become special ids; the same spelling in a message stays
ordinary text.
"""

import dataclasses
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm import schema
from lm.data import template as template_lib
from lm.data import tokenizer as tokenizer_lib
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib
from lm.sample import show

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


def fim_ids(
  tokenizer: tokenizer_lib.Tokenizer,
  prefix: str,
  suffix: str,
  order: str = "psm",
) -> list[int]:
  """Fill-in-the-middle (FIM) prompt: bos, then prefix and suffix ("psm") or
  suffix and prefix ("spm"). The model continues with the text in between, then
  eos (arXiv:2207.14255).

  Every tokenizer here has the three FIM tokens, but output of a model trained
  without FIM is worthless. Raises ConfigError on any other `order`.
  """
  if order not in ("psm", "spm"):
    raise schema.ConfigError(
      f"order={order!r}: must be 'psm' (prefix first) or 'spm'"
    )
  before, after = tokenizer.encode(prefix), tokenizer.encode(suffix)
  start, hole, end = (
    [tokenizer.bos, tokenizer.fim_prefix],
    [tokenizer.fim_suffix],
    [tokenizer.fim_middle],
  )
  if order == "psm":
    return start + before + hole + after + end
  return start + hole + after + end + before


def _check(messages: Sequence[Any]) -> None:
  if not messages:
    raise schema.ConfigError("messages=[]: must hold at least one message")
  for i, item in enumerate(messages):
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
      raise schema.ConfigError(
        f"messages[{i}]={_short(item)}: must be an object with role and "
        "content, and nothing else"
      )
    for name, value in item.items():
      if not isinstance(value, str):
        raise schema.ConfigError(
          f"messages[{i}].{name}={_short(value)}: must be a text"
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


def _short(value: object) -> str:
  text = repr(value)
  return text if len(text) < 60 else f"{text[:57]}..."


# --- in the terminal ---------------------------------------------------------


def talk(
  sampler: sampler_lib.Sampler,
  request: request_lib.Request,
  system: str | None = None,
) -> int:
  """Chat loop: answers lines of stdin, by the rules of `request`, until EOF.

  Answers go to stdout, notes and errors to stderr. Returns 1 if any line got
  an error in place of an answer; the history omits failed lines. Raises
  ConfigError at once if the template would refuse every line.
  """
  start = [] if system is None else [_message("system", system)]
  chat_ids(sampler.tokenizer, [*start, _message("user", "?")])
  terminal = sys.stdin.isatty()
  if terminal:
    importlib.import_module("readline")  # Gives input() line editing.
    _note("/reset forgets the conversation; /exit or Ctrl-D ends it")
  history, failed = start, False
  while True:
    try:
      line = input("> " if terminal else "")
    except (EOFError, KeyboardInterrupt):
      break
    if line.strip() == "/exit":
      break
    if line.strip() == "/reset":
      history = start
      _note("the conversation starts anew")
    elif line.strip():
      asked = [*history, _message("user", line)]
      try:
        asked, prompt = _fit(sampler, asked, len(start), request)
        answer = _answer(sampler, request, prompt)
        history = [*asked, _message("assistant", answer)]
      except schema.UserError as error:
        _note(f"error: {error}")
        failed = True
  return 1 if failed else 0


def _fit(
  sampler: sampler_lib.Sampler,
  messages: list[dict[str, str]],
  n_kept: int,
  request: request_lib.Request,
) -> tuple[list[dict[str, str]], list[int]]:
  """Messages shortened to leave room for an answer, and the prompt's ids.

  Drops the oldest turns after the first `n_kept` messages, with a note on
  stderr. Raises ConfigError if the last turn alone is too long.
  """
  context, room = sampler.cfg.context_length, request.max_new_tokens
  if room is None:
    room = min(request_lib.DEFAULT_NEW_TOKENS, context // 4)
  n_messages = len(messages)
  while True:
    ids = chat_ids(sampler.tokenizer, messages)
    n_tokens = len(ids)
    if n_tokens + room <= context:
      break
    turns = [i for i, m in enumerate(messages) if m["role"] == "user"]
    if len(turns) == 1:
      raise schema.ConfigError(
        f"this message alone makes a prompt of {n_tokens} tokens; the context "
        f"of {context} keeps {room} for the answer: shorten it"
      )
    messages = messages[:n_kept] + messages[turns[1] :]
  if len(messages) < n_messages:
    _note(
      f"the oldest {n_messages - len(messages)} messages are forgotten: the "
      f"context has {context} tokens"
    )
  return messages, ids


def _answer(
  sampler: sampler_lib.Sampler,
  request: request_lib.Request,
  prompt: list[int],
) -> str:
  """Streams the answer to stdout and returns the text.

  Ctrl-C ends the answer early and keeps the text. Raises RunError on NaN
  logits.
  """
  ends = {*request.stop_ids, *stop_ids(sampler.tokenizer)}
  request = dataclasses.replace(
    request, prompt=prompt, stop_ids=sorted(ends), n_samples=1
  )
  text, reason = "", None
  try:
    for piece in sampler.stream([request]):
      text += piece.text
      show.write(piece.text)
      reason = piece.result.finish_reason if piece.result else reason
  except KeyboardInterrupt:
    reason = "cancelled"
  show.write("\n")
  if reason == "error":
    raise schema.RunError("NaN logits: the answer means nothing")
  if reason not in ("eos", "stop"):
    _note("the answer was cut short")
  return text


def _message(role: str, content: str) -> dict[str, str]:
  return {"role": role, "content": content}


def _note(text: str) -> None:
  print(f"[{text}]", file=sys.stderr, flush=True)
