"""Comparison of runs: the bootstrap against closed forms, then the command."""

import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import rich.console
import saved_runs
from matplotlib import figure as figure_lib
from scipy import stats

from lm import checkpoint, cli, schema
from lm import config as config_lib
from lm.data import overlap_report, tokenizer_training
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import bootstrap, compare, compare_output, corpora
from lm.evaluate import output as output_lib


def documents(rng, n, sigma=0.5):
  """Bytes of documents, log-normal."""
  return np.exp(rng.normal(7, sigma, n)).astype(np.int64) + 1


def difference(rng, n_bytes, mean, noise):
  """Bits of each document: `mean` per byte; noise of a document's own rate."""
  return (mean + rng.normal(0, noise, len(n_bytes))) * n_bytes


def estimate(values, n_bytes, sizes=None, seed=0):
  sizes = [len(n_bytes)] if sizes is None else sizes
  n = bootstrap.N_RESAMPLES
  return bootstrap.ratios(values[None], n_bytes, sizes, n, seed)[0]


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(bootstrap, "N_RESAMPLES", 999)


def within(share, expected, n):
  """Whether `share` of n trials is plausible: four standard deviations."""
  return abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)


# --- the bootstrap -----------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 0.01, 0.02])
def test_runs_are_told_apart_as_often_as_the_closed_form_says(mean, quick):
  """With 80 documents of one length: the power of the paired t-test, from the
  noncentral t distribution; at no difference, 5 %.
  """
  n, noise, trials = 80, 0.05, 400
  rng = np.random.default_rng(7)
  n_bytes = np.full(n, 1000)
  told = np.mean(
    [
      estimate(difference(rng, n_bytes, mean, noise), n_bytes, seed=i).p <= 0.05
      for i in range(trials)
    ]
  )
  limit = stats.t.ppf(0.975, n - 1)
  shifted = stats.nct(n - 1, mean / noise * np.sqrt(n))
  power = shifted.sf(limit) + shifted.cdf(-limit)
  assert mean or power == pytest.approx(0.05)
  assert within(told, power, trials), (told, power)


@pytest.mark.parametrize(
  ("n", "sigma", "least"), [(20, 0.5, 0.95), (20, 1.5, 0.92), (200, 1.5, 0.94)]
)
def test_intervals_cover_the_truth_with_heavy_tailed_lengths(
  n, sigma, least, quick
):
  trials = 400
  rng = np.random.default_rng(3)
  covered = 0
  for i in range(trials):
    n_bytes = documents(rng, n, sigma)
    found = estimate(difference(rng, n_bytes, 0.02, 0.05), n_bytes, seed=i)
    covered += found.low <= 0.02 <= found.high
  share = covered / trials
  assert share > 0.95 or within(share, least, trials), share


def test_interval_of_many_documents_is_the_delta_methods():
  """Of two sources: the variance of a stratified ratio, written out."""
  rng = np.random.default_rng(0)
  sizes = [700, 400]
  n_bytes = documents(rng, sum(sizes))
  values = difference(rng, n_bytes, 0.02, 0.05)
  values[700:] += 0.3 * n_bytes[700:]
  found = estimate(values, n_bytes, sizes)
  ratio = values.sum() / n_bytes.sum()
  variance = sum(
    n * np.var((values - ratio * n_bytes)[part], ddof=1)
    for part, n in zip((slice(700), slice(700, None)), sizes, strict=True)
  )
  half = 1.96 * np.sqrt(variance) / n_bytes.sum()
  assert found.value == pytest.approx(ratio)
  assert found.high - found.low == pytest.approx(2 * half, rel=0.04)
  assert found.low + found.high == pytest.approx(2 * ratio)
  # Unstratified, the difference of the sources would count as noise.
  mixed = estimate(values, n_bytes)
  assert mixed.high - mixed.low > 1.8 * (found.high - found.low)


