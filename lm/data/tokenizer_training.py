"""Trains a tokenizer on texts: the same texts give the same tokenizer."""

import io
import re
from collections.abc import Iterable

import sentencepiece

from lm import config as config_lib
from lm import schema
from lm.data import tokenizer as tokenizer_lib
from lm.data.vocabulary import RESERVED

# Sentences for the trainer: at most 4096 characters, cut after a newline where
# possible. Whole lines let the trainer learn newlines and indentation.
_SENTENCE = re.compile(r"(?s).{1,4096}(?<=\n)|.{1,4096}")
# Chosen by bits per byte after training (2 layers, 400 steps, 2048 ids), since
# bytes per token is a bad predictor: 1.80 at 2.98 bytes per token; 1.85 at 3.11
# if pieces join letters and signs; 2.17 at 3.51 if pieces also join words.
TRAINER = {
  "character_coverage": 0.9995,
  "split_digits": True,
  "allow_whitespace_only_pieces": True,
  "max_sentencepiece_length": 32,
}


def train(
  config: config_lib.Config, texts: Iterable[str]
) -> tokenizer_lib.Tokenizer:
  """Trains byte-pair encoding (BPE) of `model.vocab_size` ids on `texts`.

  The same texts give the same tokenizer. Raises ConfigError if the size is
  below the minimum or out of reach of the texts.
  """
  size, special = config.model.vocab_size, config.tokenizer.special_tokens
  tokenizer_lib.check_special(special)
  smallest = len(RESERVED) + len(special) + 256 + 1
  if size < smallest:
    raise schema.ConfigError(
      f"config.model.vocab_size={size}: {smallest - 1} ids are taken by bytes, "
      f"reserved and special tokens; set it to at least {smallest}"
    )
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
      # SentencePiece requires an unknown token. With byte fallback no text is
      # unknown: <mask> takes the id.
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
    # Strips SentencePiece's source file and line.
    reason = " ".join(str(error).rpartition("] ")[2].split())
    raise schema.ConfigError(
      f"config.model.vocab_size={size}: the training sources are too small "
      f"or too varied for it ({reason}); change it, give more text, "
      "or set tokenizer.kind='bytes'"
    ) from error
  tokenizer = tokenizer_lib.Tokenizer(model.getvalue(), special_tokens=special)
  tokenizer_lib.check_vocabulary(config, tokenizer)
  return tokenizer
