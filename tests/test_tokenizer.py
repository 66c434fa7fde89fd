"""Tokenizers: lossless, deterministic, and never a reserved id from text."""

import argparse
import base64
import inspect
import io
import json
import textwrap

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from lm import config as config_lib
from lm import schema
from lm.data import tokenizer as tokenizer_lib
from lm.data import tokenizer_training

CORPUS = [inspect.getsource(m) for m in (argparse, json, textwrap, inspect)]
CORPUS.append("in 1024 by 2048\n" * 997)
SIZE = 701


def make_config(**model) -> config_lib.Config:
  config = config_lib.Config()
  config.model.vocab_size = SIZE
  for name, value in model.items():
    setattr(config.model, name, value)
  return config


@pytest.fixture(scope="module")
def trained():
  return tokenizer_training.train(make_config(), CORPUS)


def bpe_config(**model) -> config_lib.Config:
  config = make_config(**model)
  config.tokenizer.kind = "bpe"
  return config


@pytest.fixture(scope="module", params=["sentencepiece", "bpe", "bytes"])
def tokenizer(request, trained):
  if request.param == "bpe":
    return tokenizer_training.train(bpe_config(), CORPUS)
  return (
    trained if request.param == "sentencepiece" else (tokenizer_lib.Tokenizer())
  )


def reserved_ids(tokenizer) -> list[int]:
  return [
    tokenizer.pad,
    tokenizer.bos,
    tokenizer.eos,
    tokenizer.mask,
    tokenizer.fim_prefix,
    tokenizer.fim_middle,
    tokenizer.fim_suffix,
    *tokenizer.sentinels,
    tokenizer.system,
    tokenizer.user,
    tokenizer.assistant,
    tokenizer.end_of_turn,
  ]


# Any UTF-8 string, with what is likely to break one more often than chance.
HARD = [
  "\u2581",
  "\u2585",
  "\0",
  "  ",
  "\t",
  "\r\n",
  "\n    ",
  "\ufeff",
  "e\u0301",
]
TEXTS = st.lists(
  st.one_of(st.text(), st.sampled_from([*HARD, *tokenizer_lib.RESERVED]))
).map("".join)


