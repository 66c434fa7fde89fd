"""The account of a run's time, and the watch over its steps."""

import io
import json
import sys
import time
import types

import pytest

from lm.train import ledger, watchdog


def _attempt(began, written, first_step, step, saved, **seconds):
  spent = dict.fromkeys(ledger.PHASES, 0.0) | {"step": step} | seconds
  return {
    "began": began,
    "written": written,
    "first_step": first_step,
    "seconds": spent,
    "saved": saved,
  }


def test_closed_form():
  """Three attempts: killed 6 s after a save; killed before any; the end."""
  attempts = [
    _attempt(0, 40, 0, 30.0, {"5": 12.0, "10": 24.0}, start=4.0, save=6.0),
    _attempt(50, 65, 10, 9.0, {}, start=5.0, restore=1.0),
    _attempt(70, 100, 10, 20.0, {"20": 20.0}, start=5.0, restore=5.0),
  ]
  found = ledger.summarize(attempts)
  assert found["lost"] == 6 + 9
  assert found["down"] == 10 + 5
  assert found["step"] == 24 + 0 + 20
  assert found["start"] == 14 and found["save"] == 6 and found["restore"] == 6
  assert found["wall"] == 100
  assert found["goodput"] == 0.44


def test_going_back_two_checkpoints_loses_what_was_kept_before():
  attempts = [
    _attempt(0, 24, 0, 24.0, {"5": 12.0, "10": 24.0}),
    _attempt(24, 30, 10, 6.0, {"15": 6.0}),
    _attempt(30, 40, 5, 10.0, {"20": 10.0}),  # 10 and 15 were damaged
  ]
  found = ledger.summarize(attempts)
  assert found["lost"] == 12 + 6
  assert found["step"] == 12 + 10


def test_a_start_that_fails_loses_no_step(tmp_path):
  attempts = [
    _attempt(0, 24, 0, 24.0, {"10": 20.0}),
    _attempt(30, 31, None, 0.0, {}, start=1.0),  # could not read a checkpoint
    _attempt(34, 44, 10, 10.0, {"20": 10.0}),
  ]
  found = ledger.summarize(attempts)
  assert found["lost"] == 4 and found["step"] == 30
  assert found["down"] == 6 + 3 and found["wall"] == 44
  ledger.Ledger(str(tmp_path), time.time())  # ends before `starts_from`
  account = ledger.Ledger(str(tmp_path), time.time())
  account.starts_from(7)
  assert [a["first_step"] for a in ledger.read(str(tmp_path))] == [None, 7]


def test_every_second_is_in_one_phase_and_survives(tmp_path, monkeypatch):
  now = 1000.0

  def sleep(seconds):
    nonlocal now
    now += seconds

  clock = types.SimpleNamespace(time=lambda: now, perf_counter=lambda: now - 7)
  monkeypatch.setattr(ledger, "time", clock)
  account = ledger.Ledger(str(tmp_path), now - 2.0)
  with account.within("restore"):
    sleep(1.5)
  with account.within("compile"):
    sleep(1.0)
  account.starts_from(0)
  sleep(0.5)
  with account.within("evaluate"), account.within("data_wait"):
    sleep(0.25)
  account.saved(3)
  (attempt,) = ledger.read(str(tmp_path))
  spent = {phase: s for phase, s in attempt["seconds"].items() if s}
  assert spent == {
    "start": 2.0,
    "restore": 1.5,
    "compile": 1.0,
    "step": 0.5,
    "data_wait": 0.25,
  }
  assert attempt["saved"] == {"3": 0.5}
  said = account.describe()
  assert ", 1 attempt: start 2.0 s, make or restore the state 1.5 s, " in said
  again = ledger.Ledger(str(tmp_path), now)
  again.starts_from(3)
  assert [a["first_step"] for a in ledger.read(str(tmp_path))] == [0, 3]
  assert ", 2 attempts: " in again.describe()


class _Watched:
  """A watchdog by a clock that moves when it is told to."""

  def __init__(self, monkeypatch, shortest, factor):
    self.now, self._n_looks = 0.0, 0
    clock = types.SimpleNamespace(monotonic=lambda: self.now)
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog, "_SHORTEST", shortest)
    self.watch = watchdog.Watchdog(factor)
    wait = self.watch._ended.wait

    def noted(seconds):
      self._n_looks += 1
      return wait(seconds)

    self.watch._ended.wait = noted

  def looked(self):
    """Waits until it has looked, from beginning to end."""
    n, deadline = self._n_looks + 2, time.monotonic() + 60
    while self._n_looks < n:
      assert time.monotonic() < deadline
      time.sleep(0.001)

  def sleep(self, seconds):
    self.now += seconds
    self.looked()


def test_a_slow_step_is_reported_with_stacks(monkeypatch):
  """To a stderr without a file descriptor, as a notebook's is."""
  stderr = io.StringIO()
  monkeypatch.setattr(sys, "stderr", stderr)
  watched = _Watched(monkeypatch, shortest=0.2, factor=3.0)
  watch = watched.watch
  for step in range(8):
    watched.sleep(0.01)
    watch.step_done(step)
  watch.pause()  # an evaluation
  watched.looked()
  watched.sleep(0.4)
  assert stderr.getvalue() == ""
  watch.step_done(8)

  def hangs_here():
    watched.sleep(0.5)

  hangs_here()
  watch.close()
  said = stderr.getvalue()
  assert "the step after 8 has taken" in said and "hangs_here" in said
  assert "Thread MainThread:" in said


def test_a_step_as_long_as_others_is_not_reported(capfd, monkeypatch):
  watched = _Watched(monkeypatch, shortest=0.01, factor=10.0)
  for step in range(8):
    watched.sleep(0.05)
    watched.watch.step_done(step)
  watched.watch.close()
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
  "content", ["", "{}", "7", "[" * 100_000, '[{"seconds": {}}]', "no saved"]
)
def test_a_damaged_file_is_set_aside(content, tmp_path, capsys):
  """Whatever JSON it is, and whichever field it lacks."""
  path = tmp_path / "goodput.json"
  if content == "no saved":
    ledger.Ledger(str(tmp_path), time.time())
    (attempt,) = json.loads(path.read_text())
    del attempt["saved"]
    content = json.dumps([attempt])
  path.write_text(content)
  ledger.Ledger(str(tmp_path), time.time()).starts_from(0)
  assert len(ledger.read(str(tmp_path))) == 1
  (aside,) = tmp_path.glob("goodput.json.damaged-*")
  assert aside.read_text() == content
  assert "is damaged: moved to" in capsys.readouterr().err
