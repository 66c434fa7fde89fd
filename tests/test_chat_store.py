"""Sources and token stores of chats, and the embedded instruction pairs."""

import ast
import dataclasses
import json
import os
import pathlib
import pickle
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_templates import IM, STYLES

from lm import config as config_lib
from lm import objective as objective_lib
from lm import schema
from lm.data import __main__ as data_command
from lm.data import chat, instructions, pipeline, sources
from lm.data import store as store_lib
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder, loss

SHIPPED = pathlib.Path(__file__).parent.parent / "configs" / "chat.jinja"
CHATML = STYLES["chatml"]


def say(*contents):
  roles = ("user", "assistant")
  return [
    {"role": roles[i % 2], "content": content}
    for i, content in enumerate(contents)
  ]


ROWS = [
  {"messages": say(f"q{i}", f"answer {i} \u00e9" * (i % 5 + 1))}
  for i in range(31)
] + [
  {"instruction": "say <eos>", "output": "<|im_end|>"},
  {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt"}][:1]},
]


def part(store, start, stop):
  """(tokens, targets) [start, stop) of a store."""
  return store.pieces(np.array([start]), np.array([stop - start]))


@pytest.fixture
def prepare(tmp_path):
  """Writes rows, tokenizes them as chats and gives the store."""

  def run(rows, template=CHATML.template, special=IM, **data):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(lines))
    config = config_lib.DataConfig(cache_dir=str(tmp_path / "cache"), **data)
    tokenizer = tokenizer_lib.Tokenizer(None, template, special)
    spec = f"jsonl:{path}"
    (store,) = store_lib.prepare_sources([f"{spec}|chat"], tokenizer, config)
    return store

  return run


def test_a_store_holds_what_encode_gives(prepare, monkeypatch):
  monkeypatch.setattr(store_lib, "_BATCH_CHARACTERS", 100)
  store = prepare(ROWS[:-1])
  t = tokenizer_lib.Tokenizer(None, CHATML.template, IM)
  rows = [row["messages"] for row in ROWS[:-2]] + [
    say("say <eos>", "<|im_end|>")
  ]
  encoded = [chat.encode(t, messages) for messages in rows]
  assert store.n_documents == len(rows)
  for i, (ids, scored) in enumerate(encoded):
    start = int(store.ends[i - 1]) if i else 0
    stop = int(store.ends[i])
    assert store.document(i).tolist() == ids.tolist()
    tokens, flags = part(store, start, stop)
    assert tokens.dtype == np.int32 and flags.dtype == bool
    assert tokens.tolist() == ids.tolist()
    assert flags.tolist() == scored.tolist()
    assert store.document_bytes[i] == t.n_bytes(ids)
    assert store.name(i).endswith(f"chat.jsonl:{i + 1}")
  flat = np.concatenate([ids for ids, _ in encoded])
  assert store.n_tokens == len(flat)
  assert store.n_scored == sum(int(scored.sum()) for _, scored in encoded)
  # Of a part of the store, over the end of a document.
  everything = np.concatenate([scored for _, scored in encoded])
  assert part(store, 7, 151)[1].tolist() == everything[7:151].tolist()


def test_the_command_tells_the_share_of_targets(prepare, monkeypatch, capsys):
  store = prepare([{"messages": say("a" * 25, "b" * 14)}])
  assert (store.n_scored, store.n_tokens) == (15, 61)
  tokenizer = tokenizer_lib.Tokenizer(None, CHATML.template, IM)
  prepared = store_lib.Prepared(tokenizer, [store], [])
  monkeypatch.setattr(store_lib, "prepare", lambda *_: prepared)
  data_command.describe(
    config_lib.Config(data=config_lib.DataConfig(validation=()))
  )
  assert "  training targets: 15 (25%)" in capsys.readouterr().out


