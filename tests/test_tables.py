"""Parquet and CSV files as sources of texts and of chats."""

import csv
import pickle

import pyarrow
import pytest
from pyarrow import parquet

from lm import config as config_lib
from lm import schema
from lm.data import sources

TURN = [
  {"role": "user", "content": "u"},
  {"role": "assistant", "content": "a"},
]


@pytest.fixture
def data(tmp_path):
  return config_lib.DataConfig(cache_dir=str(tmp_path / "cache"))


def read(source) -> list[tuple[str, str]]:
  documents = (source[i] for i in range(len(source)))
  return [(d.name, d.text) for d in documents if d is not None]


def write_parquet(path, columns, **options):
  parquet.write_table(pyarrow.table(columns), path, **options)


def write_csv(path, rows):
  with open(path, "w", newline="") as file:
    csv.writer(file).writerows(rows)


def test_rows_of_parquet_files_by_group(tmp_path, data):
  texts = [f"row {i} \u00e9" for i in range(103)]
  columns = {"id": list(range(103)), "text": texts}
  columns["meta"] = [{"t": f"deep {i}", "n": i} for i in range(103)]
  parts = {k: (v[:71], v[71:]) for k, v in columns.items()}
  for i, name in enumerate("ab"):
    part = {k: v[i] for k, v in parts.items()}
    write_parquet(tmp_path / f"{name}.parquet", part, row_group_size=29)
  spec = f"parquet:{tmp_path}/*.parquet#text"
  source = sources.open_source(spec, data)
  assert len(source) == 103 and not source.chat
  assert [text for _, text in read(source)] == texts
  for i in (102, 0, 71, 28, 29, 70):
    assert source[i].text == texts[i]
  assert source[58].name == f"{tmp_path}/a.parquet:59"
  assert source[71 + 30].name == f"{tmp_path}/b.parquet:31"
  assert pickle.loads(pickle.dumps(source))[99].text == texts[99]
  deep = sources.open_source(spec.replace("#text", "#meta.t"), data)
  assert deep[100].text == "deep 100"
  assert deep.fingerprint() != source.fingerprint()
  assert source.changed() is None
  with pytest.raises(IndexError):
    source[103]


def test_rows_of_csv_files(tmp_path, data):
  rows = [["a", "007"], ['two\nlines, "quoted"', ""], ["\u00e9", "NULL"]]
  write_csv(tmp_path / "a.csv", [["text", "n"], *rows])
  for column in (0, 1):
    name = ("text", "n")[column]
    source = sources.open_source(f"csv:{tmp_path}/a.csv#{name}", data)
    assert [text for _, text in read(source)] == [row[column] for row in rows]
  assert source[1].name == f"{tmp_path}/a.csv:2"


def test_a_row_of_a_csv_file_may_be_a_book(tmp_path, data):
  rows = [["1", "a line,\n" * 500_000], ["2", "b" * 5_000_000], ["3", "c"]]
  write_csv(tmp_path / "a.csv", [["n", "text"], *rows])
  source = sources.open_source(f"csv:{tmp_path}/a.csv#text", data)
  assert [text for _, text in read(source)] == [text for _, text in rows]


def test_bytes_of_a_csv_file_that_are_not_utf8(tmp_path, data):
  path = tmp_path / "a.csv"
  path.write_bytes(b"n,text\n\xe9,a\n2,caf\xe9\n3,c\n")
  source = sources.open_source(f"csv:{path}#text", data)
  assert source[0].text == "a"  # Another column is not read.
  with pytest.raises(schema.ConfigError, match="a.csv:2: invalid UTF-8"):
    source[1]
  data.invalid_utf8 = "skip"
  source = sources.open_source(f"csv:{path}#text", data)
  assert [text for _, text in read(source)] == ["a", "c"]
  path.write_bytes(b"caf\xe9,text\n1,2\n")
  with pytest.raises(schema.ConfigError, match="damaged, or not a csv file"):
    sources.open_source(f"csv:{path}#text", data)


