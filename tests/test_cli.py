"""What becomes of an error that reaches a door."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import doors
import jax
import pytest

from lm import cli, schema, terminal
from lm import config as config_lib
from lm.evaluate import output
from lm.train import metrics
from lm.verify import result

ROOT = pathlib.Path(__file__).parent.parent


def noted(error, note):
  error.add_note(note)
  return error


@pytest.mark.parametrize(
  ("error", "code", "said"),
  [
    (schema.ConfigError("a=1: no"), 2, "a=1: no"),
    (schema.RunError("gone"), 1, "gone"),
    (OSError(errno.ENOSPC, "No space left", "f"), 1, "f: No space left"),
    (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
    (TimeoutError("slow"), 1, "slow"),
    (MemoryError(), 1, "out of memory"),
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"),
      1,
      "out of device memory: RESOURCE_EXHAUSTED: 9 GiB; lower",
    ),
    (
      RuntimeError("Unable to initialize backend 'x': not known"),
      1,
      "Unable to initialize backend 'x': not known",
    ),
    (
      noted(jax.errors.JaxRuntimeError("UNAVAILABLE: peer"), "Start again."),
      1,
      "UNAVAILABLE: peer. Start again.",
    ),
  ],
)
def test_what_is_no_bug_is_explained(error, code, said):
  told = cli.explain(error)
  assert told is not None
  assert told.exit_code == code and said in str(told)


@pytest.mark.parametrize(
  "error",
  [KeyError("x"), TypeError("x"), jax.errors.JaxRuntimeError("INTERNAL: x")],
)
def test_a_bug_is_not_explained(error):
  assert cli.explain(error) is None


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--steps=3", "set by --config.train.steps=VALUE"),
    (
      "--name=adamw",
      "set by --config.optimizer.name=VALUE",
    ),
    ("--nonesuch=3", "Unknown command line flag 'nonesuch'"),
  ],
)
def test_a_flag_that_names_a_field_says_how_it_is_set(flag, said, tmp_path):
  ended = doors.run("lm.train", [flag], str(tmp_path))
  assert ended.code == 2 and ended.err.count("\n") == 1
  assert ended.err.strip().endswith(said)


PROGRAM = """
import atexit, os, resource, signal, sys, threading, time, warnings
from lm import cli, terminal
def main():
  if os.environ["WHAT"] == "write":
    for _ in range(10**6):
      print("a line")
    return 0
  if os.environ["WHAT"] == "table":
    for _ in range(10**6):
      terminal.console().print("a line")
    return 0
  if os.environ["WHAT"] == "said":
    return terminal.console().print("a line")
  if os.environ["WHAT"] == "streams":
    return len(sys.stdin.read()) + sys.stdout.isatty()
  if os.environ["WHAT"] == "compile":
    import jax
    with warnings.catch_warnings(record=True) as found:
      most = 10**9 if "WHOLE" in os.environ else 100
      limits = most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
      jax.jit(lambda x: x + 1)(1.0)
    return print(len(found))
  if os.environ["WHAT"] == "stop":
    atexit.register(print, "cleared", file=sys.stderr)
    atexit.register(signal.raise_signal, signal.SIGINT)  # a second Ctrl-C
    threading.Thread(target=time.sleep, args=(60,)).start()
  raised = {"bug": KeyError("lost"), "stop": KeyboardInterrupt()}
  raise raised[os.environ["WHAT"]]
