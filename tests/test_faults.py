"""Fault injection: the comparison of runs sees every difference, and a run
recovers from every fault.
"""

import json
import pathlib
import shutil
import signal

import doors
import pytest

from lm import cli
from lm.train import loop
from lm.verify import shrink
from lm.verify.faults import cases, inject, runner

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished") / "run"
  assert loop.train(make(mesh__fsdp=1, train__steps=6), str(workdir)) == 0
  return workdir


def _change(workdir, name, change):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  report = json.loads(lines[1])
  report[name] = change(report[name])
  lines[1] = json.dumps(report)
  (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
  ("edit", "differs"),
  [
    (lambda run: None, False),
    (lambda run: _change(run, "tokens_per_second", lambda x: x + 1), False),
    (lambda run: _change(run, "train/loss", lambda x: x * (1 + 1e-15)), True),
    (lambda run: _change(run, "batch_hash", lambda x: x[::-1]), True),
    (lambda run: _repeat_a_step(run), True),
    (lambda run: shutil.rmtree(run / "checkpoints" / "6"), True),
  ],
)
def test_differences_are_seen(edit, differs, finished, tmp_path):
  shutil.copytree(finished, tmp_path / "run")
  edit(tmp_path / "run")
  assert (runner.differences(tmp_path / "run", finished) > 0) == differs


def _repeat_a_step(workdir):
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines, lines[-1]]) + "\n")


def test_a_run_so_far_is_compared_at_a_checkpoint(finished, tmp_path):
  def differs(step):
    return runner.differences(run, finished, step) > 0

  run = tmp_path / "run"
  shutil.copytree(finished, run)
  _repeat_a_step(run)  # step 6, which is not compared yet
  assert not differs(3) and not differs(6)
  _change(run, "train/loss", lambda x: x * (1 + 1e-15))  # of step 4
  assert not differs(3) and differs(6)
  shutil.rmtree(run / "checkpoints" / "3")
  assert differs(3)


def test_wrappers_call_the_action_at_the_injection_point():
  calls = []

  class Owner:
    def work(self):
      calls.append("work")

  inject.before(Owner, "work", lambda: calls.append("before"), at=2)
  inject.after(Owner, "work", lambda: calls.append("after"), at=1)
  Owner().work()
  Owner().work()
  assert calls == ["work", "after", "before", "work"]


def test_a_background_job_heeds_the_signals_of_faults():
  before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGHUP)}
  try:
    for which in before:
      signal.signal(which, signal.SIG_IGN)  # as nohup does
    inject._heed_signals()
    assert all(signal.getsignal(s) != signal.SIG_IGN for s in before)
  finally:
    for which, handler in before.items():
      signal.signal(which, handler)


@pytest.mark.slow
def test_runs_recover_from_every_fault():
  doors.start_server()  # training processes are forks of the server too
  config = shrink.shrink(cli.load(str(ROOT / "configs" / "tiny.py")))
  results = list(cases.run(config))
  assert len(results) >= 60
  unchecked = [r for r in results if r.note.startswith("not checked")]
  failed = [r for r in results if not r.passed and r not in unchecked]
  assert not failed, "\n".join(f"{r.compared}: {r.note}" for r in failed)
  if unchecked:  # a disk to fill needs the right to mount one
    pytest.skip("; ".join(f"{r.compared}: {r.note}" for r in unchecked))
