"""Going on with a run: from which checkpoint, with what, and when not.

`goldens/run_format1.tar.gz` is a run of 12 steps by commit 97cef6f, as a kill
after its checkpoint of step 6 left it, with the reports of all 12 steps.
"""

import copy
import dataclasses
import errno
import gc
import json
import os
import pathlib
import shutil
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import checkpoint, files, items, locks, schema, validation
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm.train import loop, optimizer, resume, start
from lm.train import metrics as metrics_lib

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# Orbax leaves coroutines behind where a restore fails.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def collect_coroutines():
  """Those of the note above, while their test is under way."""
  yield
  gc.collect()


@pytest.fixture(scope="module")
def old(tmp_path_factory):
  """The run of format 1, and its config for a corpus at another path."""
  folder = tmp_path_factory.mktemp("old")
  with tarfile.open(GOLDENS / "run_format1.tar.gz") as packed:
    # Python before 3.11.4, such as that of Debian 12, knows no filters.
    packed.extraction_filter = getattr(tarfile, "data_filter", None)
    packed.extractall(folder)
  config = validation.from_json((folder / "run" / "config.json").read_text())
  config.data.train = (f"text:{folder}/corpus/*.txt",)
  config.data.validation = (f"text:{folder}/corpus/0.txt",)
  config.data.cache_dir = str(folder / "cache")
  config.mesh = config_lib.MeshConfig(data=8)
  return config, folder / "run"


@pytest.fixture(scope="module")
def resumed(old, tmp_path_factory):
  """The old run, gone on with to its end: step 12 has today's format."""
  config, run = old
  workdir = tmp_path_factory.mktemp("resumed") / "run"
  shutil.copytree(run, workdir)
  assert loop.train(config, str(workdir)) == 0
  return config, workdir


@pytest.fixture
def broken(resumed, tmp_path):
  """A copy of the resumed run, to be damaged."""
  config, workdir = resumed
  shutil.copytree(workdir, tmp_path / "run")
  return copy.deepcopy(config), tmp_path / "run"


def first_state(config, workdir, said=None):
  """What a start of the run begins with, and what it says."""
  said = [] if said is None else said
  checkpoints = checkpoint.Checkpoints(str(workdir), config.checkpoint)
  try:
    # The data are those of the last checkpoint.
    now = checkpoint.load_meta(str(workdir), min(checkpoints.steps()))
    now = dataclasses.replace(now, config=config)
    mesh = mesh_lib.make(config)
    state, meta = resume.first_state(
      config, mesh, str(workdir), checkpoints, now, said.append
    )
  finally:
    checkpoints.close()
  return state, meta, "\n".join(said)


def places(workdir):
  """Every file of the run, and how long it is."""
  return {
    str(path.relative_to(workdir)): path.stat().st_size
    for path in workdir.rglob("*")
    if path.is_file()
  }


def test_a_run_of_format_1_goes_on_as_it_would_have(old, resumed):
  """Same losses, on another mesh, with the corpus at another path; config.json
  is the present config, and the one before is kept.
  """
  want = metrics_lib.read(str(old[1]))
  got = metrics_lib.read(str(resumed[1]))
  assert [r["step"] for r in got] == list(range(1, 13))
  for a, b in zip(got, want, strict=True):
    assert a["batch_hash"] == b["batch_hash"]
    for name in ("train/loss", "grad_norm", "lr", "eval/loss"):
      if name in b:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
  config, workdir = resumed
  meta = checkpoint.load_meta(str(workdir))
  assert meta.step == 12 and meta.config == config and meta.trees
  saved = (workdir / "config.json").read_text()
  assert validation.from_json(saved) == config
  (line,) = (workdir / "config_history.jsonl").read_text().splitlines()
  entry = json.loads(line)
  assert entry["until_step"] == 6
  assert entry["config"]["data"]["train"] == ["text:corpus/*.txt"]


def edit_meta(step, change):
  """Changes what a checkpoint says of itself, as a later program might."""
  path = step / "meta" / "metadata"
  content = json.loads(path.read_text())
  content.pop("digest", None)
  change(content)
  content["digest"] = files.json_digest(content)
  path.write_text(json.dumps(content))


def test_a_later_format_is_refused(broken):
  config, workdir = broken
  edit_meta(workdir / "checkpoints" / "12", lambda c: c.update(format=99))
  before = places(workdir)
  with pytest.raises(schema.ConfigError, match="has format 99"):
    checkpoint.load_meta(str(workdir))
  with pytest.raises(schema.ConfigError, match="formats 1 to 2"):
    loop.train(config, str(workdir))
  assert places(workdir) == before