def test_the_template_names_the_stores_of_chats_and_of_nothing_else(
  prepare, tmp_path
):
  first = prepare(ROWS[:3])
  data = config_lib.DataConfig(cache_dir=str(tmp_path / "cache"))
  (tmp_path / "a.txt").write_text("text")

  def plain(template, special=IM):
    tokenizer = tokenizer_lib.Tokenizer(None, template, special)
    spec = f"text:{tmp_path}/a.txt"
    return store_lib.prepare_sources([spec], tokenizer, data)[0]

  text = plain(CHATML.template)
  changed = CHATML.template.replace("'\\n'", "'\\n\\n'")
  second = prepare(ROWS[:3], changed)
  assert first.path != second.path
  assert first.fingerprint != second.fingerprint  # What a restart compares.
  assert plain(changed).path == text.path
  assert prepare(ROWS[:3]).path == first.path
  # Special tokens are part of the vocabulary: everything is tokenized anew.
  more = (*IM, "<more>")
  assert prepare(ROWS[:3], special=more).path not in (first.path, second.path)
  assert plain(CHATML.template, more).path != text.path


def test_stores_of_texts_are_as_they_were(prepare, tmp_path):
  (tmp_path / "a.txt").write_text("text")
  data = config_lib.DataConfig(cache_dir=str(tmp_path / "cache"))
  (store,) = store_lib.prepare_sources(
    [f"text:{tmp_path}/a.txt"], tokenizer_lib.Tokenizer(), data
  )
  assert sorted(os.listdir(store.path)) == sorted(
    ["ends", "manifest.json", "n_bytes", "name_ends", "names", "tokens"]
  )
  manifest = json.loads(pathlib.Path(store.path, "manifest.json").read_text())
  assert manifest["version"] == 2 and "n_scored" not in manifest
  assert store.n_scored is None
  tokens, scored = part(store, 0, 3)
  assert tokens.tolist() == store.document(0)[:3].tolist() and scored is None


def test_damage_of_the_targets_is_seen(prepare):
  store = prepare(ROWS[:3])
  for file in pathlib.Path(store.path, "scored").rglob("*"):
    if file.is_file():
      raw = file.read_bytes()
      file.write_bytes(raw[:-1])
      with pytest.raises(schema.RunError, match="scored.* is damaged|is dama"):
        prepare(ROWS[:3])
      file.write_bytes(raw)
  assert prepare(ROWS[:3]).n_documents == 3


BAD = [
  ('{"messages": ', "chat.jsonl:2: invalid JSON"),
  ("[1]", "chat.jsonl:2: is a list, not an object with a conversation"),
  ({"text": "a"}, "chat.jsonl:2: is in no format of chats"),
  ({"messages": say("a", 3)}, r"chat.jsonl:2: messages\[1\].content=3"),
  ({"messages": say("a")}, "chat.jsonl:2: has no training target"),
  ({"messages": say("a", "b")[1:] * 0}, "chat.jsonl:2: field 'messages' holds"),
]


@pytest.mark.parametrize("row, message", BAD)
def test_a_bad_conversation_is_an_error_or_is_skipped(
  prepare, tmp_path, capsys, row, message
):
  rows = [ROWS[0], row, ROWS[1], row]
  with pytest.raises(schema.ConfigError, match=message) as error:
    prepare(rows)
  assert "set invalid_documents to 'skip'" in str(error.value)
  assert "\n" not in str(error.value)
  assert [p.name for p in tmp_path.iterdir()] == ["chat.jsonl"]
  store = prepare(rows, invalid_documents="skip")
  assert store.n_documents == 2
  said = capsys.readouterr().err
  assert "documents skipped by invalid_documents or invalid_utf8: 2" in said
  # The same rows with the other policy are not taken from the cache.
  with pytest.raises(schema.ConfigError, match=message):
    prepare(rows)


def test_what_the_template_refuses_is_a_bad_conversation(prepare):
  rows = [ROWS[0], {"messages": say("a", "b")[1:]}]
  with pytest.raises(schema.ConfigError, match="jsonl:2: .*must alternate"):
    prepare(rows, STYLES["mistral"].template, ())
  store = prepare(
    rows, STYLES["mistral"].template, (), invalid_documents="skip"
  )
  assert store.n_documents == 1


