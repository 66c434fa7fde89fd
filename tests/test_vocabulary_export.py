"""Vocabularies that transformers reads: equal ids and text, on hostile text."""

import functools
import json
import random

import chat_templates
import pytest
import vocabularies
from vocabularies import auto_tokenizer

from lm import config as config_lib
from lm import schema
from lm.convert import vocabulary as export
from lm.data import chat, tokenizer_training
from lm.data import tokenizer as tokenizer_lib

TEXTS = vocabularies.hostile(1000)
SPECIAL = ("<|im_start|>", "<|im_end|>", "[INST], a b", "\u2581x")


@functools.cache
def trained(special=(), size=901) -> bytes:
  config = config_lib.Config()
  config.model.vocab_size = size
  config.tokenizer.special_tokens = special
  model = tokenizer_training.train(config, vocabularies.CORPUS).model
  assert isinstance(model, bytes)
  return model


@functools.cache
def bpe(special=()):
  config = config_lib.Config()
  config.tokenizer.kind = "bpe"
  config.model.vocab_size = 901
  config.tokenizer.special_tokens = special
  return tokenizer_training.train(config, vocabularies.CORPUS)


OURS = {
  "bytes": lambda: tokenizer_lib.Tokenizer(None, None, SPECIAL),
  "trained": lambda: tokenizer_lib.Tokenizer(trained()),
  "trained_special": lambda: tokenizer_lib.Tokenizer(
    trained(SPECIAL), None, SPECIAL
  ),
  "loaded_special": lambda: tokenizer_lib.Tokenizer(trained(), None, SPECIAL),
  "bpe": lambda: bpe(SPECIAL),
  "foreign": lambda: tokenizer_lib.Tokenizer(
    vocabularies.sentencepiece_model()
  ),
  "foreign_plain": lambda: tokenizer_lib.Tokenizer(
    vocabularies.sentencepiece_model(), None, SPECIAL, plain=True
  ),
  "foreign_symbols": lambda: tokenizer_lib.Tokenizer(
    vocabularies.sentencepiece_model(
      add_dummy_prefix=False,
      user_defined_symbols=["<table>", "\u2581\u2581", "\n\n", "<|im_end|>"],
    ),
    None,
    ("<|im_end|>",),
  ),
}


@pytest.mark.parametrize("kind", OURS)
def test_ids_and_text_of_our_own(tmp_path, kind):
  t = OURS[kind]()
  export.write(t, str(tmp_path))
  other = auto_tokenizer(tmp_path)
  assert (other.bos_token_id, other.eos_token_id) == (t.bos, t.eos)
  assert (other.pad_token_id, other.mask_token_id) == (t.pad, t.mask)
  ours = [ids.tolist() for ids in t.encode_batch(TEXTS)]
  for text, ids in zip(TEXTS, ours, strict=True):
    got = other.encode(
      text, add_special_tokens=False, split_special_tokens=True
    )
    assert got == ids, repr(text)
    assert other.decode(ids, skip_special_tokens=True) == t.decode(ids)
  # A document begins with bos; the names of special tokens are theirs.
  assert other.encode("x") == [t.bos, *t.encode("x")]
  for name, i in t.named.items():
    assert other.convert_tokens_to_ids(name) == i


@pytest.mark.parametrize("seed", range(4))
def test_merges_are_sentencepieces_on_texts_of_few_letters(seed):
  """Where ties are likeliest: texts with periods, pieces made in many ways."""
  draw = random.Random(seed)
  letters = ["ab", "abc", "a ", " \t"][seed]
  corpus = [
    "".join(draw.choice(letters) for _ in range(draw.randint(1, 60)))
    for _ in range(300)
  ]
  config = config_lib.Config()
  config.model.vocab_size = (430, 430, 393, 393)[seed]
  t = tokenizer_training.train(config, corpus)
  tree = export.contents(t)["tokenizer.json"]
  other = vocabularies.tokenizers.Tokenizer.from_str(tree)
  other.encode_special_tokens = True
  for _ in range(4000):
    text = "".join(draw.choice(letters) for _ in range(draw.randint(1, 40)))
    got = other.encode(text, add_special_tokens=False).ids
    assert got == t.encode(text), repr(text)