@pytest.mark.parametrize("mean", [0.004, 0.01, 0.012])
def test_interval_and_p_value_agree(mean):
  rng = np.random.default_rng(1)
  n_bytes = documents(rng, 90)
  found = estimate(difference(rng, n_bytes, mean, 0.05), n_bytes)
  assert (found.low <= 0 <= found.high) == (found.p > 0.05)
  t = found.value * 2 * 1.99 / (found.high - found.low)
  assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 89), abs=0.03)


def test_a_difference_without_variance():
  n_bytes = documents(np.random.default_rng(0), 30)
  same = estimate(np.zeros(30), n_bytes)
  assert same == (0, 0, 0, 1)
  # Per byte each document differs by a power of two: residuals are 0.
  found = estimate(n_bytes / 64, n_bytes)
  assert found[:3] == (1 / 64,) * 3 and found.p == 1 / 10_000


def test_rows_share_resamples_and_seeds_are_fixed():
  rng = np.random.default_rng(0)
  n_bytes = documents(rng, 40)
  a, b = (difference(rng, n_bytes, m, 0.1) for m in (1.0, 1.1))

  def ratios(**seed):
    return bootstrap.ratios(np.stack([a, b]), n_bytes, [40], 9_999, **seed)

  assert ratios() == ratios()
  assert ratios() == [estimate(a, n_bytes), estimate(b, n_bytes)]
  assert ratios() != ratios(seed=1)


def test_chunks_change_nothing(monkeypatch, quick):
  rng = np.random.default_rng(0)
  n_bytes = documents(rng, 40)
  values = difference(rng, n_bytes, 1.0, 0.1)
  whole = estimate(values, n_bytes)
  monkeypatch.setattr(bootstrap, "_CHUNK", 7 * 40)
  np.testing.assert_allclose(estimate(values, n_bytes), whole, rtol=1e-12)


def test_huge_sources_have_fewer_resamples():
  n = {d: bootstrap.n_resamples(d) for d in (20, 40_000, 200_000, 10**9)}
  assert n == {20: 9_999, 40_000: 9_999, 200_000: 1_999, 10**9: 999}


def test_holm_by_hand():
  """Of four: times 4, 3, 2, 1 in ascending order, never falling."""
  found = bootstrap.holm([0.04, 0.01, 0.03, 0.005])
  np.testing.assert_allclose(found, [0.06, 0.03, 0.06, 0.02])
  assert bootstrap.holm([0.6, 0.7]) == [1.0, 1.0]
  assert bootstrap.holm([]) == []


