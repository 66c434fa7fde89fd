"""Tokenizers: text to token ids and back.

Every tokenizer reserves ids for the objectives: a checkpoint can later be
trained on any objective. Encoding never yields a reserved or special id: the
text "<eos>" is encoded as ordinary text.
"""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lm import config as config_lib
from lm import files, schema
from lm.data import (
  huggingface_files,
  huggingface_vocabulary,
  sentencepiece_model,
  vocabulary,
)
from lm.data import template as template_lib

SENTINELS, RESERVED = vocabulary.SENTINELS, vocabulary.RESERVED
BYTES_SIZE = vocabulary.BYTES_SIZE

# Most special tokens: lm/data/chat_layout.py has 1022 marks, also for RESERVED.
_MOST_SPECIAL = 900


def _required(name: str) -> Any:
  """The id of a reserved token; raises ConfigError where there is none."""
  return property(lambda self: self.require(name))


class Tokenizer:
  """Encodes and decodes text; made by `load`, `from_json` or training.

  `model` is a serialised SentencePiece model, the files of a Hugging Face
  vocabulary, or None for the bytes tokenizer. Bytes and models trained here
  lose nothing: `decode(encode(s)) == s`, and counts of bytes are exact. Others
  say in `lossy` which texts they change; `prefix` is a dummy space that they
  put before a text and that `decode` and `n_bytes` take away.

  `chat_template` is the Jinja text by which lm/data/chat.py lays out a
  conversation; None is the vocabulary's own, if it has one. The fingerprint
  covers the vocabulary only, not the template.

  `special_tokens` are further names with an id of their own, such as
  "<|im_start|>": an id of the model if it has a control or user-defined piece
  of that name, otherwise an id after the model's own. Like a reserved token, a
  special token is written by a chat template only: text that spells it stays
  text. Raises ConfigError on names that are empty, repeated or reserved, and on
  more names than the bytes tokenizer has spare ids.

  `plain` is of a SentencePiece model, as there.
  """

  def __init__(
    self,
    model: bytes | huggingface_files.Source | None = None,
    chat_template: str | None = None,
    special_tokens: Sequence[str] = (),
    plain: bool = False,
  ):
    check_special(special_tokens)
    self.model, self.special_tokens = model, tuple(special_tokens)
    own_template = None
    if model is None:
      self.vocabulary = vocabulary.Bytes(special_tokens)
    elif isinstance(model, bytes):
      self.vocabulary = sentencepiece_model.SentencePiece(
        model, special_tokens, plain
      )
    else:
      self.vocabulary = huggingface_vocabulary.HuggingFace(
        model, special_tokens
      )
      own_template = model.template
    if chat_template is None:
      chat_template = own_template
    self.chat_template = chat_template
    self._pieces = self.vocabulary.pieces
    # Id of each reserved token, and of each reserved or special token.
    self.reserved = self.vocabulary.reserved
    self.named = {**self.vocabulary.special, **self.reserved}
    self._names = self.vocabulary.names()
    # Bytes of text per id: int64 [size], 0 for reserved and special ids.
    self.byte_lengths = np.array([len(p) for p in self._pieces], np.int64)
    self.fingerprint = hashlib.sha256(
      json.dumps(self._vocabulary()).encode()
    ).hexdigest()[:16]
    self.pad = self.reserved["<pad>"]
    self.bos = self.reserved["<bos>"]
    self.eos = self.reserved["<eos>"]

  def with_template(self, chat_template: str | None) -> "Tokenizer":
    """The same vocabulary with another chat template."""
    return self._made_anew(self.model, chat_template)

  def _made_anew(self, model, chat_template: str | None) -> "Tokenizer":
    plain = getattr(self.vocabulary, "plain", False)
    return Tokenizer(model, chat_template, self.special_tokens, plain)

  def with_reserved(self, names: Sequence[str], room: int) -> "Tokenizer":
    """A tokenizer that has all reserved `names`: this one, or, of a Hugging
    Face vocabulary, one with ids for them after the vocabulary's own.

    Raises ConfigError if more than `room` ids would be needed.
    """
    if all(name in self.reserved for name in names):
      return self
    assert isinstance(self.vocabulary, huggingface_vocabulary.HuggingFace)
    source = self.vocabulary.with_added(names, room)
    template = self.chat_template
    return self._made_anew(
      source, None if template == source.template else template
    )

  def require(self, name: str) -> int:
    """Id of a reserved token. Raises ConfigError if there is none."""
    if name not in self.reserved:
      raise schema.ConfigError(
        f"tokenizer: has no {name}, which neither its vocabulary nor the "
        "objectives that it was prepared for have; train with an objective "
        "that needs it, and a config.model.vocab_size that has room for it"
      )
    return self.reserved[name]

  mask = _required("<mask>")
  fim_prefix = _required("<fim_prefix>")
  fim_middle = _required("<fim_middle>")
  fim_suffix = _required("<fim_suffix>")
  system = _required("<system>")
  user = _required("<user>")
  assistant = _required("<assistant>")
  end_of_turn = _required("<end_of_turn>")

  @functools.cached_property
  def sentinels(self) -> tuple[int, ...]:
    return tuple(self.require(name) for name in SENTINELS)

  @property
  def kind(self) -> str:
    return self.vocabulary.kind

  @property
  def lossy(self) -> str | None:
    """Which texts do not come back from their ids; None: all do."""
    return self.vocabulary.lossy

  @property
  def prefix(self) -> bytes:
    return self.vocabulary.prefix

  @functools.cached_property
  def template_tokens(self) -> tuple[str, ...]:
    """Names that become ids where a chat template writes them. A template that
    came with a vocabulary writes no reserved name of this program.
    """
    if not isinstance(self.model, huggingface_files.Source):
      return (*RESERVED, *self.special_tokens)
    own = self.chat_template == self.model.template
    return (*self.vocabulary.special, *(() if own else RESERVED))

  @functools.cached_property
  def marked_tokens(self) -> tuple[str, ...]:
    """Those of `template_tokens` that may stand in the template: all, or of a
    Hugging Face vocabulary, which may have thousands, those that do.
    """
    if not isinstance(self.model, huggingface_files.Source):
      return self.template_tokens
    template = self.chat_template or ""
    return tuple(name for name in self.template_tokens if name in template)

  @property
  def stops(self) -> tuple[int, ...]:
    """Ids that end an answer besides eos, as a vocabulary's own files say."""
    if not isinstance(self.model, huggingface_files.Source):
      return ()
    return tuple(self.named[x] for x in self.model.stops if x in self.named)

  @property
  def size(self) -> int:
    return len(self._pieces)

  def encode(self, text: str, continues: bool = False) -> list[int]:
    """Token ids of `text`, without bos and eos."""
    return self.encode_batch([text], continues=continues)[0].tolist()

  def encode_batch(
    self, texts: Sequence[str], threads: int = 1, continues: bool = False
  ) -> list[np.ndarray]:
    """Token ids of each text, int32; SentencePiece uses `threads` threads.

    Texts that go on from earlier text, `continues`, get no dummy prefix. Raises
    ConfigError on text that is invalid in UTF-8 (surrogates).
    """
    try:
      return self.vocabulary.encode(texts, threads, continues)
    except (TypeError, UnicodeEncodeError) as error:
      for text in texts:
        schema.check_text("text", text)
      raise error

  def decode(self, ids: Iterable[int], continues: bool = False) -> str:
    """Text of `ids`, encoded with `continues`; incomplete or invalid UTF-8
    becomes U+FFFD.
    """
    raw = self.decode_bytes(ids)
    if not continues:
      raw = raw.removeprefix(self.prefix)
    return raw.decode(errors="replace")

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Bytes of `ids`, dummy prefix included; reserved ids add no bytes."""
    return b"".join(self._pieces[i] for i in ids)

  def n_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
    """UTF-8 bytes of the text whose ids, from its start on, `ids` are."""
    lengths = self.byte_lengths[np.asarray(ids, np.int64)]
    n = int(lengths.sum())
    if n and self.prefix:
      first = ids[int(np.flatnonzero(lengths)[0])]
      n -= len(self.prefix) * self._pieces[first].startswith(self.prefix)
    return n

  @functools.cached_property
  def target_bytes(self) -> np.ndarray:
    """Bytes that each id stands for as a target: int64 [size]. That of bos, if
    negative, is added to those of the target behind bos: the dummy prefix is no
    text.
    """
    lengths = self.byte_lengths.copy()
    if self.prefix:
      lengths[self.bos] = -len(self.prefix)
    return lengths

  def piece(self, i: int) -> str:
    """Text of id `i`, escaped to print on one line; partial UTF-8 as <0xNN>, an
    id that only pads a model's vocabulary as <i>.
    """
    if i in self._names:
      return self._names[i]
    if i >= self.size:
      return f"<{i}>"
    try:
      return repr(self._pieces[i].decode())[1:-1]
    except UnicodeDecodeError:
      return "".join(f"<0x{byte:02X}>" for byte in self._pieces[i])

  def to_json(self) -> str:
    """Serialises the tokenizer for a checkpoint; `from_json` is the inverse."""
    content = self._vocabulary()
    own = None
    if isinstance(self.model, huggingface_files.Source):
      own = self.model.template
      content["own_template"] = own
      content["stops"] = list(self.model.stops)
    if self.chat_template != own:
      content["chat_template"] = self.chat_template
    return json.dumps(content)

  def _vocabulary(self) -> dict[str, Any]:
    content = dict(self.vocabulary.content())
    if self.special_tokens:  # Absent in tokenizers of earlier versions.
      content["special_tokens"] = list(self.special_tokens)
    return content

  def __reduce__(self):
    return _from_json, (self.to_json(),)  # for other processes

  @classmethod
  def from_json(cls, text: str) -> "Tokenizer":
    """Inverse of `to_json`; raises ConfigError on invalid text."""
    try:
      content = json.loads(text)
      template = content.get("chat_template")
      if content["kind"] not in ("bytes", "sentencepiece", "huggingface"):
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
      elif content["kind"] == "huggingface":
        model = huggingface_files.from_content(content)
      return cls(model, template, special, content.get("rules") != "own")
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


def _from_json(text: str) -> Tokenizer:
  return Tokenizer.from_json(text)


def check_special(names: Sequence[str]) -> None:
  """Raises ConfigError unless `names` can be special tokens."""
  where = "config.tokenizer.special_tokens"
  for i, name in enumerate(names):
    schema.check_text(where, name)
    for rule, wrong in {
      "is empty; leave it out": not name,
      "is given twice; give it once": name in names[:i],
      "is a reserved token of every tokenizer; omit it": name in RESERVED,
      "names a byte; choose another": re.fullmatch("<0x[0-9A-F]{2}>", name),
      f"is one more than the limit of {_MOST_SPECIAL}": i >= _MOST_SPECIAL,
    }.items():
      if wrong:
        raise schema.ConfigError(f"{where}: {name!r} {rule}")


def load(config: config_lib.Config) -> Tokenizer:
  """Loads the bytes tokenizer, the SentencePiece `.model` or the Hugging Face
  vocabulary of the config.
  """
  path, template = config.tokenizer.path, config_template(config)
  special = config.tokenizer.special_tokens
  if config.tokenizer.kind == "bytes":
    tokenizer = Tokenizer(None, template, special)
  elif config.tokenizer.kind == "huggingface":
    assert path is not None, "checked with the config"
    n = config.model.vocab_size
    tokenizer = from_files(path, template, special, n)
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


def from_files(
  path: str,
  template: str | None = None,
  special_tokens: Sequence[str] = (),
  rows: int | None = None,
) -> Tokenizer:
  """The tokenizer of a Hugging Face folder, or of a tokenizer.json; `template`
  replaces its chat template. Special tokens that a model with `rows` embeddings
  cannot have are left out. Raises ConfigError that quotes the path.
  """
  source = huggingface_files.read(path)
  if rows is not None:
    source = huggingface_files.within(source, rows)
  try:
    return Tokenizer(source, template, special_tokens)
  except schema.ConfigError as error:
    raise schema.ConfigError(
      f"config.tokenizer.path={path!r}: {error}"
    ) from error


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

  With a loaded vocabulary rows may be left over; trained and bytes tokenizers
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