def test_a_corpus_without_any_target_is_refused(prepare, tmp_path):
  """trl#3927: loss 0 and no gradient, and the run ends well."""
  rows = [{"messages": say("a")}, {"messages": say("b")}]
  message = (
    "no text; documents skipped .*: 2; one of .*:1: has no training target"
  )
  with pytest.raises(schema.ConfigError, match=message):
    prepare(rows, invalid_documents="skip")
  assert not list((tmp_path / "cache").glob("tokens-*"))


def test_a_template_is_probed_before_anything_is_tokenized(
  prepare, tmp_path, monkeypatch
):
  monkeypatch.setattr(store_lib, "_build", None)
  with pytest.raises(schema.ConfigError, match="does not write the assist"):
    prepare(ROWS[:3], "{{ messages | length }}")
  with pytest.raises(schema.ConfigError, match="has no chat template"):
    prepare(ROWS[:3], None)
  assert [p.name for p in tmp_path.iterdir()] == ["chat.jsonl"]


@pytest.mark.parametrize("policy", ["error", "replace", "skip"])
def test_half_a_character_goes_by_its_own_policy(prepare, policy):
  rows = [ROWS[0], '{"prompt": "a", "completion": "x\\ud83d"}']
  options = {"invalid_utf8": policy, "invalid_documents": "skip"}
  if policy == "error":
    with pytest.raises(schema.ConfigError, match="jsonl:2: invalid UTF-8"):
      prepare(rows, **options)
    return
  store = prepare(rows, **options)
  assert store.n_documents == (2 if policy == "replace" else 1)


@pytest.mark.parametrize(
  "spec, message",
  [
    ("jsonl:a.jsonl#messages", "malformed for chats; write jsonl:GLOB, parq"),
    ("text:a.txt", "malformed for chats"),
    ("tfds:python_stdlib:train", "malformed for chats"),
    ("jsonl:absent*.jsonl", "no file matches"),
    ("instruct:python_stdlib:test", "unknown; write instruct:python_stdlib:"),
    ("instruct:other:train", "unknown; write instruct:python_stdlib:train"),
  ],
)
def test_bad_specs_of_chats(tmp_path, spec, message):
  data = config_lib.DataConfig(cache_dir=str(tmp_path / "cache"))
  with pytest.raises(schema.ConfigError, match=message):
    sources.open_source(spec, data, chat=True)
  assert not list(tmp_path.iterdir())


def test_a_tokenizer_can_be_trained_on_chats(prepare, tmp_path):
  prepare(ROWS[:3])
  data = config_lib.DataConfig(cache_dir=str(tmp_path / "cache"))
  source = sources.open_source(f"jsonl:{tmp_path}/chat.jsonl", data, chat=True)
  document = pickle.loads(pickle.dumps(source))[1]
  assert document is not None
  assert document.text == "q1\n" + ROWS[1]["messages"][1]["content"]


# --- instruction pairs -------------------------------------------------------

CODE = '''\
"""A module."""

class C:
    """A class."""

    @property
    def two(self) -> int:
        """Gives two.

        Always.
        """

        x = [1,
             1]
        return sum(x)  # \\u00e9

    def bare(self):
        return 1 + 1 + 1 + 1

    async def later(
        self, a=1,
    ):
        'Waits, and gives a.'
        await something(a)
        def inner():
            """Not a pair of its own."""
            return 5
        return a

def one_line(): """Doc."""; return 5 + 5 + 5
def only_documented():
    """Doc."""
\x0c
def after_a_form_feed(text):
    """Doc."""
    return text.upper().strip()
'''


def test_pairs_of_a_module():
  code = CODE.replace("\\u00e9", "\u00e9")
  two, later, last = instructions.pairs(code)
  assert two.line == 6
  assert two.head == textwrap.dedent('''\
    @property
    def two(self) -> int:
        """Gives two.

        Always.
        """''')
  assert two.function == textwrap.dedent("""\
    @property
    def two(self) -> int:
        x = [1,
             1]
        return sum(x)  # \u00e9""")
  assert later.head.startswith("async def later(\n    self, a=1,\n):\n    'W")
  assert later.function.endswith("\n    return a") and "inner" in later.function
  assert last.head == 'def after_a_form_feed(text):\n    """Doc."""'
  assert last.function.endswith("):\n    return text.upper().strip()")
  assert [*instructions.pairs("not ( python")] == []
  crlf = [*instructions.pairs(code.replace("\n", "\r\n"))]
  assert [p.function for p in crlf] == [p.function for p in (two, later, last)]


