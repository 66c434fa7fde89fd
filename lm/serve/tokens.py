"""Answers /tokenize, /detokenize and /tokenizer_info, as vLLM does, for clients
without the tokenizer, such as lm-evaluation-harness with
`tokenizer_backend=remote`.
"""

from typing import Any

from lm.data import chat
from lm.sample import sampler as sampler_lib
from lm.serve import fields as fields_lib
from lm.serve import protocol

TOKENIZE = ("prompt", "messages", "add_special_tokens", "return_token_strs")
DETOKENIZE = ("tokens",)


def tokenize(
  sampler: sampler_lib.Sampler, model: str, body: bytes
) -> dict[str, Any]:
  """Returns the token ids of a `prompt`, with bos first unless
  `add_special_tokens` is false, or of `messages` up to the assistant's answer.

  A prompt equal to the name of a token gives the id of the token, for clients
  looking up bos and eos; within a longer text, a name stays text. Raises
  Refusal on an invalid request.
  """
  fields = fields_lib.read(body, model, TOKENIZE)
  tokenizer = sampler.tokenizer
  with_bos = fields_lib.typed(fields, "add_special_tokens", bool, True)
  names = fields_lib.typed(fields, "return_token_strs", bool, False)
  if ("prompt" in fields) == ("messages" in fields):
    raise fields_lib.Refusal(400, "prompt: give this or messages", "prompt")
  if "messages" in fields:
    messages = fields_lib.messages(fields["messages"])
    ids = protocol.checked(chat.chat_ids, tokenizer, messages)
  else:
    text = fields_lib.typed(fields, "prompt", str, "")
    if text in tokenizer.named:
      ids = [tokenizer.named[text]]
    else:
      ids = protocol.checked(sampler.encode, text)[not with_bos :]
  return {
    "count": len(ids),
    "max_model_len": sampler.cfg.context_length,
    "tokens": ids,
    "token_strs": [tokenizer.piece(i) for i in ids] if names else None,
  }


def detokenize(
  sampler: sampler_lib.Sampler, model: str, body: bytes
) -> dict[str, Any]:
  """Returns the text of `tokens`; reserved and special tokens have no text.
  Raises Refusal on an invalid request.
  """
  fields = fields_lib.read(body, model, DETOKENIZE)
  if "tokens" not in fields:
    raise fields_lib.Refusal(400, "tokens: missing", "tokens")
  ids = fields["tokens"]
  fields_lib.check_list("tokens", ids, int)
  size = sampler.tokenizer.size
  for i in ids:
    if not 0 <= i < size:
      raise fields_lib.Refusal(
        400, f"tokens: id {fields_lib.short(i)} is not in [0, {size})", "tokens"
      )
  return {"prompt": sampler.tokenizer.decode(ids)}


def info(sampler: sampler_lib.Sampler) -> dict[str, Any]:
  """Returns the keys of tokenizer_config.json read by clients, and the
  vocabulary size and the fingerprint.
  """
  tokenizer = sampler.tokenizer
  return {
    "tokenizer_class": type(tokenizer).__name__,
    "bos_token": tokenizer.piece(tokenizer.bos),
    "eos_token": tokenizer.piece(tokenizer.eos),
    "pad_token": tokenizer.piece(tokenizer.pad),
    "chat_template": tokenizer.chat_template,
    "model_max_length": sampler.cfg.context_length,
    "vocab_size": tokenizer.size,
    "fingerprint": tokenizer.fingerprint,
  }


# The functions with a request body, by URL path.
READERS = {"/tokenize": tokenize, "/detokenize": detokenize}