@hypothesis.given(text=TEXTS)
@hypothesis.settings(deadline=None)
def test_any_text_comes_back_and_holds_no_reserved_id(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert not set(ids) & set(reserved_ids(tokenizer))
  lengths = [len(tokenizer.decode_bytes([i])) for i in ids]
  assert sum(lengths) == tokenizer.n_bytes(ids) == len(text.encode())


def test_reserved_ids_are_apart_and_stand_for_no_text(tokenizer):
  ids = reserved_ids(tokenizer)
  assert len(set(ids)) == len(tokenizer_lib.RESERVED) == 111
  assert max(ids) < tokenizer.size == len(tokenizer.byte_lengths)
  assert tokenizer.decode(ids) == ""
  assert not tokenizer.byte_lengths[ids].any()
  assert tokenizer.piece(tokenizer.fim_middle) == "<fim_middle>"
  assert tokenizer.piece(tokenizer.sentinels[37]) == "<sentinel_37>"


def test_incomplete_utf8_decodes_to_the_replacement_character(tokenizer):
  ids = tokenizer.encode("\U0001f9ea")  # Four bytes, in no vocabulary here.
  assert len(ids) == 4
  assert tokenizer.decode_bytes(ids[:3]) == "\U0001f9ea".encode()[:3]
  assert tokenizer.decode([*ids[:3], *tokenizer.encode("x")]) == "\ufffdx"


def test_pieces_print_on_one_line(tokenizer):
  pieces = [tokenizer.piece(i) for i in range(tokenizer.size)]
  assert all(piece.isprintable() for piece in pieces)
  assert "\\n" in pieces and "<0xE2>" in pieces


def test_a_batch_is_its_texts_one_by_one(tokenizer):
  texts = [*CORPUS[:2], "", "a\u2581b \u2581"]
  for ids, text in zip(
    tokenizer.encode_batch(texts, threads=2), texts, strict=True
  ):
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode(text)


def test_json_carries_all_of_it(tokenizer):
  again = tokenizer_lib.Tokenizer.from_json(tokenizer.to_json())
  assert again.fingerprint == tokenizer.fingerprint
  assert again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


@pytest.mark.parametrize(
  "text",
  [
    *("", "x", "null", "[]", "3", "{}", '{"kind": "else"}', "[" * 10**5),
    *('{"kind": "sentencepiece"}', '{"kind": "sentencepiece", "model": 3}'),
    *('{"kind": "sentencepiece", "model": "?"}', '{"kind": ["bytes"]}'),
    *('{"kind": "sentencepiece", "model": ""}', '{"kind": "bytes'),
    '{"kind": "sentencepiece", "model": "/////w=="}',
    '{"kind": "bytes", "chat_template": 3}',
    '{"kind": "bytes", "special_tokens": "<a>"}',
    '{"kind": "bytes", "special_tokens": [3]}',
  ],
)
def test_json_that_is_no_tokenizer_is_one_line(text):
  with pytest.raises(schema.ConfigError, match="^tokenizer '.*: not one"):
    tokenizer_lib.Tokenizer.from_json(text)


def test_a_model_cut_anywhere_is_one_line(trained):
  stored = json.loads(trained.to_json())
  model, n = base64.b64decode(stored["model"]), 0
  for cut in range(0, len(model), 97):
    stored["model"] = base64.b64encode(model[:cut]).decode()
    try:
      tokenizer_lib.Tokenizer.from_json(json.dumps(stored))
    except schema.ConfigError:
      n += 1
  assert n > 10


def test_half_a_character_is_refused(tokenizer):
  for text in ("caf\udce9 ", "\ud83d", "x" * 99 + "\ud800" + "y" * 99):
    with pytest.raises(schema.ConfigError, match="half a char") as error:
      tokenizer.encode_batch(["fine", text])
    assert len(str(error.value)) < 200
    with pytest.raises(schema.ConfigError, match="holds half a character"):
      tokenizer.encode(text)


def test_a_chat_template_goes_with_the_tokenizer(trained):
  template = "{{ messages[0].content }}\n<user> \u2603"
  for model in (None, trained.model):
    plain = tokenizer_lib.Tokenizer(model)
    tokenizer = tokenizer_lib.Tokenizer(model, template)
    again = tokenizer_lib.Tokenizer.from_json(tokenizer.to_json())
    assert again.chat_template == template
    # It does not name ids, so that token stores stay when it changes.
    assert again.fingerprint == tokenizer.fingerprint == plain.fingerprint
    assert again.encode(CORPUS[0]) == plain.encode(CORPUS[0])
    assert (
      tokenizer_lib.Tokenizer.from_json(plain.to_json()).chat_template is None
    )


def test_without_a_chat_template_nothing_has_changed():
  """What a checkpoint of an earlier version holds, and its fingerprint."""
  tokenizer = tokenizer_lib.Tokenizer()
  assert tokenizer.to_json() == '{"kind": "bytes"}'
  assert tokenizer.fingerprint == "eb929771327edd99"


def test_the_config_names_the_chat_template(tmp_path, trained):
  path = tmp_path / "chat.jinja"
  path.write_text("<user>\n{% generation %}x{% endgeneration %}")
  config = make_config(vocab_size=384)
  config.tokenizer.kind = "bytes"
  assert tokenizer_lib.load(config).chat_template is None
  config.tokenizer.chat_template = str(path)
  assert tokenizer_lib.load(config).chat_template == path.read_text()
  model = tmp_path / "a.model"
  model.write_bytes(trained.model)
  config = make_config()
  config.tokenizer.path = str(model)
  config.tokenizer.chat_template = str(path)
  assert tokenizer_lib.load(config).chat_template == path.read_text()


@pytest.mark.parametrize(
  "content, message",
  [
    (None, "absent.*No such file.*name a file of UTF-8 text, or None"),
    (b"\xff", "can't decode byte 0xff.*; name a file of UTF-8 text"),
    (b"a\n{% if %}", "chat template, line 2: Expected an expression"),
    (b"{% nothing %}", "chat template, line 1: .*unknown tag 'nothing'"),
    (b"{% generation %}", "chat template, line 1: .*endgeneration"),
  ],
)
def test_a_chat_template_that_is_none_is_refused(tmp_path, content, message):
  """Before a run, not once it is over and somebody wants to talk."""
  path = tmp_path / "absent.jinja"
  if content is not None:
    path.write_bytes(content)
  config = make_config(vocab_size=384)
  config.tokenizer.kind = "bytes"
  config.tokenizer.chat_template = str(path)
  with pytest.raises(schema.ConfigError, match=message) as error:
    tokenizer_lib.load(config)
  assert f"config.tokenizer.chat_template={str(path)!r}: " in str(error.value)


# --- special tokens ----------------------------------------------------------

SPECIAL = ("<|im_start|>", "<|im_end|>", "[INST], a b", "\u2581x", '"')


@pytest.fixture(scope="module")
def trained_special():
  config = make_config()
  config.tokenizer.special_tokens = SPECIAL
  return tokenizer_training.train(config, CORPUS)


@pytest.fixture(params=["sentencepiece", "bytes", "loaded"])
def special(request, trained, trained_special):
  if request.param == "sentencepiece":
    return trained_special
  model = None if request.param == "bytes" else trained.model
  return tokenizer_lib.Tokenizer(model, None, SPECIAL)


def test_special_tokens_have_ids_that_no_text_has(special):
  ids = [special.named[name] for name in SPECIAL]
  assert len({*ids, *reserved_ids(special)}) == 5 + 111
  assert max(ids) < special.size == len(special.byte_lengths)
  assert special.decode(ids) == "" and not special.byte_lengths[ids].any()
  assert [special.piece(i) for i in ids] == list(SPECIAL)
  for text in (*SPECIAL, "a" + "".join(SPECIAL) * 2, *CORPUS[:1]):
    encoded = special.encode(text)
    assert special.decode(encoded) == text
    assert not set(encoded) & set(ids)
  again = tokenizer_lib.Tokenizer.from_json(special.to_json())
  assert again.named == special.named
  assert again.fingerprint == special.fingerprint
  plain = tokenizer_lib.Tokenizer(special.model)
  assert plain.fingerprint != special.fingerprint


def test_special_tokens_are_reserved_at_training(trained, trained_special):
  assert trained_special.size == trained.size == SIZE
  ids = [trained_special.named[name] for name in SPECIAL]
  assert ids == [111, 112, 113, 114, 115]
  loaded = tokenizer_lib.Tokenizer(trained.model, None, SPECIAL)
  assert loaded.size == SIZE + 5 and loaded.named["<|im_end|>"] == SIZE + 1
  # Text is encoded as it would be without them.
  assert loaded.encode(CORPUS[1]) == trained.encode(CORPUS[1])


def test_a_loaded_models_own_pieces_are_the_special_tokens(tmp_path):
  model = foreign_model(
    normalization_rule_name="identity",
    user_defined_symbols=["<mask>", "<|im_end|>", "a b"],
    control_symbols=["<|im_start|>"],
  )
  own = sentencepiece.SentencePieceProcessor(model_proto=model)
  names = ("<|im_start|>", "<|im_end|>", "a b", "<new>")
  t = tokenizer_lib.Tokenizer(model, None, names)
  assert t.named["<|im_start|>"] == own.piece_to_id("<|im_start|>")
  assert t.named["<|im_end|>"] == own.piece_to_id("<|im_end|>")
  assert t.named["a b"] == own.piece_to_id("a b") > 0
  assert t.named["<new>"] == t.size - 1 >= 503
  text = "x<|im_end|> a b<|im_start|><new>"
  assert t.decode(t.encode(text)) == text
  assert not set(t.encode(text)) & {t.named[name] for name in names}


@pytest.mark.parametrize(
  "names, message",
  [
    (("",), "special_tokens: '' is empty; leave it out"),
    (("<a>", "<b>", "<a>"), "special_tokens: '<a>' is given twice"),
    (("<user>",), "special_tokens: '<user>' is a reserved token"),
    (("<0x41>",), "special_tokens: '<0x41>' names a byte"),
    (("\ud800",), "special_tokens=.*half a character"),
    (tuple(f"<{i}>" for i in range(18)), "holds 18 tokens, .* has 17 spare"),
    (tuple(f"<{i}>" for i in range(901)), "is one more than the limit of 900"),
  ],
)
def test_special_tokens_that_are_refused(names, message):
  config = make_config(vocab_size=384)
  config.tokenizer.kind = "bytes"
  config.tokenizer.special_tokens = names
  with pytest.raises(schema.ConfigError, match=message):
    tokenizer_lib.load(config)


def test_special_tokens_count_in_the_least_size():
  config = make_config(vocab_size=369)
  config.tokenizer.special_tokens = ("<a>", "<b>")
  with pytest.raises(schema.ConfigError, match="set it to at least 370"):
    tokenizer_training.train(config, CORPUS)


# --- training ----------------------------------------------------------------


def test_training_is_deterministic_and_reads_its_texts(trained):
  again = tokenizer_training.train(make_config(), CORPUS)
  assert again.fingerprint == trained.fingerprint
  other = tokenizer_training.train(make_config(), CORPUS[1:])
  assert other.fingerprint != trained.fingerprint
  assert trained.size == SIZE


def test_a_byte_level_bpe_is_deterministic_and_has_the_same_reserved_ids():
  config = bpe_config()
  config.tokenizer.special_tokens = ("<|im_start|>", "<|im_end|>")
  t = tokenizer_training.train(config, CORPUS)
  again = tokenizer_training.train(config, CORPUS)
  assert t.fingerprint == again.fingerprint and t.size == SIZE
  assert list(t.reserved.values()) == list(range(111))
  assert t.named["<|im_end|>"] == 112
  pieces = [t.decode([i]) for i in range(SIZE)]
  assert " return" in pieces and "    " in pieces
  assert not any(p.strip().isdigit() and len(p.strip()) > 1 for p in pieces)
  other = tokenizer_training.train(config, CORPUS[1:])
  assert other.fingerprint != t.fingerprint


@pytest.mark.parametrize(
  "texts, size, special, message",
  [
    (["too little text"], 701, (), "sources are too small.*they give 3"),
    (CORPUS, 367, (), "set it to at least 368"),
    (CORPUS, 701, ('"',), "'\"' is a token that ordinary text needs"),
  ],
)
def test_a_byte_level_bpe_out_of_reach(texts, size, special, message):
  config = bpe_config(vocab_size=size)
  config.tokenizer.special_tokens = special
  with pytest.raises(schema.ConfigError, match=message):
    tokenizer_training.train(config, texts)


def test_training_learns_newlines_and_indentation(trained):
  pieces = [trained.decode([i]) for i in range(SIZE)]
  assert ":\n" in pieces and "    " in pieces
  # Digits stay apart, so that a number is read as its digits.
  assert not any(p.strip().isdigit() and len(p.strip()) > 1 for p in pieces)


@pytest.mark.parametrize(
  "texts, size, message",
  [
    (["too little text"], 701, "sources are too small"),
    (["".join(map(chr, range(0x4E00, 0x5000)))], 401, "too varied for it"),
    (CORPUS, 367, "set it to at least 368"),
  ],
)
def test_a_size_out_of_reach_is_refused(texts, size, message):
  with pytest.raises(schema.ConfigError, match=message) as error:
    tokenizer_training.train(make_config(vocab_size=size), texts)
  assert f"config.model.vocab_size={size}" in str(error.value)
  assert ".cc" not in str(error.value)


# --- models that others made -------------------------------------------------


def foreign_model(**options) -> bytes:
  """A model with a normaliser and a dummy prefix, as T5's and Llama 2's."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(" ".join(CORPUS).splitlines()),
    model_writer=model,
    vocab_size=503,
    minloglevel=2,
    **{
      "model_type": "bpe",
      "byte_fallback": True,
      "user_defined_symbols": ["<mask>"],
      **options,
    },
  )
  return model.getvalue()


def load(tmp_path, model: bytes, size: int):
  path = tmp_path / "foreign.model"
  path.write_bytes(model)
  config = make_config(vocab_size=size)
  config.tokenizer.path = str(path)
  return tokenizer_lib.load(config)


def test_a_loaded_model_keeps_its_ids_and_gains_the_reserved(tmp_path):
  model = foreign_model()
  tokenizer = load(tmp_path, model, 701)
  own = sentencepiece.SentencePieceProcessor(model_proto=model)
  assert (tokenizer.bos, tokenizer.eos) == (own.bos_id(), own.eos_id())
  # All but bos and eos are missing; its own <mask> is matched in text.
  assert tokenizer.size == 503 + 111 - 2
  assert tokenizer.mask >= 503
  for i in range(300, 503, 29):
    piece = own.id_to_piece(i).replace("\u2581", " ")
    assert tokenizer.decode([i], continues=True) == piece
  # Its normaliser folds the ligature and the spaces.
  assert tokenizer.lossy is not None and "nmt_nfkc" in tokenizer.lossy
  for text in ("  \ufb01x  return\n\n", "<mask><s></s><pad>", "\u2581 "):
    ids = tokenizer.encode(text)
    assert ids == own.encode(text)
    assert not set(ids) & set(reserved_ids(tokenizer))
  assert tokenizer.decode(tokenizer.encode("  \ufb01x  y ")) == "fix y"


@pytest.mark.parametrize(
  "options, size, message",
  [
    ({}, 611, "vocabulary mismatch: config.model.vocab_size=611.* has 612 ids"),
    ({"byte_fallback": False}, 701, "foreign.model.*without byte fallback"),
  ],
)
def test_a_loaded_model_that_does_not_fit(tmp_path, options, size, message):
  with pytest.raises(schema.ConfigError, match=message):
    load(tmp_path, foreign_model(**options), size)


def test_a_file_that_is_no_model(tmp_path):
  with pytest.raises(schema.ConfigError, match="not a SentencePiece model"):
    load(tmp_path, b"no model", 701)
  for content in (b"", b"\0\xff" * 50, b"text\n" * 200):
    with pytest.raises(schema.ConfigError, match="foreign.model'"):
      load(tmp_path, content, 701)
  config = make_config()
  config.tokenizer.path = ""
  with pytest.raises(schema.ConfigError, match="tokenizer.path='': empty"):
    tokenizer_lib.load(config)
  config.tokenizer.path = str(tmp_path / "absent.model")
  with pytest.raises(schema.ConfigError, match="absent.model.*No such file"):
    tokenizer_lib.load(config)


def test_paths_in_the_home_folder(tmp_path, monkeypatch, trained):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "a.model").write_bytes(trained.model)
  (tmp_path / "a.jinja").write_bytes(b"\xef\xbb\xbf<user>")
  config = make_config()
  config.tokenizer.path = "~/a.model"
  config.tokenizer.chat_template = "~/a.jinja"
  tokenizer = tokenizer_lib.load(config)
  assert tokenizer.fingerprint == trained.fingerprint
  assert tokenizer.chat_template == "<user>"


def test_an_unigram_model_loads(tmp_path):
  model = foreign_model(
    model_type="unigram",
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
  )
  tokenizer = load(tmp_path, model, 701)
  assert tokenizer.decode(tokenizer.encode(CORPUS[2])) == CORPUS[2]


def test_the_bytes_tokenizer_names_the_size_that_it_needs():
  config = make_config()
  config.tokenizer.kind = "bytes"
  with pytest.raises(schema.ConfigError, match="701.*exactly 384"):
    tokenizer_lib.load(config)
  config.model.vocab_size = 384
  assert tokenizer_lib.load(config).size == 384


def test_the_model_alone_gives_the_same_ids_elsewhere(trained):
  """SentencePiece reads the stored model without this project."""
  proto = vars(model_pb2)["ModelProto"]()
  proto.ParseFromString(trained.model)
  assert proto.normalizer_spec.name == "identity"
  own = sentencepiece.SentencePieceProcessor(model_proto=trained.model)
  assert own.encode(CORPUS[1]) == trained.encode(CORPUS[1])
  assert own.decode(trained.encode(CORPUS[1])) == CORPUS[1]
