"""How a chat template lays out the assistant's turns: found by a probe.

During rendering a surrogate, the mark, stands for each reserved and special
token of the template's text, and two more marks surround training targets.
Messages hold no surrogate: UTF-8 cannot encode one. Marks are low surrogates
only, since JSON would read a high and a low surrogate as one character.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm import schema
from lm.data import template as template_lib
from lm.data import tokenizer as tokenizer_lib

# Marks before and after training targets.
TARGETS = ("\udffe", "\udfff")
_MARK = re.compile("[\udc00-\udffd]")
# What looks like a token.
_SPELT = re.compile(r"<[|\uff5c][^<>]{1,40}[|\uff5c]>|</s>")
_REMEDY = (
  "put {% generation %} and {% endgeneration %} around the assistant's content "
  "and end of turn in the chat template"
)


def _conversation(*roles: str) -> list[dict[str, str]]:
  return [
    {"role": role, "content": f"Probe {'ABCDE'[i]} of {role}"}
    for i, role in enumerate(roles)
  ]


# The first that a template renders is its probe.
_PROBES = (
  _conversation("user", "assistant", "user", "assistant"),
  _conversation("system", "user", "assistant", "user", "assistant"),
  _conversation("user", "assistant"),
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A chat template, with marks in place of `tokens`, and its turns.

  `has_blocks` says whether it has `{% generation %}` blocks. `ends` are the
  names of the tokens that end the assistant's turn; () means that the turn is
  plain text, and eos ends it.
  """

  template: str
  tokens: tuple[str, ...]
  has_blocks: bool
  ends: tuple[str, ...]

  def cuts(self, messages: Sequence[Any]) -> list[template_lib.Cut]:
    """What to render of a conversation; the last is the whole of it."""
    whole = (len(messages), False)
    if self.has_blocks:
      return [whole]
    cuts = _turn_cuts(messages)
    return cuts if whole in cuts else [*cuts, whole]

  def with_targets(
    self, messages: Sequence[Any], texts: Sequence[str | schema.ConfigError]
  ) -> str:
    """The whole text, with marks around the training targets.

    `texts` are the renderings of `cuts`. Raises ConfigError if one failed, or
    the prefixes do not tell which tokens are the assistant's.
    """
    text = texts[-1]
    if isinstance(text, schema.ConfigError):
      raise text
    if not self.has_blocks:
      text = self._derived(messages, texts, text)
    if not self.ends:
      eos = marks(self.tokens)["<eos>"]
      # Before the mark that ends the last answer, so that eos is a target.
      text = f"{text.removesuffix(TARGETS[1])}{eos}" + (
        TARGETS[1] if text.endswith(TARGETS[1]) else ""
      )
    return text

  def _derived(
    self,
    messages: Sequence[Any],
    texts: Sequence[str | schema.ConfigError],
    whole: str,
  ) -> str:
    parts, done, ends = [], 0, self._end_marks()
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i, prompt, answered in zip(
      turns, texts[::2], texts[1::2], strict=False
    ):
      for text in (prompt, answered):
        if isinstance(text, schema.ConfigError):
          raise schema.ConfigError(
            f"messages[{i}]: the conversation up to it cannot be rendered on "
            f"its own ({text}), and without {{% generation %}} only that tells "
            f"which tokens are the assistant's; {_REMEDY}"
          )
      assert isinstance(prompt, str) and isinstance(answered, str)
      if not answered.startswith(prompt):
        raise _ambiguous(i, "by add_generation_prompt and with the answer")
      turn, said = answered[len(prompt) :], messages[i]["content"].strip()
      stop = len(turn)
      if ends:
        found = ends.search(turn, max(0, turn.find(said)))
        if found is None:
          raise self._no_end(f"messages[{i}]")
        stop = found.end()
      if len(prompt) < done or not whole.startswith(prompt + turn[:stop]):
        raise _ambiguous(i, "at its end and before further messages")
      parts += [whole[done : len(prompt)], TARGETS[0], turn[:stop], TARGETS[1]]
      done = len(prompt) + stop
    return "".join([*parts, whole[done:]])

  def _end_marks(self) -> re.Pattern[str] | None:
    known = marks(self.tokens)
    found = "".join(known[name] for name in self.ends)
    return re.compile(f"[{found}]") if found else None

  def check_ends(self, messages: Sequence[Any], text: str) -> None:
    """Raises ConfigError unless the end of each assistant turn is a target in
    `text`, the result of `with_targets`.
    """
    targets = re.findall(f"{TARGETS[0]}([^{TARGETS[1]}]*)", text)
    n_turns = sum(message["role"] == "assistant" for message in messages)
    if not self.ends:
      if targets and not text.endswith(TARGETS[1]):
        raise schema.ConfigError(
          "messages: the chat template ends the assistant's turn with no "
          "token, and the last message is not the assistant's, so no end of "
          "turn would be a target; leave out the messages after it, or end "
          "each turn with a token in the chat template"
        )
      return
    ends = self._end_marks()
    assert ends is not None
    n_ends = sum(len(ends.findall(target)) for target in targets)
    if n_ends < min(len(targets), n_turns):
      raise self._no_end("messages")

  def _no_end(self, where: str) -> schema.ConfigError:
    return schema.ConfigError(
      f"{where}: the chat template ends an assistant's turn without "
      f"{' or '.join(self.ends)} as a target, so the model would not learn to "
      f"stop; {_REMEDY}"
    )