# --- other arrays than wanted -------------------------------------------------


@pytest.mark.parametrize("step", [6, 12])  # of formats 1 and 2
def test_another_optimizer_tree_is_refused_then_taken_afresh(
  step, broken, monkeypatch
):
  """As a new optax might bring it: a link more in the chain."""
  config, workdir = broken
  if step == 6:
    shutil.rmtree(workdir / "checkpoints" / "12")
  make = optimizer.make

  def chained(*args):
    return optax.chain(optax.scale_by_schedule(lambda _: 1.0), make(*args))

  monkeypatch.setattr(optimizer, "make", chained)
  before = places(workdir)
  with pytest.raises(schema.ConfigError) as error:
    first_state(config, workdir)
  assert "in `rest` 1/0/count: stored not, wanted int32[]" in str(error.value)
  assert "on_mismatch=fresh_optimizer" in str(error.value)
  assert places(workdir) == before
  config.checkpoint.on_mismatch = "fresh_optimizer"
  state, meta, said = first_state(config, workdir)
  assert meta.step == step and "afresh from step" in said
  assert int(state.step) == step
  # Schedules go on where they were; the moments are new.
  assert int(state.opt_state[0].count) == step
  adam = state.opt_state[1].inner_states["adam"].inner_state
  assert int(adam[0].count) == 0 and int(adam[2].count) == step
  assert not np.any(adam[0].mu["embed"])
  # What fits is as it was.
  wanted, _, _ = first_state_of(config, workdir, make, monkeypatch)
  for name in ("params", "ema", "history"):
    same = jax.tree.map(
      np.array_equal, getattr(state, name), getattr(wanted, name)
    )
    assert all(jax.tree.leaves(same)), name


def first_state_of(config, workdir, make, monkeypatch):
  monkeypatch.setattr(optimizer, "make", make)
  return first_state(config, workdir)


def test_a_part_of_any_form_can_be_left_out(make, tmp_path):
  """As Adam's state, a tuple, where the optimizer is now another."""
  config = make()
  meta = checkpoint.Meta(7, config, "", "none")
  saved = checkpoint.Checkpoints(str(tmp_path), config.checkpoint)
  one, step = np.ones(3, np.float32), np.asarray(7, np.int32)
  for i, state in enumerate([({"mu": one}, (one,)), {"mu": one}, [one], one]):
    meta = dataclasses.replace(meta, step=i + 1)
    saved.save({"rest": (step, state, None)}, meta)
    saved.wait()
    like = jax.ShapeDtypeStruct((), np.int32)
    found = saved.restore_parts(meta, "rest", (like, None, None))
    assert found[0] == 7 and found[1:] == (None, None)
  saved.close()


def test_from_step_asks_for_the_config_of_that_step(broken):
  """Not of a later one; and where it is refused, nothing has moved."""
  config, workdir = broken
  other = copy.deepcopy(config)
  other.optimizer.b2 = 0.5
  meta = checkpoint.load_meta(str(workdir))
  meta = dataclasses.replace(meta, step=13, config=other)
  checkpoints = checkpoint.Checkpoints(str(workdir), config.checkpoint)
  checkpoints.save({"params": {"x": np.ones(3)}}, meta)
  checkpoints.close()
  before = places(workdir)
  with pytest.raises(schema.ConfigError, match="optimizer.b2 was"):
    loop.train(other, str(workdir), from_step=12)
  assert places(workdir) == before
  with pytest.raises(schema.ConfigError, match="optimizer.b2 was 0.5"):
    start.prepare(config, str(workdir), None)
  start.prepare(config, str(workdir), 12)


def test_an_average_and_a_history_can_be_added(broken):
  """And the optimizer's state stays, since it fits."""
  config, workdir = broken
  plain = copy.deepcopy(config)
  plain.optimizer.ema_decay = plain.optimizer.skip = None
  wanted, _, _ = first_state(config, workdir)
  # A checkpoint without either.
  state = dataclasses.replace(wanted, ema=None, history=None)
  meta = checkpoint.load_meta(str(workdir))
  meta = dataclasses.replace(meta, step=13, config=plain)
  checkpoints = checkpoint.Checkpoints(str(workdir), config.checkpoint)
  checkpoints.save(resume.to_trees(state), meta)
  checkpoints.close()
  with pytest.raises(schema.ConfigError, match="optimizer.ema_decay was"):
    first_state(config, workdir)
  config.checkpoint.on_mismatch = "fresh_optimizer"
  got, meta, said = first_state(config, workdir)
  assert meta.step == 13
  assert "from step 13 on config.optimizer.ema_decay is 0.9; was None" in said
  assert int(got.history.count) == 0
  for a, b in ((got.ema, wanted.params), (got.opt_state, wanted.opt_state)):
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_another_model_is_refused_by_field_also_without_config_json(broken):
  config, workdir = broken
  (workdir / "config.json").unlink()
  config.model.d_model = 16
  before = places(workdir)
  with pytest.raises(schema.ConfigError, match="d_model was 8 and is 16"):
    loop.train(config, str(workdir))
  assert places(workdir) == before