# --- runs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Uniform runs `bytes` and `pieces` of other tokenizers and contexts, a run
  `random` of random weights, and two runs of other validation documents; beside
  them files of 40 and 25 lines.
  """
  folder = tmp_path_factory.mktemp("runs")
  rng = np.random.default_rng(0)
  words = "naïve café def return x = 日本 the of a value".split()
  for name, n in (("a.txt", 40), ("b.txt", 25)):
    lines = [" ".join(rng.choice(words, rng.integers(1, 20))) for _ in range(n)]
    (folder / name).write_text("\n".join(lines))
  sources = tuple(f"text:{folder}/{name}.txt" for name in "ab")
  config = config_lib.Config()
  config.model.vocab_size = 390
  text = (folder / "a.txt").read_text()
  pieces = tokenizer_training.train(config, [text] * 9)
  alphabet = tokenizer_lib.Tokenizer()
  lines = {"text_unit": "line", "train": (f"text:{folder}/train.txt",)}
  saved_runs.save(folder / "bytes", alphabet, 11, sources, **lines)
  saved_runs.save(folder / "pieces", pieces, 7, sources, **lines)
  saved_runs.save(
    folder / "random", alphabet, 11, sources, uniform=False, **lines
  )
  saved_runs.save(folder / "files", alphabet, 11, sources, text_unit="file")
  saved_runs.save(folder / "one", alphabet, 11, sources[:1], **lines)
  # Training has the first three lines of a.txt.
  text = "\n".join((folder / "a.txt").read_text().split("\n")[:3])
  (folder / "train.txt").write_text(text)
  return folder


def lines(runs, name):
  return (runs / f"{name}.txt").read_text().split("\n")


def names(runs, *some):
  return [str(runs / name) for name in some]


def test_runs_of_other_tokenizers_by_hand(runs, quick):
  """Uniform predictions cost log2 V bits a token, eos included."""
  found = compare.compare(names(runs, "bytes", "pieces@7"))
  config = checkpoint.load_meta(str(runs / "pieces")).tokenizer
  pieces = tokenizer_lib.Tokenizer.from_json(config)
  alphabet = tokenizer_lib.Tokenizer()
  assert [row.source for row in found.rows] == [*found.documents, "total"]
  for row, texts in zip(
    found.rows,
    (lines(runs, "a"), lines(runs, "b"), lines(runs, "a") + lines(runs, "b")),
    strict=True,
  ):
    n_bytes = sum(len(text.encode()) for text in texts)
    assert (row.n_documents, row.n_bytes) == (len(texts), n_bytes)
    wanted = [
      math.log2(t.size) * sum(len(t.encode(s)) + 1 for s in texts) / n_bytes
      for t in (alphabet, pieces)
    ]
    for estimate, value in zip(row.bits_per_byte, wanted, strict=True):
      assert estimate.value == pytest.approx(value, rel=1e-5)
      assert estimate.low < value < estimate.high
    first, second = row.difference
    assert first is None and row.p_holm[0] is None
    assert second.value == pytest.approx(wanted[1] - wanted[0], rel=1e-4)
    assert second.high < 0 and second.p == pytest.approx(0.001)
  assert found.overall.p_holm == [None, pytest.approx(0.001)]
  assert found.rows[0].p_holm[1] == pytest.approx(0.002)  # of two sources
  said = compare.verdict(found, found.overall, 1)
  assert f"pieces@7 is better than {runs}/bytes by" in said


def test_files_of_scores_compare_as_their_runs_do(runs, tmp_path, quick):
  a, b = names(runs, "bytes", "random")
  from_runs = compare.compare([a, b])
  files = []
  for name in (a, b):
    evaluation = corpora.evaluate(
      name,
      specs=[],
      step=None,
      stride=None,
      batch_size=None,
      data={},
      output=None,
    )
    files.append(str(tmp_path / f"{os.path.basename(name)}.json"))
    output_lib.write(evaluation, files[-1], documents=True)
  for given in (files, [a, files[1]], [files[0], b]):
    assert compare.compare(given).rows == from_runs.rows
  for options in (
    {"stride": 3},
    {"batch_size": 1},
    {"data": {"cache_dir": "d"}},
  ):
    with pytest.raises(schema.ConfigError, match="names files alone"):
      compare.compare(files, **options)
  (one,) = compare.compare(files, specs=[f"text:{runs}/b.txt"]).rows
  assert one.difference == from_runs.rows[1].difference
  with pytest.raises(schema.ConfigError, match="are the same scores"):
    compare.compare([a, files[0]])
  with pytest.raises(schema.ConfigError, match="has no scores of 'text:x'"):
    compare.compare(files, specs=["text:x"])
  content = json.loads((tmp_path / "bytes.json").read_text())
  content["sources"][0]["documents"][3]["n_bytes"] += 1
  (tmp_path / "other.json").write_text(json.dumps(content))
  with pytest.raises(schema.ConfigError, match="other documents, .*a.txt:4'"):
    compare.compare([str(tmp_path / "other.json"), b])
  content["sources"][0]["documents"][3]["n_bytes"] -= 1
  content["sources"][0]["documents"][3]["nll"] = None
  (tmp_path / "other.json").write_text(json.dumps(content))
  with pytest.raises(schema.RunError, match="loss of .*a.txt:4.* not finite"):
    compare.compare([str(tmp_path / "other.json"), b])
  output_lib.write(evaluation, files[0], documents=False)
  with pytest.raises(schema.ConfigError, match="not scores of documents"):
    compare.compare([files[0], b])
  content["sources"][0]["documents"][3]["nll"] = 10**400
  for text in ("[1]", 100_000 * "[", json.dumps(content)):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(schema.ConfigError, match="not scores of documents"):
      compare.compare([str(tmp_path / "other.json"), b])


def test_a_source_named_twice_is_compared_once(runs, tmp_path, quick):
  twice = [f"text:{runs}/a.txt"] * 2
  tokenizer, lines = tokenizer_lib.Tokenizer(), {"text_unit": "line"}
  saved = [
    saved_runs.save(tmp_path / name, tokenizer, 11, twice, **lines)
    for name in ("one", "two")
  ]
  (row,) = compare.compare([str(name) for name in saved]).rows
  wanted = compare.compare(names(runs, "bytes", "random"), specs=twice[:1])
  assert row.n_documents == wanted.rows[0].n_documents


def test_three_runs_are_corrected_and_drawn(runs, tmp_path, quick):
  found = compare.compare(names(runs, "bytes", "pieces", "random"))
  console = rich.console.Console(file=io.StringIO(), width=160)
  compare_output.show(found, console)
  said = console.file.getvalue()
  assert (
    "corrected (Holm) for the 4 differences by source and for the 2" in said
  )
  for k in (1, 2):
    assert compare.verdict(found, found.overall, k) in said
  picture = tmp_path / "compare.png"
  compare_output.draw(found, str(picture))
  assert picture.read_bytes().startswith(b"\x89PNG")
  path = tmp_path / "compare.json"
  compare_output.write(found, str(path), documents=True)
  content = json.loads(path.read_text())
  for run, about in zip(found.runs, content["runs"], strict=True):
    assert about["name"] == run.name and about["tokenizer"]["fingerprint"]
  row = content["rows"][-1]["runs"][2]
  wanted = found.overall.difference[2]
  assert row["difference"]["value"] == wanted.value
  assert (row["difference"]["low"], row["difference"]["high"]) == wanted[1:3]
  documents = [d for part in content["documents"].values() for d in part]
  nll = np.sum([d["nll"] for d in documents], 0)
  n_bytes = sum(d["n_bytes"] for d in documents)
  np.testing.assert_allclose(
    nll / math.log(2) / n_bytes,
    [e.value for e in found.overall.bits_per_byte],
  )


def test_a_picture_shows_names_as_they_are(runs, tmp_path, monkeypatch, quick):
  """Matplotlib takes what is between two $ for a formula, mostly a wrong one,
  and leaves a name that begins with _ out of a legend.
  """
  found = compare.compare(names(runs, "bytes", "random"))
  for k, name in enumerate(["_a", "$x_$"]):
    found.runs[k].name = name
  found.rows[0].source = "text:$^$/*.txt"
  drawn, save = [], figure_lib.Figure.savefig
  monkeypatch.setattr(
    figure_lib.Figure,
    "savefig",
    lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)),
  )
  compare_output.draw(found, str(tmp_path / "a.png"))
  labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
  assert labels == ["_a", r"\$x_\$"]


def test_overlaps_stand_beside_the_sources(runs, tmp_path, quick):
  a, b = names(runs, "bytes", "random")
  config = checkpoint.load_meta(a).config
  overlap_report.report(config, 2, output=str(tmp_path / "overlap.json"))
  path = str(tmp_path / "overlap.json")
  found = compare.compare([a, b], overlap=path)
  assert list(found.overlap) == list(found.documents)
  share = found.overlap[found.rows[0].source].of_bytes
  assert 0 < share < 1
  console = rich.console.Console(file=io.StringIO(), width=300)
  compare_output.show(found, console)
  assert f"{share:.1%} overlap with training text" in console.file.getvalue()
  compare_output.write(found, str(tmp_path / "c.json"), documents=False)
  rows = json.loads((tmp_path / "c.json").read_text())["rows"]
  assert rows[0]["share_of_bytes_in_training"] == share
  assert "share_of_bytes_in_training" not in rows[-1]  # the total


def test_runs_that_differ_by_luck_are_not_told_apart(quick):
  rng = np.random.default_rng(5)
  n_bytes = documents(rng, 60, sigma=1)
  listed = [compare.Document(f"doc{i}", int(n)) for i, n in enumerate(n_bytes)]
  a = n_bytes * rng.normal(1, 0.1, 60)
  runs = [
    compare.Run("a", (), {}, nll={"s": a}),
    compare.Run("b", (), {}, nll={"s": a + n_bytes * rng.normal(0, 0.05, 60)}),
    compare.Run("c", (), {}, nll={"s": a + n_bytes * 0.02}),
  ]
  found = compare.summarise(runs, {"s": listed}, seed=0)
  (row,) = found.rows  # of one source there is no total beside it
  assert "a and b are not told apart" in compare.verdict(found, row, 1)
  assert "c is worse than a by 0.0289 bits" in compare.verdict(found, row, 2)
  method = compare_output.method(found)
  assert "(Holm) for the 2 differences by source; each" in method


@pytest.mark.parametrize(
  ("given", "options", "message"),
  [
    (["bytes"], {}, "--compare: 1 run given; name two or more"),
    (["bytes", "none"], {}, "--compare=.*none: .*has no checkpoint; name"),
    (["bytes", "pieces@6"], {}, r"no checkpoint of step 6; it has \[7\]"),
    (["bytes", "bytes@7"], {}, "bytes and .*bytes@7 are the same scores"),
    (["bytes", "../runs0/bytes"], {}, "are the same scores"),
    (["bytes", "pieces"], {"specs": ["text:{}/a.txt|fim"]}, "objective"),
    (["bytes", "pieces"], {"data": {"text_unit": "file"}}, "1 document with"),
    (["bytes", "pieces"], {"specs": ["text:{}/none"]}, "no file matches"),
    (["bytes", "pieces"], {"stride": 9}, "--stride=9: must be from 1 to .*=7"),
    (["bytes", "files"], {}, "other documents, .*a.txt:1' of"),
    (["bytes", "one"], {}, "one on .*name the sources by --source"),
  ],
)
def test_mistakes_are_found_before_parameters_are_loaded(
  runs, monkeypatch, given, options, message
):
  monkeypatch.setattr(checkpoint, "load_params", None)
  options = dict(options)
  if "specs" in options:
    options["specs"] = [s.format(runs) for s in options["specs"]]
  given = [n.replace("runs0", runs.name) for n in given]
  with pytest.raises(schema.ConfigError, match=message):
    compare.compare(names(runs, *given), **options)


def test_command(runs, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "lm.evaluate"),
      *("--compare", "bytes", "random", f"--source=text:{runs}/a.txt"),
      f"--output={tmp_path}/compare.json",
      f"--draw={tmp_path}/compare.png",
    ],
    cwd=runs,
    capture_output=True,
    text=True,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "COLUMNS": "140",
      "PYTHONPATH": os.path.dirname(os.path.dirname(__file__)),
    },
  )
  assert done.returncode == 0, done.stderr
  content = json.loads((tmp_path / "compare.json").read_text())
  assert content["verdicts"][0] in done.stdout
  assert content["n_resamples"] == 9_999
  assert [run["name"] for run in content["runs"]] == ["bytes", "random"]
  assert {p.name for p in tmp_path.iterdir()} == {
    "compare.json",
    "compare.png",
  }


def test_values_of_a_list_flag_are_spread():
  def spread(*arguments):
    return cli.spread(arguments, ["compare"])

  assert spread("p", "--compare", "a", "b", "--x", "c") == [
    *("p", "--compare=a", "--compare=b", "--x", "c")
  ]
  assert spread("p", "--compare=a", "b") == ["p", "--compare=a", "--compare=b"]
  # Without a value the parser of flags complains.
  assert spread("p", "--compare", "--x=1") == ["p", "--compare", "--x=1"]
  assert spread("p", "--compare") == ["p", "--compare"]