def bodies(source):
  """The code of each pair, without a docstring; checks the pairs."""
  for i in range(len(source)):
    user, assistant = source[i].messages
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert len(user["content"]) + len(assistant["content"]) <= 800
    (head,) = ast.parse(user["content"]).body
    (function,) = ast.parse(assistant["content"]).body
    assert head.name == function.name
    assert ast.get_docstring(head) is not None
    yield ast.dump(ast.Module(function.body, []))


def test_the_embedded_pairs_are_functions(tmp_path):
  data = config_lib.DataConfig(cache_dir=str(tmp_path / "cache"))
  spec = "instruct:python_stdlib:validation"
  source, again = (sources.open_source(spec, data, chat=True) for _ in range(2))
  assert len(source) > 50 and len(set(bodies(source))) == len(source)
  assert source[7] == again[7]
  assert source.fingerprint() == again.fingerprint()
  t = tokenizer_lib.Tokenizer(None, SHIPPED.read_text())
  (store,) = store_lib.prepare_sources([f"{spec}|chat"], t, data)
  assert store.n_documents == len(source)
  start, stop = int(store.ends[6]), int(store.ends[7])
  tokens, scored = part(store, start, stop)
  ids = tokens[scored]
  assert t.decode(ids.tolist()) == source[7].messages[1]["content"]
  assert ids[-1] == t.end_of_turn and t.end_of_turn in chat.stop_ids(t)


@pytest.mark.slow
def test_no_code_of_the_embedded_pairs_is_twice(tmp_path):
  data = config_lib.DataConfig(cache_dir=str(tmp_path / "cache"))
  found = []
  for split, least in (("train", 2000), ("validation", 50)):
    spec = f"instruct:python_stdlib:{split}"
    source = sources.open_source(spec, data, chat=True)
    assert len(source) > least
    found += bodies(source)
  assert len(set(found)) == len(found)


def test_the_shipped_template(tmp_path):
  t = tokenizer_lib.Tokenizer(None, SHIPPED.read_text())
  messages = [{"role": "system", "content": " S"}, *say("u\n", "a\n", "v", "b")]
  ids, scored = chat.encode(t, messages)
  assert ids.tolist() == [
    *(t.bos, t.system, *t.encode(" S"), t.end_of_turn),
    *(t.user, *t.encode("u\n"), t.end_of_turn),
    *(t.assistant, *t.encode("a\n"), t.end_of_turn),
    *(t.user, *t.encode("v"), t.end_of_turn),
    *(t.assistant, *t.encode("b"), t.end_of_turn),
  ]
  want = [*t.encode("a\n"), t.end_of_turn, *t.encode("b"), t.end_of_turn]
  assert ids[scored].tolist() == want
  prompt = chat.chat_ids(t, messages[:-1])
  assert prompt == ids[: len(prompt)].tolist()
  with pytest.raises(schema.ConfigError, match="the role tool cannot stand"):
    chat.encode(t, [*messages, {"role": "tool", "content": ""}])


# --- rows ---------------------------------------------------------------------


def rows_of(store, length, template=None, special=()):
  """All rows of one batch size, of a store whose rows have `length` tokens."""
  config = config_lib.Config()
  config.train.sequence_length = length
  config.train.batch_size = 64
  tokenizer = tokenizer_lib.Tokenizer(None, template, special)
  prepared = store_lib.Prepared(tokenizer, [], [store])
  ((_, batch),) = pipeline.validation_batches(config, prepared)
  return jax.tree.map(lambda a: a[batch.segments[:, 0] > 0], batch)


