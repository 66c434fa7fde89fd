"""Vocabularies of others: equal ids, exact bytes, and what objectives need."""

import dataclasses
import json
import re
import unicodedata

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
import vocabularies

from lm import checkpoint, schema, validation
from lm.data import chat, pipeline, store, tokenizer_cache
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import perplexity
from lm.model import decoder
from lm.train import init_from

NAMES = list(vocabularies.MAKERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabularies")
  return {name: vocabularies.folder(path, name) for name in NAMES}


@pytest.fixture(scope="module")
def ours(folders):
  return {n: tokenizer_lib.from_files(str(p)) for n, p in folders.items()}


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(folders, ours, name):
  own, other = ours[name], vocabularies.auto_tokenizer(folders[name])
  texts = vocabularies.hostile(1000, names=False)
  want = [other.encode(text, add_special_tokens=False) for text in texts]
  got = [ids.tolist() for ids in own.encode_batch(texts)]
  assert got == want


@pytest.mark.parametrize("name", NAMES)
def test_no_text_has_a_special_id(ours, name):
  t = ours[name]
  closed = {i for n, i in t.named.items() if n not in ("<unk>", "[UNK]")}
  texts = [*vocabularies.hostile(400), *t.vocabulary.special]
  texts += [f"a {x}{x} b" for x in t.vocabulary.special]
  for text, ids in zip(texts, t.encode_batch(texts), strict=True):
    assert not closed & set(ids.tolist()), text
    if t.lossy is None:
      assert t.decode(ids.tolist()) == text


LOSSY = {
  "llama_3": None,
  "gpt_2": None,
  "qwen": "normalizer is NFC",
  "llama_2": "a \u2581 of the text becomes a space",
  "code_llama": "a \u2581 of the text becomes a space",
  "gemma": "a \u2581 of the text becomes a space",
  "bert": "BertNormalizer.*spaces of the text.*outside the vocabulary",
  "unigram": "becomes a space; one space at the start",
}


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_exact_or_it_says_why_not(ours, name):
  t = ours[name]
  assert (t.lossy is None) == (LOSSY[name] is None)
  assert t.lossy is None or re.search(LOSSY[name], t.lossy)
  changed = 0
  for text in vocabularies.hostile(1000):
    ids = t.encode(text)
    same = t.decode(ids) == text
    changed += not same
    if same:
      assert t.n_bytes(ids) == len(text.encode()), text
    # What is lost is what it says is lost.
    elif name == "qwen":
      assert t.decode(ids) == unicodedata.normalize("NFC", text)
    elif name in ("llama_2", "code_llama", "gemma"):
      assert t.decode(ids) == text.replace("\u2581", " ")
      assert "\u2581" in text
    elif name == "unigram":
      assert "\u2581" in text or text.startswith(" ") or "<0x41>" in text
  assert (changed == 0) == (t.lossy is None)
  raw = "\U0001f9ea".encode()
  if name != "bert":  # Partial characters, token by token.
    ids = t.encode("x\U0001f9ea")
    assert b"".join(t.decode_bytes([i]) for i in ids).endswith(b"x" + raw)
    assert t.byte_lengths[ids].sum() == 5 + len(t.prefix)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bert"])
def test_decoding_is_that_of_transformers(folders, ours, name):
  t, other = ours[name], vocabularies.auto_tokenizer(folders[name])
  for text in vocabularies.hostile(300, names=False):
    ids = t.encode(text)
    want = other.decode(ids, clean_up_tokenization_spaces=False)
    assert t.decode(ids) == want


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_all_of_it(ours, name):
  t = ours[name]
  again = tokenizer_lib.Tokenizer.from_json(t.to_json())
  assert again.fingerprint == t.fingerprint
  assert again.named == t.named and again.chat_template == t.chat_template
  assert again.encode("Hello  you\n") == t.encode("Hello  you\n")
  assert again.to_json() == t.to_json()
  other = t.with_template("{{ messages[0].content }}")
  assert other.fingerprint == t.fingerprint
  again = tokenizer_lib.Tokenizer.from_json(other.to_json())
  assert again.chat_template == "{{ messages[0].content }}"
  assert again.with_template(None).chat_template == t.chat_template


def test_reserved_tokens_are_the_vocabularys_own(folders, ours):
  def own(name, *tokens):
    t = tokenizers.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    return [t.token_to_id(token) for token in tokens]

  t = ours["llama_3"]
  want = own("llama_3", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>")
  assert [t.bos, t.eos, t.pad] == want
  first = own("llama_3", *(f"<|reserved_special_token_{i}|>" for i in range(5)))
  # In the order of RESERVED: mask, three of FIM, sentinels.
  got = [t.mask, t.fim_prefix, t.fim_middle, t.fim_suffix, t.sentinels[0]]
  assert got == first
  assert t.size == 600 + 135 and t.piece(t.mask) == "<mask>"
  assert t.piece(t.eos) == "<|eot_id|>"

  t = ours["gpt_2"]
  assert [t.bos] == [t.eos] == [t.pad] == own("gpt_2", "<|endoftext|>")
  for name in ("mask", "fim_prefix", "user", "sentinels"):
    with pytest.raises(schema.ConfigError, match="has no <.*vocab_size"):
      getattr(t, name)

  t = ours["qwen"]  # No bos: what ends a text stands before the next.
  assert [t.bos, t.eos, t.pad] == own(
    "qwen", "<|im_end|>", "<|im_end|>", "<|endoftext|>"
  )
  assert [t.fim_prefix, t.fim_middle, t.fim_suffix] == own(
    "qwen", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
  )
  t = ours["code_llama"]
  assert [t.fim_prefix, t.fim_middle, t.fim_suffix] == own(
    "code_llama", "\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>"
  )
  t = ours["gemma"]
  assert [t.pad, t.bos, t.eos] == own("gemma", "<pad>", "<bos>", "<eos>")
  assert [t.mask] == own("gemma", "<unused0>")
  # Not the <unusedN> that would be next: the vocabulary has one of that name.
  assert [t.end_of_turn] == own("gemma", "<end_of_turn>")
  t = ours["bert"]
  want = own("bert", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]")
  assert [t.bos, t.eos, t.pad, t.mask, t.fim_prefix] == want


# --- files -------------------------------------------------------------------


@pytest.mark.parametrize(
  "files, message",
  [
    ({}, "tokenizer.json'.*No such file.*name a tokenizer.json, or a folder"),
    ({"tokenizer.json": "{"}, "not JSON"),
    ({"tokenizer.json": "[]"}, "must hold an object"),
    ({"tokenizer.json": "{}"}, "not a tokenizer.json .KeyError"),
    ({"tokenizer.json": b"\xff"}, "not UTF-8"),
    (
      {"tokenizer.json": '{"model": {"type": "X", "vocab": {"</s>": 0}}}'},
      "not a tokenizer.json",
    ),
    (
      {"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"</s>": 1e12}}}'},
      "not a tokenizer.json .ValueError: ids must be from 0",
    ),
    (
      {"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}}}'},
      "no token ends a text; name the vocabulary's eos_token",
    ),
    (
      {
        "tokenizer.json": '{"normalizer": ["x"], "model": {"type": "BPE", '
        '"vocab": {"</s>": 0}, "merges": []}}'
      },
      "not a tokenizer.json .TypeError",
    ),
    ({"tokenizer_config.json": "]"}, "tokenizer_config.json: not JSON"),
    ({"chat_template.jinja": "{% if %}"}, "jinja: chat template, line 1"),
    (
      {"tokenizer_config.json": '{"chat_template": 3}'},
      "chat_template must be a text",
    ),
  ],
)
def test_folders_that_hold_no_vocabulary(tmp_path, files, message):
  if files and "tokenizer.json" not in files:
    files = vocabularies.files("llama_3") | files
  for name, content in files.items():
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
  with pytest.raises(schema.ConfigError, match=message) as error:
    tokenizer_lib.from_files(str(tmp_path))
  assert "config.tokenizer.path=" in str(error.value)


def test_a_tokenizer_json_alone(tmp_path):
  """Without files that say which tokens begin and end a text."""
  for name in ("llama_3", "gpt_2", "llama_2", "gemma", "bert"):
    path = tmp_path / f"{name}.json"
    path.write_text(vocabularies.files(name)["tokenizer.json"])
    t = tokenizer_lib.from_files(str(path))
    own = t.vocabulary.names()
    assert (own[t.bos], own[t.eos]) == {
      "llama_3": ("<|begin_of_text|>", "<|end_of_text|>"),
      "gpt_2": ("<|endoftext|>", "<|endoftext|>"),
      "llama_2": ("<s>", "</s>"),
      "gemma": ("<bos>", "<eos>"),
      "bert": ("[CLS]", "[SEP]"),
    }[name]
    path.unlink()


def test_templates_and_settings_beside_it(tmp_path):
  """A file chat_template.jinja wins; of named templates, `default`; dropout,
  truncation and padding of a tokenizer.json are not for pretraining.
  """
  folder = vocabularies.folder(tmp_path, "llama_3")
  config = json.loads((folder / "tokenizer_config.json").read_text())
  config["chat_template"] = [
    {"name": "tool_use", "template": "no"},
    {"name": "default", "template": "{{ 'yes' }}"},
  ]
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  before = tokenizer_lib.from_files(str(folder))
  assert before.chat_template == "{{ 'yes' }}"
  (folder / "chat_template.jinja").write_text("{{ 'file' }}")
  tree = json.loads((folder / "tokenizer.json").read_text())
  tree["model"]["dropout"] = 0.9
  tree["truncation"] = {
    **{"max_length": 3, "stride": 0, "direction": "Right"},
    "strategy": "LongestFirst",
  }
  (folder / "tokenizer.json").write_text(json.dumps(tree))
  t = tokenizer_lib.from_files(str(folder))
  assert t.chat_template == "{{ 'file' }}"
  text = vocabularies.CORPUS[0]
  assert t.encode(text) == before.encode(text)


# --- SentencePiece models of others ------------------------------------------


@pytest.mark.parametrize(
  "options",
  [
    {},  # As Llama 2's.
    {"add_dummy_prefix": False},  # As Gemma's.
    {"remove_extra_whitespaces": True},
    {"normalization_rule_name": "nmt_nfkc"},
    {"model_type": "unigram", "normalization_rule_name": "nfkc_cf"},
    {"user_defined_symbols": ["<table>", "\u2581\u2581"]},
  ],
)
def test_a_models_ids_are_those_of_sentencepiece(options):
  model = vocabularies.sentencepiece_model(**options)
  own = sentencepiece.SentencePieceProcessor(model_proto=model)
  t = tokenizer_lib.Tokenizer(model)
  plain = len(options) < 2 and "norm" not in str(options)
  for text in vocabularies.hostile(1000):
    ids = t.encode(text)
    assert ids == own.encode(text), repr(text)
    same = t.decode(ids) == text
    if same:
      assert t.n_bytes(ids) == len(text.encode())
    if not same and plain and "remove_extra_whitespaces" not in options:
      assert "\u2581" in text
  again = tokenizer_lib.Tokenizer.from_json(t.to_json())
  assert again.fingerprint == t.fingerprint
  assert again.encode(" \ufb01 x") == own.encode(" \ufb01 x")
  # Text that goes on from other text gets no space of its own.
  if options == {}:
    assert t.decode(t.encode("ing", continues=True), continues=True) == "ing"


def test_a_checkpoint_of_an_earlier_version_keeps_its_ids():
  """Then each model was used without its normaliser and its dummy prefix."""
  model = vocabularies.sentencepiece_model(normalization_rule_name="nmt_nfkc")
  t = tokenizer_lib.Tokenizer(model)
  content = json.loads(t.to_json())
  assert content.pop("rules") == "own"
  old = tokenizer_lib.Tokenizer.from_json(json.dumps(content))
  assert old.lossy is None and json.loads(old.to_json()) == content
  assert old.fingerprint != t.fingerprint
  assert old.with_template("x").fingerprint == old.fingerprint
  for text in vocabularies.hostile(300):
    assert old.decode(old.encode(text)) == text


# --- objectives, stores, evaluation ------------------------------------------


def config_of(make, folders, name, source="text:{}/*.py", **fields):
  config = make()
  corpus = config.data.train[0].removeprefix("text:").removesuffix("/*.py")
  config.tokenizer.kind, config.tokenizer.path = (
    "huggingface",
    str(folders[name]),
  )
  config.model.vocab_size = 1024
  config.data.train = (source.format(corpus),)
  config.data.validation = ("text:" + corpus + "/cli.py",)
  for path, value in fields.items():
    room, field = path.split("__")
    setattr(getattr(config, room), field, value)
  return validation.validate(config)


@pytest.mark.parametrize(
  "objective, needed",
  [("fim", 3), ("masked", 1), ("span_corruption", 100), ("prefix", 0)],
)
def test_ids_are_added_where_an_objective_needs_them(
  make, folders, objective, needed
):
  source = "text:{}/*.py|" + objective
  config = config_of(make, folders, "gpt_2", source, model__vocab_size=601)
  size = 601
  if needed:
    message = (
      rf"vocab_size=601: .* need {needed} tokens? .* least {601 + needed}"
    )
    with pytest.raises(schema.ConfigError, match=message):
      store.prepare(config)
  config.model.vocab_size = size + needed
  prepared = store.prepare(config)
  assert prepared.tokenizer.size == size + needed
  again = tokenizer_lib.Tokenizer.from_json(prepared.tokenizer.to_json())
  assert again.named == prepared.tokenizer.named
  row = next(pipeline.train_batches(config, prepared))
  text = [*prepared.tokenizer.named.values()]
  assert row.inputs.max() < config.model.vocab_size
  assert needed == 0 or set(np.unique(row.inputs)) & set(text[-needed:])
  # Another run, from that checkpoint, of an objective that it was not made for.
  data = config.data
  if objective == "prefix":
    with pytest.raises(schema.ConfigError, match="has no <mask>"):
      store.prepare_sources(["text:" + __file__ + "|masked"], again, data)


def test_a_vocabulary_with_unused_tokens_needs_no_room(make, folders):
  for name in ("llama_3", "gemma", "bert"):
    config = config_of(make, folders, name, "text:{}/*.py|span_corruption")
    t = store.prepare(config).tokenizer
    assert t.size == tokenizer_lib.from_files(str(folders[name])).size or (
      name == "gemma"  # Which has 99, and a hundred sentinels need more.
    )


@pytest.mark.parametrize("name", ["gpt_2", "llama_2", "qwen", "bert"])
def test_windows_and_validation_count_documents_and_bytes(
  make, folders, name, capsys, tmp_path
):
  config = config_of(make, folders, name, train__eval_batches=None)
  config.data.cache_dir = str(tmp_path)
  prepared = store.prepare(config)
  said = capsys.readouterr().err
  assert ("the tokenizer changes the text of" in said) == (name == "bert")
  found = prepared.train[0]
  tokens, documents = found.window(0, found.n_tokens)
  assert documents.max() == found.n_documents
  want = np.searchsorted(found.ends, np.arange(found.n_tokens), side="right")
  np.testing.assert_array_equal(documents, want + 1)
  assert tokens[documents == 2].tolist() == found.document(1).tolist()
  totals = perplexity.evaluate_batches(
    perplexity.eval_step(config.model),
    decoder.init_params(config.model, jax.random.key(0)),
    (batch for _, batch in pipeline.validation_batches(config, prepared)),
    prepared.tokenizer.target_bytes,
  )
  assert totals is not None
  if name != "bert":
    assert totals.n_bytes == prepared.validation[0].n_bytes
  assert totals.n_eos >= prepared.validation[0].n_documents


def test_special_tokens_that_a_config_names(ours, folders):
  """Tokens of the vocabulary, now for templates alone; or ids after its own."""
  names = ("<think>", "<tool>")
  plain, folder = ours["qwen"], str(folders["qwen"])
  t = tokenizer_lib.from_files(folder, None, names)
  assert t.size == plain.size + 1 and t.named["<tool>"] == plain.size
  think = t.named["<think>"]
  assert plain.encode("a<think>") == [*plain.encode("a"), think]
  assert think not in t.encode("a<think>")
  assert t.decode(t.encode("a<think><tool>")) == "a<think><tool>"
  assert tokenizer_lib.Tokenizer.from_json(t.to_json()).named == t.named
  with pytest.raises(schema.ConfigError, match="'a' is a token that ordinary"):
    tokenizer_lib.from_files(folder, None, ("a",))
  again = tokenizer_lib.from_files(folder, None, (" the",))
  assert again.decode(again.encode("of the x")) == "of the x"


def test_a_run_goes_on_from_a_run_with_a_vocabulary(make, folders, tmp_path):
  """Its tokenizer, with the ids that were added, comes with its parameters."""
  source = "text:{}/*.py|fim"
  config = config_of(make, folders, "gpt_2", source, model__vocab_size=700)
  stored = store.prepare(config).tokenizer
  meta = checkpoint.Meta(3, config, stored.to_json(), "data")
  saved = checkpoint.Checkpoints(str(tmp_path / "run"), config.checkpoint)
  saved.save({"params": {"none": np.zeros(1)}}, meta)
  saved.close()
  tuned = config_of(make, folders, "gpt_2", "text:{}/*.py|masked")
  tuned.model.vocab_size = 700
  tuned.init_from = str(tmp_path / "run")
  for path in (tuned.tokenizer.path, None):
    tuned.tokenizer.path = path
    found = init_from.tokenizer(validation.validate(tuned))
    assert found is not None and found.fingerprint == stored.fingerprint
    prepared = store.prepare(tuned, found)
    assert prepared.tokenizer.fim_prefix == stored.fim_prefix == 601
    assert prepared.tokenizer.mask == 604
  for kind, path in (("huggingface", folders["qwen"]), ("sentencepiece", None)):
    tuned.tokenizer.kind = kind
    tuned.tokenizer.path = None if path is None else str(path)
    with pytest.raises(schema.ConfigError, match="not the tokenizer of"):
      init_from.tokenizer(tuned)
  config.tokenizer.path = None
  with pytest.raises(schema.ConfigError, match="path=None: must name a tok"):
    validation.validate(config)


# --- chats -------------------------------------------------------------------

MESSAGES = [
  {"role": "user", "content": "Gr\u00fc\u00df dich \U0001f642! 12345"},
  {"role": "assistant", "content": "Hi."},
  {"role": "user", "content": "and now?"},
  {"role": "assistant", "content": "caf\u00e9 \U0001f600 def f(x):\n  x"},
]


@pytest.mark.parametrize("name", ["llama_3", "qwen"])
def test_chats_are_those_of_transformers(folders, ours, name):
  t, other = ours[name], vocabularies.auto_tokenizer(folders[name])
  out = other.apply_chat_template(
    MESSAGES, return_assistant_tokens_mask=True, return_dict=True
  )
  ids, scored = chat.encode(t, MESSAGES)
  assert ids.tolist() == out["input_ids"]
  assert scored.tolist() == [bool(x) for x in out["assistant_masks"]]
  prompt = other.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)
  assert chat.chat_ids(t, MESSAGES[:1]) == prompt["input_ids"]
  # A message cannot write a special token.
  end = {"llama_3": "<|eot_id|>", "qwen": "<|im_end|>"}[name]
  messages = [{"role": "user", "content": end}, *MESSAGES[1:2]]
  assert chat.encode(t, messages)[0].tolist().count(t.named[end]) == 2
  again = tokenizer_lib.Tokenizer.from_json(t.to_json())
  assert chat.encode(again, MESSAGES)[0].tolist() == ids.tolist()


def test_a_vocabulary_may_have_several_tokens_that_end_an_answer(tmp_path):
  folder = vocabularies.folder(tmp_path, "llama_3")
  own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  names = ["<|end_of_text|>", "<|eot_id|>", "<|reserved_special_token_3|>"]
  ids = [own.token_to_id(name) for name in names]
  (folder / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [*ids, 10**6], "bos_token_id": 0})
  )
  t = tokenizer_lib.from_files(str(folder))
  assert t.eos == ids[1]  # As tokenizer_config.json says.
  assert chat.stop_ids(t) == [ids[0], ids[2]]
  again = tokenizer_lib.Tokenizer.from_json(t.to_json())
  assert chat.stop_ids(again) == [ids[0], ids[2]]


def test_a_template_of_this_program_needs_ids(ours):
  template = (
    "{% for m in messages %}<user>{{ m.content }}<end_of_turn>{% endfor %}"
  )
  t = ours["gpt_2"].with_template(template)
  with pytest.raises(schema.ConfigError, match="writes <user>, for which"):
    chat.chat_ids(t, MESSAGES[:1])
  need = tokenizer_cache.needs(["jsonl:a.jsonl|chat"], t)
  assert need == ["<user>", "<end_of_turn>"]
  t = t.with_reserved(need, 603)
  ids = chat.chat_ids(t, MESSAGES[:1])
  assert [ids[0], ids[-1]] == [t.user, t.end_of_turn] == [601, 602]
  # In a vocabulary's own template such a name is text.
  own = dataclasses.replace(ours["gpt_2"].model, template=template)
  t = tokenizer_lib.Tokenizer(own)
  assert t.decode(chat.chat_ids(t, MESSAGES[:1])).startswith("<user>Gr")


def test_chats_of_a_vocabulary_with_a_prefix_and_greedy_tokens(tmp_path, ours):
  """Behind a special token Llama 2's normaliser puts a space; some tokens take
  the spaces behind them; text cut at the targets gets no space of its own.
  """
  template = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' "
    "+ m.content + ' [/INST]' }}{% else %}{% generation %}{{ ' ' + m.content "
    "+ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
  )
  for strips in (False, True):
    folder = vocabularies.folder(tmp_path / str(strips), "llama_2")
    tree = json.loads((folder / "tokenizer.json").read_text())
    for token in tree["added_tokens"]:
      token["rstrip"] = token["lstrip"] = strips
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    other = vocabularies.auto_tokenizer(folder)
    t = tokenizer_lib.from_files(str(folder), template)
    messages = [
      {"role": "user", "content": " Hello  "},
      {"role": "assistant", "content": "well "},
      {"role": "user", "content": "x"},
      {"role": "assistant", "content": "y"},
    ]
    want = other.apply_chat_template(
      messages, chat_template=template, return_dict=True
    )["input_ids"]
    assert chat.encode(t, messages)[0].tolist() == want
