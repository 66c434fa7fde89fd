"""The loop of a conversation: lines of stdin, answers on stdout."""

import dataclasses
import importlib
import sys

from lm import schema
from lm.data import chat
from lm.data import tokenizer as tokenizer_lib
from lm.sample import output
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib


def opening(
  tokenizer: tokenizer_lib.Tokenizer, system: str | None
) -> list[dict[str, str]]:
  """Messages before the user's first line. Raises ConfigError if the chat
  template is missing, or refuses them.
  """
  start = [] if system is None else [_message("system", system)]
  chat.chat_ids(tokenizer, [*start, _message("user", "?")])
  return start


def talk(
  sampler: sampler_lib.Sampler,
  request: request_lib.Request,
  start: list[dict[str, str]],
) -> int:
  """Chat loop: answers lines of stdin, by the rules of `request`, until EOF.

  `start` is the `opening`. Answers go to stdout, notes and errors to stderr.
  Returns 1 if any line got an error in place of an answer; the history omits
  failed lines. Raises ConfigError if even the shortest line would get one.
  """
  asked = [*start, _message("user", "?")]
  ids = chat.chat_ids(sampler.tokenizer, asked)
  sampler.require_causal()
  shortest = _turn(sampler, request, ids)
  sampler.resolve(shortest, shown=asked[0]["content"])
  _fit(sampler, asked, len(start), request)
  terminal = sys.stdin.isatty()
  if terminal:
    importlib.import_module("readline")  # Gives input() line editing.
    _note("/reset forgets the conversation; /exit or Ctrl-D ends it")
  # Where stdout is a file, it holds the answers alone.
  prompt = "> " if terminal and sys.stdout.isatty() else ""
  history, failed = start, False
  while True:
    try:
      line = input(prompt)
    except EOFError:
      break
    except KeyboardInterrupt:
      if not terminal:
        raise
      break
    if line.strip() == "/exit":
      break
    if line.strip() == "/reset":
      history = start
      _note("the conversation starts anew")
    elif line.strip():
      asked = [*history, _message("user", line)]
      try:
        schema.check_text("line", line)
        asked, ids = _fit(sampler, asked, len(start), request)
        answer = _answer(sampler, request, ids)
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
  room = max(room, request.min_tokens)
  n_messages = len(messages)
  while True:
    ids = chat.chat_ids(sampler.tokenizer, messages)
    n_tokens = len(ids)
    if n_tokens + room <= context:
      break
    turns = [i for i, m in enumerate(messages) if m["role"] == "user"]
    if len(turns) == 1:
      n_letters = len(messages[-1]["content"])
      beside = " and the system message make" if n_kept else " alone makes"
      raise schema.ConfigError(
        f"a message of {schema.counted(n_letters, 'character')}{beside} a "
        f"prompt of {n_tokens} tokens; the context of {context} keeps {room} "
        "for the answer: shorten the prompt or the answer"
      )
    messages = messages[:n_kept] + messages[turns[1] :]
  if len(messages) < n_messages:
    _note(
      f"the oldest {n_messages - len(messages)} messages are forgotten: the "
      f"context has {context} tokens"
    )
  return messages, ids


def _turn(
  sampler: sampler_lib.Sampler,
  request: request_lib.Request,
  prompt: list[int],
) -> request_lib.Request:
  """The request for the answer to a prompt: a single one, of one turn."""
  ends = {*request.stop_ids, *chat.stop_ids(sampler.tokenizer)}
  return dataclasses.replace(
    request, prompt=prompt, stop_ids=sorted(ends), n_samples=1
  )


def _answer(
  sampler: sampler_lib.Sampler,
  request: request_lib.Request,
  prompt: list[int],
) -> str:
  """Streams the answer to stdout and returns the text.

  Ctrl-C at a terminal ends the answer early and keeps the text; of other
  lines nobody waits for the next. Raises RunError on NaN logits.
  """
  text, reason = "", None
  try:
    for piece in sampler.stream([_turn(sampler, request, prompt)]):
      text += piece.text
      output.write(piece.text)
      reason = piece.result.finish_reason if piece.result else reason
  except KeyboardInterrupt:
    if not sys.stdin.isatty():
      raise
    reason = "cancelled"
  output.write("\n")
  if reason == "error":
    raise schema.RunError("NaN logits: the answer means nothing")
  if reason not in ("eos", "stop"):
    _note("the answer was cut short")
  return text


def _message(role: str, content: str) -> dict[str, str]:
  return {"role": role, "content": content}


def _note(text: str) -> None:
  print(f"[{text}]", file=sys.stderr, flush=True)
