"""Overlap of held-out text with training text, against a search of all pairs
of positions; planted passages; the commands.
"""

import dataclasses
import io
import json
import unicodedata

import doors
import hypothesis
import numpy as np
import pytest
import rich.console
import saved_runs
from hypothesis import strategies as st

from lm import checkpoint, schema
from lm.data import overlap, overlap_report, sources
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import corpora
from lm.evaluate import output as output_lib


class Listed:
  """A source of given texts, by name."""

  chat = False

  def __init__(self, spec, texts):
    self.spec, self.texts = spec, list(texts.items())

  def __len__(self):
    return len(self.texts)

  def __getitem__(self, i):
    name, text = self.texts[i]
    return None if text is None else sources.Document(name, text)

  def fingerprint(self):
    return "listed"

  def changed(self):
    return None


def find(held_out, training, n):
  """{name: Touched} of dicts of texts."""
  (found,) = overlap.find(
    [Listed("held", held_out)], [Listed("train", training)], n
  )
  assert found.n_documents == sum(t is not None for t in held_out.values())
  return {document.name: document for document in found.touched}


# --- all pairs ---------------------------------------------------------------


def split(text):
  """(word, first byte, end byte) of each word, a character at a time."""
  found, word, offset = [], "", 0
  for character in [*text, " "]:
    name = unicodedata.name(character, "")
    alone = name.startswith(("CJK UNIFIED", "HIRAGANA", "KATAKANA"))
    inside = character.isalnum() or character == "_"
    if word and (alone or not inside):
      found.append((word.casefold(), offset - len(word.encode()), offset))
      word = ""
    size = len(character.encode())
    if alone:
      found.append((character.casefold(), offset, offset + size))
    elif inside:
      word += character
    offset += size
  return found


def by_hand(held_out, training, n):
  """{held-out document: {(first byte, end byte): (training document, first
  byte, end byte)}} of each N-gram that overlaps, at its first place.
  """
  found = {}
  for name, text in held_out.items():
    mine = split(text)
    for i in range(len(mine) - n + 1):
      for other, theirs in training.items():
        theirs = split(theirs)
        for j in range(len(theirs) - n + 1):
          if all(mine[i + k][0] == theirs[j + k][0] for k in range(n)):
            place = (other, theirs[j][1], theirs[j + n - 1][2])
            here = (mine[i][1], mine[i + n - 1][2])
            found.setdefault(name, {}).setdefault(here, place)
  return found


# Few words, so that much repeats; what is between words is of every kind.
TEXT = st.lists(
  st.sampled_from(["a", "B", "b", "é", "É", "日", "本", "x_1", "ß", "𝔸", "ss"]),
  max_size=14,
).flatmap(
  lambda some: st.lists(
    st.sampled_from([" ", "\n", ", ", "—", " 💡 "]),
    min_size=len(some),
    max_size=len(some),
  ).map(lambda between: "".join(map("".join, zip(some, between, strict=True))))
)
TEXTS = st.lists(TEXT, max_size=4).map(
  lambda texts: {f"doc{i}": text for i, text in enumerate(texts)}
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(TEXTS, TEXTS, st.integers(2, 5))
def test_overlaps_are_those_of_a_search_of_all_pairs(held_out, training, n):
  wanted = by_hand(held_out, training, n)
  found = find(held_out, training, n)
  assert set(found) == set(wanted)
  for name, document in found.items():
    text = held_out[name].encode()
    covered = set()
    for first, stop in wanted[name]:
      covered |= set(range(first, stop))
    assert document.n_covered == len(covered)
    assert document.n_bytes == len(text)
    grams = {}
    for match in document.matches:
      mine = split(text[match.start : match.stop].decode())
      other = training[match.training_document].encode()
      theirs = split(other[match.training_start : match.training_stop].decode())
      assert len(mine) == len(theirs) == match.n_words >= n
      for i in range(len(mine) - n + 1):
        here = (match.start + mine[i][1], match.start + mine[i + n - 1][2])
        there = match.training_start
        there = (there + theirs[i][1], there + theirs[i + n - 1][2])
        grams[here] = (match.training_document, *there)
    assert grams == wanted[name]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text())
def test_words_and_places_of_any_text(text):
  raw = text.encode("utf-8", "surrogatepass")
  places = overlap.places(text)
  words = list(overlap.words(text))
  assert len(places) == len(words)
  for (start, stop), word in zip(places, words, strict=True):
    assert raw[start:stop].decode().casefold() == word
  assert (places[1:, 0] >= places[:-1, 1]).all()


