"""Sources: documents by index, and a clear message for each bad input."""

import gzip
import json
import pathlib
import pickle
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard

from lm import config as config_lib
from lm.data import sources


def data_config(tmp_path, **fields) -> config_lib.DataConfig:
  return config_lib.DataConfig(cache_dir=str(tmp_path / "cache"), **fields)


def read(source) -> list[tuple[str, str]]:
  documents = (source[i] for i in range(len(source)))
  return [tuple(d) for d in documents if d is not None]


# --- text and JSON lines -----------------------------------------------------

TEXT = "one\n two\r\n\n  \nthree \u00e9\n\n\nfour\nfive"


@pytest.mark.parametrize(
  "unit, expected",
  [
    ("file", {"": TEXT}),
    (
      "line",
      {
        ":1": "one",
        ":2": " two",
        ":5": "three \u00e9",
        ":8": "four",
        ":9": "five",
      },
    ),
    ("block", {":1": "one\n two", ":5": "three \u00e9", ":8": "four\nfive"}),
  ],
)
def test_text_units(tmp_path, unit, expected):
  path = tmp_path / "a.txt"
  path.write_bytes(TEXT.encode())
  data = data_config(tmp_path, text_unit=unit)
  source = sources.open_source(f"text:{path}", data)
  assert dict(read(source)) == {f"{path}{k}": v for k, v in expected.items()}


