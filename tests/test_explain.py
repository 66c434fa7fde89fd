"""Tables, traces, heat maps, the page and the command line, against logits of
full forward passes in NumPy.
"""

import dataclasses
import functools
import html.parser
import io
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import doors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import saved_runs
import vocabularies

from lm import batch as batch_lib
from lm import checkpoint
from lm import config as config_lib
from lm.data import chat, fim
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import corpora
from lm.explain import heat, tables
from lm.model import decoder
from lm.sample import output
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib
from lm.sample.request import Alternative, Candidate, NextToken, Request

CFG = config_lib.ModelConfig(
  vocab_size=tokenizer_lib.BYTES_SIZE + 5,
  n_layers=1,
  d_model=24,
  n_heads=3,
  n_kv_heads=3,
  d_head=8,
  d_mlp=17,
  context_length=67,
  init_scale=0.4,
)
TOKENIZER = tokenizer_lib.Tokenizer(
  None,
  "{% for m in messages %}<user>{{ m.content }}<end_of_turn>{% endfor %}",
)
HARD = "a </script><b>&\n\té\U0001f9ea\x1b[1m'\"\r\n"


@functools.cache
def params():
  return jax.jit(functools.partial(decoder.init_params, CFG))(jax.random.key(0))


@pytest.fixture(scope="module")
def sampler():
  return sampler_lib.Sampler(CFG, params(), TOKENIZER)


@functools.cache
def full_logs(ids: tuple[int, ...]) -> np.ndarray:
  """log P(next id | ids up to each), float64 [T, V]."""
  inputs = np.zeros((1, CFG.context_length), np.int32)
  inputs[0, : len(ids)] = ids

  @jax.jit
  def logits(batch):
    hidden, _ = decoder.forward(CFG, params(), batch)
    return decoder.bind(CFG, params()).logits(hidden)

  x = np.asarray(logits(batch_lib.unscored(inputs)), np.float64)[0, : len(ids)]
  x -= x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def rendered(*tables) -> str:
  console = rich.console.Console(width=120, file=io.StringIO())
  for table in tables:
    console.print(table)
  lines = console.file.getvalue().splitlines()
  return "\n".join(line.rstrip() for line in lines)


# --- the next token ----------------------------------------------------------


@pytest.mark.parametrize(
  "changes, used",
  [
    ({}, ""),
    ({"temperature": 0.5}, "temperature"),
    ({"temperature": 0.0, "top_k": 3, "top_p": 0.5}, "temperature"),
    ({"min_p": 0.1, "top_k": 3}, "min_p top_k"),
    ({"top_p": 0.5, "typical_p": 0.5}, "top_p typical_p"),
    ({"repetition_penalty": 1.5}, "penalties"),
    ({"frequency_penalty": -1.0}, "penalties"),
    ({"presence_penalty": 1.0}, "penalties"),
    ({"logit_bias": {3: 1.0}, "temperature": 0.0}, "penalties temperature"),
    ({"forbidden": [3]}, "penalties"),
    ({"min_tokens": 1}, "penalties"),
    ({"seed": 3, "n_samples": 2, "max_new_tokens": 4, "stop": ["a"]}, ""),
  ],
)
def test_stages_are_those_that_the_request_uses(changes, used):
  assert tables.stages(Request(**changes), TOKENIZER.size) == set(used.split())


def test_the_table_of_candidates_word_by_word():
  def candidate(i, piece, rank, raw, cumulative, cut):
    return Candidate(
      i, piece, rank, raw, cumulative, {"raw": raw, "top_k": cut, "top_p": cut}
    )

  found = NextToken(
    prompt_ids=[TOKENIZER.bos, *TOKENIZER.encode("x" * 60 + "if [red] ")],
    candidates=[
      candidate(5, " a", 1, 0.5, 0.5, 0.75),
      candidate(3, "[b]", 2, 1e-5, 0.50001, 0.0),
    ],
    entropy=1.25,
    chosen=candidate(9, "\\n", 7, 0.1, 0.9, 0.25),
  )
  lines = rendered(
    tables.candidates(found, Request(top_k=2, seed=8), TOKENIZER)
  ).splitlines()
  assert lines[0] == "after \u2026" + "x" * 38 + "if\u2423[red]\u2423"
  assert [line.split() for line in lines if line.strip()][1:] == [
    ["rank", "candidate", "raw", "cumulative", "top_k"],
    ["\u2500" * len(lines[3].strip())],
    ["1", "\u2423a", "50.00%", "50.00%", "75.00%"],
    ["2", "[b]", "1e-05", "50.00%", "\u2013"],
    ["\u25b8", "7", "\\n", "10.00%", "90.00%", "25.00%"],
    "seed 8 draws \\n; the model's entropy is 1.25 bits".split(),
  ]


