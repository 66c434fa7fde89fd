"""Training targets of chats: ids and masks against goldens, transformers, and
the faults that other trainers had.
"""

import dataclasses
import functools
import importlib.util
import inspect
import json
import re
import time

import chat_templates
import hypothesis
import numpy as np
import pytest
from chat_templates import STYLES
from hypothesis import strategies as st

from lm import config as config_lib
from lm import schema
from lm.data import chat, tokenizer_training
from lm.data import tokenizer as tokenizer_lib

CHATML = STYLES["chatml"]


@functools.cache
def bytes_tokenizer(template=CHATML.template, special=chat_templates.IM):
  return tokenizer_lib.Tokenizer(None, template, special)


@functools.cache
def trained_model(special) -> bytes:
  config = config_lib.Config()
  config.model.vocab_size = 503
  config.tokenizer.special_tokens = special
  model = tokenizer_training.train(config, [inspect.getsource(json)]).model
  assert model is not None
  return model


def trained_tokenizer(template, special):
  return tokenizer_lib.Tokenizer(trained_model(special), template, special)


def say(*contents):
  roles = ("user", "assistant")
  return [
    {"role": roles[i % 2], "content": content}
    for i, content in enumerate(contents)
  ]


def expected(tokenizer, golden):
  """Ids and targets that a golden states."""
  names = sorted(tokenizer.named, key=len, reverse=True)
  pattern = "|".join(map(re.escape, ["[[", "]]", *names]))
  ids, scored, inside = [], [], False
  for part in re.split(f"({pattern})", golden):
    if part in ("[[", "]]"):
      inside = part == "[["
      continue
    known = part in tokenizer.named
    new = [tokenizer.named[part]] if known else tokenizer.encode(part)
    ids += new
    scored += [inside] * len(new)
  if ids[:1] != [tokenizer.bos]:
    ids, scored = [tokenizer.bos, *ids], [False, *scored]
  return ids, scored


def shown(tokenizer, ids, scored):
  """The golden of ids and targets: what a failing test prints."""
  text, before = "", False
  for i, flag in zip(ids, scored, strict=True):
    text += {(0, 1): "[[", (1, 0): "]]"}.get((before, flag), "")
    text += tokenizer.piece(int(i))
    before = flag
  return text + ("]]" if before else "")


def targets(tokenizer, messages):
  """The text of the targets, with the names of tokens."""
  ids, scored = chat.encode(tokenizer, messages)
  assert ids.dtype == np.int32 and scored.dtype == bool
  assert ids.shape == scored.shape
  return "".join(tokenizer.piece(int(i)) for i in ids[scored])


# --- goldens -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "trained"])
@pytest.mark.parametrize("style", STYLES)
def test_ids_and_targets_are_those_written_by_hand(style, kind):
  s = STYLES[style]
  make = bytes_tokenizer if kind == "bytes" else trained_tokenizer
  tokenizer = make(s.template, s.special_tokens)
  ids, scored = chat.encode(tokenizer, s.messages)
  want = expected(tokenizer, s.golden)
  assert shown(tokenizer, ids, scored) == shown(tokenizer, *want)
  assert (ids.tolist(), scored.tolist()) == want


@pytest.mark.parametrize("kind", ["bytes", "trained"])
@pytest.mark.parametrize("style", STYLES)
def test_prefixes_find_the_same_targets_but_for_what_follows_the_end(
  style, kind
):
  """Without {% generation %} the newline after an end of turn is no target."""
  s = STYLES[style]
  make = bytes_tokenizer if kind == "bytes" else trained_tokenizer
  tokenizer = make(s.without_blocks, s.special_tokens)
  ids, scored = chat.encode(tokenizer, s.messages)
  golden = s.golden.replace("<eos>\n]]", "<eos>]]\n")
  golden = golden.replace("<|end|>\n]]", "<|end|>]]\n")
  if style == "alpaca":  # Plain text: also what follows an earlier answer.
    golden = golden.replace("Hi.]]\n\n", "Hi.]]\n\n")
  want = expected(tokenizer, golden)
  assert shown(tokenizer, ids, scored) == shown(tokenizer, *want)
  assert (ids.tolist(), scored.tolist()) == want


@functools.cache
def reference(special):
  """transformers' tokenizer with the ids of our bytes tokenizer."""
  if importlib.util.find_spec("transformers") is None:
    pytest.fail("needs the extra `test`")
  import tokenizers
  import transformers
  from tokenizers import decoders, models, pre_tokenizers
  from transformers.convert_slow_tokenizer import bytes_to_unicode

  ours = bytes_tokenizer(CHATML.template, special)
  letters = bytes_to_unicode()
  vocabulary = {name: i for name, i in ours.named.items()}
  first = len(tokenizer_lib.RESERVED)
  vocabulary |= {letters[b]: first + b for b in range(256)}
  inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  inner.decoder = decoders.ByteLevel()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner,
    bos_token="<bos>",
    eos_token="<eos>",
    pad_token="<pad>",
    additional_special_tokens=[*tokenizer_lib.RESERVED[3:], *special],
  )