cli.run(main, takes_config=False)
"""


def start(what, *flags, **environment):
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, *flags],
    cwd=ROOT,
    env={"PYTHONPATH": str(ROOT), "WHAT": what} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_bug_shows_its_traceback_once_and_says_where_to_report_it():
  child = start("bug")
  _, said = child.communicate()
  assert child.returncode == 1
  assert said.count("Traceback") == 1 and "KeyError: 'lost'" in said
  assert said.strip().splitlines()[-1].startswith("This is an error in the")
  assert said.strip().endswith("to the project's issue tracker.")


def test_ctrl_c_is_a_line():
  """And no thread is waited for: one that XLA left would crash the process.
  A second one adds nothing.
  """
  child = start("stop")
  _, said = child.communicate(timeout=50)
  assert child.returncode == 130 and said == "stopped by Ctrl-C\ncleared\n"


@pytest.mark.parametrize("module", ["lm.data", "lm.evaluate", "lm.sample"])
def test_ctrl_c_during_imports_is_a_line(module, tmp_path):
  """Which take seconds; here JAX takes for ever."""
  (tmp_path / "jax.py").write_text(
    "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
  )
  with subprocess.Popen(
    [sys.executable, "-m", module],
    cwd=ROOT,
    env={"PYTHONPATH": str(tmp_path)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout is not None and child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
  assert child.returncode == 130 and said == "stopped by Ctrl-C\n"


@pytest.mark.parametrize("what", ["write", "table"])
def test_a_reader_that_leaves_ends_the_program_quietly(what):
  """As `head` does."""
  child = start(what)
  assert child.stdout.readline() == "a line\n"
  child.stdout.close()
  said = child.stderr.read()
  child.stderr.close()
  assert child.wait() == 141 and said == ""


def test_help_without_a_reader_ends_quietly():
  read, write = os.pipe()
  os.close(read)
  child = subprocess.run(
    [sys.executable, "-c", PROGRAM, "--help"],
    cwd=ROOT,
    env={"PYTHONPATH": str(ROOT), "WHAT": "help"},
    stdout=write,
    stderr=subprocess.PIPE,
  )
  os.close(write)
  assert child.returncode == 141 and child.stderr == b""


def test_closed_streams_are_empty_ones():
  """As `<&- >&- 2>&-` of a shell, or a daemon, leave them."""
  child = subprocess.run(
    ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, PROGRAM],
    cwd=ROOT,
    env={"PYTHONPATH": str(ROOT), "WHAT": "streams"},
  )
  assert child.returncode == 0


@pytest.mark.slow
def test_what_one_run_has_compiled_serves_the_next(make, tmp_path):
  """Entries that cannot be read, as after a kill, are compiled again."""
  text = config_lib.to_json(make(train__steps=1, mesh__fsdp=1))
  (tmp_path / "config.py").write_text(
    "from lm import validation\n\n\n"
    f"def get_config():\n  return validation.from_json({text!r})\n"
  )
  cache, reports = tmp_path / "compiled", []

  def entries():
    paths = cache.glob("*-cache")
    return {path.name: path.stat().st_mtime_ns for path in paths}

  def train(workdir):
    flags = [f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]
    flags.append(f"--compilation_cache={cache}")
    ended = doors.run("lm.train", flags, str(tmp_path))
    assert ended.code == 0, ended.err
    (report,) = metrics.read(str(workdir))
    reports.append({k: report[k] for k in ("train/loss", "eval/loss")})

  train(tmp_path / "first")
  filled = entries()
  assert any(name.startswith("jit_step-") for name in filled)
  train(tmp_path / "second")
  assert entries() == filled
  for path in cache.glob("*-cache"):
    path.write_bytes(path.read_bytes()[:100])
  train(tmp_path / "third")
  assert reports[0] == reports[1] == reports[2]


def test_no_part_of_a_program_is_in_the_cache(tmp_path):
  """Nothing of what could not be written whole; the next start writes it."""
  flag = f"--compilation_cache={tmp_path}"
  for whole, n_warnings in (({}, 1), ({"WHOLE": ""}, 0)):
    child = start("compile", flag, JAX_PLATFORMS="cpu", **whole)
    out, said = child.communicate(timeout=50)
    assert (child.returncode, out) == (0, f"{n_warnings}\n"), said
    entries = list(tmp_path.iterdir())
    assert len(entries) == len(whole)
  assert entries[0].stat().st_size > 100


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "taken").touch()
  flags = [f"--config={ROOT / 'configs/tiny.py'}", "--workdir=run"]
  flags.append(f"--compilation_cache={tmp_path / 'taken' / 'compiled'}")
  ended = doors.run("lm.train", flags, str(tmp_path))
  assert ended.code == 2 and "is not a directory" in ended.err
  assert ended.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_no_columns_lose_no_output():
  """In none, rich would print nothing."""
  said, _ = start("said", COLUMNS="0").communicate()
  assert said == "a line\n"


def test_tables_in_a_file_hold_whole_names(capsys, monkeypatch):
  """The widest row of lm.evaluate's table, and a path in lm.verify's."""
  monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
  name, path = "tfds:python_stdlib:validation", "/" + 300 * "x"
  table = output._table("run", "source", "docs", "overlap")
  numbers = ("5.7008", "3.9512", "71.51", "7.209e+15", "386,283", "386,257")
  table.add_row(name, *numbers, "26", "12.4%")
  terminal.console().print(table)
  assert name in capsys.readouterr().out
  result.show([result.Result("batches", "", None, None, False, path)], "")
  assert capsys.readouterr().out.count("x") == 300


@pytest.mark.parametrize("columns", ["1", "20", "80"])
def test_a_narrow_terminal_cuts_nothing(columns, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", columns)
  table = output._table("run", "source", "docs", "overlap")
  numbers = ("5.7008", "3.9512", "71.51", "7.209e+15", "386,283", "386,257")
  table.add_row(300 * "x", *numbers, "26", "12.4%")
  console = terminal.console()
  terminal.print_table(console, table)
  assert console.width == int(columns)
  out = capsys.readouterr().out
  for whole in ("bits/byte", *numbers, "26", "12.4%"):
    assert whole in out, out
  assert out.count("x") == 300
  failed = result.Result("batches", 300 * "z", 0.125, 0.5, False, "")
  result.show([failed], "")
  out = capsys.readouterr().out
  for whole in ("batches", "0.125", "0.5", "FAIL"):
    assert whole in out, out
  assert out.count("z") == 300


def test_a_name_between_colons_is_no_emoji(capsys):
  """`tfds:moon:test` is one, and files may be called so."""
  console = terminal.console()
  table = terminal.table("source", "docs", title="runs/:cat:")
  table.add_row("tfds:moon:test", "1")
  console.print(table)
  terminal.print_lines(console, ["a:book:.txt"])
  out = capsys.readouterr().out
  for whole in ("runs/:cat:", "tfds:moon:test", "a:book:.txt"):
    assert whole in out, out


def test_a_name_has_no_power_over_the_terminal(capsys):
  table = terminal.table("source", "docs")
  table.add_row(terminal.cell("a\x1b[31mb\n[bold]"), "1")
  terminal.print_table(terminal.console(), table)
  terminal.print_lines(terminal.console(), ["longest: a\x1b[31mb\r"])
  out = capsys.readouterr().out
  assert r" a\x1b[31mb\n[bold] " in out and r": a\x1b[31mb\r" in out, out