def test_a_row_scores_answers_and_their_ends_alone(prepare):
  template = SHIPPED.read_text()
  store = prepare([{"messages": say("a", "bc", "d", "e")}], template, ())
  row = rows_of(store, 16)
  t = tokenizer_lib.Tokenizer()
  a, b, c, d, e = t.encode("abcde")
  tokens = [t.bos, t.user, a, t.end_of_turn, t.assistant, b, c, t.end_of_turn]
  tokens += [t.user, d, t.end_of_turn, t.assistant, e, t.end_of_turn]
  assert row.inputs[0].tolist() == tokens + [0, 0]
  assert row.targets[0].tolist() == tokens[1:] + [0, 0, 0]
  assert (
    row.weights[0].tolist() == [0] * 4 + [1] * 3 + [0] * 4 + [1, 1] + [0] * 3
  )
  assert row.segments[0].tolist() == [1] * 14 + [0, 0]
  # What is trained as the end of turn is what generation stops at.
  chatty = tokenizer_lib.Tokenizer(None, template)
  assert t.end_of_turn in chat.stop_ids(chatty)


def test_conversations_are_packed_whole(prepare):
  conversations = [say("q" * (i % 7), "a" * (1 + i % 5)) for i in range(40)]
  template = SHIPPED.read_text()
  store = prepare([{"messages": c} for c in conversations], template, ())
  rows = rows_of(store, 31)
  t = tokenizer_lib.Tokenizer(None, template)
  wanted = sorted(chat.encode(t, c)[0].tolist() for c in conversations)
  found, n_scored = [], 0
  for r in range(len(rows.inputs)):
    for s in range(1, rows.segments[r].max() + 1):
      at = rows.segments[r] == s
      last = rows.targets[r][at][-1:] if rows.segments[r][-1] == s else []
      found.append([*rows.inputs[r][at].tolist(), *last])
    n_scored += rows.weights[r].sum()
  whole = [f[:-1] if f[-2:] == [t.end_of_turn, t.bos] else f for f in found]
  assert sorted(map(len, whole)) >= sorted(map(len, wanted))
  assert n_scored == store.n_scored
  assert len(rows.inputs) < 20


def test_a_conversation_longer_than_a_row(prepare):
  template = SHIPPED.read_text()
  rows = [say("q", "a" * 5), say("question", "x" * 40, "more", "y" * 3)]
  store = prepare([{"messages": m} for m in rows], template, ())
  first, last = "x" * 28, "y" * 3
  t = tokenizer_lib.Tokenizer()

  def texts(long):
    store.objective = objective_lib.Chat(long)
    batch = rows_of(store, 39)
    scored = batch.weights > 0
    return {
      t.decode(targets[some].tolist())
      for targets, some in zip(batch.targets, scored, strict=True)
    }

  assert texts("drop") == {"aaaaa"}
  assert texts("cut_end") == {"aaaaa", first}
  (kept,) = texts("cut_start") - {"aaaaa"}
  assert kept.endswith(last) and kept.startswith("x")
  with pytest.raises(schema.ConfigError, match="has 2 conversations, and none"):
    store.objective = objective_lib.Chat("drop")
    rows_of(store, 5)


def test_targets_of_prompts_have_no_influence_on_gradients(prepare):
  """Bit for bit: other targets where nothing is scored change nothing."""
  template = SHIPPED.read_text()
  store = prepare([{"messages": say("question", "answer")}] * 3, template, ())
  batch = rows_of(store, 31)
  unscored = batch.weights == 0
  assert unscored.any() and not unscored.all()
  other = dataclasses.replace(
    batch, targets=np.where(unscored, 7, batch.targets)
  )
  model = config_lib.ModelConfig(
    vocab_size=384, n_layers=1, d_model=8, n_heads=2, n_kv_heads=2, d_head=4,
    d_mlp=12, context_length=32,
  )  # fmt: skip
  params = decoder.init_params(model, jax.random.key(0))

  @jax.jit
  @jax.grad
  def gradient(params, batch):
    hidden, _ = decoder.forward(model, params, batch)
    head = decoder.bind(model, params).head_weight()
    return loss.cross_entropy(
      hidden, head, batch.targets, batch.weights, chunk=64
    )[0]

  a, b = (
    gradient(params, jax.tree.map(jnp.asarray, x)) for x in (batch, other)
  )
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(a))
