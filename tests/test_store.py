"""Token stores: whole or absent, exact, and prepared by one process."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorstore

from lm import config as config_lib
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


@pytest.mark.parametrize("size, dtype", [(384, "uint16"), (65537, "uint32")])
def test_documents_come_back_exactly(tmp_path, monkeypatch, size, dtype):
  # Several chunks, shards and batches of text.
  monkeypatch.setattr(store_lib, "_CHUNK", 16)
  monkeypatch.setattr(store_lib, "_SHARD", 128)
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
  assert store.names == [f"{path}:{i + 1}" for i in range(53)]

  numbers = [i for i, e in enumerate(expected) for _ in e]
  for start, length in ((0, 7), (119, 211), (len(flat) - 3, 11)):
    tokens, documents = store.window(start, length)
    part = flat[start : start + length]
    padding = [0] * (length - len(part))
    assert tokens.tolist() == part + padding
    first = numbers[start]
    inside = [n - first + 1 for n in numbers[start : start + length]]
    assert documents.tolist() == inside + padding


def test_a_second_preparation_only_opens(tmp_path, monkeypatch):
  config = make_config(tmp_path)
  first = store_lib.prepare(config)
  monkeypatch.setattr(store_lib, "_build", None)
  # Nor does it need to write, as on a cache that many machines share.
  monkeypatch.setattr(store_lib.sources_lib, "exclusive", None)
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
  train = tokenizer_lib.train

  def spy(config, texts):
    read.extend(texts)
    return train(config, texts)

  monkeypatch.setattr(tokenizer_lib, "train", spy)
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
  monkeypatch.setattr(tokenizer_lib, "train", None)
  template = tmp_path / "chat.jinja"
  template.write_text("<user>")
  config.tokenizer.chat_template = str(template)
  talker = store_lib.prepare(config).tokenizer
  assert talker.chat_template == "<user>"
  assert talker.model == other.tokenizer.model


@pytest.mark.parametrize("part", ["tokens", "ends"])
def test_a_file_that_is_missing_or_cut_is_not_read_as_zeros(tmp_path, part):
  config = make_config(tmp_path)
  (store,) = store_lib.prepare(config).train
  file = pathlib.Path(store.path, part, "c", "0")
  content = file.read_bytes()
  file.write_bytes(content[:-7])
  cut = f"{part}/c/0 is {len(content) - 7} bytes, and was {len(content)}"
  with pytest.raises(config_lib.RunError, match=cut):
    store_lib.prepare(config)
  file.unlink()
  with pytest.raises(config_lib.RunError, match=f"{part}/c/0 is missing"):
    store_lib.prepare(config)


def test_a_bit_that_turned_over_is_refused(tmp_path, monkeypatch):
  config = make_config(tmp_path)
  (store,) = store_lib.prepare(config).train
  file = pathlib.Path(store.path, "tokens", "c", "0")
  content = bytearray(file.read_bytes())
  content[40] ^= 4  # of the tokens, which come first
  file.write_bytes(content)
  fresh = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
  monkeypatch.setattr(store_lib, "_CONTEXT", fresh)
  (store,) = store_lib.prepare(config).train
  with pytest.raises(config_lib.RunError, match="is damaged: .*Remove it"):
    store.window(0, 30)
  shutil.rmtree(store.path)
  (again,) = store_lib.prepare(config).train
  assert len(contents(again)) == len(TEXTS)


def test_a_store_of_another_tokenizer_is_refused(tmp_path):
  config = make_config(tmp_path)
  prepared = store_lib.prepare(config)
  tokenizer = tokenizer_lib.Tokenizer()
  path = prepared.train[0].path
  assert store_lib.open_store(path, tokenizer).n_documents == 53
  tokenizer.fingerprint = "another"
  with pytest.raises(config_lib.ConfigError, match="made by tokenizer .* this"):
    store_lib.open_store(path, tokenizer)


# --- bad inputs --------------------------------------------------------------


@pytest.mark.parametrize(
  "content, message",
  [
    (b'{"t": "a"}\n{"t": "\xff"}\n', r"train.jsonl: invalid UTF-8 at byte 18"),
    (b'{"t": "a"}\n{"t": \n', r"train.jsonl:2: invalid JSON"),
    (b'{"t": "a"}\n{"u": "b"}\n', r"train.jsonl:2: no text field 't'"),
    (b'{"t": ""}\n', "empty"),
    (b"\n", "empty"),
  ],
)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_bad_text_writes_nothing(tmp_path, kind, content, message):
  config = make_config(tmp_path)
  config.tokenizer.kind = kind
  (tmp_path / "train.jsonl").write_bytes(content)
  with pytest.raises(config_lib.ConfigError, match=message):
    store_lib.prepare(config)
  assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]


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
  with pytest.raises(config_lib.ConfigError, match=message):
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


def test_the_door_prints_a_row_per_source(tmp_path):
  (tmp_path / "a.txt").write_text("abc\u00e9")
  config = tmp_path / "config.py"
  config.write_text(
    "from lm import config\n"
    "def get_config():\n"
    "  c = config.Config()\n"
    f"  c.data.train = c.data.validation = ('text:{tmp_path}/a.txt',)\n"
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
  rows = [line for line in done.stdout.splitlines() if "text:" in line]
  cells = [cell.strip() for cell in rows[0].split("\u2502")]
  assert len(rows) == 2 and cells[2:6] == ["1", "5", "7", "0.714"]


# --- several processes, and one that dies ------------------------------------

# Prepares as the given config says and announces each build, which takes
# as long as it is told to.
WORKER = """
import sys, time
from lm import config
from lm.data import store
append = store._append
def slow(*arguments):
  written = append(*arguments)
  print("writing", flush=True)
  time.sleep(float(sys.argv[2]))
  return written
store._append = slow
store.prepare(config.from_json(open(sys.argv[1]).read()))
print("done", flush=True)
"""


def start(tmp_path, config, seconds) -> subprocess.Popen:
  path = tmp_path / "config.json"
  path.write_text(config_lib.to_json(config))
  return subprocess.Popen(
    [sys.executable, "-c", WORKER, str(path), str(seconds)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


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