@pytest.mark.parametrize("content", [b"\xff\x00", b"{}", b"", b"[" * 100_000])
def test_a_config_json_that_is_none_is_written_again(
  content, broken, capsys, monkeypatch
):
  config, workdir = broken
  (workdir / "config.json").write_bytes(content)
  last = checkpoint.last_undamaged(str(workdir))
  assert resume.earlier_config(str(workdir), last) == config
  said = resume.write_config(str(workdir), config, 12)
  if content != b"{}":
    assert "config.json is damaged: moved to" in said
  saved = (workdir / "config.json").read_text()
  assert validation.from_json(saved) == config


# --- the world fails, or the files are damaged --------------------------------


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    MemoryError(),
    ConnectionError("reset"),
    ValueError("UNAVAILABLE: the store does not answer"),
    ValueError("Error reading local file: [os_error_code='5']"),
    TypeError("of a library that changed"),
  ],
)
def test_a_read_that_fails_moves_nothing(error, broken, monkeypatch):
  """Once: it is tried again, and goes on. Always: exit code 1. What nobody
  knows is not tried again.
  """
  import orbax.checkpoint as ocp

  monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
  config, workdir = broken
  original, left = ocp.Checkpointer.restore, [1]

  def fails(self, *args, **kwargs):
    left[0] -= 1
    if left[0] >= 0:
      raise RuntimeError("about a checkpoint") from error
    return original(self, *args, **kwargs)

  monkeypatch.setattr(ocp.Checkpointer, "restore", fails)
  before = places(workdir)
  if not isinstance(error, TypeError):
    assert first_state(config, workdir)[1].step == 12
  left[0] = 1000
  with pytest.raises(schema.RunError, match="could not be read") as failed:
    first_state(config, workdir)
  assert not isinstance(failed.value, files.Damaged)
  assert failed.value.exit_code == 1 and str(failed.value).count("\n") == 0
  assert places(workdir) == before


@pytest.mark.parametrize("part", ["meta", "params"])
def test_a_checkpoint_removed_by_its_run_is_not_called_damaged(
  part, broken, monkeypatch
):
  """The run saves a later one while the checkpoint is read."""
  config, workdir = broken
  module, name = {"meta": (files, "unseal"), "params": (items, "read")}[part]
  original = getattr(module, name)

  def late(*args, **kwargs):
    shutil.rmtree(workdir / "checkpoints" / "12")
    if part == "meta":
      raise FileNotFoundError("no such file")
    return original(*args, **kwargs)

  monkeypatch.setattr(module, name, late)
  with pytest.raises(schema.RunError, match="was removed while it was read"):
    checkpoint.load_params(str(workdir), config.model)


