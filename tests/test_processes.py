"""Real processes, of eight devices together, joined over loopback."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import doors
import jax
import pytest
import safetensors.numpy
import test_convert
import test_families
import test_init_from
import test_train

from lm import config as config_lib
from lm import digest
from lm import mesh as mesh_lib
from lm.train import init_from, loop
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
  children = doors.joined(program, lambda _: arguments, n_processes)
  said = ["".join(child.communicate(timeout=300)) for child in children]
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


# Prints the rows read of tensors and the digests of parameters, and trains.
FROM_A_FOLDER = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from lm import digest, processes, validation
from lm import mesh as mesh_lib
processes.join(heartbeat_seconds=10)
from lm.huggingface import tensors
from lm.train import init_from, loop

rows, read = [], tensors.Stored.read
def spy(self, first=0, last=None):
  rows.append([list(self.shape), first, last])
  return read(self, first, last)
tensors.Stored.read = spy

c = validation.from_json(sys.argv[1])
loaded = init_from.load(c, mesh_lib.make(c), lambda line: None)
found = {
  jax.tree_util.keystr(path): [int(x) for x in digest.of_tree(leaf)]
  for path, leaf in jax.tree_util.tree_leaves_with_path(loaded)
}
print("found", json.dumps([rows, found]))
sys.exit(loop.train(c, sys.argv[2]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  """A folder with a small Llama, of lengths that eight devices divide."""
  path = tmp_path_factory.mktemp("hub") / "llama"
  sizes = {"vocab_size": 320, "intermediate_size": 40, "hidden_size": 48}
  test_families.reference("llama3", path, **sizes)
  test_convert.save_tokenizer(path)
  return path


@pytest.mark.parametrize(
  ("mode", "data", "fsdp", "tensor"),
  [
    ("jit", 1, 4, 2),
    ("pmap", 8, 1, 1),
  ],
)
@pytest.mark.slow
def test_processes_start_from_a_folder_of_hugging_face(
  mode, data, fsdp, tensor, make, hub, tmp_path
):
  """The parameters of one process to the bit, and its losses; a process reads
  the rows of its own devices alone.
  """
  config = test_init_from.from_hub(make, hub)
  config.train.steps, config.train.log_every = 3, 1
  # Adam would divide a gradient of rounding errors alone by its own size. Which
  # ones there are depends on the text, and the text is this project's source.
  config.optimizer.epsilon = 1e-2
  m = config.mesh
  m.data, m.fsdp, m.tensor = data, fsdp, tensor
  loaded = init_from.load(config, mesh_lib.make(config), print)
  want = {
    jax.tree_util.keystr(path): [int(x) for x in digest.of_tree(leaf)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded)
  }
  assert loop.train(config, str(tmp_path / "alone")) == 0
  m.mode = mode
  arguments = config_lib.to_json(config), str(tmp_path / "joined")
  for i, said in enumerate(_children(FROM_A_FOLDER, arguments, 2)):
    (line,) = [x for x in said.splitlines() if x.startswith("found ")]
    rows, found = json.loads(line.removeprefix("found "))
    assert found == want and len(found) == 12
    # mlp.down_proj is [48, 40], and split along its rows by fsdp.
    read = [[first, last] for shape, first, last in rows if shape == [48, 40]]
    own = [24 * i, 24 * i + 24] if fsdp == 4 else [0, 48]
    assert read == [own] * 3
  mine, theirs = (test_train._exact(tmp_path / x) for x in ("alone", "joined"))
  assert len(mine) == 3
  # A perplexity differs relatively by what its loss, of 7.2, does absolutely.
  test_train.assert_close(theirs, mine, rtol=3e-5)


FROM_FOLDERS_THAT_DIFFER = """
import os, sys
import jax
from lm import processes, schema, validation
processes.join(heartbeat_seconds=10)
from lm.train import init_from, loop

c = validation.from_json(sys.argv[1])
os.chdir(os.path.join(sys.argv[2], str(jax.process_index())))
told = []
for c.init_from in ("missing", "other"):
  try:
    loop.train(c, os.path.join(sys.argv[2], "run"))
  except schema.ConfigError as error:
    told.append(" ".join(str(error).split()))
print("\\n".join(["told", *told]))
"""


@pytest.mark.slow
def test_folders_that_differ_are_an_error_on_all(make, hub, tmp_path):
  """One is missing on process 1; and one has other numbers in one tensor."""
  for i in range(2):
    for name in ("missing", "other")[i:]:
      shutil.copytree(hub, tmp_path / str(i) / name)
  path = tmp_path / "1" / "other" / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  tensors["model.layers.1.mlp.up_proj.weight"] += 1.0
  safetensors.numpy.save_file(tensors, path, {"format": "pt"})
  config = test_init_from.from_hub(make, hub)
  config.train.steps, config.mesh.fsdp = 1, 1
  arguments = config_lib.to_json(config), str(tmp_path)
  for i, said in enumerate(_children(FROM_FOLDERS_THAT_DIFFER, arguments, 2)):
    missing, other = said[said.index("told\n") :].splitlines()[1:]
    says = "config.init_from='missing': missing has no checkpoint"
    assert missing.startswith(says if i else f"process 1: {says}"), said
    says = "config.init_from=other: process(es) [1] have another value than"
    assert other.startswith(says), said
  assert not (tmp_path / "run").exists()


ONE_FAILS = """
import jax
from lm import processes, schema
processes.join(heartbeat_seconds=10)
me = jax.process_index()

def check(function, on):
  try:
    print(f"told {function(on)}")
  except Exception as error:
    print(f"told {type(error).__name__}: {error}")

def made(errors):
  if errors[me] is not None:
    raise errors[me]
  return me

for errors in (
  (None, None),
  (None, schema.ConfigError("bad")),
  (schema.RunError("full"), None),
  (ValueError("a"), KeyError("b")),
):
  check(lambda on: processes.on_all(lambda: made(on)), errors)
check(lambda on: processes.only_first(lambda: made(on)), (OSError("c"), None))
"""


def test_an_error_on_one_is_an_error_on_all():
  first, second = (
    [x.removeprefix("told ") for x in said.splitlines() if x[:5] == "told "]
    for said in _children(ONE_FAILS, (), 2)
  )
  assert first == [
    "0",
    "ConfigError: process 1: bad",
    "RunError: full",
    "ValueError: a",
    "OSError: c",
  ]
  assert second == [
    "1",
    "ConfigError: bad",
    "RunError: process 0: full",
    "KeyError: 'b'",
    "RunError: process 0: OSError: c",
  ]


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