def transformers_says(style, messages):
  out = reference(style.special_tokens).apply_chat_template(
    messages,
    chat_template=style.template,
    return_assistant_tokens_mask=True,
    return_dict=True,
    sanitize_control_tokens=False,
  )
  ids, scored = out["input_ids"], [bool(x) for x in out["assistant_masks"]]
  bos = tokenizer_lib.Tokenizer().bos
  if ids[:1] != [bos]:  # Documents here begin with bos.
    ids, scored = [bos, *ids], [False, *scored]
  return ids, scored


CONTENTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=9).filter(
  lambda text: "<" not in text
)


def test_tools_answer_as_in_transformers():
  """In JSON, as Llama 3.1's template writes what a tool answers."""
  written = "{{ 'ipython\n' ~ m.content | tojson ~ '<|im_end|>' }}"
  more = "{{ m.content | tojson(ensure_ascii=True, indent=1) }}"
  style = dataclasses.replace(
    CHATML,
    template=CHATML.template.replace(
      "{%- else -%}",
      "{%- elif m.role == 'tool' -%}" + written + more + "{%- else -%}",
    ),
  )
  messages = say("<b>", "I'll look & see.")
  found = 'it\'s 5 > 4 & "<im>", \u00e9\n'
  messages += [{"role": "tool", "content": found}, *say("so?", "yes")]
  tokenizer = bytes_tokenizer(style.template, style.special_tokens)
  ids, scored = chat.encode(tokenizer, messages)
  assert json.dumps(found, ensure_ascii=False) in tokenizer.decode(ids.tolist())
  want_ids, want_scored = transformers_says(style, messages)
  assert ids.tolist() == want_ids and scored.tolist() == want_scored


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_targets_are_those_of_transformers(style):
  s = STYLES[style]
  tokenizer = bytes_tokenizer(s.template, s.special_tokens)

  @hypothesis.given(contents=st.lists(CONTENTS, min_size=2, max_size=5))
  @hypothesis.settings(deadline=None, max_examples=15, database=None)
  def check(contents):
    if not s.last_user and len(contents) % 2:
      contents = contents[1:]
    messages = say(*contents)
    ids, scored = chat.encode(tokenizer, messages)
    want_ids, want_scored = transformers_says(s, messages)
    if style == "alpaca":  # eos, which ends a turn of plain text.
      assert ids[-1] == tokenizer.eos and scored[-1]
      ids, scored = ids[:-1], scored[:-1]
    assert ids.tolist() == want_ids
    assert scored.tolist() == want_scored

  check()


def test_the_goldens_are_what_transformers_says():
  for s in STYLES.values():
    tokenizer = bytes_tokenizer(s.template, s.special_tokens)
    ids, scored = expected(tokenizer, s.golden.replace("<eos>]]", "<eos>]]"))
    got_ids, got_scored = transformers_says(s, s.messages)
    n = len(ids) - (s is STYLES["alpaca"])
    assert (ids[:n], scored[:n]) == (got_ids, got_scored)


# --- properties --------------------------------------------------------------

SPELLINGS = st.sampled_from(["<|im_end|>", "<eos>", "<|im_start|>user\n", "[["])
ANYTHING = st.lists(st.one_of(st.text(max_size=5), SPELLINGS), max_size=4).map(
  "".join
)


@pytest.mark.parametrize("kind", ["bytes", "trained"])
@pytest.mark.parametrize("blocks", [True, False])
def test_targets_are_what_the_assistant_said_whatever_it_spells(kind, blocks):
  make = bytes_tokenizer if kind == "bytes" else trained_tokenizer
  template = CHATML.template if blocks else CHATML.without_blocks
  t = make(template, CHATML.special_tokens)
  end, start = t.named["<|im_end|>"], t.named["<|im_start|>"]

  @hypothesis.given(contents=st.lists(ANYTHING, min_size=1, max_size=5))
  @hypothesis.settings(deadline=None, max_examples=40, database=None)
  def check(contents):
    messages = say(*contents)
    ids, scored = chat.encode(t, messages)
    assert int((ids == end).sum()) == int((ids == start).sum()) == len(contents)
    answers = contents[1::2]
    assert int((ids[scored] == end).sum()) == len(answers)
    assert t.decode(ids[scored].tolist()) == "".join(answers)
    text = "".join(f"{m['role']}\n{m['content']}\n" for m in messages)
    assert t.decode(ids.tolist()) == text
    # The prompt of an answer is how the conversation begins.
    for i, message in enumerate(messages):
      if message["role"] == "assistant" and (blocks or i == 1):
        prompt = chat.chat_ids(t, messages[:i])
        assert ids[: len(prompt)].tolist() == prompt
        assert scored[len(prompt)]  # The first token of the answer.

  check()