@pytest.mark.parametrize("name", list(vocabularies.MAKERS))
def test_a_vocabulary_of_others_comes_back_as_it_was(tmp_path, name):
  t = tokenizer_lib.from_files(str(vocabularies.folder(tmp_path, name)))
  (tmp_path / "out").mkdir()
  export.write(t, str(tmp_path / "out"))
  old = json.loads(vocabularies.files(name)["tokenizer.json"])
  assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == old
  other = auto_tokenizer(tmp_path / "out")
  assert (other.bos_token_id, other.eos_token_id) == (t.bos, t.eos)
  texts = vocabularies.hostile(300, names=False)
  for text, ids in zip(texts, t.encode_batch(texts), strict=True):
    got = other.encode(text, add_special_tokens=False)
    assert got == ids.tolist()
  again = tokenizer_lib.from_files(str(tmp_path / "out"))
  assert (again.named, again.chat_template) == (t.named, t.chat_template)
  assert again.encode("Hello") == t.encode("Hello")


def test_tokens_that_were_added_are_exported(tmp_path):
  t = tokenizer_lib.from_files(
    str(vocabularies.folder(tmp_path, "gpt_2")), None, ("<|im_end|>",)
  )
  t = t.with_reserved(["<mask>", "<fim_prefix>"], 700)
  assert t.size == 604 and t.mask == 602
  export.write(t, str(tmp_path))
  other = auto_tokenizer(tmp_path)
  for name in ("<|im_end|>", "<mask>", "<fim_prefix>"):
    assert other.convert_tokens_to_ids(name) == t.named[name]
    assert other.encode(name, add_special_tokens=False) == [t.named[name]]
  again = tokenizer_lib.from_files(str(tmp_path))
  assert again.named == t.named


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("style", chat_templates.STYLES)
def test_chats_are_laid_out_alike(tmp_path, style, kind):
  s = chat_templates.STYLES[style]
  t = tokenizer_lib.Tokenizer(None, s.template, s.special_tokens)
  if kind == "bpe":
    t = bpe(s.special_tokens).with_template(s.template)
  export.write(t, str(tmp_path))
  other = auto_tokenizer(tmp_path)
  got = other.apply_chat_template(s.messages, return_dict=True)["input_ids"]
  want, _ = chat.encode(t, s.messages)
  if style == "alpaca":  # Plain text, cut where targets begin; eos at its end.
    assert t.decode(got) == t.decode(want.tolist())
  else:
    assert got == want.tolist()
  if kind == "bpe":  # Loaded by its files, it is the same.
    again = tokenizer_lib.from_files(str(tmp_path))
    assert chat.encode(again, s.messages)[0].tolist() == want.tolist()


def test_the_files_are_read_again_with_the_config_beside_them(tmp_path):
  """transformers has a tokenizer of its own for some model types."""
  t = tokenizer_lib.Tokenizer(trained())
  export.write(t, str(tmp_path))
  for family in ("llama", "gpt2", "qwen3", "gemma2", "bert", "phi3"):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    export.verify(t, str(tmp_path))
  (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
  with pytest.raises(schema.RunError, match="as Qwen2Tokenizer and makes"):
    export.verify(t, str(tmp_path))
  # Of its own vocabulary that tokenizer is the true one.
  t = tokenizer_lib.from_files(str(vocabularies.folder(tmp_path, "qwen")))
  export.write(t, str(tmp_path))
  export.verify(t, str(tmp_path))


def test_what_a_tokenizer_json_cannot_express_is_refused():
  joint = tokenizer_lib.Tokenizer(trained()).decode([400])
  assert len(joint) > 1
  for special in ('"', joint):
    t = tokenizer_lib.Tokenizer(trained(), None, (special,))
    with pytest.raises(schema.ConfigError, match="is also a token of text"):
      export.contents(t)
  for options, why in (
    ({"model_type": "unigram"}, "no BPE"),
    ({"normalization_rule_name": "nmt_nfkc"}, "has a normaliser"),
    ({"remove_extra_whitespaces": True}, "has a normaliser"),
    ({"user_defined_symbols": ["<t>"]}, "user-defined symbols and a prefix"),
  ):
    t = tokenizer_lib.Tokenizer(vocabularies.sentencepiece_model(**options))
    with pytest.raises(schema.ConfigError, match=why):
      export.contents(t)