def test_the_candidates_of_a_model_are_those_of_its_logits(sampler):
  request = Request("def ", temperature=0.7, top_k=3, seed=2)
  found = sampler.next_token(request, 5)
  raw = np.exp(full_logs((TOKENIZER.bos, *TOKENIZER.encode("def ")))[-1])
  order = np.argsort(-raw, kind="stable")
  rows = rendered(tables.candidates(found, request, TOKENIZER)).splitlines()
  shown = [line.replace("\u25b8", " ").split() for line in rows]
  shown = [row for row in shown if row and row[0].isdigit()][:5]
  kept = raw[: TOKENIZER.size][np.argsort(-raw[: TOKENIZER.size])[:3]] ** (
    1 / 0.7
  )
  for place, (row, i) in enumerate(zip(shown, order, strict=False)):
    assert row[0] == str(place + 1)
    assert row[-4] == f"{raw[i]:.2%}"
    assert row[-3] == f"{raw[order[: place + 1]].sum():.2%}"
    if (order[: place + 1] < TOKENIZER.size).all():
      share = f"{kept[place] / kept.sum():.2%}" if place < 3 else "\u2013"
      assert row[-1] == share
  drawn = sampler.generate([dataclasses.replace(request, max_new_tokens=1)])
  assert found.chosen.id == drawn[0].token_ids[0]


# --- step by step ------------------------------------------------------------

RULES = [
  Request("if x", max_new_tokens=7, seed=3),
  Request("if x", max_new_tokens=7, seed=3, top_k=4, temperature=1.5),
  Request("", max_new_tokens=6, temperature=0.0),
  Request("ab", max_new_tokens=6, top_k=6, seed=1, frequency_penalty=1.9),
]


@pytest.mark.parametrize("request_", RULES, ids=range(len(RULES)))
def test_a_trace_is_of_what_generate_draws(sampler, request_):
  (result,) = sampler.generate([request_])
  trace = tables.trace(sampler, request_, 3)
  assert [step.id for step in trace.steps] == result.token_ids
  assert trace.text == result.text and trace.request == request_
  assert trace.finish_reason == result.finish_reason
  ids = [TOKENIZER.bos, *TOKENIZER.encode(request_.prompt)]
  logs = full_logs((*ids, *result.token_ids))[len(ids) - 1 :]
  running, drawn = 0.0, np.zeros(TOKENIZER.size)
  for i, step in enumerate(trace.steps):
    running += logs[i, step.id]
    assert step.number == i + 1
    np.testing.assert_allclose(
      step.log_probability, logs[i, step.id], atol=2e-5
    )
    np.testing.assert_allclose(
      step.probability, math.exp(logs[i, step.id]), rtol=1e-4
    )
    np.testing.assert_allclose(step.running, running, atol=1e-4)
    best = np.argsort(-logs[i], kind="stable")[:3]
    assert [choice.id for choice in step.candidates] == best.tolist()
    # The rules by their definitions, in NumPy.
    scores = logs[i, : TOKENIZER.size] - request_.frequency_penalty * drawn
    drawn[step.id] += 1
    if request_.temperature:
      scores = scores / request_.temperature
    k = 1 if request_.temperature == 0 else request_.top_k or len(scores)
    order = np.argsort(-scores, kind="stable")[: min(k, 20)]
    share = np.exp(np.sort(scores)[::-1][:k])
    kept = [choice for choice in step.kept if choice.probability > 0]
    assert [choice.id for choice in kept] == order.tolist()
    np.testing.assert_allclose(
      [choice.probability for choice in kept],
      np.exp(scores[order]) / share.sum(),
      rtol=1e-4,
    )