WAYS = {
  "deleted": None,
  "halved": lambda b: b[: len(b) // 2],
  "longer": lambda b: b + b"\x01",
  "first bit": lambda b: _turn(b, 0),
  "a bit at a third": lambda b: _turn(b, len(b) // 3),
}


def _turn(content, i):
  return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


def test_replicas_save_parts_of_what_is_large(make, tmp_path, monkeypatch):
  """And small arrays whole: a part is cut out by a program of its own."""
  mesh = jax.sharding.Mesh(jax.devices(), ("data",))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  rng = np.random.default_rng(0)
  sizes = {"small": (64, 16), "large": (8, items._PART_BYTES // 4)}
  tree = {
    name: jax.device_put(rng.normal(size=size).astype(np.float32), everywhere)
    for name, size in sizes.items()
  }
  cut, slice_in_dim = [], jax.lax.slice_in_dim

  def spy(x, *args, **options):
    cut.append(x.shape)
    return slice_in_dim(x, *args, **options)

  config = make()
  meta = checkpoint.Meta(1, config, "", "none")
  saved = checkpoint.Checkpoints(str(tmp_path), config.checkpoint)
  with monkeypatch.context() as patch:
    patch.setattr(jax.lax, "slice_in_dim", spy)
    saved.save({"params": tree}, meta)
  saved.close()
  assert cut == [sizes["large"]] * 8
  known = checkpoint.load_meta(str(tmp_path))
  again = checkpoint.Checkpoints(str(tmp_path), config.checkpoint)
  found = again.restore(known, {"params": tree})["params"]
  again.close()
  jax.tree.map(np.testing.assert_array_equal, found, tree)


@pytest.mark.slow
def test_any_file_of_a_checkpoint_may_be_damaged(tmp_path):
  """Each file in turn, in each way: the arrays that come back are right to the
  bit, or one line names the checkpoint's file or item.
  """
  rng = np.random.default_rng(5)
  trees = {
    "params": {"embed": rng.standard_normal((37, 11)).astype(np.float32)},
    "rest": (np.int32(7), {"mu": rng.standard_normal(31)}, None),
  }
  trees = jax.tree.map(jnp.asarray, trees)
  config = config_lib.Config()
  whole = tmp_path / "whole"
  checkpoints = checkpoint.Checkpoints(str(whole), config.checkpoint)
  meta = checkpoint.Meta(7, config, "{}", "data", loss=1.5, batch_hash="00")
  checkpoints.save(trees, meta)
  checkpoints.close()
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trees
  )
  step = whole / "checkpoints" / "7"
  n_told = n_right = 0
  for path in sorted(p for p in step.rglob("*") if p.is_file()):
    for way, change in WAYS.items():
      shutil.rmtree(tmp_path / "run", ignore_errors=True)
      shutil.copytree(whole, tmp_path / "run")
      broken = tmp_path / "run" / path.relative_to(whole)
      if change is None:
        broken.unlink()
      else:
        broken.write_bytes(change(path.read_bytes()))
      what = f"{path.relative_to(whole)}, {way}"
      opened = None
      try:
        opened = checkpoint.Checkpoints(
          str(tmp_path / "run"), config.checkpoint
        )
        found = checkpoint.load_meta(str(tmp_path / "run"))
        assert dataclasses.replace(found, digests={}, trees={}) == meta, what
        got = opened.restore(found, like)
        same = jax.tree.map(np.array_equal, got, trees)
        assert all(jax.tree.leaves(same)), what
        n_right += 1
      except files.Damaged as error:
        item = path.relative_to(step).parts[0]
        assert f"checkpoints/7/{item}" in str(error), what
        assert "\n" not in str(error), what
        n_told += 1
      finally:
        if opened is not None:
          opened.close()
  assert n_told > 20 and n_right > 20


def test_no_more_checkpoints_are_moved_than_allowed(broken):
  """Two damaged ones after a whole one."""
  config, workdir = broken
  saved = workdir / "checkpoints"
  shutil.copytree(saved / "12", saved / "18")
  for step in ("12", "18"):
    os.truncate(saved / step / "meta" / "metadata", 99)
  with pytest.raises(files.Damaged, match="checkpoint.set_aside=2"):
    first_state(config, workdir)
  assert (workdir / "damaged" / "18").exists() and (saved / "12").exists()
  with pytest.raises(files.Damaged, match="checkpoint.set_aside=1"):
    config.checkpoint.set_aside = 0
    first_state(config, workdir)
  config.checkpoint.set_aside = 1
  _, meta, said = first_state(config, workdir)
  assert meta.step == 6 and "12/meta/metadata is damaged" in said
  assert "going back to step 6" in said


def test_a_run_whose_last_checkpoint_is_damaged_is_not_complete(broken):
  config, workdir = broken

  def complete():
    with start.opened(config, str(workdir), None, None) as opened:
      return opened.complete

  assert complete()
  last = workdir / "checkpoints" / "12"
  os.truncate(last / "meta" / "metadata", 99)
  assert not complete()
  shutil.rmtree(last)
  last.mkdir()
  assert not complete()


def test_from_step_goes_on_from_an_earlier_checkpoint(broken):
  """Later ones are moved, and none is deleted."""
  config, workdir = broken
  with pytest.raises(schema.ConfigError, match=r"has \[6, 12\]"):
    loop.train(config, str(workdir), from_step=7)
  before = metrics_lib.read(str(workdir))
  assert loop.train(config, str(workdir), from_step=6) == 0
  assert (workdir / "abandoned" / "12" / "params").exists()
  got = metrics_lib.read(str(workdir))
  assert [r["train/loss"] for r in got] == [r["train/loss"] for r in before]
  checkpoints = checkpoint.Checkpoints(str(workdir), config.checkpoint)
  assert checkpoints.set_aside(12, "abandoned").endswith("abandoned/12.2")
  checkpoints.close()
  assert (workdir / "abandoned" / "12" / "params").exists()
  assert (workdir / "abandoned" / "12.2" / "params").exists()


# --- one owner ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "lr#1", "50%", "a%20b", "ü ß"])
def test_a_second_start_is_refused_until_the_first_is_gone(name, tmp_path):
  """Whatever the directory's name would mean in a URL."""
  run = tmp_path / name
  lock = locks.Lock(str(run))
  assert json.loads((run / "lock.json").read_text())["process"] == os.getpid()
  with pytest.raises(schema.RunError, match=f"process {os.getpid()} on"):
    locks.Lock(str(run))
  lock.release()
  locks.Lock(str(run)).release()
  assert not (run / "lock.json").exists()


def test_damage_of_config_history_is_not_called_that_of_config_json(
  make, tmp_path
):
  """The entry is added below what cannot be read."""
  workdir = str(tmp_path)
  assert resume.write_config(workdir, make(train__steps=2), 0) is None
  history = tmp_path / "config_history.jsonl"
  history.write_bytes(b"\xff\n")
  assert resume.write_config(workdir, make(train__steps=3), 2) is None
  damaged, entry = history.read_bytes().splitlines()
  assert damaged == b"\xff"
  assert json.loads(entry)["config"]["train"]["steps"] == 2
  assert {p.name for p in tmp_path.iterdir()} == {"config.json", history.name}


@pytest.mark.parametrize("name", ["[x]", "a*", "b?c", "d\\e"])
def test_a_directory_that_orbax_cannot_list_is_refused(name, tmp_path):
  """Its checkpoints would be complete by their names, and have no arrays."""
  keep = config_lib.CheckpointConfig()
  with pytest.raises(schema.ConfigError, match="name another directory"):
    checkpoint.Checkpoints(str(tmp_path / name / "run"), keep)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["d\\e", "\udce9"])
def test_a_run_moved_to_a_name_that_tensorstore_misreads(name, broken):
  """It is not damaged: by another name, it is whole."""
  config, workdir = broken
  moved = workdir.rename(workdir.with_name(name))
  with pytest.raises(schema.ConfigError, match="^workdir=.*; (name|give) "):
    checkpoint.load_params(str(moved), config.model)


def record(**changed):
  owner = {"host": "elsewhere", "process": 7, "started": "then", **changed}
  return json.dumps(owner)


@pytest.mark.parametrize("flock", [True, False])
def test_a_lease_of_another_host_is_waited_for(
  flock, tmp_path, monkeypatch, capsys
):
  """Also where the file system has no locks of the operating system."""
  monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
  if not flock:

    def none(*_):
      raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
  path = tmp_path / "lock.json"
  path.write_text(record())
  lock = locks.Lock(str(tmp_path))
  assert "last held by process 7 on elsewhere" in capsys.readouterr().err
  assert json.loads(path.read_text())["process"] == os.getpid()
  path.write_text(record())  # taken over, as while this process slept
  lock._renewing_thread.join(timeout=60)
  assert lock.lost
  lock.release()
  assert json.loads(path.read_text())["host"] == "elsewhere"


def test_an_answer_that_is_lost_is_not_a_lost_lease(tmp_path):
  """The write was done, and its new generation never came."""
  lock = locks.Lock(str(tmp_path))
  lock._store.write("lock.json", json.dumps(lock._record)).result()
  assert lock._write() and lock._write()
  lock._store.write("lock.json", record()).result()
  assert not lock._write()
  lock.release()


def test_a_lease_that_is_renewed_is_refused(tmp_path, monkeypatch):
  path, n = tmp_path / "lock.json", [0]
  path.write_text(record())

  def sleep(_):
    n[0] += 1
    path.write_text(record(renewals=n[0]))

  monkeypatch.setattr(locks.time, "sleep", sleep)
  with pytest.raises(schema.RunError, match="process 7 on elsewhere"):
    locks.Lock(str(tmp_path))
  assert json.loads(path.read_text())["renewals"] == 1


def test_training_in_a_directory_in_use_is_refused(broken):
  config, workdir = broken
  config.train.steps = 18
  lock = locks.Lock(str(workdir))
  before = places(workdir)
  with pytest.raises(schema.RunError, match="in use by process"):
    loop.train(config, str(workdir))
  assert places(workdir) == before
  lock.release()
