"""Token stores: whole or absent, exact, and prepared by one process."""

import gzip
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import doors
import numpy as np
import pyarrow
import pytest
import tensorstore
from pyarrow import parquet

from lm import config as config_lib
from lm import schema
from lm.data import __main__ as data_command
from lm.data import (
  arrays,
  reading,
  sources,
  tables,
  tokenizer_cache,
  tokenizer_training,
)
from lm.data import store as store_lib
from lm.data import tokenizer as tokenizer_lib

TEXTS = [f"document {i}\n" + "\u00e9\u2581 " * (i % 13) for i in range(53)]


def make_config(tmp_path, texts=TEXTS, **data) -> config_lib.Config:
  """A config over one document per line of a JSON file, in bytes."""
  path = tmp_path / "train.jsonl"
  path.write_text("".join(json.dumps({"t": t}) + "\n" for t in texts))
  config = config_lib.Config()
  config.model.vocab_size = tokenizer_lib.BYTES_SIZE
  config.tokenizer.kind = "bytes"
  config.data.train = (f"jsonl:{path}#t",)
  config.data.validation = ()
  config.data.cache_dir = str(tmp_path / "cache")
  for name, value in data.items():
    setattr(config.data, name, value)
  return config


def contents(store) -> list[list[int]]:
  return [store.document(i).tolist() for i in range(store.n_documents)]


def document_names(store) -> list[str]:
  return [store.name(i) for i in range(store.n_documents)]


@pytest.mark.parametrize("size, dtype", [(384, "uint16"), (65537, "uint32")])
def test_documents_come_back_exactly(tmp_path, monkeypatch, size, dtype):
  # Several chunks, shards and batches of text.
  monkeypatch.setattr(arrays, "CHUNK", 16)
  monkeypatch.setattr(arrays, "SHARD", 128)
  monkeypatch.setattr(store_lib, "_BATCH_CHARACTERS", 100)
  pieces = [b""] * size
  monkeypatch.setattr(
    tokenizer_lib.Tokenizer, "size", property(lambda _: len(pieces))
  )
  tokenizer = tokenizer_lib.Tokenizer()
  config = make_config(tmp_path, [*TEXTS, ""])
  (store,) = store_lib.prepare_sources(
    config.data.train, tokenizer, config.data
  )
  array = pathlib.Path(store.path, "tokens", "zarr.json")
  assert json.loads(array.read_text())["data_type"] == dtype
  expected = [
    [tokenizer.bos, *tokenizer.encode(t), tokenizer.eos] for t in TEXTS
  ]
  assert contents(store) == expected  # An empty document is left out.
  flat = sum(expected, [])
  assert store.n_tokens == len(flat) and store.n_documents == 53
  assert store.ends.tolist() == np.cumsum([len(e) for e in expected]).tolist()
  assert store.document_bytes.tolist() == [len(t.encode()) for t in TEXTS]
  assert store.n_bytes == sum(len(t.encode()) for t in TEXTS)
  path = config.data.train[0][len("jsonl:") : -len("#t")]
  assert document_names(store) == [f"{path}:{i + 1}" for i in range(53)]

  numbers = [i for i, e in enumerate(expected) for _ in e]
  for start, length in ((0, 7), (119, 211), (len(flat) - 3, 11)):
    tokens, documents = store.window(start, length)
    part = flat[start : start + length]
    padding = [0] * (length - len(part))
    assert tokens.tolist() == part + padding
    first = numbers[start]
    inside = [n - first + 1 for n in numbers[start : start + length]]
    assert documents.tolist() == inside + padding


def test_the_command_names_the_documents_to_look_at(tmp_path, capsys):
  texts = ["plain text " * 9, "a", "\U0001f600" * 20, "text " * 30, "b", "c"]
  config = make_config(tmp_path, texts)
  config.train.sequence_length = 83
  data_command.describe(config)
  table, longest, lines = capsys.readouterr().out.partition("  longest")
  assert "33%" in table  # Two of six, bos and eos counted.
  path = config.data.train[0][len("jsonl:") : -len("#t")]
  assert (longest + lines).splitlines()[:2] == [
    f"  longest: '{path}:4', 152 tokens, {150 / 152:.3f} bytes/token",
    # Of the longer half: "a", "b" and "c" have fewer yet.
    f"  fewest bytes/token: '{path}:3', 82 tokens, {80 / 82:.3f} bytes/token",
  ]


