"""Real processes, of eight devices together, joined over loopback."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import test_train

from lm import config as config_lib
from lm.train import loop
from lm.train import metrics as metrics_lib

ROOT = pathlib.Path(__file__).parent.parent

CHILD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
from lm import processes, validation
processes.join(heartbeat_seconds=10)
from lm.train import loop
c = validation.from_json(sys.argv[1])
sys.exit(loop.train(c, sys.argv[2]))
"""


AGREEING = """
import sys, types
import jax
from lm import config, objective, processes, schema
processes.join(heartbeat_seconds=10)
from lm.train import resume

def store(**changed):
  made = dict(spec="text:a", fingerprint="f", n_tokens=9)
  made["objective"] = objective.Causal()
  return types.SimpleNamespace(**{**made, **changed})

def prepared(tokenizer="t", **changed):
  named = types.SimpleNamespace(fingerprint=tokenizer)
  train = [store(), store(**changed)]
  return types.SimpleNamespace(tokenizer=named, train=train, validation=[])

me, told = jax.process_index(), []
def check(function, *args):
  try:
    function(*args)
    told.append("agreed")
  except schema.ConfigError as error:
    told.append(" ".join(str(error).split()))

c = config.Config()
check(resume.check_processes_start_alike, c)
c.data.cache_dir = f"cache{me}"
check(resume.check_processes_start_alike, c)
c.optimizer.b2 = 0.9 + me / 100
check(resume.check_processes_start_alike, c)
c = config.Config()
for change in ({}, {"fingerprint": f"f{me}"}, {"n_tokens": 9 + me}):
  check(resume.check_processes_read_alike, c, prepared(**change), "/none")
check(resume.check_processes_read_alike, c, prepared(f"t{me}"), "/none")
print("\\n".join(told))
"""


def test_processes_that_differ_are_told_so():
  """Each by itself, in a line; what hosts may have of their own may differ."""
  for i, said in enumerate(_children(AGREEING, (), 2)):
    told = said.strip().splitlines()[-7:]
    assert told[:2] == ["agreed", "agreed"] and told[3] == "agreed", said
    for line, name, value in (
      (told[2], "config.optimizer", f'"b2": 0.9{i or ""}'),
      (told[4], "config.data.train[1]='text:a'", f"fingerprint f{i}, 9 tokens"),
      (told[5], "config.data.train[1]='text:a'", f"fingerprint f, {9 + i} tok"),
      (told[6], "tokenizer", f"t{i}"),
    ):
      assert line.startswith(f"{name}: process(es) [1] have another value"), (
        line
      )
      assert f"on process {i} it is" in line and value in line, line


def _run(config, workdir, n_processes):
  arguments = config_lib.to_json(config), str(workdir), str(8 // n_processes)
  _children(CHILD, arguments, n_processes)


def _children(program, arguments, n_processes):
  """What each of the joined processes says; all must end with 0."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  children = [
    subprocess.Popen(
      [sys.executable, "-c", program, *arguments],
      cwd=ROOT,
      env={
        **os.environ,
        "COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "PROCESS_COUNT": str(n_processes),
        "PROCESS_INDEX": str(i),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(n_processes)
  ]
  said = [child.communicate(timeout=300)[0] for child in children]
  codes = [child.returncode for child in children]
  assert codes == [0] * n_processes, "\n---\n".join(said)
  return said


@pytest.mark.parametrize(
  ("n_processes", "mode", "data", "fsdp", "tensor"),
  [
    (2, "jit", 2, 2, 2),
    pytest.param(2, "pmap", 8, 1, 1, marks=pytest.mark.slow),
    pytest.param(4, "jit", 1, 4, 2, marks=pytest.mark.slow),
  ],
)
def test_processes_are_one(
  n_processes, mode, data, fsdp, tensor, make, tmp_path
):
  """The same reports and checkpoints as one process with eight devices in mode
  jit; a run begun by several is finished by one.
  """
  fields = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
  config = make(**fields)
  alone, joined = tmp_path / "alone", tmp_path / "joined"
  assert loop.train(config, str(alone)) == 0
  _run(make(**fields, mesh__mode=mode), joined, n_processes)
  mine, theirs = (test_train._exact(d) for d in (alone, joined))
  assert len(mine) == 6
  test_train.assert_close(theirs, mine, rtol=1e-5)
  test_train._cut(joined, tmp_path / "resumed", step=9)
  assert loop.train(config, str(tmp_path / "resumed")) == 0
  resumed = test_train._exact(tmp_path / "resumed")
  test_train.assert_close(resumed, mine, rtol=1e-5)
  assert json.loads((joined / "config.json").read_text())
  assert metrics_lib.read(str(joined))[-1]["step"] == 12


def test_flags_say_what_the_environment_does(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "lm.train",
      "--config=configs/tiny.py",
      f"--workdir={tmp_path}",
      "--coordinator_address=host:1",
    ],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if not k.startswith("PROCESS_")},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert "COORDINATOR_ADDRESS=host:1: needs PROCESS_COUNT" in done.stderr