def test_no_hash_makes_an_overlap(monkeypatch):
  """Hashes of three bits collide all the time: among the held-out N-grams,
  until a seed is found with which they do not, and with training text then.
  """
  whole = overlap._hashes
  seeds = []

  def weak(ids, n, seed):
    seeds.append(seed)
    return whole(ids, n, seed) >> np.uint64(61)

  monkeypatch.setattr(overlap, "_hashes", weak)
  rng = np.random.default_rng(0)
  for _ in range(40):
    held_out = {"x": " ".join(rng.choice([*"abcd"], 6))}
    training = {"y": " ".join(rng.choice([*"abcd"], 40))}
    wanted = by_hand(held_out, training, 3).get("x", {})
    found = find(held_out, training, 3)
    matches = found["x"].matches if found else []
    assert sum(m.n_words - 2 for m in matches) == len(wanted)
  assert max(seeds) > 2


# --- planted -----------------------------------------------------------------

QUOTE = "one two three four five six seven eight nine ten eleven twelve 13 14"


def test_planted_passages_are_named():
  held_out = {
    "clean": "nothing of it " * 9,
    "quotes": f"é: \u201c{QUOTE}\u201d, and {QUOTE.upper()}.",
    "short": " ".join(QUOTE.split()[:12]),
    "empty": "",
    "skipped": None,
  }
  training = {
    "first": "日本 " + QUOTE.replace(" ", ",\n") + "!",
    "none": None,
    "again": QUOTE,
  }
  (found,) = overlap.find(
    [Listed("held", held_out)], [Listed("train", training)]
  )
  assert (found.n_documents, found.n_short) == (4, 2)
  assert found.n_bytes == sum(len(t.encode()) for t in held_out.values() if t)
  (quotes,) = found.touched
  n = len(QUOTE)
  there = ("train", "first", 7, 7 + n + QUOTE.count(" "))
  first = len("é: \u201c".encode())
  second = len(f"é: \u201c{QUOTE}\u201d, and ".encode())
  assert quotes.matches == [
    (first, first + n, 14, *there),
    (second, second + n, 14, *there),
  ]
  assert quotes.n_covered == found.n_covered == 2 * n


def test_a_passage_over_the_end_of_a_document_is_none():
  words = QUOTE.split()
  halves = {"a": " ".join(words[:7]), "b": " ".join(words[7:])}
  assert find({"whole": QUOTE}, halves, 13) == {}
  assert find(halves, {"whole": QUOTE}, 13) == {}
  assert find(halves, {"whole": QUOTE}, 7).keys() == {"a", "b"}


def test_a_passage_ends_where_the_training_document_does():
  """The next words stand at the next place, of another document."""
  found = find({"x": "a b c d"}, {"one": "a b c", "two": "x b c d"}, 3)
  assert [m[:2] + m[4:] for m in found["x"].matches] == [
    (0, 5, "one", 0, 5),
    (2, 7, "two", 2, 7),
  ]


def test_every_document_is_read_once():
  """In order, and none is kept: training text streams by."""
  read = []

  class Counted(Listed):
    def __getitem__(self, i):
      read.append((self.spec, i))
      return super().__getitem__(i)

  texts = {"a": QUOTE, "b": "b", "c": QUOTE}
  specs = ("held", "train", "more")
  held, *training = (Counted(spec, texts) for spec in specs)
  overlap.find([held], training)
  assert read == [(spec, i) for spec in specs for i in range(3)]


def test_sources_are_kept_apart():
  held = [Listed("one", {"x": QUOTE, "y": "y"}), Listed("two", {"x": QUOTE})]
  train = [Listed("t1", {"d": "z"}), Listed("t2", {"d": QUOTE})]
  one, two = overlap.find(held, train)
  assert (one.source, one.n_documents, one.n_bytes) == (
    "one",
    2,
    1 + len(QUOTE),
  )
  assert (two.source, two.n_documents, two.n_bytes) == ("two", 1, len(QUOTE))
  for part in (one, two):
    assert part.touched[0].matches[0][3:5] == ("t2", "d")
  assert overlap.find([Listed("none", {})], train)[0].touched == []
  assert overlap.find(held, [])[0].touched == []


