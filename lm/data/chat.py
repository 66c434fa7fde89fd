"""Chats as token ids, and which of the tokens are training targets.

A message is `{"role": ..., "content": ...}`. The checkpoint's chat template
renders messages as text. Reserved and special tokens named in the template
(<user>, <|im_end|>, ...) become ids of their own; the same spelling in a
message stays ordinary text.

Targets are the tokens of `{% generation %}` blocks. For a template without such
blocks, prefixes of the conversation are rendered, and the targets are what an
assistant's message adds to the prompt of its answer, up to its end of turn.
"""

import functools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm import schema
from lm.data import chat_layout
from lm.data import tokenizer as tokenizer_lib

ROLES = ("system", "user", "assistant", "tool")
# Conversations, and characters of them, in one round trip to the renderer.
_MOST_CONVERSATIONS = 256
_MOST_CHARACTERS = 1 << 20
_SURROGATE = re.compile("([\ud800-\udfff])")

# Token ids, int32 [n], and which of them are targets, bool [n].
Encoded = tuple[np.ndarray, np.ndarray]
# A text or a mark, and whether its tokens are targets.
_Piece = tuple[str, bool]


def chat_ids(
  tokenizer: tokenizer_lib.Tokenizer, messages: Sequence[Any]
) -> list[int]:
  """Token ids of a conversation, up to the start of the assistant's answer.

  bos comes first even if the template omits bos. Raises ConfigError without a
  chat template, on a malformed message, and on messages refused by the
  template.
  """
  marked = chat_layout.marked_template(tokenizer)
  _check(messages)
  cut = (len(messages), True)
  ((text,),) = chat_layout.render(marked, [(messages, [cut])])
  if isinstance(text, schema.ConfigError):
    raise text
  pieces = _pieces(tokenizer, text, messages)
  ids, _ = _assemble(tokenizer, [pieces])[0]
  return ids.tolist()


def stop_ids(tokenizer: tokenizer_lib.Tokenizer) -> list[int]:
  """Stop ids of the assistant's turn, besides eos: <end_of_turn>, <user> and
  <system>, each only if named in the chat template, and every token that ends
  a turn in training, or of which the vocabulary says that it ends an answer.
  """
  template = tokenizer.chat_template
  if template is None:
    return []
  names = ["<end_of_turn>", "<user>", "<system>"]
  known = set(tokenizer.marked_tokens) & set(tokenizer.named)
  found = [
    tokenizer.named[name]
    for name in names
    if name in known and name in template
  ]
  try:
    found += [tokenizer.named[x] for x in chat_layout.layout(tokenizer).ends]
  except schema.ConfigError as error:
    # A template that cannot be trained on may still lay out a prompt.
    _say_ends_are_unknown(str(error))
  found += tokenizer.stops
  return [i for i in dict.fromkeys(found) if i != tokenizer.eos]


@functools.lru_cache(maxsize=64)  # once for each reason
def _say_ends_are_unknown(reason: str) -> None:
  print(
    f"{reason}. What ends a turn is not known: an answer ends with eos, a "
    "token that the vocabulary says ends one, or <end_of_turn>, <user> or "
    "<system> if the template names it",
    file=sys.stderr,
    flush=True,
  )


def encode(
  tokenizer: tokenizer_lib.Tokenizer, messages: Sequence[Any]
) -> Encoded:
  """Token ids of a whole conversation, int32 [n], and the targets, bool [n].

  `scored[i]` says that token i itself is a target: a token of the assistant, or
  the end of the assistant's turn. bos comes first, as in `chat_ids`. The ids
  end with the last rendered token; if the template ends no turn with a token,
  eos follows and is the end of turn.

  Text is cut where targets begin and end: no token is partly a target, and
  where the first answer begins, the ids so far are its prompt by `chat_ids`.
  The same holds of later answers if the template has `{% generation %}` blocks,
  or tokens around its turns.

  Raises ConfigError without a chat template, on a malformed message or an
  unknown role, on messages refused by the template, where prefixes do not tell
  which tokens are the assistant's, and if an end of turn would not be a target.
  """
  (encoded,) = encode_batch(tokenizer, [messages])
  if isinstance(encoded, schema.ConfigError):
    raise encoded
  return encoded


def encode_batch(
  tokenizer: tokenizer_lib.Tokenizer,
  conversations: Sequence[Sequence[Any]],
  threads: int = 1,
) -> list[Encoded | schema.ConfigError]:
  """`encode` of each conversation, or the ConfigError that it would raise.

  SentencePiece uses `threads` threads. Raises ConfigError without a chat
  template, and on a template that no conversation can be trained with.
  """
  layout = chat_layout.layout(tokenizer)
  found: list[list[_Piece] | schema.ConfigError] = []
  for group in _groups(conversations):
    found += _render_group(tokenizer, layout, group)
  whole = [pieces for pieces in found if isinstance(pieces, list)]
  encoded = iter(_assemble(tokenizer, whole, threads))
  return [
    x if isinstance(x, schema.ConfigError) else next(encoded) for x in found
  ]


def _groups(conversations: Sequence[Any]) -> list[list[Any]]:
  groups, n = [], _MOST_CHARACTERS
  for messages in conversations:
    if n >= _MOST_CHARACTERS or len(groups[-1]) >= _MOST_CONVERSATIONS:
      groups.append([])
      n = 0
    groups[-1].append(messages)
    n += sum(len(str(message)) for message in messages)
  return groups


