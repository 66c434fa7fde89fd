"""SentencePiece models (arXiv:1808.06226) as vocabularies."""

import base64
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from lm import schema
from lm.data import vocabulary as vocabulary_lib
from lm.data.vocabulary import SPACE

# Errors raised by SentencePiece, protobuf and JSON on unreadable input.
UNREADABLE = (RuntimeError, message.DecodeError, ValueError)


def parse(model: bytes) -> Any:
  """Parses a ModelProto; raises one of UNREADABLE on invalid bytes."""
  # The generated protobuf module creates classes only at import.
  proto: Any = vars(model_pb2)["ModelProto"]()
  proto.ParseFromString(model)
  return proto


class Piece(NamedTuple):
  """A piece; `text` has U+2581 for spaces, and `kind` is normal, unknown,
  control, user_defined, byte or unused.
  """

  text: str
  score: float
  kind: str


class SentencePiece(vocabulary_lib.Vocabulary):
  """A serialised model. Names of `RESERVED` and `special_tokens` missing in the
  model get ids after the model's ids.

  A model trained by this program has the identity as normaliser and no dummy
  prefix: decoding returns every text unchanged. SentencePiece writes a space as
  U+2581 and would confuse a U+2581 of the text with a space, so a U+2581 of the
  text is encoded as bytes.

  A model from elsewhere keeps the normaliser and the dummy prefix, and gives
  the ids of the sentencepiece library. With `plain`, as in checkpoints of
  earlier versions, the model is used like a model trained by this program.

  Reserved names are looked up among the control pieces, special tokens also
  among the user-defined pieces. The processor matches neither in text. Raises
  ConfigError without byte fallback, and one of UNREADABLE on invalid bytes.
  """

  kind = "sentencepiece"

  def __init__(
    self,
    model: bytes,
    special_tokens: Sequence[str] = (),
    plain: bool = False,
  ):
    self.model = model
    self._proto = proto = parse(model)
    # tokenizer_training gives <mask> the id of the unknown piece, never needed.
    self.trained_here = proto.trainer_spec.unk_piece == "<mask>"
    self.plain = plain or self.trained_here
    normalizer = proto.normalizer_spec
    if self.plain:
      normalizer.Clear()
      normalizer.name = "identity"
      normalizer.add_dummy_prefix = False
      normalizer.remove_extra_whitespaces = False
      proto.ClearField("denormalizer_spec")
    else:
      self.lossy = _lost(normalizer)
      self.prefix = b" " if normalizer.add_dummy_prefix else b""
      self.prefix_once = True
    self._read_pieces(special_tokens)
    processor = self._processor
    for name, i in (
      ("<pad>", processor.pad_id()),
      ("<bos>", processor.bos_id()),
      ("<eos>", processor.eos_id()),
    ):
      if i >= 0:  # SentencePiece returns -1 for an absent piece.
        self.reserved[name] = i
    for names, known in (
      (vocabulary_lib.RESERVED, self.reserved),
      (special_tokens, self.special),
    ):
      for name in names:
        if name not in known:
          known[name] = len(self.pieces)
          self.pieces.append(b"")
    self._space_ids = np.array(
      [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()],
      np.int32,
    )

  def _read_pieces(self, special_tokens: Sequence[str]) -> None:
    """Sets `pieces`, `reserved` and `special` from the model's pieces. Raises
    ConfigError without byte fallback.
    """
    kinds = vars(model_pb2)["ModelProto"].SentencePiece
    wanted = {name.replace(" ", SPACE): name for name in special_tokens}
    self.pieces, self.reserved, self.special = [], {}, {}
    n_byte_pieces = 0
    for i, piece in enumerate(self._proto.pieces):
      if piece.type == kinds.BYTE:
        self.pieces.append(bytes([int(piece.piece[3:5], 16)]))
        n_byte_pieces += 1
        continue
      name = wanted.get(piece.piece.replace(" ", SPACE))
      if name and piece.type in (kinds.CONTROL, kinds.USER_DEFINED):
        self.special[name] = i
        piece.type = kinds.CONTROL  # Never matched in text.
      if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
        self.pieces.append(b"")
        if piece.piece in vocabulary_lib.RESERVED:
          self.reserved[piece.piece] = i
      else:
        self.pieces.append(piece.piece.replace(SPACE, " ").encode())
    self._processor = _processor(self._proto)
    if n_byte_pieces < 256:
      raise schema.ConfigError(
        "SentencePiece model without byte fallback: text outside its "
        "vocabulary would be lost; train it with --byte_fallback"
      )

  def encode(
    self, texts: Sequence[str], threads: int, continues: bool
  ) -> list[np.ndarray]:
    processor = self._continuing if continues else self._processor
    if not self.plain:
      return processor.encode(
        list(texts), return_type="numpy", num_threads=threads
      )
    parts = [text.split(SPACE) for text in texts]
    encoded = iter(
      processor.encode(
        [part for split in parts for part in split],
        return_type="numpy",
        num_threads=threads,
      )
    )
    rows = []
    for split in parts:
      row = [next(encoded)]
      for _ in split[1:]:
        row += [self._space_ids, next(encoded)]
      rows.append(row[0] if len(row) == 1 else np.concatenate(row))
    return rows

  @functools.cached_property
  def _continuing(self) -> sentencepiece.SentencePieceProcessor:
    if not self.prefix:
      return self._processor
    proto = type(self._proto)()
    proto.CopyFrom(self._proto)
    proto.normalizer_spec.add_dummy_prefix = False
    return _processor(proto)

  @property
  def is_bpe(self) -> bool:
    spec = self._proto.trainer_spec
    return spec.model_type == type(spec).BPE

  @property
  def changes_text(self) -> bool:
    """Whether the normaliser changes text beyond the dummy prefix."""
    normalizer = self._proto.normalizer_spec
    return bool(
      normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    )

  def model_pieces(self) -> list[Piece]:
    """Returns the model's pieces; special tokens are of kind control."""
    kinds = vars(model_pb2)["ModelProto"].SentencePiece.Type
    return [
      Piece(piece.piece, piece.score, kinds.Name(piece.type).lower())
      for piece in self._proto.pieces
    ]

  def content(self) -> Mapping[str, Any]:
    content = {
      "kind": self.kind,
      "model": base64.b64encode(self.model).decode(),
    }
    if not self.plain:  # Absent in checkpoints of earlier versions.
      content["rules"] = "own"
    return content


def _processor(proto: Any) -> sentencepiece.SentencePieceProcessor:
  return sentencepiece.SentencePieceProcessor(
    model_proto=proto.SerializeToString()
  )


def _lost(normalizer: Any) -> str:
  """Describes the texts changed by encoding and decoding."""
  lost = [f"a {SPACE} of the text becomes a space"]
  if normalizer.precompiled_charsmap:
    lost.append(f"its normaliser is {normalizer.name}")
  if normalizer.remove_extra_whitespaces:
    lost.append("runs of spaces, and spaces at both ends, are not kept")
  return "; ".join(lost)