def _ambiguous(i: int, where: str) -> schema.ConfigError:
  return schema.ConfigError(
    f"messages[{i}]: the chat template writes the conversation differently "
    f"{where}, so prefixes do not tell which tokens are the assistant's; "
    f"{_REMEDY}"
  )


def layout(tokenizer: tokenizer_lib.Tokenizer) -> Layout:
  """Layout of the tokenizer's chat template, from a probe conversation.

  Raises ConfigError without a chat template, and on a template that renders no
  conversation, does not write the assistant's content, or does not make the
  end of turn a target.
  """
  return _layout(
    marked_template(tokenizer),
    tokenizer.marked_tokens,
    tokenizer.template_tokens,
  )


@functools.lru_cache(maxsize=64)
def _layout(
  template: str, tokens: tuple[str, ...], all_tokens: tuple[str, ...]
) -> Layout:
  messages, texts = _probe(template)
  turns = [m for m in messages if m["role"] == "assistant"]
  has_blocks = any(TARGETS[0] in text for text in texts)
  for text in texts:
    check_whole(text, messages, all_tokens)
  known = names(tokens)
  ends = []
  for turn, text in zip(turns, texts[1::2], strict=True):
    at = text.rfind(turn["content"])
    if at < 0:
      raise schema.ConfigError(
        "chat template: does not write the assistant's message as it is"
      )
    if has_blocks and not _is_target(text, at):
      continue  # The template leaves this turn out.
    end = _MARK.search(text, at + len(turn["content"]))
    stop = end.start() if end else len(text)
    if spelt := _SPELT.search(text, at, stop):
      raise schema.ConfigError(
        f"chat template: ends the assistant's turn with {spelt[0]} as ordinary "
        "text; name it in config.tokenizer.special_tokens"
      )
    learnt = _is_target(text, stop) if end else text[-1] == TARGETS[1]
    if has_blocks and not learnt:
      raise schema.ConfigError(
        "chat template: the end of the assistant's turn follows "
        "{% endgeneration %}, so the model would not learn to stop; put it "
        "before {% endgeneration %}"
      )
    ends.append(known.get(end[0], "") if end else None)
  if not ends:
    raise schema.ConfigError(
      "chat template: no {% generation %} block holds the assistant's message"
    )
  if None in ends and any(ends):
    raise schema.ConfigError(
      "chat template: ends only some of the assistant's turns with a token; "
      "end each of them with the same"
    )
  found = Layout(
    template,
    tokens,
    has_blocks,
    tuple(dict.fromkeys(end for end in ends if end)),
  )
  # Up to the first answer: not every template writes a second.
  first = messages[: messages.index(turns[0]) + 1]
  (texts,) = render(template, [(first, found.cuts(first))])
  found.check_ends(first, found.with_targets(first, texts))
  return found


def check_whole(
  text: str, messages: Sequence[Any], tokens: tuple[str, ...]
) -> None:
  """Raises ConfigError if the template assembles a token: `<{{ role }}>`.

  Only tokens written whole in the template become ids.
  """
  for name in spelling(tokens).findall(text):
    if not any(name in value for item in messages for value in item.values()):
      raise schema.ConfigError(
        f"chat template: puts {name} together out of parts, which would be "
        "ordinary text; write the token whole"
      )


def _is_target(text: str, at: int) -> bool:
  """Whether character `at` of a rendered text lies between TARGETS."""
  before, after = (text.count(mark, 0, at) for mark in TARGETS)
  return before > after