def _render_group(
  tokenizer: tokenizer_lib.Tokenizer,
  layout: chat_layout.Layout,
  conversations: Sequence[Any],
) -> list[list[_Piece] | schema.ConfigError]:
  """Pieces of each conversation, by one round trip to the renderer."""
  tasks, errors = [], []
  for messages in conversations:
    try:
      _check(messages, ROLES)
      tasks.append((messages, layout.cuts(messages)))
      errors.append(None)
    except schema.ConfigError as error:
      errors.append(error)
  rendered = zip(tasks, chat_layout.render(layout.template, tasks), strict=True)
  found = []
  for error in errors:
    try:
      if error is not None:
        raise error
      (messages, _), texts = next(rendered)
      text = layout.with_targets(messages, texts)
      pieces = _pieces(tokenizer, text, messages)
      layout.check_ends(messages, text)
      found.append(pieces)
    except schema.ConfigError as refused:
      found.append(refused)
  return found


def _pieces(
  tokenizer: tokenizer_lib.Tokenizer, text: str, messages: Sequence[Any]
) -> list[_Piece]:
  """Splits a rendered text at its marks; checks what the template wrote."""
  pieces, inside = [], False
  names = chat_layout.names(tokenizer.marked_tokens)
  chat_layout.check_whole(text, messages, tokenizer.template_tokens)
  for part in _SURROGATE.split(text):
    if part in chat_layout.TARGETS:
      inside = part == chat_layout.TARGETS[0]
    elif part:
      if len(part) == 1 and part not in names and _SURROGATE.match(part):
        raise schema.ConfigError(
          f"chat template: writes half a character, {part!r}"
        )
      pieces.append((part, inside))
  return pieces


def rendered_ids(tokenizer: tokenizer_lib.Tokenizer, text: str) -> list[int]:
  """Token ids of a text of `chat_layout.render`, marks of tokens included."""
  pieces = [(part, False) for part in _SURROGATE.split(text) if part]
  ((_, parts),) = _encoded(tokenizer, [pieces])
  return np.concatenate(parts).tolist() if parts else []


def _assemble(
  tokenizer: tokenizer_lib.Tokenizer,
  conversations: Sequence[list[_Piece]],
  threads: int = 1,
) -> list[Encoded]:
  """Token ids and targets of pieces. bos comes first, but of a vocabulary whose
  templates write what they were trained with.
  """
  bos, found = np.array([tokenizer.bos], np.int32), []
  begins = tokenizer.vocabulary.chats_begin_with_bos
  for inside, parts in _encoded(tokenizer, conversations, threads):
    opens = parts and parts[0][:1].tolist() == [tokenizer.bos]
    if not parts or (begins and not opens):
      parts, inside = [bos, *parts], [False, *inside]
    scored = np.repeat(inside, [len(part) for part in parts])
    found.append((np.concatenate(parts), scored))
  return found


def _encoded(
  tokenizer: tokenizer_lib.Tokenizer,
  conversations: Sequence[list[_Piece]],
  threads: int = 1,
) -> Iterator[tuple[list[bool], list[np.ndarray]]]:
  """Yields, per conversation, whether each piece is a target, and its ids."""
  names = chat_layout.names(tokenizer.marked_tokens)
  ids = {
    mark: np.array([tokenizer.named[name]], np.int32)
    for mark, name in names.items()
  }
  vocabulary = tokenizer.vocabulary

  def going_on(pieces: list[_Piece]) -> list[bool]:
    """Of each piece, whether its text would get no dummy prefix."""
    before = ["", *(text for text, _ in pieces)]
    return [
      vocabulary.prefix_once if text in names else text != ""
      for text in before[: len(pieces)]
    ]

  if vocabulary.strips:
    marks = {
      mark: vocabulary.strips.get(int(ids[mark][0]), (False, False))
      for mark in names
    }
    conversations = [_stripped(pieces, marks) for pieces in conversations]
  # Texts at the start, and texts that go on from earlier text.
  texts: tuple[list[str], list[str]] = ([], [])
  for pieces in conversations:
    for (text, _), goes_on in zip(pieces, going_on(pieces), strict=True):
      if text not in names:
        texts[goes_on].append(text)
  encoded = [
    iter(tokenizer.encode_batch(some, threads, bool(i)) if some else [])
    for i, some in enumerate(texts)
  ]
  for pieces in conversations:
    parts = [
      ids[text] if text in ids else next(encoded[goes_on])
      for (text, _), goes_on in zip(pieces, going_on(pieces), strict=True)
    ]
    yield [flag for _, flag in pieces], parts


def _stripped(
  pieces: list[_Piece], strips: Mapping[str, tuple[bool, bool]]
) -> list[_Piece]:
  """Pieces without the spaces that special tokens take with them: before and
  behind each mark, as `strips` says.
  """
  found: list[_Piece] = []
  behind = False  # Whether the last token takes the spaces behind it.
  for text, inside in pieces:
    if text in strips:
      before, behind = strips[text]
      while before and found and found[-1][0] not in strips:
        last, flag = found.pop()
        if last.rstrip():
          found.append((last.rstrip(), flag))
          break
    elif behind:
      text = text.lstrip()
      behind = not text
    if text:
      found.append((text, inside))
  return found


def _check(messages: Sequence[Any], roles: Sequence[str] = ()) -> None:
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
      schema.check_text(f"messages[{i}].{name}", value)
    if roles and item["role"] not in roles:
      raise schema.ConfigError(
        f"messages[{i}].role={schema.shown(item['role'])}: must be one of "
        f"{', '.join(roles)}"
      )