# --- commands ----------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  """A run and its config; of 3 held-out lines the second is also in training,
  whose documents are files; and a task's texts, of which training has half.
  """
  folder = tmp_path_factory.mktemp("given")
  (folder / "held.txt").write_text(f"first line\nsay {QUOTE}, é\nlast\n")
  (folder / "train.txt").write_text(f"line\n\n{QUOTE}\nline\n")
  tasks = [{"q": QUOTE.upper()}, {"q": "what is it? " * 7}]
  (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
  saved_runs.save(
    folder / "run",
    tokenizer_lib.Tokenizer(),
    11,
    (f"text:{folder}/held.txt",),
    train=(f"text:{folder}/train.txt|fim", f"text:{folder}/train.txt"),
    text_unit="line",
  )
  return folder


def report(given, output, *more, n=13, **data):
  config = checkpoint.load_meta(str(given / "run")).config
  config.data = dataclasses.replace(config.data, **data)
  overlap_report.report(config, n, more, str(output))
  return json.loads(output.read_text())


def test_report_names_what_overlaps(given, tmp_path, capsys):
  tasks = f"jsonl:{given}/tasks.jsonl#q"
  content = report(given, tmp_path / "o.json", tasks)
  train = f"text:{given}/train.txt"
  assert [t["source"] for t in content["training"]] == [train]
  held, task = content["sources"]
  assert (held["n_documents"], held["n_touched"], held["n_short"]) == (3, 1, 2)
  (document,) = held["documents"]
  n = len(QUOTE)
  assert document == {
    "name": f"{given}/held.txt:2",
    "n_bytes": n + 8,
    "n_covered": n,
    "matches": [
      {
        "start": 4,
        "stop": 4 + n,
        "n_words": 14,
        "training_source": train,
        "training_document": f"{given}/train.txt:3",
        "training_start": 0,
        "training_stop": n,
      }
    ],
  }
  total = 10 + n + 8 + 4
  assert (held["n_bytes"], held["share_of_bytes"]) == (total, n / total)
  assert (task["n_touched"], task["share_of_documents"]) == (1, 0.5)
  said = capsys.readouterr().out
  assert "held.txt: 2 documents of fewer than 13 words can overlap with" in said
  assert f"14 words, bytes 4 to {4 + n} of {given}/held.txt:2" in said


def test_a_report_is_written_before_it_is_shown(given, tmp_path, monkeypatch):
  """The reader of the table may have left, as `head` does."""

  def leave(*_):
    raise BrokenPipeError

  monkeypatch.setattr(overlap_report, "show", leave)
  with pytest.raises(BrokenPipeError):
    report(given, tmp_path / "o.json")
  assert json.loads((tmp_path / "o.json").read_text())["n"] == 13


def test_chats_are_read_as_their_contents(given, tmp_path):
  chat = {"prompt": "say", "completion": QUOTE}
  (tmp_path / "chat.jsonl").write_text(json.dumps(chat))
  spec = f"jsonl:{tmp_path}/chat.jsonl|chat"
  content = report(given, tmp_path / "o.json", spec)
  assert content["sources"][1]["n_touched"] == 1
  content = report(given, tmp_path / "o.json", train=(spec,))
  assert content["training"][0]["source"] == spec
  assert content["sources"][0]["n_touched"] == 1


def evaluate(given, path, *specs, **data):
  return corpora.evaluate(
    str(given / "run"),
    specs=specs,
    step=None,
    stride=None,
    batch_size=None,
    data=data,
    output=None,
    overlap=str(path),
  )


def test_scores_show_what_overlaps(given, tmp_path):
  path = tmp_path / "o.json"
  content = report(given, path)
  prefix = f"text:{given}/held.txt|prefix"
  spelt = f"text:{given}/held.txt|causal"
  (result,) = evaluate(given, path, spelt).results
  evaluation = evaluate(given, path, f"text:{given}/held.txt", prefix)
  first, second = evaluation.results
  assert result.overlap is not None and result.overlap == first.overlap
  share = content["sources"][0]["share_of_bytes"]
  documents = [d.totals for d in first.documents]
  clean = documents[0] + documents[2]
  assert first.clean == clean
  assert second.clean is None and second.overlap == first.overlap
  console = rich.console.Console(file=io.StringIO(), width=200)
  output_lib.show(evaluation, console, documents=True)
  lines = [line.rstrip() for line in console.file.getvalue().split("\n")]
  table = [line for line in lines if line.endswith(f" {share:.1%}")]
  assert ["held.txt" in line for line in table[:2]] == [True, True]
  said = [line for line in lines if f" has {share:.1%} of its bytes" in line]
  assert f"the other documents: {clean.bits_per_byte:.4f} bits" in said[0]
  assert said[1].endswith("13 words in 33.3% of its documents.")
  # Rows of `prefix` are no whole text: they have no word perplexity.
  assert "nan" not in console.file.getvalue()
  (line,) = [x for x in lines if "held.txt:2" in x]
  covered = content["sources"][0]["documents"][0]
  assert line.endswith(f"{covered['n_covered'] / covered['n_bytes']:.1%}")
  output_lib.write(evaluation, str(tmp_path / "e.json"), documents=False)
  one, two = json.loads((tmp_path / "e.json").read_text())["sources"]
  assert one["overlap"]["share_of_bytes"] == share
  assert one["overlap"]["without_them"]["nll"] == clean.nll
  assert "without_them" not in two["overlap"]


def test_no_rate_of_other_documents_where_all_overlap(given, tmp_path):
  whole = tmp_path / "whole.txt"
  whole.write_text(f"{QUOTE}\n")
  spec = f"text:{whole}"
  report(given, tmp_path / "o.json", spec)
  console = rich.console.Console(file=io.StringIO(), width=200)
  output_lib.show(
    evaluate(given, tmp_path / "o.json", spec), console, documents=False
  )
  said = console.file.getvalue()
  assert "13 words in 100.0% of its documents; there are no other" in said
  assert "nan" not in said


def _with(content, **fields):
  """The overlaps `content` with other fields of their first source."""
  first, *rest = content["sources"]
  return {**content, "sources": [{**first, **fields}, *rest]}


@pytest.mark.parametrize(
  ("change", "specs", "data", "message"),
  [
    (None, (), {}, "No such file or directory; write it anew"),
    (lambda c: [], (), {}, "not overlaps"),
    (lambda c: {**c, "sources": [{}]}, (), {}, "not overlaps"),
    (lambda c: {**c, "n": "x"}, (), {}, "not overlaps"),
    (lambda c: _with(c, share_of_bytes="x"), (), {}, "not overlaps"),
    (lambda c: _with(c, share_of_bytes=7), (), {}, "a share of 7"),
    (lambda c: _with(c, share_of_documents=None), (), {}, "not overlaps"),
    (lambda c: 100_000 * "[", (), {}, "not overlaps"),
    (lambda c: {**c, "training": []}, (), {}, r"sources \[\], and the run was"),
    (lambda c: c, ("text:{}/train.txt",), {}, "has no source '.*train.txt', o"),
    (lambda c: c, (), {"text_unit": "file"}, "has changed since, or is read"),
  ],
)
def test_overlaps_of_something_else_are_refused(
  given, tmp_path, monkeypatch, change, specs, data, message
):
  monkeypatch.setattr(checkpoint, "load_params", None)
  path = tmp_path / "o.json"
  if change is not None:
    content = change(report(given, path))
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
  with pytest.raises(schema.ConfigError, match=message):
    evaluate(given, path, *(s.format(given) for s in specs), **data)


def test_what_was_converted_has_no_known_training_text(given, tmp_path):
  report(given, path := tmp_path / "o.json")
  meta = checkpoint.load_meta(str(given / "run"), None)
  meta.fingerprint = checkpoint.CONVERTED
  with pytest.raises(schema.ConfigError, match="trained on is unknown"):
    corpora.prepare(
      *("run", meta),
      specs=[],
      stride=None,
      batch_size=None,
      data={},
      overlap=str(path),
    )


def test_command(given, tmp_path):
  """A flag with or without its value."""
  config = tmp_path / "config.py"
  config.write_text(
    "from lm import config as config_lib\n"
    "def get_config():\n"
    "  config = config_lib.Config()\n"
    "  config.tokenizer.kind = 'bytes'\n"
    "  config.model.vocab_size = 384\n"
    f"  config.data.train = ('text:{given}/train.txt',)\n"
    f"  config.data.validation = ('text:{given}/held.txt',)\n"
    "  return config\n"
  )
  for i, flag in enumerate(["--overlap", "--overlap=15"]):
    arguments = [f"--config={config}", flag, f"--output={tmp_path}/{i}.json"]
    ended = doors.run("lm.data", arguments, str(tmp_path))
    assert ended.code == 0, ended.err
    assert ("1 100.0%" in ended.out) == (i == 0)
  found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
  assert [f["n"] for f in found] == [13, 15]
  assert [f["sources"][0]["n_touched"] for f in found] == [1, 0]
