"""Tokenizers: text to token ids and back, without loss.

Every tokenizer reserves ids for all objectives from the start: a checkpoint can
later be trained on any objective. Encoding never yields a reserved or special
id: the text "<eos>" is encoded as ordinary text.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece

from lm import config as config_lib
from lm import files, schema
from lm.data import sentencepiece_model
from lm.data import template as template_lib

SENTINELS = tuple(f"<sentinel_{i}>" for i in range(100))
RESERVED = (
  "<pad>",
  "<bos>",
  "<eos>",
  "<mask>",
  "<fim_prefix>",
  "<fim_middle>",
  "<fim_suffix>",
  *SENTINELS,
  "<system>",
  "<user>",
  "<assistant>",
  "<end_of_turn>",
)
# Vocabulary of the bytes tokenizer: reserved ids and 256 bytes, rounded up to a
# multiple of 128 to let a mesh axis shard the embedding.
BYTES_SIZE = 384

# Most special tokens: lm/data/chat_layout.py has 1022 marks, also for RESERVED.
_MOST_SPECIAL = 900
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


class Tokenizer:
  """Encodes and decodes text; made by `train`, `load` or `from_json`.

  `model` is a serialised SentencePiece model, or None for the bytes tokenizer.
  Reserved tokens absent from the model get ids after the model's own ids.
  Normalisation is the identity, even if the model asks for another: hence
  `decode(encode(s)) == s`, and counts of bytes are exact.

  `chat_template` is the Jinja text by which lm/data/chat.py lays out a
  conversation. The fingerprint covers the vocabulary only, not the template.

  `special_tokens` are further names with an id of their own, such as
  "<|im_start|>": an id of the model if it has a control or user-defined piece
  of that name, otherwise an id after the model's own. Like a reserved token, a
  special token is written by a chat template only: text that spells it stays
  text. Raises ConfigError on names that are empty, repeated or reserved, and on
  more names than the bytes tokenizer has spare ids.
  """

  def __init__(
    self,
    model: bytes | None = None,
    chat_template: str | None = None,
    special_tokens: Sequence[str] = (),
  ):
    _check_special(special_tokens)
    self.model, self.chat_template = model, chat_template
    self.special_tokens = tuple(special_tokens)
    if model is None:
      self._pieces = [b""] * len(RESERVED) + [bytes([i]) for i in range(256)]
      n_text = len(self._pieces)
      if (n_spare := BYTES_SIZE - n_text) < len(special_tokens):
        raise schema.ConfigError(
          f"config.tokenizer.special_tokens: holds {len(special_tokens)} "
          f"tokens, and the bytes tokenizer has {n_spare} spare ids; give at "
          "most as many, or use kind='sentencepiece'"
        )
      self._pieces += [b""] * n_spare
      reserved = {name: i for i, name in enumerate(RESERVED)}
      special = {name: n_text + i for i, name in enumerate(special_tokens)}
    else:
      self._processor, self._pieces, reserved, special = (
        sentencepiece_model.read(model, RESERVED, special_tokens)
      )
      self._space_ids = [
        self._processor.piece_to_id(f"<0x{byte:02X}>")
        for byte in sentencepiece_model.SPACE.encode()
      ]
    # Id of each reserved token, and of each reserved or special token.
    self.reserved = reserved
    self.named = {**special, **reserved}
    self._names = {i: name for name, i in self.named.items()}
    # Bytes of text per id: int64 [size], 0 for reserved and special ids.
    self.byte_lengths = np.array([len(p) for p in self._pieces], np.int64)
    self.fingerprint = hashlib.sha256(
      json.dumps(self._vocabulary()).encode()
    ).hexdigest()[:16]
    self.pad = reserved["<pad>"]
    self.bos = reserved["<bos>"]
    self.eos = reserved["<eos>"]
    self.mask = reserved["<mask>"]
    self.fim_prefix = reserved["<fim_prefix>"]
    self.fim_middle = reserved["<fim_middle>"]
    self.fim_suffix = reserved["<fim_suffix>"]
    self.sentinels = tuple(reserved[name] for name in SENTINELS)
    self.system = reserved["<system>"]
    self.user = reserved["<user>"]
    self.assistant = reserved["<assistant>"]
    self.end_of_turn = reserved["<end_of_turn>"]

  def with_template(self, chat_template: str | None) -> "Tokenizer":
    """The same vocabulary with another chat template."""
    return Tokenizer(self.model, chat_template, self.special_tokens)

  @property
  def size(self) -> int:
    return len(self._pieces)

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`, without bos and eos."""
    return self.encode_batch([text])[0].tolist()

  def encode_batch(
    self, texts: Sequence[str], threads: int = 1
  ) -> list[np.ndarray]:
    """Token ids of each text, int32; SentencePiece uses `threads` threads.

    Raises ConfigError on text that is invalid in UTF-8 (surrogates).
    """
    try:
      return self._encode_batch(texts, threads)
    except (TypeError, UnicodeEncodeError) as error:
      for text in texts:
        check_text("text", text)
      raise error

  def _encode_batch(
    self, texts: Sequence[str], threads: int
  ) -> list[np.ndarray]:
    if self.model is None:
      return [
        np.frombuffer(text.encode(), np.uint8).astype(np.int32) + len(RESERVED)
        for text in texts
      ]
    parts = [text.split(sentencepiece_model.SPACE) for text in texts]
    encoded = iter(
      self._processor.encode(
        [part for split in parts for part in split],
        return_type="numpy",
        num_threads=threads,
      )
    )
    space = np.array(self._space_ids, np.int32)
    rows = []
    for split in parts:
      row = [next(encoded)]
      for _ in split[1:]:
        row += [space, next(encoded)]
      rows.append(row[0] if len(row) == 1 else np.concatenate(row))
    return rows

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; incomplete or invalid UTF-8 becomes U+FFFD."""
    return self.decode_bytes(ids).decode(errors="replace")

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Bytes of `ids`; reserved ids add no bytes."""
    return b"".join(self._pieces[i] for i in ids)

  def n_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
    return int(self.byte_lengths[np.asarray(ids, np.int64)].sum())

  def piece(self, i: int) -> str:
    """Text of id `i`, escaped to print on one line; partial UTF-8 as <0xNN>, an
    id that only pads a model's vocabulary as <i>.
    """
    if i >= self.size:
      return f"<{i}>"
    if i in self._names:
      return self._names[i]
    try:
      return repr(self._pieces[i].decode())[1:-1]
    except UnicodeDecodeError:
      return "".join(f"<0x{byte:02X}>" for byte in self._pieces[i])

  def to_json(self) -> str:
    """Serialises the tokenizer for a checkpoint; `from_json` is the inverse."""
    content = self._vocabulary()
    if self.chat_template is not None:
      content["chat_template"] = self.chat_template
    return json.dumps(content)

  def _vocabulary(self) -> dict[str, Any]:
    content: dict[str, Any] = {"kind": "bytes"}
    if self.model is not None:
      model = base64.b64encode(self.model).decode()
      content = {"kind": "sentencepiece", "model": model}
    if self.special_tokens:  # Absent in tokenizers of earlier versions.
      content["special_tokens"] = list(self.special_tokens)
    return content

  @classmethod
  def from_json(cls, text: str) -> "Tokenizer":
    """Inverse of `to_json`; raises ConfigError on invalid text."""
    try:
      content = json.loads(text)
      template = content.get("chat_template")
      if content["kind"] not in ("bytes", "sentencepiece"):
        raise ValueError(f"kind {content['kind']!r}")
      if not isinstance(template, str | None):
        raise ValueError("chat_template is not text")
      special = content.get("special_tokens", [])
      if not isinstance(special, list) or not all(
        isinstance(name, str) for name in special
      ):
        raise ValueError("special_tokens is not a list of texts")
      model = None
      if content["kind"] == "sentencepiece":
        model = base64.b64decode(content["model"], validate=True)
      return cls(model, template, special)
    except (
      *sentencepiece_model.UNREADABLE,
      AttributeError,
      KeyError,
      TypeError,
    ) as error:
      raise schema.ConfigError(
        f"tokenizer {text[:40]!r}: not one that this program has stored "
        f"({type(error).__name__}: {error})"
      ) from error


