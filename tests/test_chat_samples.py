"""Samples in the evaluation of chats, against greedy steps in float64 NumPy."""

import io
import json
import re
import sys

import doors
import numpy as np
import pytest
import reference
import saved_runs
import test_chat

from lm import batch as batch_lib
from lm import checkpoint, schema
from lm.chat import talk
from lm.data import chat
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import compare, corpora
from lm.sample import sampler as sampler_lib
from lm.sample.request import Request

T = tokenizer_lib.Tokenizer(None, test_chat.TEMPLATE)
CONTEXT, LIMIT = 41, 9
say = test_chat.say
ROWS = [
  say("one", "1"),
  [{"role": "system", "content": "S"}, *say("two", "2", "[b]more[/b]", "\x1b")],
  say("only me", role="assistant"),  # answers nothing
  say("three", "3", "and then?"),  # ends with the user
  say("x" * 60, "too long"),
  say("four", "4"),
  say("five", "5"),
]
# Prompt and reference of the first five that have both.
WANT = [
  (ROWS[0][:1], "1"),
  (ROWS[1][:-1], "\x1b"),
  (ROWS[3][:1], "3"),
  (ROWS[4][:1], "too long"),
  (ROWS[5][:1], "4"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run that says a few letters, or ends its turn; and its held-out chats."""
  path = tmp_path_factory.mktemp("run")
  held_out = path / "held_out.jsonl"
  lines = [json.dumps({"messages": m}) for m in ROWS]
  held_out.write_text("\n".join(lines))
  (path / "text.txt").write_text("some text")
  spoken = [*T.encode("abcdefgé"), T.end_of_turn]
  sources = (f"jsonl:{held_out}|chat", f"text:{path}/text.txt")
  return saved_runs.save(path / "run", T, CONTEXT, sources, spoken=spoken)


def evaluate(workdir, **options):
  defaults = {
    "specs": (),
    "step": None,
    "stride": None,
    "batch_size": None,
    "data": {},
    "output": None,
    "samples": 5,
    "max_new_tokens": LIMIT,
  }
  return corpora.evaluate(workdir, **(defaults | options))


def by_hand(workdir, messages, limit=LIMIT):
  """(answer, whether it ended): the likeliest token, one after another."""
  meta = checkpoint.load_meta(workdir)
  model = meta.config.model
  params = checkpoint.load_params(workdir, model, meta.step)
  ids = chat.chat_ids(T, messages)
  n = len(ids)
  while len(ids) < min(n + limit, CONTEXT):
    batch = batch_lib.unscored(np.array([ids]))
    ids.append(int(reference.forward(params, model, batch)[0, -1].argmax()))
    if ids[-1] in (T.eos, T.end_of_turn):
      return T.decode(ids[n:-1]), True
  return T.decode(ids[n:]), False


def test_answers_are_the_likeliest_tokens(run):
  samples = evaluate(run).samples
  assert [(s.prompt, s.reference) for s in samples] == WANT
  names = [s.document.rpartition("/")[2] for s in samples]
  assert names == [f"held_out.jsonl:{i}" for i in (1, 2, 4, 5, 6)]
  long = samples.pop(3)
  assert (long.answer, long.ended) == (None, False)
  want = [by_hand(run, s.prompt) for s in samples]
  assert [(s.answer, s.ended) for s in samples] == want
  assert len(set(want)) > 2 and len({ended for _, ended in want}) == 2


def test_answers_are_those_of_the_sampler_and_of_chat(run, monkeypatch, capsys):
  """Whatever the limit, they fit the context."""
  whole = evaluate(run, samples=1, max_new_tokens=None).samples[0]
  sampler = sampler_lib.Sampler.from_checkpoint(run)
  prompt = chat.chat_ids(T, ROWS[0][:1])
  request = Request(prompt, temperature=0.0, stop_ids=chat.stop_ids(T))
  (result,) = sampler.generate([request])
  assert (whole.answer, whole.ended) == (
    result.text,
    result.finish_reason == "eos",
  )
  assert (whole.answer, whole.ended) == by_hand(run, ROWS[0][:1], 999)
  (more,) = evaluate(run, samples=1, max_new_tokens=10**9).samples
  assert more == whole
  (short,) = evaluate(run, samples=1, max_new_tokens=2).samples
  monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
  asked = Request(temperature=0.0, max_new_tokens=2)
  assert talk.talk(sampler, asked, talk.opening(T, None)) == 0
  assert capsys.readouterr().out == f"{short.answer}\n"
  assert (short.answer, short.ended) == by_hand(run, ROWS[0][:1], 2)


def test_scores_are_the_same_with_samples(run):
  with_samples, without = (evaluate(run, samples=n) for n in (2, 1))
  plain = evaluate(run, samples=None, max_new_tokens=None)
  assert plain.samples is None and len(with_samples.samples) == 2
  assert plain.totals == with_samples.totals == without.totals


def test_the_command_shows_and_writes_them(run, tmp_path):
  """Text of a conversation is shown as it is, but for control characters."""
  ended = doors.run(
    "lm.evaluate",
    [f"--workdir={run}", "--samples=4", f"--max_new_tokens={LIMIT}"]
    + ["--output=eval.json", "--documents"],
    str(tmp_path),
    timeout=120,
  )
  assert (ended.code, ended.err) == (0, ""), ended
  content = json.loads((tmp_path / "eval.json").read_text())
  found = content["samples"]
  assert [s["prompt"] for s in found] == [prompt for prompt, _ in WANT[:4]]
  samples = evaluate(run, samples=4).samples
  for written, sample in zip(found, samples, strict=True):
    assert written == {
      "source": sample.source,
      "document": sample.document,
      "prompt": sample.prompt,
      "reference": sample.reference,
      "answer": sample.answer,
      "ended": sample.ended,
    }
  shown = [" ".join(line.split()) for line in ended.out.splitlines()]
  second = shown[shown.index("system S") : shown.index("system S") + 6]
  note = "" if samples[1].answer else "[empty: it ended at once]"
  note = note if samples[1].ended else "[cut off: it did not end by itself]"
  assert second == [
    "system S",
    "user two",
    "assistant 2",
    "user [b]more[/b]",
    "reference \\x1b",
    f"answer {samples[1].answer} {note}".replace("  ", " ").strip(),
  ]
  assert [s.document for s in samples] == [
    line for line in shown if re.fullmatch(r"/.*jsonl:\d+", line)
  ]
  assert "\x1b" not in ended.out
  n = len(samples[3].prompt_ids)
  none = f"answer [none: the prompt has {n} tokens, the context {CONTEXT}]"
  assert none in shown
  # A comparison reads the scores of such a file, and repeats no samples.
  read = compare._from_file(str(tmp_path / "eval.json"))
  assert len(read.documents) == 2 and "samples" not in read.about


@pytest.mark.slow
def test_processes_answer_alike(run, tmp_path):
  """Two processes of two devices, of which the first writes."""
  arguments = f"--workdir={run}", "--samples=5", f"--max_new_tokens={LIMIT}"
  children = doors.joined(
    "lm.evaluate",
    lambda i: [*arguments, f"--output={tmp_path}/{i}.json"],
    2,
    JAX_NUM_CPU_DEVICES="2",
  )
  said = [child.communicate() for child in children]
  assert [child.returncode for child in children] == [0, 0], said
  (written,) = tmp_path.iterdir()
  content = json.loads(written.read_text())["samples"]
  want = evaluate(run).samples
  assert [(s["answer"], s["ended"]) for s in content] == [
    (s.answer, s.ended) for s in want
  ]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"samples": 0}, "--samples=0: must be at least 1"),
    (
      {"specs": ["text:{}/../text.txt"]},
      "--samples=5: none of the sources 'text:.*is of chats; name one",
    ),
    (
      {"samples": None},
      "--max_new_tokens=9: has a meaning for --samples only",
    ),
    ({"chat_template": "{{ raise_exception('never') }}"}, "never"),
    ({"specs": ["jsonl:{}/none.jsonl|chat"]}, "no file matches"),
  ],
)
def test_mistakes_are_refused_before_parameters_are_loaded(
  run, monkeypatch, options, message
):
  monkeypatch.setattr(checkpoint, "load_params", None)
  if "specs" in options:
    options = {"specs": [s.format(run) for s in options["specs"]]}
  with pytest.raises(schema.ConfigError, match=message):
    evaluate(run, **options)


def test_a_checkpoint_without_a_chat_template(run, tmp_path):
  specs = (f"jsonl:{run}/../held_out.jsonl|chat",)
  bare = saved_runs.save(tmp_path, tokenizer_lib.Tokenizer(), CONTEXT, specs)
  with pytest.raises(schema.ConfigError, match="lm.evaluate by --chat_templ"):
    evaluate(bare)


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["--tasks=docstring_bodies"], "--samples: has a meaning for sources"),
    (["--compare", "a", "b"], "--samples=2: is about one run"),
  ],
)
def test_flags_without_effect_are_refused(run, arguments, says, tmp_path):
  workdir = [] if arguments[0] == "--compare" else [f"--workdir={run}"]
  ended = doors.run(
    "lm.evaluate", [*workdir, "--samples=2", *arguments], str(tmp_path)
  )
  assert ended.code == 2 and says in ended.err, ended


def test_a_chat_too_long_or_none_says_what_this_command_can_do(run, tmp_path):
  """And what the message says works."""
  rows = [*ROWS[4:5], [{"role": "user"}]]
  lines = [json.dumps({"messages": messages}) for messages in rows]
  (tmp_path / "long.jsonl").write_text("\n".join(lines))

  def ask(how, *flags):
    source = f"--source=jsonl:{tmp_path}/long.jsonl|chat{how}"
    options = [f"--workdir={run}", source, *flags]
    return doors.run("lm.evaluate", options, str(tmp_path))

  ended = ask("")
  assert ended.code == 2, ended
  assert "set invalid_documents to 'skip'" in ended.err
  ended = ask("", "--invalid_documents=skip")
  assert ended.code == 2, ended
  assert "write |chat(long='cut_start')" in ended.err
  ended = ask("(long='cut_start')", "--invalid_documents=skip")
  assert ended.code == 0, ended