def test_a_second_preparation_only_opens(tmp_path, monkeypatch):
  config = make_config(tmp_path)
  first = store_lib.prepare(config)
  monkeypatch.setattr(store_lib, "_build", None)
  # Nor does it need to write, as on a cache that many machines share.
  monkeypatch.setattr(store_lib.locks, "exclusive", None)
  again = store_lib.prepare(config)
  assert again.train[0].path == first.train[0].path
  assert contents(again.train[0]) == contents(first.train[0])
  make_config(tmp_path, TEXTS[1:])
  with pytest.raises(TypeError):  # Other contents, another store.
    store_lib.prepare(config)


def test_the_tokenizer_is_trained_once_on_a_spread_of_documents(
  tmp_path, monkeypatch
):
  words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
  texts = [f"{words[i % 10]} {words[i * 7 % 9]} {i:04d}" for i in range(997)]
  config = make_config(tmp_path, texts)
  config.tokenizer.kind = "sentencepiece"
  config.model.vocab_size = 397
  config.tokenizer.train_bytes = 5000
  read = []
  train = tokenizer_training.train

  def spy(config, texts):
    read.extend(texts)
    return train(config, texts)

  monkeypatch.setattr(tokenizer_training, "train", spy)
  prepared = store_lib.prepare(config)
  again = store_lib.prepare(config)
  assert again.tokenizer.fingerprint == prepared.tokenizer.fingerprint
  total = sum(len(t.encode()) for t in read)
  assert 4900 < total <= 5000  # The last one is cut; read once, not twice.
  places = np.array([int(t[-4:]) for t in read[:-1]])
  assert len(set(places)) == len(places)
  counts = np.histogram(places, bins=10, range=(0, 997))[0]
  assert counts.max() - counts.min() <= 3
  config.tokenizer.train_bytes = 6000
  other = store_lib.prepare(config)
  assert other.tokenizer.fingerprint != prepared.tokenizer.fingerprint
  # A chat template needs no other training.
  monkeypatch.setattr(tokenizer_training, "train", None)
  template = tmp_path / "chat.jinja"
  template.write_text("<user>")
  config.tokenizer.chat_template = str(template)
  talker = store_lib.prepare(config).tokenizer
  assert talker.chat_template == "<user>"
  assert talker.model == other.tokenizer.model


