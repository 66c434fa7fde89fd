"""Trains a tokenizer on texts; equal texts give an equal tokenizer."""

import io
import re
from collections.abc import Iterable, Sequence

import sentencepiece
import tokenizers

from lm import config as config_lib
from lm import schema
from lm.data import huggingface_files
from lm.data import tokenizer as tokenizer_lib
from lm.data.vocabulary import RESERVED

# Sentences for the trainer have at most 4096 characters, and end in a newline
# where possible. Whole lines let the trainer learn newlines and indentation.
_SENTENCE = re.compile(r"(?s).{1,4096}(?<=\n)|.{1,4096}")
# The options were chosen by bits per byte after training (2 layers, 400 steps,
# 2048 ids), since bytes per token is a bad predictor: 1.80 at 2.98 bytes per
# token; 1.85 at 3.11 if pieces join letters and signs; 2.17 at 3.51 if pieces
# also join words.
TRAINER = {
  "character_coverage": 0.9995,
  "split_digits": True,
  "allow_whitespace_only_pieces": True,
  "max_sentencepiece_length": 32,
}


# The split of text before byte-level BPE merges bytes follows Qwen2: each digit
# is a token by itself, and no text is dropped.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# To be raised when `_bpe` gives another tokenizer for the same texts.
BPE_VERSION = 1


def train(
  config: config_lib.Config, texts: Iterable[str]
) -> tokenizer_lib.Tokenizer:
  """Trains byte-pair encoding (BPE, arXiv:1508.07909) with `model.vocab_size`
  ids on `texts`: over characters by SentencePiece, or over bytes if
  tokenizer.kind='bpe'.

  Raises ConfigError on invalid special tokens, and if the vocabulary size is
  below the minimum or too large for the texts.
  """
  size, special = config.model.vocab_size, config.tokenizer.special_tokens
  tokenizer_lib.check_special(special)
  smallest = len(RESERVED) + len(special) + 256 + 1
  if size < smallest:
    raise schema.ConfigError(
      f"config.model.vocab_size={size}: {smallest - 1} ids are taken by bytes, "
      f"reserved and special tokens; set it to at least {smallest}"
    )
  make = _bpe if config.tokenizer.kind == "bpe" else _sentencepiece
  model = make(size, special, texts)
  tokenizer = tokenizer_lib.Tokenizer(model, special_tokens=special)
  tokenizer_lib.check_vocabulary(config, tokenizer)
  return tokenizer


def _out_of_reach(size: int, reason: str) -> schema.ConfigError:
  return schema.ConfigError(
    f"config.model.vocab_size={size}: the training sources are too small "
    f"or too varied for it ({reason}); change it, give more text, "
    "or set tokenizer.kind='bytes'"
  )


def _bpe(
  size: int, special: Sequence[str], texts: Iterable[str]
) -> huggingface_files.Source:
  """Trains byte-level BPE with `tokenizers`; as with SentencePiece, reserved
  and special tokens have the first ids.
  """
  names = [*RESERVED, *special]
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
      tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
      ),
    ]
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[
      tokenizers.AddedToken(name, special=True, normalized=False)
      for name in names
    ],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    max_token_length=TRAINER["max_sentencepiece_length"],
    show_progress=False,
  )
  made.train_from_iterator(texts, trainer)
  if (found := made.get_vocab_size()) < size:
    raise _out_of_reach(size, f"they give {found} ids")
  bos = RESERVED.index("<bos>")
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
  )
  roles = {role: f"<{role}>" for role in ("bos", "eos", "pad", "mask")}
  return huggingface_files.Source(made.to_str(), roles)


def _sentencepiece(
  size: int, special: Sequence[str], texts: Iterable[str]
) -> bytes:
  model = io.BytesIO()
  sentences = (m.group() for t in texts for m in _SENTENCE.finditer(t))
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences,
      model_writer=model,
      model_type="bpe",
      vocab_size=size,
      pad_id=0,
      pad_piece=RESERVED[0],
      bos_id=1,
      bos_piece=RESERVED[1],
      eos_id=2,
      eos_piece=RESERVED[2],
      # SentencePiece requires an unknown piece. With byte fallback no text is
      # unknown, so <mask> takes the id.
      unk_id=3,
      unk_piece=RESERVED[3],
      control_symbols=[*RESERVED[4:], *special],
      byte_fallback=True,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      max_sentence_length=1 << 30,
      minloglevel=3,
      **TRAINER,
    )
  except RuntimeError as error:
    # The message begins with SentencePiece's source file and line.
    reason = " ".join(str(error).rpartition("] ")[2].split())
    raise _out_of_reach(size, reason) from error
  return model.getvalue()