def test_the_table_of_a_step_word_by_word():
  step = tables.Step(
    number=4,
    context="def",
    id=9,
    piece="x",
    probability=0.01,
    log_probability=-4.605,
    running=-7.5,
    candidates=[output.Choice(1, " ", 0.5), output.Choice(2, "b", 0.25)],
    kept=[output.Choice(1, " ", 0.9), output.Choice(9, "x", 0.1)],
  )

  def lines():
    text = rendered(tables.step_table(step))
    return [line.split() for line in text.splitlines() if line.strip()]

  assert lines()[0] == ["4.", "after", "def"]
  assert lines()[3:] == [
    ["1", "\u2423", "50.00%", "50.00%", "90.00%"],
    # Not among the likeliest after the rules: no more than the last of these.
    ["2", "b", "25.00%", "75.00%", "\u2264", "10.00%"],
    ["\u25b8", ">", "2", "x", "1.00%", "10.00%"],
    "draws x, log P -4.605; log P of all that was drawn -7.500".split(),
  ]
  # The rules kept no other.
  step.kept.append(output.Choice(3, "c", 0.0))
  assert lines()[4] == ["2", "b", "25.00%", "75.00%", "\u2013"]


# --- how likely a text is ----------------------------------------------------


def test_a_score_is_the_sum_of_conditionals(sampler):
  score = sampler.score(HARD, alternatives=2)
  ids = TOKENIZER.encode(HARD)
  logs = full_logs((TOKENIZER.bos, *ids))[:-1]
  own = logs[np.arange(len(ids)), ids]
  rows = output.tokens(score, TOKENIZER)
  assert [row["id"] for row in rows] == ids
  for name, expected in (
    ("log_probability", own),
    ("bits", -own / np.log(2)),
    ("running", np.cumsum(own)),
  ):
    found = [row[name] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-3)
  assert [row["rank"] for row in rows] == [
    1 + int((log > log[i]).sum()) for i, log in zip(ids, logs, strict=True)
  ]
  assert [[c.id for c in row["alternatives"]] for row in rows] == [
    np.argsort(-log, kind="stable")[:2].tolist() for log in logs
  ]
  figures = heat.figures(score)
  n_bytes = len(HARD.encode())
  assert (figures["n_tokens"], figures["n_bytes"]) == (len(ids), n_bytes)
  bits = -own.sum() / np.log(2)
  for name, expected in (
    ("log_probability", own.sum()),
    ("bits", bits),
    ("bits_per_byte", bits / n_bytes),
    ("bits_per_token", bits / len(ids)),
    ("perplexity_per_token", np.exp(-own.mean())),
  ):
    np.testing.assert_allclose(figures[name], expected, rtol=1e-5)
  assert f"log P(text) = {own.sum():.3f}, the sum of" in heat.summary(score)


def scored(text, logs=None):
  """A score that no model made."""
  ids = TOKENIZER.encode(text)
  logs = logs or [-0.5 * (i + 1) for i in range(len(ids))]
  return request_lib.Score(
    token_ids=ids,
    pieces=[TOKENIZER.piece(i) for i in ids],
    log_probabilities=logs,
    ranks=list(range(1, len(ids) + 1)),
    alternatives=[[Alternative(ids[0], -1.0)] for _ in ids],
    n_bytes=len(text.encode()),
  )


def test_bits_are_per_byte_and_per_token():
  """Three tokens that would stand for five bytes, of one bit each."""
  score = dataclasses.replace(scored("abc", [-math.log(2)] * 3), n_bytes=5)
  figures = heat.figures(score)
  np.testing.assert_allclose(figures["bits_per_byte"], 0.6)
  np.testing.assert_allclose(figures["bits_per_token"], 1)
  np.testing.assert_allclose(figures["perplexity_per_token"], 2)


