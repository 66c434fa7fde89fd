"""Sources: documents by index, and a clear message for each bad input."""

import bz2
import errno
import glob
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import pickle
import re
import subprocess
import sys
import sysconfig
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from backports import zstd

from lm import config as config_lib
from lm import schema
from lm.data import contents, reading, sources


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


COMPRESS = {
  "": bytes,
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": zstd.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_at_random_and_in_order(tmp_path, suffix, monkeypatch):
  """More documents than the index remembers offsets, over two files."""
  texts = [f"line {i}\n\u00e9{'x' * (i % 7)}" for i in range(701)]
  for name, part in (("a", texts[:601]), ("b", texts[601:])):
    lines = [json.dumps({"id": 1, "content": t}) + "\n" for t in part]
    lines.insert(5, "\n")  # A blank line is no document.
    raw = "".join(lines).encode()
    # Two streams, one after the other, as parallel compressors write them.
    raw = COMPRESS[suffix](raw[:4000]) + COMPRESS[suffix](raw[4000:])
    (tmp_path / f"{name}.jsonl{suffix}").write_bytes(raw)
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
  opened, open_file = [], reading.opened
  monkeypatch.setattr(
    reading, "opened", lambda *a: opened.append(a[0]) or open_file(*a)
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
    schema.ConfigError, match=r"a.txt: invalid UTF-8 at byte 7;.*'skip'"
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
  with pytest.raises(schema.ConfigError, match=r"a.jsonl:2: invalid UTF-8"):
    read(source)


@pytest.mark.parametrize(
  "content, message",
  [
    ('{"t": "a"}\n{"t": ', r"a.jsonl:2: invalid JSON.* at column 7"),
    ('{"t": "a"}\n\n{"u": 1}', r"a.jsonl:3: no field 't'; .*fields: 'u'"),
    ("{}", r"a.jsonl:1: no field 't'; its fields: none"),
    (json.dumps({f"u{i}": 1 for i in range(999)}), r"no field .{200,300}$"),
    ('{"t": 1}', r"a.jsonl:1: field 't' is a number, not text"),
    ('{"t": null}', r"a.jsonl:1: field 't' is null, not text"),
    ('{"t": ["a"]}', r"a.jsonl:1: field 't' is a list, not text"),
    ('{"t": {}}', r"a.jsonl:1: field 't' is an object, not text"),
    ('{"t": true}', r"a.jsonl:1: field 't' is true or false, not text"),
    ("[1]", r"a.jsonl:1: is a list, not an object with field 't'"),
    ("null", r"a.jsonl:1: is null, not an object"),
    ('"t"', r"a.jsonl:1: is text, not an object"),
    ("[" * 10**5 + "]" * 10**5, r"a.jsonl:1: JSON beyond reason, .*recursion"),
    (f'{{"t": {"1" * 5000}}}', r"a.jsonl:1: JSON beyond reason, .*digits"),
  ],
)
def test_bad_json_lines_name_file_and_line(tmp_path, content, message):
  path = tmp_path / "a.jsonl"
  path.write_text(content)
  source = sources.open_source(f"jsonl:{path}#t", data_config(tmp_path))
  with pytest.raises(schema.ConfigError, match=message):
    read(source)


def test_fields_of_fields(tmp_path):
  path = tmp_path / "a.jsonl"
  rows = [
    {"meta": {"text": "inner", "a": {"b": "deep"}}},
    {"meta.text": "literal", "meta": {"text": "no", "a": {"b": "2"}}},
  ]
  path.write_text("\n".join(map(json.dumps, rows)))

  def texts(field):
    source = sources.open_source(f"jsonl:{path}#{field}", data_config(tmp_path))
    return [text for _, text in read(source)]

  assert texts("meta.text") == ["inner", "literal"]
  assert texts("meta.a.b") == ["deep", "2"]
  for field, message in (
    ("meta.none", "no field 'meta.none' with 'none'; its fields: 'text', 'a'"),
    ("none.text", "no field 'none.text'; its fields: 'meta'"),
    ("meta.text.x", "a.jsonl:1: no field .* should hold 'x' is text, not"),
    ("meta", "field 'meta' is an object, not text"),
  ):
    refused(tmp_path, f"jsonl:{path}#{field}", message)


def test_invalid_lines_are_skipped_by_policy(tmp_path):
  path = tmp_path / "a.jsonl"
  lines = ['{"t": "a"}', '{"t": ', '{"u": 1}', '{"t": 1}', "[]", '{"t": "b"}']
  path.write_text("\n".join(lines))
  spec = f"jsonl:{path}#t"
  refused(tmp_path, spec, r"a.jsonl:2: .*; correct it, or set invalid_docu")
  data = data_config(tmp_path, invalid_documents="skip")
  source = sources.open_source(spec, data)
  assert read(source) == [(f"{path}:1", "a"), (f"{path}:6", "b")]
  assert len(source) == 6 and source[1] is None
  # Bytes that are no text go by their own policy, and damage by none.
  path.write_bytes(b'{"t": "a"}\n{"t": "\xff"}\n')
  refused(tmp_path, spec, "invalid UTF-8", invalid_documents="skip")
  strict = sources.open_source(spec, data_config(tmp_path))
  lax = sources.open_source(spec, data)
  assert strict.fingerprint() != lax.fingerprint()
  text = sources.open_source(f"text:{path}", data)
  again = sources.open_source(f"text:{path}", data_config(tmp_path))
  assert text.fingerprint() == again.fingerprint()


@pytest.mark.parametrize(
  "spec, message",
  [
    ("quickstart", "malformed; write tfds:NAME.*text:GLOB.*jsonl:GLOB#FIELD"),
    ("jsonl:a.jsonl", "malformed"),
    ("tfds:python_stdlib", "malformed"),
    ("text:absent/*.txt", "no file matches 'absent/"),
    ("jsonl:absent.gz#t", "no file matches 'absent.gz'"),
    ("jsonl:a#b.jsonl#t", "no file matches 'a' .* first '#': write '\\?'"),
    ("text:gs://bucket/*.txt", "must lie on a disk of this"),
    ("text:a\0b/*.txt", "no file matches"),
    ("tfds:no_such_dataset:train", "unknown dataset .*--file_format=array_rec"),
  ],
)
def test_bad_specs_write_nothing(tmp_path, spec, message):
  with pytest.raises(schema.ConfigError, match=message) as error:
    sources.open_source(spec, data_config(tmp_path))
  assert repr(spec)[-9:-1] in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_corpus_without_documents_is_empty(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("\n \n")
  data = data_config(tmp_path, text_unit="line")
  with pytest.raises(schema.ConfigError, match="empty"):
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


@pytest.mark.parametrize("kept_bytes", [10, 2])
def test_the_fingerprint_is_of_names_and_bytes(
  tmp_path, monkeypatch, kept_bytes
):
  """Of a large corpus, each file is read once, and again where it was touched;
  of any, the time of a file says nothing.
  """
  monkeypatch.setattr(contents, "_KEPT_BYTES", kept_bytes)
  monkeypatch.setattr(contents, "_CLOCK_SECONDS", -1)
  path = tmp_path / "a.txt"
  path.write_text("abc")
  read, hash_file = [], contents._hash
  monkeypatch.setattr(
    contents, "_hash", lambda path: read.append(path) or hash_file(path)
  )

  def fingerprint():
    return sources.open_source(
      f"text:{path}", data_config(tmp_path)
    ).fingerprint()

  first = fingerprint()
  assert fingerprint() == first
  large = kept_bytes == 2
  assert len(read) == large
  path.touch()
  assert fingerprint() == first and len(read) == 2 * large
  path.write_text("abd")
  assert fingerprint() != first
  path.write_text("abc")
  for kept in (tmp_path / "cache").glob("*"):  # Damage is not believed.
    kept.write_text(kept.read_text().replace("a", "b"))
  assert fingerprint() == first
  if large:
    n = len(read)
    fingerprint()
    assert len(read) == n
    # A cache that cannot be written only costs time.
    (tmp_path / "cache" / "contents").mkdir()
    monkeypatch.setattr(
      contents.locks, "exclusive", mock.Mock(side_effect=PermissionError)
    )
    path.touch()
    assert fingerprint() == first
  else:
    assert not (tmp_path / "cache").exists()


def test_the_fingerprint_of_a_small_corpus_has_not_changed(tmp_path):
  """Runs that are stored know their data by it."""
  for name, text in (("b.txt", "first"), ("a.txt", "caf\u00e9\n")):
    (tmp_path / name).write_bytes(text.encode())
  (tmp_path / "c.gz").write_bytes(gzip.compress(b"x", mtime=0))
  source = sources.open_source(f"text:{tmp_path}/*", data_config(tmp_path))
  digest = hashlib.sha256(b"file None error")
  for name in ("a.txt", "b.txt", "c.gz"):
    raw = (tmp_path / name).read_bytes()
    digest.update(f"{name} {len(raw)}".encode() + raw)
  assert source.fingerprint() == digest.hexdigest()[:16]


# --- files that are not what they should be ----------------------------------


def refused(tmp_path, spec, message, **fields):
  with pytest.raises(schema.ConfigError, match=message) as error:
    read(sources.open_source(spec, data_config(tmp_path, **fields)))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("unit", ["file", "line"])
@pytest.mark.parametrize("suffix", list(COMPRESS)[1:])
def test_nothing_is_read_of_a_compressed_file_that_is_not_whole(
  tmp_path, suffix, unit
):
  """Whatever its end is, and whatever the policy on invalid text."""
  rng = np.random.default_rng(0)
  text = "\n".join(map(str, rng.integers(0, 1 << 40, 999))).encode()
  one = COMPRESS[suffix](text)
  two, path = one + COMPRESS[suffix](text[:99]), tmp_path / f"a.txt{suffix}"
  flipped = bytearray(one)
  flipped[len(one) // 2] ^= 4
  if suffix == ".zst":  # Its checksum is an option, which the tool zstd takes.
    options = {zstd.CompressionParameter.checksum_flag: 1}
    flipped = bytearray(zstd.compress(text, options=options))
    flipped[-1] ^= 4
  cases = {
    "half": one[: len(one) // 2],
    "all but a byte": one[:-1],
    "the second half": two[: len(one) + 9],
    "a second start": one + b"no stream",
    "text": text,
    "empty": b"",
    "flipped": bytes(flipped),
  }
  for name, raw in cases.items():
    path.write_bytes(raw)
    for policy in ("error", "replace", "skip"):
      print(name, policy)  # for whoever sees this fail
      message = rf"a.txt\{suffix}: damaged, or not a \{suffix} file: .*; fetch"
      fields = {"text_unit": unit, "invalid_utf8": policy}
      refused(tmp_path, f"text:{path}", message, **fields)
  path.write_bytes(two + b"\0" * 8)
  data = data_config(tmp_path, text_unit=unit)
  texts = [text for _, text in read(sources.open_source(f"text:{path}", data))]
  whole = (text + text[:99]).decode()
  assert texts == ([whole] if unit == "file" else whole.split("\n"))


def test_a_reader_that_knows_more_of_a_file_gives_it_another_fingerprint(
  tmp_path,
):
  """What was read by half once, or with its mark, is not the same data."""

  def fingerprint(name, raw):
    (tmp_path / name).write_bytes(raw)
    source = sources.open_source(
      f"text:{tmp_path / name}", data_config(tmp_path)
    )
    digest = hashlib.sha256(b"file None error")
    digest.update(f"{name} {len(raw)}".encode() + raw)
    return source.fingerprint(), digest.hexdigest()[:16]

  one = zstd.compress(b"text")
  for name, raw, same in (
    ("a.zst", one, True),
    ("a.zst", one + one, False),
    ("a.zst", one[:-1], False),
    ("a.txt", b"\xef\xbb\xbftext", False),
    ("a.gz", gzip.compress(b"\xef\xbb\xbftext"), False),
    ("a.xz", lzma.compress(b"text"), False),
  ):
    now, before = fingerprint(name, raw)
    assert (now == before) is same, name


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("unit", ["file", "line", "block"])
def test_a_byte_order_mark_is_no_text(tmp_path, unit, suffix):
  path = tmp_path / f"a.txt{suffix}"
  text = "one\n\n\ufefftwo\ufeff"
  path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
  whole = [("", text)]
  parts = [(":1", "one"), (":3", "\ufefftwo\ufeff")]
  expected = whole if unit == "file" else parts
  for invalid in ("error", "replace", "skip"):
    data = data_config(tmp_path, text_unit=unit, invalid_utf8=invalid)
    documents = read(sources.open_source(f"text:{path}", data))
    assert documents == [(f"{path}{where}", text) for where, text in expected]
  path.write_bytes(COMPRESS[suffix](b'\xef\xbb\xbf{"t": "\xc3\xa9"}\n'))
  (document,) = read(sources.open_source(f"jsonl:{path}#t", data))
  assert document == (f"{path}:1", "\u00e9")
  # Places of bytes are those of the file.
  path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbfa\xff"))
  refused(tmp_path, f"jsonl:{path}#t", "invalid UTF-8 at byte 4")


@pytest.mark.parametrize(
  "raw, message",
  [
    ("text".encode("utf-16"), "a.txt: is UTF-16 or UTF-32 text: convert it"),
    (b"\xfe\xff" + "text".encode("utf-16-be"), "a.txt: is UTF-16 text"),
    (b"\0\0\xfe\xff" + "text".encode("utf-32-be"), "a.txt: is UTF-32 text"),
    (
      gzip.compress(b"text", mtime=0),
      "a.txt: is compressed: end its name in .gz",
    ),
    (zstd.compress(b"text"), "a.txt: is compressed: end its name in .zst"),
    (lzma.compress(b"text"), "a.txt: is compressed: end its name in .xz"),
    (b"PK\x03\x04text", "a.txt: is a zip archive: unpack it"),
  ],
)
def test_a_file_that_begins_as_no_text_does(tmp_path, raw, message):
  path = tmp_path / "a.txt"
  path.write_bytes(raw)
  for unit in ("file", "line"):
    refused(tmp_path, f"text:{path}", message, text_unit=unit)
    fields = {"text_unit": unit, "invalid_utf8": "replace"}
    refused(tmp_path, f"text:{path}", message, **fields)


def test_a_name_need_not_be_utf8(tmp_path):
  name = os.fsdecode(b"caf\xe9.txt")
  (tmp_path / name).write_text("text")
  for spec in (f"text:{tmp_path}/*.txt", f"text:{tmp_path}/{name}"):
    source = sources.open_source(spec, data_config(tmp_path))
    assert read(source) == [(f"{tmp_path}/{name}", "text")]
    assert source.fingerprint()
  (tmp_path / name).write_bytes(b"\xff")
  refused(tmp_path, f"text:{tmp_path}/*", "caf\udce9.txt: invalid UTF-8")
  refused(tmp_path, f"text:{name}", "no file matches")


def find(tmp_path, pattern) -> list[str]:
  found = reading.matching(f"{tmp_path}/{pattern}")
  return [os.path.relpath(path, tmp_path) for path in found]


def test_a_file_is_read_once_whatever_links_lead_to_it(tmp_path):
  (tmp_path / "loop" / "sub").mkdir(parents=True)
  (tmp_path / "loop" / "a.txt").write_text("a")
  for up in ("up", "again"):  # 2 ** 40 paths, to a walker that follows both
    (tmp_path / "loop" / "sub" / up).symlink_to("..")
  assert find(tmp_path, "loop/**/*.txt") == ["loop/a.txt"]
  assert find(tmp_path, "**/sub/**/*.txt") == ["loop/sub/again/a.txt"]
  (tmp_path / "loop" / "0.txt").symlink_to("a.txt")
  assert find(tmp_path, "loop/**/*.txt") == ["loop/0.txt"]
  # A folder elsewhere is read through a link, as before.
  (tmp_path / "far").mkdir()
  (tmp_path / "far" / "b.txt").write_text("b")
  (tmp_path / "loop" / "near").symlink_to("../far")
  assert find(tmp_path, "loop/**/b.txt") == ["loop/near/b.txt"]
  assert find(tmp_path, "**/b.txt") == ["far/b.txt"]
  # A hard link is a file, as the copy is that another disk would make of it.
  os.link(tmp_path / "far" / "b.txt", tmp_path / "far" / "c.txt")
  assert find(tmp_path, "far/*") == ["far/b.txt", "far/c.txt"]


def test_a_glob_finds_what_pythons_does(tmp_path, monkeypatch):
  names = "a.txt b.txt .h.txt s/a.txt s/t/c.md s/t/.x/d.txt z[1]/e.txt".split()
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  os.mkfifo(tmp_path / "p.txt")  # Reading it would never end.
  (tmp_path / "d.txt").mkdir()
  monkeypatch.chdir(tmp_path)
  for pattern in (
    *("*", "*.txt", "**", "**/*", "**/*.txt", "s/**", "./*.txt", "*/*.txt"),
    *("**/t/*", "s/**/**/*", "[ab].txt", "?.txt", ".*", "**/.x/*", "z[[]1]/*"),
    *("s/../*.txt", "s//*.txt", "a.txt", "absent", "absent/*", "a.txt/*", "s"),
    *(f"{tmp_path}/**/*.txt", "z[1]/*", "s/*/", "**/**", "s/t/../a.txt"),
  ):
    found = sorted(set(glob.glob(pattern, recursive=True)))
    assert reading.matching(pattern) == [p for p in found if os.path.isfile(p)]


def test_brackets_of_a_name_have_a_hint(tmp_path):
  (tmp_path / "data[1]").mkdir()
  (tmp_path / "data[1]" / "a.txt").write_text("a")
  hint = re.escape(f"write '{tmp_path}/data[[]1]/*.txt'")
  refused(tmp_path, f"text:{tmp_path}/data[1]/*.txt", hint)
  assert find(tmp_path, "data[[]1]/*.txt") == ["data[1]/a.txt"]


def test_what_a_glob_cannot_see_is_said(tmp_path, monkeypatch):
  (tmp_path / "a.txt").write_text("a")
  (tmp_path / "b.txt").symlink_to("absent")
  refused(tmp_path, f"text:{tmp_path}/*", "b.txt: No such file.*leaves it out")
  (tmp_path / "b.txt").unlink()
  (tmp_path / "b.txt").symlink_to("b.txt")
  refused(tmp_path, f"text:{tmp_path}/**/*", "b.txt: Too many levels")
  (tmp_path / "b.txt").unlink()
  (tmp_path / "closed").mkdir()
  # As the kernel would to anybody but root.
  listdir, lstat = os.listdir, os.lstat

  def guarded(path, folder, call, **fields):
    if os.path.basename(folder) == "closed":
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return call(path, **fields)

  monkeypatch.setattr(os, "listdir", lambda p: guarded(p, p, listdir))
  monkeypatch.setattr(
    os, "lstat", lambda p, **k: guarded(p, os.path.dirname(p), lstat, **k)
  )
  for pattern in ("**/*.txt", "*/*.txt", "closed/*", "closed/a.txt"):
    message = "closed[^:]*: Permission denied; mend it"
    refused(tmp_path, f"text:{tmp_path}/{pattern}", message)
  assert find(tmp_path, "*.txt") == ["a.txt"]


def test_an_error_of_the_disk_names_the_file(tmp_path):
  path = tmp_path / "a.txt"
  path.symlink_to("/proc/self/mem")  # A regular file; reading it is EIO.
  source = sources.open_source(f"text:{path}", data_config(tmp_path))
  for fail in (source.fingerprint, lambda: source[0]):
    with pytest.raises(OSError, match="Input/output error") as error:
      fail()
    assert error.value.filename == str(path)


def test_a_file_that_shrinks_after_it_was_indexed(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("a\nb\nc\n")
  data = data_config(tmp_path, text_unit="line")
  source = sources.open_source(f"text:{path}", data)
  path.write_text("a\n")
  with pytest.raises(schema.RunError, match="a.txt: has changed while"):
    read(source)


def test_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "a.txt").write_text("text")
  source = sources.open_source("text:~/a.txt", data_config(tmp_path))
  assert read(source) == [(f"{tmp_path}/a.txt", "text")]


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
  with pytest.raises(schema.ConfigError, match=r"body\[\d\]: inv.* byte 3"):
    read(strict)
  for spec, message in (
    ("tfds:toy:train", "no feature 'text'; the dataset has body, n"),
    ("tfds:toy:test#body", "no split 'test'; the dataset has train"),
    ("tfds:toy/big:train#body", "unknown dataset"),
  ):
    with pytest.raises(schema.ConfigError, match=message):
      sources.open_source(spec, data)
  numbers = sources.open_source("tfds:toy:train#n", data)
  with pytest.raises(schema.ConfigError, match="'n' is not text"):
    read(numbers)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> pathlib.Path:
  """A dataset in TFDS_DATA_DIR, whose builder this machine does not have."""
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("TFDS_DATA_DIR", "~/sets")
  data = data_config(tmp_path, invalid_utf8="skip")
  sources.open_source("tfds:toy:train#body", data)
  assert not (tmp_path / "cache").exists() and not pathlib.Path("~").exists()
  folder = tmp_path / "sets" / "far" / "en" / "2.0.0"
  folder.parent.mkdir(parents=True)
  (tmp_path / "sets" / "toy" / "1.0.0").rename(folder)
  info = json.loads((folder / "dataset_info.json").read_text())
  info.update(name="far", configName="en", version="2.0.0")
  (folder / "dataset_info.json").write_text(json.dumps(info))
  for path in folder.glob("toy-*"):
    path.rename(folder / path.name.replace("toy-", "far-"))
  return folder


def test_a_dataset_that_was_built_elsewhere_opens_by_its_name(
  tmp_path, elsewhere
):
  data = data_config(tmp_path, invalid_utf8="skip")
  for name in ("far/en", "far/en:2.0.0"):
    source = sources.open_source(f"tfds:{name}:train#body", data)
    assert {text for _, text in read(source)} == {"first", "third"}
  with pytest.raises(schema.ConfigError, match="unknown dataset 'far/de'"):
    sources.open_source("tfds:far/de:train#body", data)


def test_a_dataset_that_is_damaged_is_one_line(tmp_path, elsewhere):
  data = data_config(tmp_path, invalid_utf8="skip")
  (records,) = elsewhere.glob("*array_record*")
  for path in (records, *elsewhere.glob("*.json")):
    raw = path.read_bytes()
    for bad in (b"", raw[: len(raw) // 2], b"[]", raw[:70] + b"?" + raw[71:]):
      path.write_bytes(bad)
      with pytest.raises(schema.UserError, match="damaged|unknown") as error:
        read(sources.open_source("tfds:far/en:train#body", data))
      assert "\n" not in str(error.value) and "far/en" in str(error.value)
    path.write_bytes(raw)
  records.unlink()
  with pytest.raises(schema.RunError, match="far.*No such file"):
    read(sources.open_source("tfds:far/en:train#body", data))


class Unreachable(Toy):
  """Needs what is not to be had."""

  def _split_generators(self, dl_manager):
    part = pathlib.Path(dl_manager.download_dir, "unreachable", "a.gz.tmp.12ab")
    part.parent.mkdir(parents=True)
    part.write_text("the first half")
    raise ConnectionError("no route to host\nand a long story")


def test_a_download_that_fails_is_one_line(tmp_path):
  message = "'unreachable' could not be .*ConnectionError: no route to host$"
  with pytest.raises(schema.RunError, match=message):
    sources.open_source("tfds:unreachable:train", data_config(tmp_path))
  left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
  assert not left


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
from lm import locks
with locks.exclusive(sys.argv[1]):
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