def _check_special(names: Sequence[str]) -> None:
  """Raises ConfigError unless `names` can be special tokens."""
  where = "config.tokenizer.special_tokens"
  for i, name in enumerate(names):
    check_text(where, name)
    for rule, wrong in {
      "is empty; leave it out": not name,
      "is given twice; give it once": name in names[:i],
      "is a reserved token of every tokenizer; omit it": name in RESERVED,
      "names a byte; choose another": re.fullmatch("<0x[0-9A-F]{2}>", name),
      f"is one more than the limit of {_MOST_SPECIAL}": i >= _MOST_SPECIAL,
    }.items():
      if wrong:
        raise schema.ConfigError(f"{where}: {name!r} {rule}")


def check_text(name: str, text: str) -> None:
  """Raises ConfigError if `text` holds a surrogate, invalid in UTF-8: half a
  character, or a byte of a command line that is not UTF-8.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    shown = text[max(0, error.start - 20) : error.start + 1]
    raise schema.ConfigError(
      f"{name}={shown!r}: holds half a character (a surrogate), which UTF-8 "
      "cannot spell; give text that is UTF-8"
    ) from error


def load(config: config_lib.Config) -> Tokenizer:
  """Loads the bytes tokenizer, or the SentencePiece `.model` of the config."""
  path, template = config.tokenizer.path, config_template(config)
  special = config.tokenizer.special_tokens
  if config.tokenizer.kind == "bytes":
    tokenizer = Tokenizer(None, template, special)
  else:
    assert path is not None, "a tokenizer without a path is trained"
    path = files.local_path(path, "config.tokenizer.path")
    try:
      with open(path, "rb") as file:
        tokenizer = Tokenizer(file.read(), template, special)
    except OSError as error:
      raise schema.ConfigError(
        f"config.tokenizer.path={path!r}: {error.strerror}; name a "
        "SentencePiece .model, or None to train one"
      ) from error
    except sentencepiece_model.UNREADABLE as error:
      raise schema.ConfigError(
        f"config.tokenizer.path={path!r}: not a SentencePiece model"
      ) from error
    except schema.ConfigError as error:
      raise schema.ConfigError(
        f"config.tokenizer.path={path!r}: {error}"
      ) from error
  check_vocabulary(config, tokenizer)
  return tokenizer


def read_template(path: str | None, name: str) -> str | None:
  """Text of the chat template in the file `path`, checked to compile; None for
  None. Raises ConfigError that quotes `name`, the field or flag of the path.
  """
  if path is None:
    return None
  path = files.local_path(path, name)
  try:
    with open(path, encoding="utf-8-sig") as file:
      text = file.read()
    template_lib.check(text)
  except (OSError, ValueError) as error:
    raise schema.ConfigError(
      f"{name}={path!r}: {error}; name a file of UTF-8 text, or None"
    ) from error
  except schema.ConfigError as error:
    raise schema.ConfigError(f"{name}={path!r}: {error}") from error
  return text


def config_template(config: config_lib.Config) -> str | None:
  """`read_template` of the config's own."""
  path = config.tokenizer.chat_template
  return read_template(path, "config.tokenizer.chat_template")


def check_vocabulary(config: config_lib.Config, tokenizer: Tokenizer) -> None:
  """Raises ConfigError unless the model has an embedding row for each id.

  With a loaded `.model` rows may be left over; trained and bytes tokenizers
  must fit exactly.
  """
  wanted, size = config.model.vocab_size, tokenizer.size
  loaded = config.tokenizer.path is not None and tokenizer.model is not None
  if size != wanted and not (loaded and size < wanted):
    rule = "at least" if loaded else "exactly"
    raise schema.ConfigError(
      f"vocabulary mismatch: config.model.vocab_size={wanted}, but the "
      f"tokenizer has {size} ids; set it to {rule} {size}"
    )


def train(config: config_lib.Config, texts: Iterable[str]) -> Tokenizer:
  """Trains byte-pair encoding (BPE) of `model.vocab_size` ids on `texts`.

  The same texts give the same tokenizer. Raises ConfigError if the size is
  below the minimum or out of reach of the texts.
  """
  size, special = config.model.vocab_size, config.tokenizer.special_tokens
  _check_special(special)
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
  tokenizer = Tokenizer(model.getvalue(), special_tokens=special)
  check_vocabulary(config, tokenizer)
  return tokenizer