def test_spans_are_whole_characters():
  score = scored("aé\n\U0001f9ea\x1b")
  bits = [0.5, 1 + 1.5, 2, 2.5 + 3 + 3.5 + 4, 4.5]
  found = heat.spans(score, TOKENIZER)
  assert [span[:3] for span in found] == [
    ("a", 0, 1),
    ("é", 1, 3),
    ("\u21b5\n", 3, 4),
    ("\U0001f9ea", 4, 8),
    ("\\x1b", 8, 9),
  ]
  np.testing.assert_allclose(
    [span[3] for span in found], np.array(bits) / math.log(2)
  )
  # What is left of a character, and what stands for no text.
  score.token_ids[-1] = TOKENIZER.encode("é")[0]
  assert heat.spans(score, TOKENIZER)[-1][0] == "\ufffd"
  score.token_ids[-1] = TOKENIZER.end_of_turn
  assert heat.spans(score, TOKENIZER)[-1][0] == "<end_of_turn>"


def test_hotter_is_more_surprising():
  bits = [0.0, 1.0, 5.0, 11.9, 12.0, 99.0]
  score = scored("abcdef", [-b * math.log(2) for b in bits])
  console = rich.console.Console(
    force_terminal=True, color_system="truecolor", file=io.StringIO()
  )
  shown = heat.heat_map(score, TOKENIZER)
  assert shown.plain.startswith("abcdef\n")
  colours = [
    style.bgcolor.triplet
    for style in (console.get_style(span.style) for span in shown.spans[:6])
  ]
  blue = [c.blue for c in colours]
  assert colours[0] == (255, 250, 225) and colours[4] == (239, 90, 108)
  green = [c.green for c in colours]
  assert green == sorted(green, reverse=True) and len(set(green)) == 5
  assert colours[4] == colours[5] and blue[0] > blue[1]


def test_a_long_table_has_what_surprises_most():
  short = rendered(heat.token_table(output.tokens(scored("ab"), TOKENIZER)))
  assert [line.split() for line in short.splitlines()[4:6]] == [
    ["1", "a", "60.65%", "0.72", "1", "-0.500"],
    ["2", "b", "36.79%", "1.44", "2", "-1.500"],
  ]
  logs = [-1.0] * 200
  logs[77] = -9.0
  rows = output.tokens(scored("c" * 200, logs), TOKENIZER)
  long = rendered(heat.token_table(rows)).splitlines()
  assert long[0].startswith("the 100 most surprising of 200 tokens")
  assert long[4].split()[0] == "78" and len(long) < 106


class Page(html.parser.HTMLParser):
  """Texts of the spans, the content of each script, and every tag."""

  def __init__(self, text):
    super().__init__()
    self.spans, self.scripts, self.tags, self.attributes = [], [], [], []
    self._inside = None
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes
    self._inside = {"span": self.spans, "script": self.scripts}.get(tag)
    if self._inside is not None:
      self._inside.append("")

  def handle_data(self, data):
    if self._inside is not None:
      self._inside[-1] += data

  def handle_endtag(self, tag):
    self._inside = None


