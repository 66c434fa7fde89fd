"""SentencePiece models: the processor, and what each id stands for."""

from collections.abc import Sequence
from typing import Any

import sentencepiece
from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from lm import schema

# Errors of SentencePiece, protobuf and JSON on unreadable input.
UNREADABLE = (RuntimeError, message.DecodeError, ValueError)
# SentencePiece writes a space as U+2581 and would confuse a U+2581 of the text
# with a space; U+2581 in text is encoded as bytes.
SPACE = "\u2581"


def read(
  model: bytes, reserved: Sequence[str], special: Sequence[str]
) -> tuple[
  sentencepiece.SentencePieceProcessor,
  list[bytes],
  dict[str, int],
  dict[str, int],
]:
  """Returns the processor, the bytes of each id, and the ids of the names
  `reserved` and `special`; a name absent from the model gets an id after the
  model's own ids.

  A reserved name is looked for among the control pieces, a special token also
  among the user-defined pieces. The processor matches neither in text. Raises
  ConfigError without byte fallback, and one of UNREADABLE on bytes that are
  not a model.
  """
  # The generated protobuf module creates classes only at import.
  model_proto: Any = vars(model_pb2)["ModelProto"]
  proto = model_proto()
  proto.ParseFromString(model)
  normalizer = proto.normalizer_spec
  normalizer.Clear()
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = False
  normalizer.remove_extra_whitespaces = False
  proto.ClearField("denormalizer_spec")
  kinds = model_proto.SentencePiece
  wanted = {name.replace(" ", SPACE): name for name in special}
  pieces, ids, special_ids, n_byte_pieces = [], {}, {}, 0
  for i, piece in enumerate(proto.pieces):
    if piece.type == kinds.BYTE:
      pieces.append(bytes([int(piece.piece[3:5], 16)]))
      n_byte_pieces += 1
      continue
    name = wanted.get(piece.piece.replace(" ", SPACE))
    if name and piece.type in (kinds.CONTROL, kinds.USER_DEFINED):
      special_ids[name] = i
      piece.type = kinds.CONTROL  # Never matched in text.
    if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
      pieces.append(b"")
      if piece.piece in reserved:
        ids[piece.piece] = i
    else:
      pieces.append(piece.piece.replace(SPACE, " ").encode())
  processor = sentencepiece.SentencePieceProcessor(
    model_proto=proto.SerializeToString()
  )
  if n_byte_pieces < 256:
    raise schema.ConfigError(
      "SentencePiece model without byte fallback: text outside its vocabulary "
      "would be lost; train it with --byte_fallback"
    )
  for name, i in (
    ("<pad>", processor.pad_id()),
    ("<bos>", processor.bos_id()),
    ("<eos>", processor.eos_id()),
  ):
    if i >= 0:  # SentencePiece says -1 if absent.
      ids[name] = i
  for names, known in ((reserved, ids), (special, special_ids)):
    for name in names:
      if name not in known:
        known[name] = len(pieces)
        pieces.append(b"")
  return processor, pieces, ids, special_ids
