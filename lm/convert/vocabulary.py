"""Writes a tokenizer as files for AutoTokenizer of transformers.

Both give the same token ids for a text and the same text for token ids. A text
with the name of a special token needs `split_special_tokens=True` for equal
ids, since the name is ordinary text here except in a chat template.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from lm import files, schema
from lm.data import (
  chat_layout,
  huggingface_vocabulary,
  pretokenizing,
  sentencepiece_model,
  vocabulary,
)
from lm.data import tokenizer as tokenizer_lib
from lm.data.vocabulary import SPACE

# Prepends bos to a chat template, since chats here begin with bos even if the
# template writes none. With trim_blocks Jinja removes the comment's newline.
_BOS_FIRST = "{{ bos_token }}{# each document begins with it #}\n"

# Where tokenizers differ: spaces, newlines, digits, marks, bytes, case.
_TEXTS = (
  *("Hello world", " two  spaces   three", "a\n\n  b\r\n\tc ", "12345 3.14"),
  *("I'LL don't", "e\u0301 \u00e9 \ufb01", "\u2581a \u2581", "\0\x1f\ufeff"),
  *("\U0001f468\u200d\U0001f469 \u4e2d\u6587 \u05e9", "def f(x):\n  return x"),
)


def write(
  tokenizer: tokenizer_lib.Tokenizer, folder: str, context: int | None = None
) -> None:
  """Writes tokenizer.json and tokenizer_config.json, with the chat template if
  any, into the existing folder. `context` is the model's context length in
  tokens, the key model_max_length.

  Raises ConfigError if a tokenizer.json cannot express the vocabulary.
  """
  for name, content in contents(tokenizer, context).items():
    files.replace(os.path.join(folder, name), content)


def contents(
  tokenizer: tokenizer_lib.Tokenizer, context: int | None = None
) -> dict[str, str]:
  """Returns the content of each file of `write`, by file name."""
  v = tokenizer.vocabulary
  roles = {role: f"<{role}>" for role in ("bos", "eos", "pad", "mask")}
  config: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
  }
  if isinstance(v, huggingface_vocabulary.HuggingFace):
    tree, roles = _with_added(v), dict(v.source.roles)
    config["reserved_tokens"] = _own_names(v)
  elif isinstance(v, sentencepiece_model.SentencePiece):
    tree = _sentencepiece(v)
  else:
    tree = _bytes(v)
  config |= {f"{role}_token": name for role, name in sorted(roles.items())}
  if context is not None:
    config["model_max_length"] = context
  if tokenizer.chat_template is not None:
    config["chat_template"] = _template(tokenizer)
  text = json.dumps(tree, ensure_ascii=False, indent=1)
  _check(text, tokenizer)
  return {
    "tokenizer.json": text,
    "tokenizer_config.json": json.dumps(config, indent=2),
  }


def verify(tokenizer: tokenizer_lib.Tokenizer, folder: str) -> None:
  """Reads the folder with transformers and compares the token ids of `_TEXTS`.

  transformers chooses a class by the model_type in config.json, and some
  classes override steps of the tokenizer.json. Raises RunError on a difference,
  ConfigError if transformers is not installed.
  """
  try:
    import transformers
  except ImportError as error:
    raise schema.ConfigError(
      "transformers is not installed, so the files cannot be read again; "
      "pip install torch transformers"
    ) from error
  other = transformers.AutoTokenizer.from_pretrained(
    folder, trust_remote_code=False
  )
  for text, ids in zip(_TEXTS, tokenizer.encode_batch(_TEXTS), strict=True):
    found = other.encode(text, add_special_tokens=False)
    if found != ids.tolist():
      raise schema.RunError(
        f"{folder}: transformers reads the vocabulary as "
        f"{type(other).__name__} and makes {found[:8]} of {text!r}, not "
        f"{ids[:8].tolist()}: it has a class of its own for the model_type in "
        "config.json. Read the files with transformers."
        "PreTrainedTokenizerFast, or export as another model_type"
      )


def _check(text: str, tokenizer: tokenizer_lib.Tokenizer) -> None:
  """Raises ConfigError unless the tokenizer.json `text` has each reserved and
  special token at the id of the vocabulary.
  """
  found = tokenizers.Tokenizer.from_str(text)
  own = tokenizer.vocabulary
  for name, i in {**own.special, **own.reserved}.items():
    there = found.id_to_token(i)
    if there is None or found.token_to_id(there) != i:
      raise schema.ConfigError(
        f"tokenizer: the token {name!r} of id {i} would have no id, or "
        "another, in a tokenizer.json"
      )


def _template(tokenizer: tokenizer_lib.Tokenizer) -> str:
  template = tokenizer.chat_template
  assert template is not None
  if not tokenizer.vocabulary.chats_begin_with_bos:
    return template
  marked = chat_layout.marked_template(tokenizer)
  message = {"role": "user", "content": "Hello"}
  ((text,),) = chat_layout.render(marked, [([message], [(1, False)])])
  bos = chat_layout.marks(tokenizer.marked_tokens)["<bos>"]
  has_bos = isinstance(text, str) and text.startswith(bos)
  return template if has_bos else _BOS_FIRST + template


# --- our own kinds -----------------------------------------------------------


def _tree(
  names: Mapping[str, int],
  vocab: Mapping[str, int],
  merges: Sequence[tuple[str, str]] = (),
  **steps: Any,
) -> dict[str, Any]:
  """Returns a tokenizer.json: a BPE with the tokens `vocab`, and the special
  tokens `names`; bos is put before a text. Raises ConfigError if a name is also
  a token of text.
  """
  for name in names:
    if name in vocab or len(name) == 1:
      raise schema.ConfigError(
        f"config.tokenizer.special_tokens: {name!r} is also a token of text, "
        "which a tokenizer.json cannot tell apart; a vocabulary to export "
        "needs another name"
      )
  bos = {"id": "<bos>", "type_id": 0}
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      _added(name, i) for name, i in sorted(names.items(), key=lambda x: x[1])
    ],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [
        {"SpecialToken": bos},
        {"Sequence": {"id": "A", "type_id": 0}},
      ],
      "pair": [
        {"SpecialToken": bos},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
      ],
      "special_tokens": {
        "<bos>": {"id": "<bos>", "ids": [names["<bos>"]], "tokens": ["<bos>"]}
      },
    },
    "decoder": None,
    **steps,
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": False,
      **steps.pop("model", {}),
      "vocab": {**names, **vocab},
      "merges": [list(pair) for pair in merges],
    },
  }


def _added(name: str, i: int, special: bool = True) -> dict[str, Any]:
  return {
    "id": i,
    "content": name,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": special,
  }


def _bytes(v: vocabulary.Vocabulary) -> dict[str, Any]:
  letters = pretokenizing.LETTERS
  vocab = {letters[raw[0]]: i for i, raw in enumerate(v.pieces) if raw}
  step = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
  }
  names = {**v.special, **v.reserved}
  return _tree(names, vocab, pre_tokenizer=step, decoder=step)


def _sentencepiece(v: sentencepiece_model.SentencePiece) -> dict[str, Any]:
  """Returns a BPE over characters with byte fallback.

  SentencePiece merges the neighbours with the best score of the joint piece,
  the leftmost among equal scores; `tokenizers` merges the pair earliest in the
  list of merges. Hence the list has every split of each piece into two pieces,
  ordered by score.

  With `v.plain`, pieces are written with spaces in place of U+2581: a U+2581 of
  the text is in no piece, and becomes bytes.
  """
  space = " " if v.plain else SPACE
  vocab, scores, user_defined = {}, {}, {}
  for i, piece in enumerate(v.model_pieces()):
    name = piece.text.replace(SPACE, space)
    if piece.kind in ("normal", "byte", "user_defined"):
      vocab[name] = i
    if piece.kind == "normal":
      scores[name] = piece.score
    if piece.kind == "user_defined":
      user_defined[name] = i
  _check_sentencepiece(v, scores, user_defined)
  decoder = [{"type": "ByteFallback"}, {"type": "Fuse"}]
  normalizer = []
  if not v.plain:
    mark = {"pattern": {"String": " "}, "content": SPACE}
    normalizer = [{"type": "Replace", **mark}]
    unmark = {"pattern": {"String": SPACE}, "content": " "}
    decoder = [{"type": "Replace", **unmark}, *decoder]
  if v.prefix:
    normalizer = [{"type": "Prepend", "prepend": SPACE}, *normalizer]
    decoder += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
  tree = _tree(
    {**v.special, **v.reserved},
    vocab,
    _merges(scores),
    normalizer={"type": "Sequence", "normalizers": normalizer}
    if normalizer
    else None,
    decoder={"type": "Sequence", "decoders": decoder},
    model={"byte_fallback": True},
  )
  tree["added_tokens"] += [
    {**_added(name, i, special=False), "normalized": True}
    for name, i in user_defined.items()
  ]
  tree["added_tokens"].sort(key=lambda token: token["id"])
  return tree


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
  found = []
  for piece, score in scores.items():
    for k in range(1, len(piece)):
      left, right = piece[:k], piece[k:]
      if left in scores and right in scores:
        found.append((-score, k, left, right))
  return [(left, right) for _, _, left, right in sorted(found)]


def _check_sentencepiece(
  v: sentencepiece_model.SentencePiece,
  scores: Mapping[str, float],
  user_defined: Mapping[str, int],
) -> None:
  """Raises ConfigError if ids would differ in a tokenizer.json."""
  joint = [score for piece, score in scores.items() if len(piece) > 1]
  letters = {letter for piece in scores for letter in piece}
  for wrong, why in (
    (not v.is_bpe, "it is no BPE"),
    (v.changes_text, "it has a normaliser, which a tokenizer.json lacks"),
    (
      user_defined and v.prefix,
      "it has both user-defined symbols and a prefix",
    ),
    (len(set(joint)) < len(joint), "pieces have equal scores"),
    (letters - set(scores), "a character of a piece is no piece"),
  ):
    if wrong:
      raise schema.ConfigError(
        f"tokenizer: the SentencePiece model cannot be exported: {why}, so ids "
        "would differ; give the tokenizer.json that came with it, by "
        "tokenizer.kind='huggingface'"
      )


# --- Hugging Face's ----------------------------------------------------------


def _with_added(v: huggingface_vocabulary.HuggingFace) -> dict[str, Any]:
  """Returns the vocabulary's tokenizer.json with all added tokens."""
  tree = json.loads(v.source.text)
  there = {token["content"] for token in tree.get("added_tokens") or []}
  ours = {**v.special, **v.reserved}
  new = sorted((i, name) for name, i in ours.items() if i >= v.n_own)
  tree["added_tokens"] = (tree.get("added_tokens") or []) + [
    _added(name, i) for i, name in new if name not in there
  ]
  return tree


def _own_names(v: huggingface_vocabulary.HuggingFace) -> dict[str, str]:
  """Returns the vocabulary's own name of each reserved token."""
  own = {i: name for name, i in v.tokens.items()}
  return {name: own.get(i, name) for name, i in v.reserved.items()}
