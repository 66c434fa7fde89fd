"""Overlap of the documents of tasks with a run's training text, against a
search of all pairs of positions (test_overlap.by_hand).
"""

import io
import json
import random
import types

import doors
import pytest
import rich.console
import saved_runs
import test_overlap
from test_harness import _offline  # noqa: F401

from lm import schema
from lm.data import overlap, overlap_report
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import corpora, harness, task_texts

N = 5
RNG = random.Random(0)
WORDS = [f"{a}{b}{c}" for a in "abcdéf" for b in "ghijk" for c in "xyz日"]


def say(n):
  return " ".join(RNG.choices(WORDS, k=n))


# Of the odd documents training text has a part: of the question, of a choice,
# or the end of the question and the beginning of the right answer.
QUESTIONS = [
  {"question": say(8), "choices": [say(7), say(7)], "gold": i % 2}
  for i in range(12)
]
TEXTS = [{"text": say(20)} for _ in range(5)]
TRAINING = "\n".join(
  [
    say(40),
    f"{say(3)} {QUESTIONS[1]['question'].upper()} {say(4)}",
    f"{say(3)} {QUESTIONS[3]['choices'][0].replace(' ', ', ')}",
    f"{' '.join(QUESTIONS[5]['question'].split()[-3:])}: "
    f"{' '.join(QUESTIONS[5]['choices'][1].split()[:3])} {say(9)}",
    TEXTS[2]["text"],
    say(40),
  ]
)
TASKS = {
  "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
""",
  "writing": """
output_type: generate_until
doc_to_text: "Q: {{question}}"
doc_to_target: "{{choices}}"
generation_kwargs: {until: ["x"], do_sample: false, max_gen_toks: 2}
metric_list: [{metric: exact_match}]
""",
  "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


def choice_text(row):
  right, wrong = row["choices"][row["gold"]], row["choices"][1 - row["gold"]]
  return f"{row['question']} {right}\n{wrong}"


HELD_OUT = {
  "choices": [choice_text(row) for row in QUESTIONS],
  "writing": [
    f"Q: {row['question']} {row['choices'][0]}\n{row['choices'][1]}"
    for row in QUESTIONS
  ],
  "rolling": [row["text"] for row in TEXTS],
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  """Tasks, a group of two of them, training text, and a run."""
  path = tmp_path_factory.mktemp("given")
  (path / "train.txt").write_text(TRAINING)
  for name, content in TASKS.items():
    rows = TEXTS if name == "rolling" else QUESTIONS
    data = path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / f"{name}.yaml").write_text(
      f"task: {name}\ntest_split: test\ndataset_path: json\n"
      f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {path}}}\n"
      f"{content}"
    )
  (path / "both.yaml").write_text(
    "group: both\ntask: [choices, rolling]\n"
    "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
  )
  saved_runs.save(
    path / "run",
    tokenizer_lib.Tokenizer(),
    31,
    (f"text:{path}/train.txt",),
    train=(f"text:{path}/train.txt|fim", f"text:{path}/train.txt"),
    text_unit="line",
  )
  return path


def wanted(names, limit=None):
  """(share of documents, share of bytes) of tasks together, by hand."""
  lines = dict(enumerate(TRAINING.split("\n")))
  texts = [text for name in names for text in HELD_OUT[name][:limit]]
  grams = test_overlap.by_hand(dict(enumerate(texts)), lines, N)
  covered = {
    (i, byte)
    for i, found in grams.items()
    for span in found
    for byte in range(*span)
  }
  n_bytes = sum(len(text.encode()) for text in texts)
  return len(grams) / len(texts), len(covered) / n_bytes


def evaluate(given, tasks, overlap, **options):
  content = harness.evaluate(
    str(given / "run"),
    tasks,
    include_path=str(given),
    overlap=overlap,
    **options,
  )
  assert content is not None
  return content


def shares(content):
  return {
    name: (t["overlap"]["share_of_documents"], t["overlap"]["share_of_bytes"])
    for name, t in content["tasks"].items()
  }


def test_shares_are_those_of_a_search_of_all_pairs(
  given, tmp_path, monkeypatch
):
  """Of tasks and of a group of tasks, by one reading of the training text."""
  read, seen = overlap.read, []
  monkeypatch.setattr(
    overlap, "read", lambda source: seen.append(source.spec) or read(source)
  )
  path = tmp_path / "o.json"
  search = overlap_report.Search(N, str(path))
  content = evaluate(given, ["both", "writing"], search)
  train = f"text:{given}/train.txt"
  assert sorted(seen) == [
    *("task:choices", "task:rolling", "task:writing"),
    train,
  ]
  found = shares(content)
  names = {name: [name] for name in TASKS} | {"both": ["choices", "rolling"]}
  assert found.keys() == names.keys()
  for name, parts in names.items():
    assert found[name] == pytest.approx(wanted(parts), abs=1e-12), name
  assert found["choices"][0] == pytest.approx(3 / 12)
  assert found["writing"][0] == pytest.approx(2 / 12)  # Not its fifth answer.

  # The report has the exact places.
  report = json.loads(path.read_text())
  lines = TRAINING.split("\n")
  assert [one["source"] for one in report["training"]] == [train]
  n_matches = 0
  for part in report["sources"]:
    texts = HELD_OUT[part["source"].removeprefix("task:")]
    for document in part["documents"]:
      mine = texts[int(document["name"].rpartition(":")[2])].encode()
      for match in document["matches"]:
        line = int(match["training_document"].rpartition(":")[2]) - 1
        other = lines[line].encode()
        here, there = (
          [word for word, *_ in test_overlap.split(text[a:b].decode())]
          for text, a, b in (
            (mine, match["start"], match["stop"]),
            (other, match["training_start"], match["training_stop"]),
          )
        )
        assert here == there and len(here) == match["n_words"] >= N
        n_matches += 1
  assert n_matches >= 6
  again = evaluate(given, ["rolling"], str(path))
  assert shares(again) == {"rolling": found["rolling"]}
  with pytest.raises(schema.ConfigError, match="'task:choices' has changed"):
    evaluate(given, ["choices"], str(path), limit=3)


def test_the_first_documents_alone(given):
  content = evaluate(given, ["choices"], overlap_report.Search(N), limit=4)
  assert content["tasks"]["choices"]["n"] == 4
  assert shares(content)["choices"] == pytest.approx(wanted(["choices"], 4))
  long = evaluate(given, ["choices"], overlap_report.Search(16), limit=4)
  assert long["tasks"]["choices"]["overlap"] == {
    "n": 16,
    "n_short": 0,
    "share_of_documents": 0,
    "share_of_bytes": 0,
  }


def test_output_has_shares_beside_each_score():
  metrics = {"acc": {"value": 0.5, "stderr": None}}
  task = {"version": 1, "n": 4, "num_fewshot": 0, "metrics": metrics}
  about = {"n": 13, "n_short": 1}
  about |= {"share_of_documents": 0.25, "share_of_bytes": 0.125}
  tasks = {"known": {**task, "overlap": about}, "other": task}
  console = rich.console.Console(file=io.StringIO(), width=120)
  content = {"workdir": "run", "step": 7, "tasks": tasks}
  harness.show(content, console)
  lines = [line.split() for line in console.file.getvalue().split("\n")]
  (row,) = [line for line in lines if line[:1] == ["known"]]
  assert row[-4:] == ["0.5000", "-", "25.0%", "12.5%"]
  said = console.file.getvalue()
  assert "documents with a passage of 13 words that training text has" in said
  note = "known: 1 document of fewer than 13 words can overlap with none.\n"
  assert said.endswith(note)


@pytest.mark.parametrize(
  ("question", "target", "choices", "text"),
  [
    ("q", 1, ["a", "b", "c"], "q b\na\nc"),
    ("q", -100, ["a", "b"], "q\na\nb"),  # Without a label.
    ("q", 7, ["a", "b"], "q\na\nb"),
    ("q", [0, 2], ["a", "b", "c"], "q a\nc\nb"),
    ("q", "b", ["a", "b"], "q b\na"),
    ("q", ["x", "y"], None, "q x\ny"),
    ("q", 3, None, "q 3"),
    ("", "all of it", None, "all of it"),
    (1, "end", ["one _", "other _"], "other _ end\none _"),  # As winogrande's.
  ],
)
def test_text_of_each_kind_of_task(question, target, choices, text):
  task = types.SimpleNamespace(
    doc_to_text=lambda doc: question,
    doc_to_target=lambda doc: target,
    doc_to_choice=lambda doc: choices,
    config=types.SimpleNamespace(doc_to_choice=choices, target_delimiter=" "),
  )
  assert task_texts.text_of(task, {}) == text


def test_a_search_for_sources_is_what_the_file_has(given, tmp_path):
  search = overlap_report.Search(N, str(tmp_path / "o.json"))
  names = (f"text:{given}/train.txt", f"text:{given}/train.txt|prefix")
  found = [
    corpora.evaluate(
      str(given / "run"),
      specs=names,
      step=None,
      stride=None,
      batch_size=None,
      data={},
      output=None,
      overlap=asked,
    )
    for asked in (search, search.output)
  ]
  for one, other in zip(*(e.results for e in found), strict=True):
    assert one.overlap == other.overlap
    assert one.overlap.of_documents == 1


def test_command(given, tmp_path):
  run = [f"--workdir={given}/run", f"--output={tmp_path}/e.json"]
  tasks = ["--tasks=choices", f"--include_path={given}"]
  found = tmp_path / "o.json"
  ended = doors.run(
    "lm.evaluate",
    [*run, *tasks, "--overlap", f"--overlap_words={N}"]
    + [f"--overlap_output={found}"],
    str(tmp_path),
  )
  assert ended.code == 0, ended.err
  assert ended.err == ""  # No bars where there is no terminal.
  documents, in_bytes = wanted(["choices"])
  assert f"{documents:.1%} {in_bytes:.1%}" in " ".join(ended.out.split())
  content = json.loads((tmp_path / "e.json").read_text())
  assert shares(content)["choices"] == pytest.approx((documents, in_bytes))
  assert json.loads(found.read_text())["n"] == N
  for flags, says in (
    ([*run, "--overlap_words=5"], "--overlap_words=5: is about a search"),
    ([*run, f"--overlap={found}", "--overlap_output=x.json"], "about a search"),
    ([*run, "--overlap", "--overlap_output=/none/x"], "--overlap_output"),
    (["--compare", "a", "b", "--overlap"], "with --compare, name a file"),
    (["--compare", "a", "b", "--overlap_words=5"], "is about one run"),
  ):
    ended = doors.run("lm.evaluate", flags, str(tmp_path))
    assert ended.code == 2 and says in ended.err, ended.err
