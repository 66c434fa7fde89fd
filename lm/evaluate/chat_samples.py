"""Greedy answers of a checkpoint in conversations, with reference answers.

The reference is the last answer of a conversation, and the prompt consists of
all messages before the reference. An answer has the likeliest token at each
step.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from lm import config as config_lib
from lm import objective as objective_lib
from lm import schema
from lm.data import chat, chat_layout, conversations
from lm.data import sources as sources_lib
from lm.data import tokenizer as tokenizer_lib
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib


@dataclasses.dataclass(frozen=True)
class Sample:
  """A prompt with a reference and an answer; `prompt_ids` are the token ids up
  to the assistant's turn.

  `answer` is None if the context has no room for an answer. `ended` says
  whether the model ended the answer, by eos or an end of turn.
  """

  source: str
  document: str
  prompt: list[conversations.Message]
  reference: str
  prompt_ids: list[int]
  answer: str | None = None
  ended: bool = False


def of_chats(names: Sequence[str]) -> list[str]:
  return [
    name
    for name in names
    if isinstance(objective_lib.of(name), objective_lib.Chat)
  ]


def find(
  names: Sequence[str],
  n: int,
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
) -> list[Sample]:
  """Returns samples, without answers of a model, of the first `n` conversations
  of each source of chats among `names`. Conversations without an answer, or
  with nothing before the answer, are passed over.

  Raises ConfigError if no source is of chats, without a chat template, and on
  an unreadable source. A prompt refused by the template is skipped, or raises
  ConfigError if `data.invalid_documents` is "error".
  """
  schema.require(n >= 1, "--samples", n, "must be at least 1")
  chats = of_chats(names)
  if not chats:
    raise schema.ConfigError(
      f"--samples={n}: none of the sources {', '.join(map(repr, names))} is of "
      "chats; name one, as --source='jsonl:GLOB|chat', or leave --samples out"
    )
  chat_layout.marked_template(tokenizer)  # Raises ConfigError without one.
  return [
    sample
    for name in chats
    for sample in itertools.islice(_read(name, tokenizer, data), n)
  ]


def _read(
  name: str,
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
) -> Iterator[Sample]:
  spec, _ = objective_lib.split_source(name)
  source = sources_lib.open_source(spec, data, chat=True)
  for i in range(len(source)):
    found = source[i]
    if not isinstance(found, sources_lib.Conversation):
      continue  # The policy of the run skips an invalid document.
    turns = [
      k for k, m in enumerate(found.messages) if m["role"] == "assistant"
    ]
    if not turns or turns[-1] == 0:
      continue
    prompt = list(found.messages[: turns[-1]])
    try:
      ids = chat.chat_ids(tokenizer, prompt)
    except schema.ConfigError as error:
      sources_lib.invalid(found.name, error, data)
      continue
    reference = found.messages[turns[-1]]["content"]
    yield Sample(name, found.name, prompt, reference, ids)


def answer(
  sampler: sampler_lib.Sampler,
  samples: Sequence[Sample],
  max_new_tokens: int | None = None,
) -> list[Sample]:
  """Collective: returns the samples with answers of at most `max_new_tokens`
  tokens, fewer if the context is full. The default is
  request.DEFAULT_NEW_TOKENS. Raises RunError on NaN logits.
  """
  context = sampler.cfg.context_length
  limit = max_new_tokens
  if limit is None:
    limit = request_lib.DEFAULT_NEW_TOKENS
  ends = chat.stop_ids(sampler.tokenizer)
  requests = {
    i: request_lib.Request(
      prompt=sample.prompt_ids,
      temperature=0.0,
      max_new_tokens=min(limit, context - len(sample.prompt_ids)),
      stop_ids=ends,
    )
    for i, sample in enumerate(samples)
    if len(sample.prompt_ids) < context
  }
  if not requests:
    return list(samples)
  results = sampler.generate(list(requests.values()))
  found = list(samples)
  for i, result in zip(requests, results, strict=True):
    if result.finish_reason == "error":
      raise schema.RunError(
        f"{samples[i].document}: NaN logits: the answer means nothing"
      )
    found[i] = dataclasses.replace(
      samples[i], answer=result.text, ended=result.finish_reason == "eos"
    )
  return found