def _probe(template: str) -> tuple[list[dict[str, str]], list[str]]:
  """The first probe that the template renders, and its renderings, by turns
  the prompt of an answer and the conversation with it.
  """
  refusals = []
  for messages in _PROBES:
    cuts = _turn_cuts(messages)
    (texts,) = render(template, [(messages, cuts)])
    refusals = [t for t in texts if isinstance(t, schema.ConfigError)]
    if not refusals:
      whole = [text for text in texts if isinstance(text, str)]
      _check_blocks(template, messages, cuts, whole)
      return messages, whole
  raise schema.ConfigError(
    f"{refusals[0]} (on a probe conversation of user and assistant)"
  )


def _check_blocks(
  template: str,
  messages: Sequence[Any],
  cuts: Sequence[template_lib.Cut],
  texts: Sequence[str],
) -> None:
  """Raises ConfigError if a template treats marks of targets as text."""
  if not any(TARGETS[0] in text for text in texts):
    return
  (plain,) = render(template, [(messages, cuts)], ("", ""))
  without = [re.sub(f"[{TARGETS[0]}{TARGETS[1]}]", "", text) for text in texts]
  if plain != without:
    raise schema.ConfigError(
      "chat template: a filter changes what a {% generation %} block renders; "
      "put the block outside the filter"
    )


def _turn_cuts(messages: Sequence[Any]) -> list[template_lib.Cut]:
  """For each assistant's message, the prompt of the answer and the conversation
  up to the answer.
  """
  return [
    cut
    for i, message in enumerate(messages)
    if message["role"] == "assistant"
    for cut in ((i, True), (i + 1, False))
  ]


# --- marks -------------------------------------------------------------------


def marked_template(tokenizer: tokenizer_lib.Tokenizer) -> str:
  """The tokenizer's chat template with marks in place of the tokens named in
  it. Raises ConfigError without a chat template, or on a template that names
  a reserved token which the vocabulary lacks.
  """
  if tokenizer.chat_template is None:
    raise schema.ConfigError(
      "chat: this checkpoint has no chat template; train one with "
      "--config.tokenizer.chat_template=FILE.jinja, name one for lm.chat, "
      "lm.serve or lm.evaluate by --chat_template, or ask for a completion"
    )
  for name in tokenizer.marked_tokens:
    if name not in tokenizer.named:
      raise schema.ConfigError(
        f"chat template: writes {name}, for which the vocabulary has no id; "
        "write a token that it has, or train on a source of chats, with a "
        "config.model.vocab_size that has room for it"
      )
  return _marked(tokenizer.chat_template, tokenizer.marked_tokens)


@functools.lru_cache(maxsize=64)
def _marked(template: str, tokens: tuple[str, ...]) -> str:
  known = marks(tokens)
  return spelling(tokens).sub(lambda found: known[found[0]], template)


def render(
  marked: str,
  conversations: Sequence[tuple[Sequence[Any], Sequence[template_lib.Cut]]],
  targets: tuple[str, str] = TARGETS,
) -> list[list[str | schema.ConfigError]]:
  """Texts of each cut of each conversation, with marks of tokens and targets;
  a ConfigError in place of a text that cannot be rendered.
  """
  known = marks(())
  # As transformers: without tools and documents these are none, but defined.
  values = {
    **{"bos_token": known["<bos>"], "eos_token": known["<eos>"]},
    **{"tools": None, "documents": None},
  }
  plain = [
    ([dict(message) for message in messages], cuts)
    for messages, cuts in conversations
  ]
  return template_lib.render(marked, values, plain, targets)


@functools.lru_cache
def marks(tokens: tuple[str, ...]) -> Mapping[str, str]:
  """Mark of each token that a template may write; bos and eos are among them
  wherever it writes `bos_token` and `eos_token`.
  """
  known = dict.fromkeys(("<bos>", "<eos>", *tokens))
  return {name: chr(0xDC00 + i) for i, name in enumerate(known)}


@functools.lru_cache
def names(tokens: tuple[str, ...]) -> Mapping[str, str]:
  """Name of the token that each mark stands for."""
  return {mark: name for name, mark in marks(tokens).items()}


@functools.lru_cache
def spelling(tokens: tuple[str, ...]) -> re.Pattern[str]:
  """Matches any of `tokens`; a longer one before its parts."""
  known = sorted(tokens, key=len, reverse=True)
  return re.compile("|".join(map(re.escape, known)) or r"(?!)")