def test_a_batch_is_its_conversations_one_by_one():
  t = bytes_tokenizer()
  conversations = [
    say("a"),
    [],
    say("b", "c"),
    [{"role": "owl"}],
    say("d", "e"),
  ]
  batch = chat.encode_batch(t, conversations)
  for messages, got in zip(conversations, batch, strict=True):
    try:
      ids, scored = chat.encode(t, messages)
      assert not isinstance(got, schema.ConfigError)
      assert got[0].tolist() == ids.tolist()
      assert got[1].tolist() == scored.tolist()
    except schema.ConfigError as error:
      assert str(got) == str(error)


# --- faults of other trainers ------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("blocks", [True, False])
def test_the_end_of_turn_that_is_trained_stops_generation(style, blocks):
  """Megatron-Bridge#4265: an end of turn that is no target never comes."""
  s = STYLES[style]
  template = s.template if blocks else s.without_blocks
  t = bytes_tokenizer(template, s.special_tokens)
  ids, scored = chat.encode(t, s.messages)
  stops = {*chat.stop_ids(t), t.eos}
  ends = [i for i in ids[scored].tolist() if i in stops]
  assert len(ends) == (1 if style == "alpaca" else 2)
  names = set(t.named.values())
  assert {i for i in ids[scored].tolist() if i in names} <= stops


def test_every_answer_is_a_target_and_not_only_the_last():
  """axolotl#1761."""
  messages = say("q", "one", "q", "two", "q", "three")
  want = "".join(f"{x}<|im_end|>" for x in ("one", "two", "three"))
  for template in (CHATML.template, CHATML.without_blocks):
    assert targets(bytes_tokenizer(template), messages) == want


def test_the_first_token_of_an_answer_and_the_end_are_targets():
  """OpenRLHF#973, verl PR#3287: masks that are off by one."""
  t = bytes_tokenizer()
  ids, scored = chat.encode(t, say("q", "xyz", "q"))
  (places,) = np.nonzero(scored)
  assert t.decode(ids[places[:1]].tolist()) == "x"
  assert t.decode(ids[: places[0]].tolist()).endswith("assistant\n")
  assert ids[places[-1]] == t.named["<|im_end|>"]
  assert np.all(np.diff(places) == 1) and len(places) == 4


def test_mistrals_answers_are_found_after_any_number_of_turns():
  """axolotl#2089: wrong indices in later turns."""
  s = STYLES["mistral"]
  contents = [f"{'q' * i}-{i}" for i in range(12)]
  for template in (s.template, s.without_blocks):
    t = bytes_tokenizer(template, ())
    want = "".join(f" {c}<eos>" for c in contents[1::2])
    assert targets(t, say(*contents)) == want


def test_an_empty_answer_is_its_end_of_turn():
  for template in (CHATML.template, CHATML.without_blocks):
    t = bytes_tokenizer(template)
    assert targets(t, say("q", "")) == "<|im_end|>"
  s = STYLES["alpaca"]
  for template in (s.template, s.without_blocks):
    assert targets(bytes_tokenizer(template, ()), say("q", "")) == "<eos>"


def test_the_same_text_of_user_and_assistant_is_told_apart():
  for template in (CHATML.template, CHATML.without_blocks):
    t = bytes_tokenizer(template)
    assert targets(t, say(*["same"] * 4)) == "same<|im_end|>" * 2
    assert targets(t, say("assistant\n", "assistant\n")) == (
      "assistant\\n<|im_end|>"
    )


def test_without_an_answer_nothing_is_a_target():
  ids, scored = chat.encode(bytes_tokenizer(), say("q"))
  assert len(ids) > 1 and not scored.any()


def test_tools_and_systems_are_no_targets():
  messages = [
    {"role": "system", "content": "s"},
    *say("q", "a"),
    {"role": "tool", "content": "t"},
    {"role": "assistant", "content": "b"},
  ]
  for template in (CHATML.template, CHATML.without_blocks):
    t = bytes_tokenizer(template)
    assert targets(t, messages) == "a<|im_end|>b<|im_end|>"


# --- templates that cannot be trained on -------------------------------------

OUTSIDE = CHATML.template.replace(
  " ~ '<|im_end|>' }}{% endgeneration %}",
  " }}{% endgeneration %}{{ '<|im_end|>' }}",
)
# Thinking is left out of all turns but the last.
STRIPS = CHATML.without_blocks.replace(
  "{{ m.content ~ '<|im_end|>' }}",
  "{{ (m.content if loop.last else m.content.split('</t>')[-1])"
  " ~ '<|im_end|>' }}",
)