def test_the_page_has_every_number_and_escapes_all_text():
  score = scored(HARD)
  text = heat.page(score, TOKENIZER, "<i>&.py")
  page = Page(text)
  assert page.spans == [span[0] for span in heat.spans(score, TOKENIZER)]
  assert "".join(page.spans) == output.printable(HARD).replace("\n", "\u21b5\n")
  assert not {"b", "i"} & set(page.tags) - {"i"} and page.tags.count("i") == 1
  assert page.tags.count("script") == 2 and "&lt;i&gt;&amp;.py" in text
  rows = json.loads(page.scripts[0])
  for row, log, piece in zip(
    rows, score.log_probabilities, score.pieces, strict=True
  ):
    assert row[:2] == [piece, math.exp(log)]
    assert row[5] == [["a", math.exp(-1.0)]]
  # Offline: nothing is fetched from anywhere.
  names = {name for name, _ in page.attributes}
  assert not {"src", "href"} & names
  assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(", text)


def chromium(page: pathlib.Path) -> str:
  """The page as Chromium has it once its scripts have run."""
  program = shutil.which("chromium") or shutil.which("google-chrome")
  if program is None:
    pytest.fail("this test needs Chromium: apt-get install -y chromium")
  found = subprocess.run(
    [program, "--headless", "--no-sandbox", "--disable-gpu"]
    + ["--dump-dom", f"file://{page}"],
    capture_output=True,
    text=True,
    timeout=60,
  )
  return found.stdout


@pytest.mark.slow
def test_the_page_shows_the_numbers_where_one_points(tmp_path):
  """In a browser, with keys; the third token is a part of "</script>"."""
  score = scored("a</script><b>")
  act = """<script>
    const key = new KeyboardEvent("keydown", {key: "ArrowRight"});
    for (let i = 0; i < 3; i++) text.dispatchEvent(key);
    const over = new MouseEvent("mouseover", {bubbles: true});
    text.children[1].dispatchEvent(over);
  </script>"""
  path = tmp_path / "page.html"
  path.write_text(
    heat.page(score, TOKENIZER, "a") + act.partition("const o")[0] + "</script>"
  )
  panel = chromium(path).partition('id="panel"')[2].partition("</aside>")[0]
  assert "<h2>/</h2>" in panel and "<dd>22.31&nbsp;%</dd>" in panel
  assert "<dd>2.16 bits</dd>" in panel and "<dd>-3.000</dd>" in panel
  path.write_text(heat.page(score, TOKENIZER, "a") + act)
  panel = chromium(path).partition('id="panel"')[2].partition("</aside>")[0]
  assert "<h2>&lt;</h2>" in panel and "<dd>1.44 bits</dd>" in panel


# --- text for terminals and programs -----------------------------------------


def test_a_terminal_is_not_given_what_would_control_it(monkeypatch, capsys):
  output.write(HARD, bold=True)
  assert capsys.readouterr().out == HARD
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  output.write(HARD, bold=True)
  found = capsys.readouterr().out
  assert found.startswith("\x1b[1m") and found.endswith("\x1b[0m")
  assert found[4:-4] == HARD.replace("\x1b", "\\x1b").replace("\r", "\\r")


def test_json_has_no_number_that_is_none():
  value = {1: (math.nan, -math.inf, 0.5), "a": Alternative(3, math.nan)}
  assert json.loads(output.dumps(value)) == {
    "1": [None, None, 0.5],
    "a": {"id": 3, "log_probability": None},
  }


def test_a_narrow_terminal_loses_nothing(monkeypatch, capsys):
  table = tables.new_table("rank", "candidate ", "probability")
  table.add_row("12345", "x" * 30, "0.12%")
  for name, value in {"COLUMNS": "20", "FORCE_COLOR": "1"}.items():
    monkeypatch.setenv(name, value)
  tables.put(None, [table], as_json=False)
  out = capsys.readouterr().out
  for whole in ("candidate", "probability", "12345", "x" * 30, "0.12%"):
    assert whole in out, out


# --- the command line --------------------------------------------------------


def save_run(path, weights):
  config = config_lib.Config()
  config.model, config.tokenizer.kind = CFG, "bytes"
  config.train.sequence_length = 60
  checkpoints = checkpoint.Checkpoints(path, config.checkpoint)
  meta = checkpoint.Meta(7, config, TOKENIZER.to_json(), "none", loss=1.0)
  rest = {"step": jnp.asarray(7)}
  checkpoints.save({"params": weights, "rest": rest}, meta)
  checkpoints.close()
  return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return save_run(str(tmp_path_factory.mktemp("run")), params())


def test_every_field_of_a_request_is_a_flag(workdir, sampler):
  """Each with a value that is not its default."""
  request = Request(
    "if",
    temperature=1.3,
    top_k=50,
    top_p=0.97,
    min_p=0.001,
    typical_p=0.98,
    repetition_penalty=1.1,
    frequency_penalty=0.2,
    presence_penalty=0.1,
    logit_bias={150: 2.5, 151: -1.0},
    forbidden=[160, 161],
    temperature_last=True,
    max_new_tokens=6,
    min_tokens=2,
    stop=["zq", "\n\n"],
    stop_ids=[170],
    seed=5,
    n_samples=2,
    alternatives=3,
    processed=True,
    bidirectional_prompt=True,
  )
  default = Request()
  arguments = []
  for field in dataclasses.fields(Request):
    value = getattr(request, field.name)
    assert value != getattr(default, field.name)
    if isinstance(value, dict):
      value = [f"{i}:{bias}" for i, bias in value.items()]
    values = value if isinstance(value, list) else [value]
    arguments += [f"--{field.name}={v}" for v in values]
  ((code, out),) = doors.many(
    "lm.sample", [[f"--workdir={workdir}", "--json", *arguments]]
  )
  assert code == 0
  expected = output.results(sampler.generate([request]), TOKENIZER)
  found = json.loads(out)["results"]
  wanted = json.loads(output.dumps(expected))
  for one, other in zip(found, wanted, strict=True):
    assert one["request"] == other["request"]
    tokens = [[row["id"] for row in x["tokens"]] for x in (one, other)]
    assert tokens[0] == tokens[1] and one["text"] == other["text"]
    assert len(one["tokens"][0]["alternatives"]) == 3


@pytest.mark.slow
def test_what_sample_and_chat_write(workdir, sampler, tmp_path):
  run, rules = f"--workdir={workdir}", ["--max_new_tokens=4", "--seed=3"]
  gap = ["--prompt=de", "--suffix=):", "--fim_order=spm", *rules]
  found = doors.many(
    "lm.sample", [[run, "--prompt=if", *rules, "--stream"], [run, *gap]]
  )
  (one,) = sampler.generate([Request("if", max_new_tokens=4, seed=3)])
  ids = fim.fim_ids(TOKENIZER, "de", "):", "spm")
  (middle,) = sampler.generate([Request(ids, max_new_tokens=4, seed=3)])
  assert found == [(0, f"if{one.text}\n"), (0, f"de{middle.text}):\n")]
  found = doors.many("lm.chat", [[run, *rules]], "hello\n")
  prompt = chat.chat_ids(TOKENIZER, [{"role": "user", "content": "hello"}])
  (reply,) = sampler.generate(
    [
      Request(
        prompt,
        max_new_tokens=4,
        seed=3,
        stop_ids=chat.stop_ids(TOKENIZER),
      )
    ]
  )
  assert found == [(0, f"{reply.text}\n")]
  (tmp_path / "plain.jinja").write_text("{{ messages[-1].content }}")
  given = f"--chat_template={tmp_path / 'plain.jinja'}"
  absent = f"--chat_template={tmp_path / 'absent.jinja'}"
  found = doors.many("lm.chat", [[run, *rules, given]], "hello\n")
  (reply,) = sampler.generate([Request("hello", max_new_tokens=4, seed=3)])
  assert found == [(0, f"{reply.text}\n")]
  ((code, said),) = doors.many("lm.chat", [[run, *rules, absent]], "hello\n")
  assert code != 0 and "--chat_template" in f"{code}{said}"


@pytest.mark.slow
def test_what_explain_shows(workdir, sampler, tmp_path):
  path, page = tmp_path / "text.txt", tmp_path / "page.html"
  path.write_bytes(HARD.encode())
  run, rules = f"--workdir={workdir}", ["--max_new_tokens=4", "--seed=3"]
  found = doors.many(
    "lm.explain",
    [
      [run, "--prompt=if", "--prompt=x", "--candidates=2", "--json"],
      [run, "--prompt=if", "--candidates=2", "--top_k=3"],
      [run, "--prompt=if", "--trace", *rules, "--json", "--candidates=2"],
      [run, "--prompt=if", "--trace", *rules],
      [run, f"--score={path}", "--json", f"--html={page}"],
      [run, f"--score={path}"],
    ],
  )
  assert [code for code, _ in found] == [0] * len(found)
  out = [text for _, text in found]
  next_tokens = [sampler.next_token(Request(p), 2) for p in ("if", "x")]
  for shown, expected in zip(
    json.loads(out[0])["next_tokens"], next_tokens, strict=True
  ):
    assert shown["prompt_ids"] == expected.prompt_ids
    assert shown["chosen"]["id"] == expected.chosen.id
    assert list(shown["candidates"][0]["stages"]) == list(
      expected.chosen.stages
    )
  assert "top_k" in out[1] and "top_p" not in out[1]
  (one,) = sampler.generate([Request("if", max_new_tokens=4, seed=3)])
  (trace,) = json.loads(out[2])["traces"]
  assert [step["id"] for step in trace["steps"]] == one.token_ids
  assert len(trace["steps"][0]["candidates"]) == 2
  assert out[3].count("log P of all that was drawn") == len(one.token_ids)
  score = sampler.score(HARD, eos=True)
  shown = json.loads(out[4])
  np.testing.assert_allclose(shown["log_probability"], score.total, rtol=1e-5)
  assert len(shown["tokens"]) == len(score.token_ids)
  assert "".join(Page(page.read_text()).spans).startswith("a </script><b>&")
  assert f"log P(text) = {score.total:.2f}" in out[5]


@pytest.mark.slow
def test_a_text_has_the_score_that_evaluation_gives_it(workdir, tmp_path):
  """Over three windows, behind a mark of byte order, with each newline."""
  path, text = tmp_path / "text", "\ufeff" + "a line, é\r\n" * 15
  path.write_bytes(text.encode())
  ((code, out),) = doors.many(
    "lm.explain", [[f"--workdir={workdir}", f"--score={path}", "--json"]]
  )
  shown = json.loads(out)
  assert code == 0 and shown["n_tokens"] > 2 * CFG.context_length
  evaluation = corpora.evaluate(
    workdir,
    specs=[f"text:{path}"],
    step=None,
    stride=None,
    batch_size=None,
    data={"text_unit": "file"},
    output=None,
  )
  totals = evaluation.totals
  assert shown["n_bytes"] == totals.n_bytes == len(text.encode()) - 3
  np.testing.assert_allclose(
    shown["bits_per_byte"], totals.bits_per_byte, rtol=1e-6
  )


def test_a_text_of_which_the_tokenizer_keeps_nothing(tmp_path):
  """As BERT's does of white space and of other alphabets."""
  path = vocabularies.folder(tmp_path, "bert")
  tokenizer = tokenizer_lib.from_files(str(path))
  run = saved_runs.save(tmp_path, tokenizer, 16, ())
  text = tmp_path / "text"
  text.write_text("\u4f60\n")
  call = [f"--workdir={run}", f"--score={text}"]
  ((code, _),) = doors.many("lm.explain", [call])
  assert "--score=" in str(code) and "keeps none of its text" in str(code)


@pytest.mark.parametrize("module", ["lm.sample", "lm.explain", "lm.chat"])
def test_what_is_refused_before_a_checkpoint_is_read(module, workdir, tmp_path):
  """But for the last ones."""
  run, file = f"--workdir={workdir}", f"--score={tmp_path / 'empty'}"
  (tmp_path / "empty").touch()
  text = tmp_path / "text"
  text.write_text("a")
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  cases = [
    ([], "--workdir: missing"),
    (["--logit_bias=3"], "--logit_bias=3: must be ID:VALUE, such as"),
    (["--ahead=17"], "flag --ahead=17"),
    (["--draft=x"], "--draft=x: proposes --ahead tokens"),
    (["--draft=x", "--ahead=2"], "--draft=x: has no checkpoint"),
    ([run, "--mesh=1,1,2"], "--mesh=1,1,2: config.model.n_heads=3: must"),
  ]
  cases += {
    "lm.sample": [
      (
        ["--fim_order=spm"],
        "--fim_order: is for --suffix or --suffix_file; add",
      ),
      (["--prefix_file=x"], "--prefix_file=x: .*UTF-8 text"),
      (["--alternatives=2"], "--alternatives: is for --json; add that"),
      (["--logit_bias=a:3"], "--logit_bias=a:3: must be ID:VALUE"),
      (["--prompt_file=/absent"], "--prompt_file=/absent: .*UTF-8 text"),
      ([run, "--stream", "--n_samples=2"], "--stream: shows one sample"),
      ([run, "--stream", "--json"], "--stream: shows one sample"),
      (
        [run, "--suffix=x", "--prompt=a", "--prompt=b"],
        "--suffix: fills one gap; give one prompt, not 2",
      ),
      (
        [run, f"--suffix_file={text}", "--prompt=a", f"--prefix_file={text}"],
        "--suffix_file: fills one gap; give one prompt, not 2",
      ),
      ([run, "--forbidden=400"], "forbidden=400: ids must be integers in"),
      ([run, "--mesh=1,16,1"], "--mesh=1,16,1: config.model.d_model=24: m"),
      (["--beams=100000"], "flag --beams=100000"),
      ([run, "--beams=2", "--top_p=0.5"], "top_p=0.5: means nothing to beam"),
    ],
    "lm.explain": [
      (["--score=x", "--top_k=3"], "--top_k: has no part in --score"),
      (["--score=x", "--prompt=x"], "--prompt: has no part in --score"),
      (["--score=x", "--trace"], "--trace: has no part in --score"),
      (["--n_samples=2"], "Unknown command line flag 'n_samples'"),
      (["--max_new_tokens=2"], "--max_new_tokens: is for --trace; add that"),
      (["--stop=x"], "--stop: is for --trace; add that"),
      (["--html=x"], "--html: is for --score; add that"),
      (["--score=/absent"], "--score=/absent: .*UTF-8 text"),
      (["--candidates=0"], "flag --candidates=0"),
      ([run, file], "--score=.*is empty; name a text"),
      (
        [run, "--trace", "--candidates=21"],
        "--candidates=21: must be at most 20",
      ),
      ([run, "--candidates=385"], "--candidates=385: must be at most 384"),
      ([run, f"--score={text}", "--html=/absent/a"], "--html=.*no directory"),
      ([run, f"--score={text}", f"--html={tmp_path}"], "--html=.*be written"),
      ([run, f"--score={text}", f"--html={text}"], "--html=.*is the text of"),
      ([run, f"--score={text}", f"--html={pipe}"], "--html=.*be written"),
    ],
    "lm.chat": [
      (["--prompt=x"], "Unknown command line flag 'prompt'"),
      ([run, "--top_k=-1"], "top_k=-1: must not be negative"),
    ],
  }[module]
  calls = [
    ["--workdir=/absent", *c] if c and c[0] != run else c for c, _ in cases
  ]
  for (code, out), (arguments, message) in zip(
    doors.many(module, calls), cases, strict=True
  ):
    assert re.match(message, str(code)), (arguments, code)
    assert out == ""


@pytest.mark.parametrize("module", ["lm.sample", "lm.explain"])
def test_what_does_not_fit_is_told_as_text(module, workdir):
  """Also where the model reads other ids than those of a prompt."""
  run, long = f"--workdir={workdir}", "a" * 70
  calls = [
    [run, "--prompt=b", f"--prompt={long}"],
    [run, f"--suffix={long}"],
    [run, f"--fill=<sentinel_0>{long}"],
  ]
  if module == "lm.explain":  # whose --fill is of an encoder
    calls.pop()
  for code, out in doors.many(module, calls):
    assert re.match(r"prompt='(a{20}|<sentinel_0>a{8})'...: has 7", str(code))
    assert out == ""


@pytest.mark.slow
def test_nan_is_said_and_nothing_else(workdir, tmp_path_factory):
  """Where the token Z has no numbers."""
  path = str(tmp_path_factory.mktemp("poisoned"))
  poisoned = dict(params())
  (bad,) = TOKENIZER.encode("Z")
  poisoned["embed"] = poisoned["embed"].at[bad].set(jnp.nan)
  save_run(path, poisoned)
  text = pathlib.Path(path) / "text"
  text.write_text("aZb")
  run = f"--workdir={path}"
  found = doors.many("lm.sample", [[run, "--prompt=aZ", "--json"]])
  found += doors.many(
    "lm.explain",
    [
      [run, "--prompt=aZ", "--candidates=2"],
      [run, "--prompt=aZ", "--trace", "--json"],
      [run, f"--score={text}"],
    ],
  )
  found += doors.many("lm.chat", [[run]], "aZ\n")
  assert [code for code, _ in found] == [1] * len(found)
  (result,) = json.loads(found[0][1])["results"]
  assert result["finish_reason"] == "error"
  assert result["tokens"][0]["log_probability"] is None