def test_files_come_in_the_order_of_their_names_and_folders_are_left_out(
  tmp_path,
):
  for name in ("b.txt", "a.txt", "deep/c.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  source = sources.open_source(f"text:{tmp_path}/**/*", data_config(tmp_path))
  assert [text for _, text in read(source)] == ["a.txt", "b.txt", "deep/c.txt"]


def compress(path: pathlib.Path, raw: bytes) -> None:
  if path.suffix == ".gz":
    raw = gzip.compress(raw)
  elif path.suffix == ".zst":
    raw = zstandard.compress(raw)
  path.write_bytes(raw)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_at_random_and_in_order(tmp_path, suffix, monkeypatch):
  """More documents than the index remembers offsets, over two files."""
  texts = [f"line {i}\n\u00e9{'x' * (i % 7)}" for i in range(701)]
  for name, part in (("a", texts[:601]), ("b", texts[601:])):
    lines = [json.dumps({"id": 1, "content": t}) + "\n" for t in part]
    lines.insert(5, "\n")  # A blank line is no document.
    compress(tmp_path / f"{name}.jsonl{suffix}", "".join(lines).encode())
  spec = f"jsonl:{tmp_path}/*.jsonl{suffix}#content"
  source = sources.open_source(spec, data_config(tmp_path))
  assert len(source) == 701
  assert [text for _, text in read(source)] == texts
  for i in (700, 0, 600, 601, 255, 256, 257, 3):
    assert source[i].text == texts[i]
  assert source[7].name == f"{tmp_path}/a.jsonl{suffix}:9"
  again = pickle.loads(pickle.dumps(source))
  assert again[300].text == texts[300]
  # In order, each file is opened twice: for the index and for its texts.
  opened, open_file = [], sources._open
  monkeypatch.setattr(
    sources, "_open", lambda *a: opened.append(a[0]) or open_file(*a)
  )
  read(sources.open_source(spec, data_config(tmp_path)))
  assert len(opened) == 4
  with pytest.raises(IndexError):
    source[701]


@pytest.mark.parametrize("unit", ["file", "line"])
def test_invalid_utf8_by_policy(tmp_path, unit):
  path = tmp_path / "a.txt"
  path.write_bytes(b"good\nba\xffd\ngood")
  spec = f"text:{path}"

  def texts(policy):
    data = data_config(tmp_path, text_unit=unit, invalid_utf8=policy)
    return [text for _, text in read(sources.open_source(spec, data))]

  with pytest.raises(
    config_lib.ConfigError, match=r"a.txt: invalid UTF-8 at byte 7;.*'skip'"
  ):
    texts("error")
  replaced = ["good", "ba\ufffdd", "good"]
  assert texts("replace") == (
    ["\n".join(replaced)] if unit == "file" else replaced
  )
  assert texts("skip") == ([] if unit == "file" else ["good", "good"])


def test_json_may_spell_half_a_surrogate_pair(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"t": "ok"}\n{"t": "x\\ud83d"}\n')
  source = sources.open_source(f"jsonl:{path}#t", data_config(tmp_path))
  with pytest.raises(config_lib.ConfigError, match=r"a.jsonl:2: invalid UTF-8"):
    read(source)


@pytest.mark.parametrize(
  "content, message",
  [
    ('{"t": "a"}\n{"t": ', r"a.jsonl:2: invalid JSON.* at column 7"),
    ('{"t": "a"}\n\n{"u": 1}', r"a.jsonl:3: no text field 't'.*'u'"),
    ('{"t": 1}', r"a.jsonl:1: no text field 't'"),
    ("[1]", r"a.jsonl:1: no text field 't'"),
  ],
)
def test_bad_json_lines_name_file_and_line(tmp_path, content, message):
  path = tmp_path / "a.jsonl"
  path.write_text(content)
  source = sources.open_source(f"jsonl:{path}#t", data_config(tmp_path))
  with pytest.raises(config_lib.ConfigError, match=message):
    read(source)


@pytest.mark.parametrize(
  "spec, message",
  [
    ("quickstart", "malformed; write tfds:NAME.*text:GLOB.*jsonl:GLOB#FIELD"),
    ("jsonl:a.jsonl", "malformed"),
    ("tfds:python_stdlib", "malformed"),
    ("text:absent/*.txt", "no file matches 'absent/"),
    ("jsonl:absent.gz#t", "no file matches 'absent.gz'"),
    ("tfds:no_such_dataset:train", "unknown dataset: .*no_such_dataset"),
  ],
)
def test_bad_specs_write_nothing(tmp_path, spec, message):
  with pytest.raises(config_lib.ConfigError, match=message) as error:
    sources.open_source(spec, data_config(tmp_path))
  assert repr(spec) in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_corpus_without_documents_is_empty(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("\n \n")
  data = data_config(tmp_path, text_unit="line")
  with pytest.raises(config_lib.ConfigError, match="empty"):
    sources.open_source(f"text:{path}", data)


def test_the_fingerprint_follows_contents_and_options(tmp_path):
  path = tmp_path / "a.txt"

  def fingerprint(text, **fields):
    path.write_text(text)
    data = data_config(tmp_path, **fields)
    return sources.open_source(f"text:{path}", data).fingerprint()

  first = fingerprint("abc")
  assert fingerprint("abc") == first
  others = [
    fingerprint("abd"),
    fingerprint("abc", text_unit="line"),
    fingerprint("abc", invalid_utf8="skip"),
  ]
  assert len({first, *others}) == 4


def test_a_large_corpus_is_known_by_size_and_time(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_HASHED_BYTES", 2)
  path = tmp_path / "a.txt"
  path.write_text("abc")
  source = sources.open_source(f"text:{path}", data_config(tmp_path))
  first = source.fingerprint()
  assert source.fingerprint() == first
  path.touch()
  assert source.fingerprint() != first


# --- TFDS --------------------------------------------------------------------


class Toy(tfds.core.GeneratorBasedBuilder):
  """Three documents, one of which is not UTF-8."""

  VERSION = tfds.core.Version("1.0.0")
  # TFDS looks for a package around the builder, and here is none.
  code_path = None
  pkg_dir_path = pathlib.Path(__file__).parent

  def _info(self):
    features = {
      "body": tfds.features.Text(),
      "n": tfds.features.Scalar(np.int64),
    }
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i, body in enumerate([b"first", b"caf\xe9", b"third"]):
      yield i, {"body": body, "n": i}


def test_any_tfds_dataset_reads_by_its_name(tmp_path):
  data = data_config(tmp_path, invalid_utf8="replace")
  spec = "tfds:toy:train#body"
  source = sources.open_source(spec, data)
  documents = read(source)
  assert {text for _, text in documents} == {"first", "caf\ufffd", "third"}
  assert documents[2][0] == f"{spec}[2]"
  assert pickle.loads(pickle.dumps(source))[1] == source[1]
  part = sources.open_source("tfds:toy:train[:2]#body", data)
  assert read(part)[0][1] == documents[0][1] and len(part) == 2
  assert part.fingerprint() != source.fingerprint()

  strict = sources.open_source(spec, data_config(tmp_path))
  with pytest.raises(config_lib.ConfigError, match=r"body\[\d\]: inv.* byte 3"):
    read(strict)
  for spec, message in (
    ("tfds:toy:train", "no feature 'text'; the dataset has body, n"),
    ("tfds:toy:test#body", "no split 'test'; the dataset has train"),
    ("tfds:toy/big:train#body", "unknown dataset"),
  ):
    with pytest.raises(config_lib.ConfigError, match=message):
      sources.open_source(spec, data)
  numbers = sources.open_source("tfds:toy:train#n", data)
  with pytest.raises(config_lib.ConfigError, match="'n' is not text"):
    read(numbers)


def test_python_stdlib_is_this_interpreters_library(tmp_path, capfd):
  data = data_config(tmp_path)
  train, validation = (
    dict(read(sources.open_source(f"tfds:python_stdlib:{split}", data)))
    for split in ("train", "validation")
  )
  assert "ing dataset" not in "".join(capfd.readouterr())  # TFDS is quiet.
  assert 400 < len(train) + len(validation) < 1000
  assert 0.02 < len(validation) / (len(train) + len(validation)) < 0.08
  assert not train.keys() & validation.keys()
  everything = {**train, **validation}
  assert "argparse.py" in everything and "json/decoder.py" in everything
  parts = {part for name in everything for part in name.split("/")[:-1]}
  assert not parts & {"site-packages", "test", "tests", "idlelib"}
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  for name in ("argparse.py", "json/decoder.py"):
    assert everything[name] == (root / name).read_text("utf-8")
  builds = [p.name for p in (tmp_path / "cache/tfds/python_stdlib").iterdir()]
  assert any(sysconfig.get_python_version() in name for name in builds)


# --- the lock ----------------------------------------------------------------

HOLD = """
import sys, time
from lm.data import sources
with sources.exclusive(sys.argv[1]):
  print("held", flush=True)
  time.sleep(float(sys.argv[2]))
"""


def test_the_lock_leaves_nothing_and_dies_with_its_process(tmp_path):
  directory = tmp_path / "cache"
  command = [sys.executable, "-c", HOLD, str(directory)]
  holder = subprocess.Popen(
    [*command, "600"], stdout=subprocess.PIPE, text=True
  )
  assert holder.stdout is not None and holder.stdout.readline() == "held\n"
  waiter = subprocess.Popen(
    [*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert waiter.stderr is not None
  assert "waiting for another process" in waiter.stderr.readline()
  holder.kill()
  holder.communicate()
  assert waiter.communicate(timeout=30)[0] == "held\n"
  assert not directory.exists()