@pytest.mark.parametrize(
  "template, messages, message",
  [
    (None, say("q", "a"), "has no chat template"),
    ("{% if %}", say("q", "a"), "chat template, line 1: "),
    (OUTSIDE, say("q", "a"), "end of the assistant's turn follows .*endgen"),
    (
      STRIPS,
      say("q", "a</t>b", "q", "c"),
      r"messages\[1\]: .*prefixes do not tell.*put \{% generation %\}",
    ),
    (
      CHATML.without_blocks.replace("assistant\\n'", "assistant\\n<think>'"),
      say("q", "a"),
      r"messages\[1\]: .*prefixes do not tell.*put \{% generation %\}",
    ),
    (
      "{% for m in messages %}{{ m.role }}{% endfor %}",
      say("q", "a"),
      "does not write the assistant's message",
    ),
    (
      "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
      say("q", "a"),
      "does not write the assistant's message",
    ),
    (
      "{% for m in messages %}{% if m.role == 'user' %}{% generation %}"
      "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
      "{% endfor %}",
      say("q", "a"),
      "no {% generation %} block holds the assistant's message",
    ),
    (
      "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if loop.index == 2"
      " }}{% endfor %}",
      say("q", "a"),
      "ends only some of the assistant's turns",
    ),
    (
      "{% filter upper %}{% for m in messages %}{{ m.content }}{% endfor %}"
      "{% endfilter %}",
      say("q", "a"),
      "does not write",
    ),
    (
      CHATML.template.replace("im_end", "end"),
      say("q", "a"),
      r"with <\|end\|> as ordinary text; name it in config.tokenizer.special",
    ),
    ("{{ raise_exception('never') }}", say("q", "a"), "never .on a probe conv"),
    (CHATML.template, [], "must hold at least one"),
    (
      CHATML.template,
      [{"role": "owl", "content": ""}],
      "must be one of system",
    ),
    (CHATML.template, [{"role": "user"}], "must be an object with role"),
    (CHATML.template, say("\ud800", "a"), "holds half a character"),
    (
      CHATML.template + "{{ '\\udf00' }}",
      say("q", "a"),
      "writes half a character",
    ),
    (
      "{{ '<|im' ~ '_end|>' }}" + CHATML.template,
      say("q", "a"),
      "out of parts",
    ),
    (
      CHATML.without_blocks.replace(
        "'<|im_start|>' ~", "'<|im_' ~ 'start|>' ~"
      ),
      say("q", "a"),
      r"puts <\|im_start\|> together out of parts",
    ),
    (
      STYLES["alpaca"].template,
      say("q", "a", "q"),
      "the last message is not the assistant's",
    ),
    (STYLES["mistral"].template, say("q", "a")[1:], "must alternate"),
    (STYLES["qwen"].without_blocks, say("q", "a")[1:], "rendered on its own"),
  ],
)
def test_what_cannot_be_trained_on_is_refused(template, messages, message):
  t = bytes_tokenizer(template)
  with pytest.raises(schema.ConfigError, match=message) as error:
    chat.encode(t, messages)
  assert "\n" not in str(error.value)


def test_with_blocks_a_template_may_leave_thinking_out():
  blocks = STRIPS.replace(
    "{{ (m.content if",
    "{% if m.role == 'assistant' %}{% generation %}{{ (m.content if",
    1,
  ).replace(
    " ~ '<|im_end|>' }}",
    " ~ '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content ~ '<|im_end|>' }}{% endif %}",
    1,
  )
  t = bytes_tokenizer(blocks)
  got = targets(t, say("q", "a</t>b", "q", "c</t>d"))
  assert got == "b<|im_end|>c</t>d<|im_end|>"


def test_a_template_that_takes_too_long_is_refused_for_that_conversation():
  slow = (
    CHATML.template + "{% if messages[0].content == 'slow' %}"
    "{{ 10 ** (messages[0].content | length * 10**8) }}{% endif %}"
  )
  t = bytes_tokenizer(slow)
  got = chat.encode_batch(t, [say("q", "a"), say("slow", "a"), say("q", "b")])
  assert "takes more than 2 seconds" in str(got[1])
  assert [isinstance(x, tuple) for x in got] == [True, False, True]


@pytest.mark.slow
def test_thousands_of_short_chats_are_tokenized_in_a_second():
  conversations = [
    say(f"question {i}", f"answer {i} " * 9) for i in range(4096)
  ]
  for template in (CHATML.template, CHATML.without_blocks):
    t = bytes_tokenizer(template)
    chat.encode_batch(t, conversations[:9])
    start = time.perf_counter()
    chat.encode_batch(t, conversations)
    per_second = len(conversations) / (time.perf_counter() - start)
    print(f"{per_second:.0f} conversations per second")
    assert per_second > 500
