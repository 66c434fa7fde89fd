"""A run that starts from the parameters of another: what it takes, what not."""

import copy
import json
import os
import shutil

import jax
import numpy as np
import pytest
import reference
import test_convert
import test_families
from etils import epath

from lm import checkpoint, items, schema, validation
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm.data import store, tokenizer_training
from lm.data import tokenizer as tokenizer_lib
from lm.huggingface import config_json, folder, published
from lm.model import counts
from lm.train import init_from, loop, programs, start
from lm.train import metrics as metrics_lib


@pytest.fixture(scope="module")
def source(make, tmp_path_factory):
  """A finished run of 6 steps that keeps an average; and its directory."""
  workdir = tmp_path_factory.mktemp("source") / "run"
  config = make(train__steps=6)
  assert loop.train(config, str(workdir)) == 0
  return config, workdir


def started(config, name):
  """(state at step 0, what was said) of a fresh run from the run `name`."""
  config = copy.deepcopy(config)
  config.init_from = str(name)
  validation.validate(config)
  said = []
  mesh = mesh_lib.make(config)
  loaded = init_from.load(config, mesh, said.append)
  return programs.create_state(config, mesh, loaded), "\n".join(said)


def arrays(tree):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_same(got, want):
  got, want = arrays(got), arrays(want)
  assert got.keys() == want.keys() and len(want) > 5
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize(
  ("mode", "fsdp"), [("jit", 1), ("jit", 2), ("pmap", 1)]
)
def test_parameters_are_the_sources_and_all_else_is_fresh(
  mode, fsdp, source, make
):
  """Bit for bit, also on another mesh; the averages, as sampling reads."""
  want = checkpoint.load_params(str(source[1]), source[0].model)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), want
  )
  path = epath.Path(source[1]) / "checkpoints" / "6"
  assert_same(want, items.read(path, {"ema": like})["ema"])
  config = make(mesh__mode=mode, mesh__fsdp=fsdp)
  state, said = started(config, source[1])
  assert_same(state.params, want)
  assert_same(state.ema, want)
  layout = programs.abstract_state(config, mesh_lib.make(config))
  for leaf, like in zip(
    jax.tree.leaves(state), jax.tree.leaves(layout), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
  assert int(state.step) == 0
  assert not any(
    np.any(np.asarray(x)) for x in jax.tree.leaves(state.opt_state)
  )
  n = sum(x.size for x in jax.tree.leaves(want))
  assert said == (
    f"averages of {source[1]} at step 6: {len(jax.tree.leaves(want))} arrays, "
    f"{n:,} parameters; fresh: optimizer, schedule, data, step"
  )


def test_a_step_can_be_named_and_without_an_average_parameters_are_read(
  source, make, tmp_path
):
  want = checkpoint.load_params(str(source[1]), source[0].model, 3)
  state, said = started(make(optimizer__ema_decay=None), f"{source[1]}@3")
  assert_same(state.params, want)
  assert state.ema is None and "at step 3:" in said
  config = make(train__steps=2, optimizer__ema_decay=None)
  assert loop.train(config, str(tmp_path / "a@b")) == 0
  state, said = started(make(), tmp_path / "a@b")
  assert_same(
    state.ema, checkpoint.load_params(str(tmp_path / "a@b"), config.model)
  )
  assert said.startswith("parameters of ")


def test_initial_parameters_are_not_drawn_where_all_are_loaded(
  source, make, monkeypatch
):
  config = make(mesh__fsdp=1, mesh__data=8)
  mesh = mesh_lib.make(config)
  state = programs.abstract_state(config, mesh)
  programs_text = []
  jit = jax.jit

  def spy(function, **options):
    def call(*args):
      lowered = jit(function, **options).lower(*args)
      programs_text.append(lowered.compile().as_text())
      return lowered.out_info

    return call

  monkeypatch.setattr(jax, "jit", spy)
  programs.create_state(config, mesh)
  programs.create_state(config, mesh, state.params)
  drawn, loaded = (text.count("xor") for text in programs_text)
  assert drawn > 0 and loaded == 0


def test_a_model_may_differ_where_no_shape_does(source, make):
  config = make(
    model__context_length=64,
    model__rope_theta=5e5,
    model__windows=(7, None),
    model__residual_dropout=0.0,
    model__remat="full",
  )
  state, said = started(config, source[1])
  assert_same(
    state.params, checkpoint.load_params(str(source[1]), source[0].model)
  )
  for line in (
    "config.model.context_length is 64, was 32",
    "config.model.rope_theta is 500000.0, was 10000.0",
    "config.model.windows is (7, None), was (None,)",
  ):
    assert f"another model than at {source[1]}: {line}" in said


def test_a_run_goes_on_without_its_source(source, make, tmp_path, capsys):
  """Which is read once, and may be gone afterwards; another cannot be named."""
  copied, workdir = tmp_path / "source", tmp_path / "run"
  shutil.copytree(source[1], copied)
  config = make(train__steps=6, data__train=source[0].data.validation)
  config.init_from = str(copied)
  assert loop.train(config, str(workdir)) == 0
  assert f"averages of {copied} at step 6" in capsys.readouterr().err.replace(
    "\n", ""
  )
  whole = metrics_lib.read(str(workdir))
  fresh = metrics_lib.read(str(source[1]))
  assert whole[0]["train/loss"] < fresh[0]["train/loss"] - 0.1
  assert whole[0]["lr"] == fresh[0]["lr"]
  shutil.rmtree(workdir / "checkpoints" / "6")
  shutil.rmtree(copied)
  other = copy.deepcopy(config)
  other.init_from = None
  with pytest.raises(schema.ConfigError, match="config.init_from was '"):
    loop.train(other, str(workdir))
  assert loop.train(config, str(workdir)) == 0
  again = metrics_lib.read(str(workdir))
  for a, b in zip(again, whole, strict=True):
    for name in ("train/loss", "grad_norm", "lr", "batch_hash"):
      assert a[name] == b[name]
  assert checkpoint.load_meta(str(workdir)).config == config


def test_what_does_not_fit_is_refused_before_anything_is_made(
  source, make, tmp_path, monkeypatch
):
  _, run = source
  monkeypatch.setattr(programs, "create_state", None)
  monkeypatch.setattr(programs, "compile_step", None)
  monkeypatch.setattr(items, "read", None)
  learned = make(model__positions="learned")
  cases = [
    (make(), tmp_path / "absent", "absent has no checkpoint; name a run dir"),
    (make(), f"{run}@4", "has no checkpoint of step 4; it has [3, 6]"),
    (make(), "", "config.init_from='': empty; name a path"),
    (make(), "s4://bucket/run", "object stores are gs:// and s3://"),
    (
      make(model__d_mlp=64),
      run,
      "layers/mlp/down: [2, 32, 16] there, [2, 64, 16] here",
    ),
    (make(model__d_mlp=64), run, "config.model.d_mlp is 64, was 32"),
    (learned, run, "position_embed: not there, [32, 16] here"),
    (
      make(tokenizer__kind="sentencepiece"),
      run,
      "config.tokenizer.kind='sentencepiece', path=None: not the tokenizer of",
    ),
  ]
  for i, (config, name, says) in enumerate(cases):
    config.init_from = str(name)
    with pytest.raises(schema.ConfigError) as error:
      loop.train(config, str(tmp_path / f"run{i}"))
    assert says in str(error.value)
    assert not (tmp_path / f"run{i}").exists()


def test_learned_positions_of_another_length_are_refused(make, tmp_path):
  config = make(model__positions="learned")
  checkpoints = checkpoint.Checkpoints(str(tmp_path / "run"), config.checkpoint)
  bytes_ = tokenizer_lib.Tokenizer().to_json()
  params = reference.random_params(config.model)
  trees = {"params": params, "rest": {"step": np.zeros(())}}
  checkpoints.save(trees, checkpoint.Meta(1, config, bytes_, "none"))
  checkpoints.close()
  longer = make(model__positions="learned", model__context_length=64)
  longer.init_from = str(tmp_path / "run")
  with pytest.raises(schema.ConfigError) as error:
    init_from.tokenizer(longer, str(tmp_path / "new"))
  assert "position_embed: [32, 16] there, [64, 16] here" in str(error.value)


# --- the tokenizer ------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
  """The checkpoint, without arrays, of a run that trained its tokenizer."""
  workdir = tmp_path_factory.mktemp("trained")
  config = make(tokenizer__kind="sentencepiece", model__vocab_size=512)
  stored = json.loads(store.prepare(config).tokenizer.to_json())
  stored["chat_template"] = "the run's own"
  meta = checkpoint.Meta(3, config, json.dumps(stored), "data")
  saved = checkpoint.Checkpoints(str(workdir), config.checkpoint)
  saved.save({"params": {"none": np.zeros(1)}}, meta)
  saved.close()
  return config, workdir


def test_a_trained_tokenizer_comes_with_the_parameters(
  trained, make, tmp_path, monkeypatch
):
  """Although the training sources are other ones; so does the chat template
  where the config names none.
  """
  config, workdir = trained
  stored = tokenizer_lib.Tokenizer.from_json(
    checkpoint.load_meta(str(workdir)).tokenizer
  )
  monkeypatch.setattr(tokenizer_training, "train", None)
  tuned = copy.deepcopy(config)
  tuned.data.train, tuned.init_from = config.data.validation, str(workdir)
  prepared = start.prepare(tuned, str(tmp_path / "new"), None)
  assert prepared.tokenizer.fingerprint == stored.fingerprint
  assert prepared.tokenizer.chat_template == "the run's own"
  (tmp_path / "chat.jinja").write_text("<user>")
  tuned.tokenizer.chat_template = str(tmp_path / "chat.jinja")
  prepared = start.prepare(tuned, str(tmp_path / "new"), None)
  assert prepared.tokenizer.chat_template == "<user>"
  # A run with a checkpoint has its own.
  tuned.init_from = str(tmp_path / "gone")
  found = init_from.tokenizer(tuned, str(workdir))
  again = store.prepare(tuned, found)
  assert again.tokenizer.fingerprint == stored.fingerprint
  # lm.data cannot read runs, and says so.
  with pytest.raises(schema.ConfigError, match="lm.train reads and then prep"):
    store.prepare(tuned)


def test_a_tokenizer_that_is_named_must_be_the_sources(trained, tmp_path):
  config, workdir = trained
  stored = tokenizer_lib.Tokenizer.from_json(
    checkpoint.load_meta(str(workdir)).tokenizer
  )
  tuned = copy.deepcopy(config)
  tuned.init_from = str(workdir)
  assert stored.model is not None
  (tmp_path / "same.model").write_bytes(stored.model)
  tuned.tokenizer.path = str(tmp_path / "same.model")
  found = init_from.tokenizer(tuned, str(tmp_path / "new"))
  assert found is not None and found.fingerprint == stored.fingerprint
  other = copy.deepcopy(config)
  other.data.train = config.data.validation
  found = store.prepare(other).tokenizer
  assert found.size == stored.size and found.model is not None
  (tmp_path / "other.model").write_bytes(found.model)
  tuned.tokenizer.path = str(tmp_path / "other.model")
  with pytest.raises(schema.ConfigError) as error:
    init_from.tokenizer(tuned, str(tmp_path / "new"))
  assert f"fingerprint {stored.fingerprint}" in str(error.value)
  assert "name that run's tokenizer" in str(error.value)


# --- folders of Hugging Face --------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  """A folder with a small Llama and its tokenizer, as transformers saves it."""
  path = tmp_path_factory.mktemp("hub") / "llama"
  test_families.reference(
    "llama3", path, vocab_size=320, intermediate_size=28, hidden_size=48
  )
  test_convert.save_tokenizer(path)
  return path


def from_hub(make, hub, **fields):
  config = make(optimizer__ema_decay=None)
  config.model = config_json.read(str(hub))[1]
  config.init_from, config.tokenizer.kind = str(hub), "huggingface"
  for name, value in fields.items():
    setattr(config.model, name, value)
  return config


@pytest.mark.parametrize(
  ("mode", "fsdp"), [("jit", 1), ("jit", 2), ("pmap", 1)]
)
def test_a_run_starts_from_a_folder_of_hugging_face(mode, fsdp, hub, make):
  config = from_hub(make, hub, context_length=40)
  config.mesh.mode, config.mesh.fsdp = mode, fsdp
  state, said = started(config, hub)
  want = folder.load_on(folder.find(str(hub)))
  assert_same(state.params, want)
  assert f"parameters of {hub} at step 0: " in said
  assert "config.model.context_length is 40, was 48" in said


def test_it_trains_from_there_and_goes_on_without(hub, make, tmp_path):
  copied = tmp_path / "hub"
  shutil.copytree(hub, copied)
  config = from_hub(make, copied)
  config.train.steps = 3
  assert loop.train(config, str(tmp_path / "run")) == 0
  meta = checkpoint.load_meta(str(tmp_path / "run"))
  stored = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  assert stored.kind == "huggingface"
  shutil.rmtree(copied)
  longer = copy.deepcopy(config)
  longer.train.steps = 6
  assert loop.train(longer, str(tmp_path / "run")) == 0
  assert metrics_lib.read(str(tmp_path / "run"))[-1]["step"] == 6


def test_low_rank_updates_of_a_folder(hub, make):
  config = from_hub(make, hub, lora=config_lib.LoraConfig(rank=2))
  state, said = started(config, hub)
  assert "fresh: adapters of rank 2" in said and "--to=peft" not in said
  want = folder.load_on(folder.find(str(hub)))
  assert_same(state.frozen, want)


@pytest.mark.parametrize(
  ("targets", "joined"), [((), "q, k, v"), (("v", "o"), "v"), (("o",), None)]
)
def test_adapters_that_no_file_can_hold_are_told_of(
  make, tmp_path, targets, joined
):
  """GPT-2 of transformers has queries, keys and values in one matrix."""
  test_families.reference("gpt2", tmp_path, vocab_size=320)
  test_convert.save_tokenizer(tmp_path)
  config = from_hub(make, tmp_path)
  config.mesh.fsdp, config.mesh.data = 1, 1
  config.model.lora = config_lib.LoraConfig(rank=2, targets=targets)
  said: list[str] = []
  mesh = mesh_lib.make(config, jax.devices()[:1])
  init_from.load(config, mesh, said.append)
  told = [line for line in said if "--to=peft will refuse" in line]
  assert [f"'gpt2' of transformers has {joined} joined" in x for x in told] == (
    [True] if joined else []
  )


def test_a_folder_of_hugging_face_is_no_run_directory(hub, make, tmp_path):
  workdir = tmp_path / "hub"
  shutil.copytree(hub, workdir)
  with pytest.raises(schema.ConfigError, match="--config.init_from="):
    loop.train(make(), str(workdir))
  assert sorted(p.name for p in workdir.iterdir()) == sorted(os.listdir(hub))
  for path in workdir.iterdir():
    assert path.read_bytes() == (hub / path.name).read_bytes()


def test_a_folder_of_another_model_is_refused(hub, make, tmp_path):
  for fields, says in (
    ({"norm_epsilon": 1e-3}, "norm_epsilon=0.001, must be 1e-06"),
    ({"rope_theta": 7.0}, "config.model.rope_theta=7.0, must be 100.0"),
    ({"rope_scaling": None}, "rope_scaling.factor=None, must be 8.0"),
    ({"d_mlp": 32}, "config.model.d_mlp=32, must be 28"),
  ):
    config = from_hub(make, hub, **fields)
    with pytest.raises(schema.ConfigError) as error:
      loop.train(config, str(tmp_path / "run"))
    assert says in str(error.value)
  config = from_hub(make, hub)
  config.tokenizer.kind = "bytes"
  with pytest.raises(schema.ConfigError, match="vocabulary mismatch"):
    loop.train(config, str(tmp_path / "run"))
  broken = tmp_path / "broken"
  shutil.copytree(hub, broken)
  (broken / "model.safetensors").write_bytes(b"x")
  config = from_hub(make, hub)
  config.init_from = str(broken)
  with pytest.raises(schema.ConfigError, match="config.init_from=.*not a safe"):
    loop.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama3.2-1b", "qwen3-0.6b"])
def test_published_models_have_their_published_sizes(name):
  sizes = {
    "gpt2": 124_439_808,
    "llama3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
  }
  assert counts.parameter_count(published.model(name)) == sizes[name]