@pytest.mark.parametrize("name", ["jsonl.gz", "parquet"])
def test_a_sample_of_text_reads_files_a_few_times(tmp_path, monkeypatch, name):
  """Of each of 8 files, not once for each of some 1,000 documents."""
  texts = [f"{i:04d}{'x' * (i % 29)}" for i in range(3001)]
  for k in range(8):
    part = texts[k * 400 : (k + 1) * 400 if k < 7 else None]
    if name == "parquet":
      path = str(tmp_path / f"{k}.parquet")
      parquet.write_table(pyarrow.table({"t": part}), path)
    else:
      lines = "".join(json.dumps({"t": t}) + "\n" for t in part)
      (tmp_path / f"{k}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
  spec = f"{name.split('.')[0]}:{tmp_path}/*.{name}#t"
  source = sources.open_source(spec, config_lib.DataConfig())
  # Each a step of the golden section of 3001, a prime, after the one before.
  expected, left = [], 18_000
  for k in range(3001):
    text = texts[k * 1855 % 3001][:left]
    expected.append(text)
    left -= len(text)
    if not left:
      break
  assert len(expected) > 900
  calls = []
  where = (
    (tables.TableSource, "_read") if name == "parquet" else (reading, "opened")
  )
  read = getattr(*where)
  monkeypatch.setattr(*where, lambda *a: calls.append(a) or read(*a))
  found = list(tokenizer_cache._sample([source], 18_000))
  assert found == expected or found == [*expected, ""]
  assert len(calls) <= 6 * 8


# --- damage, and disks that fail ---------------------------------------------


@pytest.fixture
def uncached(monkeypatch):
  """Each read is one of the disk, as in a process that has just started."""
  fresh = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
  monkeypatch.setattr(arrays, "_CONTEXT", fresh)


def everything(store) -> tuple:
  return (
    *(store.spec, store.fingerprint, store.n_bytes, store.n_tokens),
    *(contents(store), store.document_bytes.tolist(), document_names(store)),
    store.window(0, store.n_tokens + 3)[0].tolist(),
  )


def damages(raw: bytes):
  """Name and content of what a file may become; None is that it is gone."""
  yield from (("gone", None), ("empty", b""), ("longer", raw + b"\0"))
  yield from (("half", raw[: len(raw) // 2]), ("cut", raw[:-1]))
  yield "nothing", bytes(len(raw))
  rng = np.random.default_rng(len(raw))
  places = {0, len(raw) - 1, *rng.integers(0, len(raw), 40).tolist()}
  for place in sorted(places):
    turned = bytearray(raw)
    turned[place] ^= 1 << int(rng.integers(8))
    yield f"bit of byte {place}", bytes(turned)


def test_whatever_happens_to_a_file_of_a_store_is_seen(tmp_path, uncached):
  config = make_config(tmp_path)
  (store,) = store_lib.prepare(config).train
  whole, refused = everything(store), 0
  files = [p for p in pathlib.Path(store.path).rglob("*") if p.is_file()]
  assert len(files) == 11  # Two of each array, and the manifest.
  for file in files:
    raw = file.read_bytes()
    for name, damaged in damages(raw):
      file.unlink() if damaged is None else file.write_bytes(damaged)
      try:
        (found,) = store_lib.prepare(config).train
        assert everything(found) == whole, (file, name)
      except schema.RunError as error:
        refused += 1
        said = str(error)
        assert said.startswith(f"token store {store.path} is damaged: "), said
        assert "Remove it, and the next start makes it again" in said
        assert "\n" not in said and len(said) < 600
        assert file.parent.name in said or file.name in said, (file, name, said)
      file.write_bytes(raw)
  assert refused > 11 * 40
  shutil.rmtree(store.path)
  (again,) = store_lib.prepare(config).train
  assert everything(again) == whole


def test_a_manifest_of_before_manifests_had_digests(tmp_path, uncached):
  config = make_config(tmp_path)
  (store,) = store_lib.prepare(config).train
  whole = everything(store)
  file = pathlib.Path(store.path, "manifest.json")
  manifest = json.loads(file.read_text())
  del manifest["digest"], manifest["arrays"]
  file.write_text(json.dumps(manifest, indent=2))
  assert everything(store_lib.prepare(config).train[0]) == whole
  for key in ("n_tokens", "n_documents", "n_bytes", "files"):
    bad = {**manifest, key: None}
    file.write_text(json.dumps(bad, indent=2))
    with pytest.raises(schema.RunError, match="is damaged: "):
      store_lib.prepare(config)
  file.write_text(json.dumps({**manifest, "n_tokens": 7}))
  with pytest.raises(schema.RunError, match="tokens has .* says 7"):
    store_lib.prepare(config)


def test_a_store_that_is_a_file(tmp_path):
  config = make_config(tmp_path)
  path = store_lib.prepare(config).train[0].path
  shutil.rmtree(path)
  pathlib.Path(path).write_text("")
  with pytest.raises(schema.RunError, match="manifest.json is missing"):
    store_lib.prepare(config)


def test_a_tokenizer_that_was_damaged_is_refused(tmp_path):
  config = make_config(tmp_path, ["some words to learn from " * 9] * 40)
  config.tokenizer.kind = "sentencepiece"
  config.model.vocab_size = 383
  prepared = store_lib.prepare(config)
  (file,) = (tmp_path / "cache").glob("tokenizer-*.json")
  raw = file.read_bytes()
  for name, damaged in damages(raw):
    if name == "gone":
      continue
    file.write_bytes(damaged)
    try:
      again = store_lib.prepare(config).tokenizer
      assert again.fingerprint == prepared.tokenizer.fingerprint, name
    except schema.RunError as error:
      assert str(error).startswith(f"tokenizer {file} is damaged: ")
      assert "Remove it" in str(error) and "\n" not in str(error)
  # One of before it had a digest.
  file.write_text(prepared.tokenizer.to_json())
  again = store_lib.prepare(config).tokenizer
  assert again.fingerprint == prepared.tokenizer.fingerprint
  file.unlink()
  again = store_lib.prepare(config).tokenizer
  assert again.fingerprint == prepared.tokenizer.fingerprint
  assert file.read_bytes() == raw


def test_a_disk_that_fails_is_no_damage(tmp_path, uncached):
  config = make_config(tmp_path)
  (store,) = store_lib.prepare(config).train
  for part in ("tokens", "ends"):
    file = pathlib.Path(store.path, part, "c", "0")
    file.unlink()
    file.symlink_to(file)  # The system refuses to read it.
  for read in (lambda: store.window(0, 9), lambda: store.ends):
    with pytest.raises(OSError, match="Too many levels") as error:
      read()
    assert error.value.filename.startswith(store.path)


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path):
  """Here, files may not grow beyond some kilobytes."""
  config = make_config(tmp_path)
  path = tmp_path / "config.py"
  path.write_text(
    "from lm import validation\n"
    f"def get_config():\n"
    f"  return validation.from_json({config_lib.to_json(config)!r})\n"
  )
  command = f"ulimit -f 8; {sys.executable} -m lm.data --config={path} | cat"
  done = subprocess.run(
    ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True
  )
  assert done.returncode == 1, done.stderr
  assert "File too large" in done.stderr and done.stderr.count("\n") == 1
  assert f"{tmp_path}/cache/tokens-" in done.stderr
  assert not (tmp_path / "cache").exists()


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
  config = make_config(tmp_path)
  append = store_lib._append

  def slow(*arguments):
    with open(tmp_path / "train.jsonl", "a") as file:
      file.write('{"t": "late"}\n')
    return append(*arguments)

  monkeypatch.setattr(store_lib, "_append", slow)
  with pytest.raises(schema.RunError, match="train.jsonl: has changed"):
    store_lib.prepare(config)
  assert not (tmp_path / "cache").exists()


# --- names -------------------------------------------------------------------


def test_names_need_not_be_utf8(tmp_path):
  config = make_config(tmp_path)
  (tmp_path / "caf\udce9[x]").mkdir()
  (tmp_path / "caf\udce9[x]" / "\udcff.txt").write_text("text")
  for spec in ("text:{}/caf*/*.txt", "text:{}/caf\udce9[[]x]/*.txt"):
    config.data.train = (spec.format(tmp_path),)
    store_lib.prepare(config)
    (store,) = store_lib.prepare(config).train
    assert store.spec == config.data.train[0]
    assert document_names(store) == [f"{tmp_path}/caf\udce9[x]/\udcff.txt"]
    assert contents(store)[0][1:-1] == [b + 111 for b in b"text"]
    shutil.rmtree(config.data.cache_dir)


def test_a_chat_template_does_not_make_other_stores(tmp_path):
  config = make_config(tmp_path)
  before = store_lib.prepare(config)
  for text in ("<user>", "<user>\n"):
    (tmp_path / "chat.jinja").write_text(text)
    config.tokenizer.chat_template = str(tmp_path / "chat.jinja")
    now = store_lib.prepare(config)
    assert now.tokenizer.chat_template == text
    assert now.train[0].path == before.train[0].path
  assert names(config) == [os.path.basename(before.train[0].path)]


def test_special_tokens_make_another_tokenizer_once(tmp_path, monkeypatch):
  config = make_config(tmp_path, ["some words to learn from " * 9] * 40)
  config.tokenizer.kind = "sentencepiece"
  config.model.vocab_size = 390
  before = store_lib.prepare(config)
  config.tokenizer.special_tokens = ("<|im_end|>",)
  now = store_lib.prepare(config)
  assert now.tokenizer.named["<|im_end|>"] == 111
  assert now.tokenizer.size == 390
  assert now.train[0].path != before.train[0].path
  monkeypatch.setattr(tokenizer_training, "train", None)
  again = store_lib.prepare(config)
  assert again.tokenizer.fingerprint == now.tokenizer.fingerprint
  config.tokenizer.special_tokens = ()
  fingerprint = store_lib.prepare(config).tokenizer.fingerprint
  assert fingerprint == before.tokenizer.fingerprint


def test_a_store_of_another_tokenizer_is_refused(tmp_path):
  config = make_config(tmp_path)
  prepared = store_lib.prepare(config)
  tokenizer = tokenizer_lib.Tokenizer()
  path = prepared.train[0].path
  assert store_lib.open_store(path, tokenizer).n_documents == 53
  tokenizer.fingerprint = "another"
  with pytest.raises(schema.ConfigError, match="made by tokenizer .* this"):
    store_lib.open_store(path, tokenizer)


# --- bad inputs --------------------------------------------------------------


@pytest.mark.parametrize(
  "content, message",
  [
    (b'{"t": "a"}\n{"t": "\xff"}\n', r"train.jsonl: invalid UTF-8 at byte 18"),
    (b'{"t": "a"}\n{"t": \n', r"train.jsonl:2: invalid JSON"),
    (b'{"t": "a"}\n{"u": "b"}\n', r"train.jsonl:2: no field 't'"),
    (b'{"t": ""}\n', "empty"),
    (b"\n", "empty"),
  ],
)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_bad_text_writes_nothing(tmp_path, kind, content, message):
  config = make_config(tmp_path)
  config.tokenizer.kind = kind
  (tmp_path / "train.jsonl").write_bytes(content)
  with pytest.raises(schema.ConfigError, match=message):
    store_lib.prepare(config)
  assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]


def test_the_number_of_skipped_documents_is_printed(tmp_path, capsys):
  config = make_config(tmp_path, invalid_documents="skip")
  path = tmp_path / "train.jsonl"
  path.write_text('{"t": "a"}\nno json\n{"u": ""}\n{"t": ""}\n{"t": "b"}\n')
  (store,) = store_lib.prepare(config).train
  assert store.n_documents == 2
  assert (
    ": documents skipped by invalid_documents or invalid_utf8: 2\n"
    in capsys.readouterr().err
  )
  store_lib.prepare(config)
  assert capsys.readouterr().err == ""
  path.write_text("no json\n")
  with pytest.raises(schema.ConfigError, match="no text; documents skip.*: 1$"):
    store_lib.prepare(config)


@pytest.mark.parametrize(
  "change, message",
  [
    (("model.vocab_size", 701), "vocabulary mismatch.*701.*exactly 384"),
    (("data.validation", ("text:absent/*",)), "no file matches"),
    (("tokenizer.kind", "sentencepiece"), "sources are too small"),
  ],
)
def test_a_bad_config_writes_nothing(tmp_path, change, message):
  config = make_config(tmp_path)
  path, value = change
  room, field = path.split(".")
  setattr(getattr(config, room), field, value)
  if path == "tokenizer.kind":
    config.model.vocab_size = 4099
  with pytest.raises(schema.ConfigError, match=message):
    store_lib.prepare(config)
  assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]


def test_the_door_prints_one_line_and_exits_2(tmp_path):
  config = tmp_path / "config.py"
  config.write_text(
    "from lm import config\n"
    "def get_config():\n"
    "  c = config.Config()\n"
    "  c.data.train = ('text:absent/*.txt',)\n"
    f"  c.data.cache_dir = {str(tmp_path / 'cache')!r}\n"
    "  return c\n"
  )
  command = [sys.executable, "-m", "lm.data", f"--config={config}"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith("error: source 'text:absent/*.txt': no file")
  assert done.stderr.count("\n") == 1
  assert not (tmp_path / "cache").exists()


def test_the_door_prints_a_row_per_store(tmp_path):
  # A name that neither UTF-8 nor the table's own markup takes for text.
  (tmp_path / "\udce9[b].txt").write_text("abc\u00e9")
  config = tmp_path / "config.py"
  config.write_text(
    "from lm import config\n"
    "def get_config():\n"
    "  c = config.Config()\n"
    f"  c.data.train = ('text:{tmp_path}/\\udce9[[]b].txt',)\n"
    "  c.data.validation = c.data.train\n"
    f"  c.data.cache_dir = {str(tmp_path / 'cache')!r}\n"
    "  c.tokenizer.kind = 'bytes'\n"
    "  return c\n"
  )
  command = [sys.executable, "-m", "lm.data", f"--config={config}"]
  command += ["--config.model.vocab_size=384"]
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    env={**os.environ, "COLUMNS": "300"},
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  (row,) = (x for x in lines if " 0.714 " in x and "bytes/token" not in x)
  source, *cells = row.rsplit(maxsplit=5)
  assert "\\udce9[[]b].txt" in source
  assert cells[:4] == ["1", "5", "7", "0.714"]


@pytest.mark.parametrize(
  "value, message",
  [
    ("", "config.data.cache_dir='': empty"),
    ("gs://bucket/x", "config.data.cache_dir=gs://bucket/x: must lie on"),
    ("s4://bucket/x", "config.data.cache_dir=s4://bucket/x: must lie on"),
    ("train.jsonl", "cache_dir=train.jsonl: .*not a directory"),
    ("train.jsonl/below", "cache_dir=train.jsonl/below: .*not a directory"),
    ("shut/cache", "cache_dir=shut/cache: .*shut cannot be written"),
  ],
)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_cache_that_cannot_be_is_refused(
  tmp_path, monkeypatch, kind, value, message
):
  config = make_config(tmp_path, cache_dir=value)
  config.tokenizer.kind = kind
  (tmp_path / "shut").mkdir()
  access = os.access  # As the kernel would answer anybody but root.
  monkeypatch.setattr(
    os,
    "access",
    lambda path, mode: pathlib.Path(path).name != "shut" and access(path, mode),
  )
  monkeypatch.chdir(tmp_path)
  with pytest.raises(schema.ConfigError, match=message):
    store_lib.prepare(config)
  assert sorted(os.listdir()) == ["shut", "train.jsonl"]


def test_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  config = make_config(tmp_path, cache_dir="~/cache")
  (store,) = store_lib.prepare(config).train
  assert os.path.dirname(store.path) == str(tmp_path / "cache")
  assert sorted(os.listdir()) == ["cache", "train.jsonl"]


# --- several processes, and one that dies ------------------------------------

# Prepares as the given config says and announces each build, which takes
# as long as it is told to.
WORKER = """
import sys, time
from lm import validation
from lm.data import store
append = store._append
def slow(*arguments):
  written = append(*arguments)
  print("writing", flush=True)
  time.sleep(float(sys.argv[2]))
  return written
store._append = slow
store.prepare(validation.from_json(open(sys.argv[1]).read()))
print("done", flush=True)
"""


def start(tmp_path, config, seconds) -> doors.Popen:
  path = tmp_path / "config.json"
  path.write_text(config_lib.to_json(config))
  return doors.Popen(WORKER, [str(path), str(seconds)])


def names(config) -> list[str]:
  return sorted(os.listdir(config.data.cache_dir))


def test_a_killed_preparation_starts_again_cleanly(tmp_path):
  config = make_config(tmp_path)
  worker = start(tmp_path, config, 600)
  assert worker.stdout is not None and worker.stdout.readline() == "writing\n"
  worker.send_signal(signal.SIGKILL)
  worker.communicate()
  left = names(config)
  assert any(name.endswith(".partial") for name in left)
  assert all(name.endswith((".partial", ".lock")) for name in left)
  store = store_lib.prepare(config).train[0]
  assert names(config) == [os.path.basename(store.path)]
  tokenizer = tokenizer_lib.Tokenizer()
  assert [tokenizer.decode(d) for d in contents(store)] == TEXTS


def test_of_two_processes_one_works_and_the_other_waits(tmp_path):
  config = make_config(tmp_path)
  first = start(tmp_path, config, 3)
  assert first.stdout is not None and first.stdout.readline() == "writing\n"
  second = start(tmp_path, config, 0)
  out, error = second.communicate(timeout=60)
  assert (out, second.returncode) == ("done\n", 0), error
  assert "waiting for another process" in error
  out, error = first.communicate(timeout=60)
  assert (out, first.returncode) == ("done\n", 0), error