def test_tables_of_chats(tmp_path, data):
  write_parquet(
    tmp_path / "a.parquet", {"messages": [TURN, TURN], "id": [1, 2]}
  )
  source = sources.open_source(f"parquet:{tmp_path}/*", data, chat=True)
  assert source.chat and source[1].messages == TURN
  write_csv(tmp_path / "a.csv", [["prompt", "completion"], ["u", "a"]])
  source = sources.open_source(f"csv:{tmp_path}/*.csv", data, chat=True)
  assert source[0].messages == TURN


def test_bad_rows_by_policy(tmp_path, data):
  path = tmp_path / "a.parquet"
  bad = pyarrow.array([b"ok", b"\xff", None], pyarrow.binary())
  write_parquet(path, {"t": bad.view(pyarrow.string())})
  source = sources.open_source(f"parquet:{path}#t", data)
  assert source[0].text == "ok"
  with pytest.raises(schema.ConfigError, match="a.parquet:2: invalid UTF-8"):
    source[1]
  with pytest.raises(
    schema.ConfigError, match="a.parquet:3: field 't' is null.*invalid_docum"
  ):
    source[2]
  data.invalid_utf8 = data.invalid_documents = "skip"
  source = sources.open_source(f"parquet:{path}#t", data)
  assert [text for _, text in read(source)] == ["ok"]


def test_a_date_that_python_has_not(tmp_path, data):
  path = tmp_path / "a.parquet"
  dates = pyarrow.array([0, 2**61], pyarrow.timestamp("us"))
  write_parquet(path, {"messages": [TURN, TURN], "date": dates})
  source = sources.open_source(f"parquet:{path}", data, chat=True)
  assert source[0].messages == TURN
  with pytest.raises(schema.ConfigError, match="a.parquet:2: has a value that"):
    source[1]
  data.invalid_documents = "skip"
  assert sources.open_source(f"parquet:{path}", data, chat=True)[1] is None


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_what_is_no_such_table_is_refused(tmp_path, data, kind):
  def refused(spec, message, chat=False):
    with pytest.raises(schema.ConfigError, match=message) as error:
      sources.open_source(spec, data, chat=chat)
    assert "\n" not in str(error.value)

  path = tmp_path / f"a.{kind}"
  refused(f"{kind}:{path}#t", "no file matches")
  refused(f"{kind}:{path}", "malformed")
  refused(f"{kind}:{path}#t", "malformed for chats", chat=True)
  path.write_bytes(b'a,b\n1,2,3\n"')
  refused(f"{kind}:{path}#t", f"a.{kind}: damaged, or not a {kind} file")
  path.write_bytes(b"")
  refused(f"{kind}:{path}#t", f"a.{kind}: damaged, or not a {kind} file")
  if kind == "csv":
    write_csv(path, [["a", "b"], ["1", "2"]])
  else:
    write_parquet(path, {"a": [1], "b": [2]})
    source = sources.open_source(f"{kind}:{path}#a", data)
    with pytest.raises(schema.ConfigError, match="field 'a' is a number"):
      source[0]
  refused(f"{kind}:{path}#t", "no column 't'; its columns: 'a', 'b'")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_column_of_two_is_not_chosen_silently(tmp_path, data, kind):
  path = tmp_path / f"a.{kind}"
  if kind == "csv":
    write_csv(path, [["t", "n", "t"], ["1", "2", "3"]])
  else:
    columns = [pyarrow.array([x]) for x in "123"]
    parquet.write_table(pyarrow.table(columns, names=["t", "n", "t"]), path)
  with pytest.raises(schema.ConfigError, match="has 2 columns 't'; rename"):
    sources.open_source(f"{kind}:{path}#t", data)
  assert sources.open_source(f"{kind}:{path}#n", data)[0].text == "2"
