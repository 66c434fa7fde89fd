"""The step: any mesh, pmap and any microbatch split give the same numbers."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import reference

from lm import batch as batch_lib
from lm import config as config_lib
from lm import door, sharding
from lm.model import decoder
from lm.train import step as step_lib

B, T, V = 16, 12, 48


def _config(name="adamw", mesh=(1, 1, 1), mode="jit", **fields):
  c = config_lib.Config()
  c.model = config_lib.ModelConfig(
    vocab_size=V,
    n_layers=3,
    d_model=16,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_mlp=24,
    context_length=T,
    qk_norm=True,
    loss_chunk=7,
  )
  c.optimizer = config_lib.OptimizerConfig(
    name=name, warmup_steps=1, peak_lr=1e-2, weight_decay=0.1
  )
  c.train = config_lib.TrainConfig(
    steps=10, batch_size=B, sequence_length=T, z_loss=1e-3
  )
  axes = dict(zip(sharding.MESH_AXES, mesh, strict=True))
  c.mesh = config_lib.MeshConfig(mode=mode, **axes)
  for path, value in fields.items():
    room, field = path.split("__")
    setattr(getattr(c, room), field, value)
  return config_lib.validate(c)


def _batch(seed, prefix=False):
  """Unequal weights, so that a mean of means would show."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, V, (B, T + 1)).astype(np.int32)
  weights = rng.random((B, T)) < rng.random((B, 1))
  seen = np.arange(T) < rng.integers(1, T, (B, 1))
  return dataclasses.replace(
    batch_lib.unscored(ids[:, :-1]),
    targets=ids[:, 1:],
    weights=weights.astype(np.float32),
    prefix=seen if prefix else None,
  )


def _run(config, n=2, prefix=False):
  """(loss, gradient norm) of each of n steps, the state after them, and the
  optimizer's after the first: AdamW's m is then the gradient itself.
  """
  devices = jax.devices()
  if config.mesh.mode == "jit":
    devices = devices[: math.prod(config.mesh.sizes().values())]
  mesh = sharding.make_mesh(config, devices)
  state = step_lib.create_state(config, mesh)
  step = step_lib.compile_step(config, mesh, prefix=prefix)
  where = step_lib.batch_sharding(config, mesh)
  numbers, first = [], None
  for i in range(n):
    batch = sharding.place(_batch(i, prefix), where, B)
    state, metrics = step(state, batch)
    numbers.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    if i == 0:
      first = jax.tree.map(np.asarray, state.opt_state)
  return np.array(numbers), state, first


DROPOUT = {"model__residual_dropout": 0.1, "model__embedding_dropout": 0.1}


@pytest.fixture(scope="module")
def one_device():
  return _run(_config(**DROPOUT), prefix=True)


@pytest.mark.parametrize(
  ("mesh", "mode", "parts"),
  [
    ((8, 1, 1), "jit", 1),
    ((1, 8, 1), "jit", 1),
    ((2, 2, 2), "jit", 1),
    ((2, 2, 2), "jit", 4),
    ((1, 1, 1), "jit", 2),
    ((8, 1, 1), "pmap", 1),
    ((8, 1, 1), "pmap", 2),
  ],
)
def test_same_numbers_however_it_is_computed(
  mesh, mode, parts, one_device, capfd, compiled_anew
):
  """Batches have a prefix, and dropout is on: its masks belong to the rows,
  wherever they lie.
  """
  config = _config(mesh=mesh, mode=mode, train__microbatches=parts, **DROPOUT)
  numbers, _, first = _run(config, prefix=True)
  want, _, reference = one_device
  np.testing.assert_allclose(numbers, want, rtol=1e-5)
  for (path, ours), theirs in zip(
    jax.tree_util.tree_leaves_with_path(first[0].mu),
    jax.tree.leaves(reference[0].mu),
    strict=True,
  ):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), path
  assert "rematerialization" not in capfd.readouterr().err


def test_a_new_mesh_axis_is_a_field_and_a_rule(monkeypatch):
  """As context parallelism will add one; of size 1 it changes no number."""

  @dataclasses.dataclass(kw_only=True)
  class Wider(config_lib.MeshConfig):
    context: int | None = config_lib.mesh_axis(1)

  config = _config()
  want, _, _ = _run(config, n=1)
  monkeypatch.setattr(sharding, "MESH_AXES", (*sharding.MESH_AXES, "context"))
  monkeypatch.setitem(sharding.RULES, "length", "context")
  config.mesh = Wider(data=2, fsdp=2, tensor=2)
  got, state, _ = _run(config, n=1)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert "context" in state.params["embed"].sharding.mesh.axis_names


def test_layout_is_kept_by_the_step():
  config = _config(mesh=(2, 2, 2), optimizer__ema_decay=0.9)
  mesh = sharding.make_mesh(config)
  promised = step_lib.abstract_state(config, mesh)
  _, state, _ = _run(config, n=1)
  for (path, want), got in zip(
    jax.tree_util.tree_leaves_with_path(promised),
    jax.tree.leaves(state),
    strict=True,
  ):
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim), path


@pytest.mark.parametrize("name", ["muon", "adafactor", "lion"])
def test_other_optimizers_on_a_mesh(name, capfd, compiled_anew):
  want, _, _ = _run(_config(name))
  got, _, _ = _run(_config(name, mesh=(2, 2, 2)))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert "rematerialization" not in capfd.readouterr().err


def test_loss_is_the_mean_over_scored_tokens_of_the_whole_batch():
  """Against the NumPy reference, without dropout and z-loss; a prefix that is
  left out shows.
  """
  config = _config(train__microbatches=4, train__z_loss=0.0)
  make = jax.jit(functools.partial(decoder.init_params, config.model))
  params = jax.tree.map(np.asarray, make(jax.random.key(config.seed)))
  (causal,), (prefixed,) = (
    _run(config, n=1, prefix=prefix)[0][:, 0] for prefix in (False, True)
  )

  def wanted(batch):
    scores = reference.forward(params, config.model, batch)
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    picked = np.take_along_axis(logs, batch.targets[..., None], -1)[..., 0]
    return -np.average(picked, weights=batch.weights)

  assert causal == pytest.approx(wanted(_batch(0)), rel=1e-5)
  assert prefixed == pytest.approx(wanted(_batch(0, prefix=True)), rel=1e-5)
  assert abs(causal - prefixed) > 1e-4 * causal


def test_clip_bounds_the_gradient_that_the_optimizer_sees():
  _, free, _ = _run(_config(optimizer__clip_norm=None), n=1)
  numbers, clipped, _ = _run(_config(optimizer__clip_norm=0.01), n=1)
  assert numbers[0, 1] > 0.01  # reported before the clip
  ratio = 0.01 / numbers[0, 1]
  for a, b in zip(
    jax.tree.leaves(free.opt_state[0].mu),
    jax.tree.leaves(clipped.opt_state[0].mu),
    strict=True,
  ):
    np.testing.assert_allclose(np.asarray(b), np.asarray(a) * ratio, rtol=1e-4)


def test_moving_average_closed_form():
  config = _config(optimizer__ema_decay=0.75)
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  state = step_lib.create_state(config, mesh)
  step = step_lib.compile_step(config, mesh)
  where = step_lib.batch_sharding(config, mesh)
  want = jax.tree.map(np.array, state.params)
  for i in range(2):
    state, _ = step(state, sharding.place(_batch(i), where, B))
    want = jax.tree.map(
      lambda e, p: 0.75 * e + 0.25 * np.asarray(p), want, state.params
    )
  for a, b in zip(
    jax.tree.leaves(state.ema), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-7)


def test_steps_that_are_outliers_or_not_finite_are_left_out_and_counted():
  skip = config_lib.SkipConfig(window=4, sigma=6.0)
  config = _config(optimizer__skip=skip)
  mesh = sharding.make_mesh(config, jax.devices()[:1])
  state = step_lib.create_state(config, mesh)
  step = step_lib.compile_step(config, mesh)
  where = step_lib.batch_sharding(config, mesh)

  def go(state, weights_factor=1.0):
    batch = _batch(0)
    weights = batch.weights * np.float32(weights_factor)
    batch = dataclasses.replace(batch, weights=weights)
    return step(state, sharding.place(batch, where, B))

  for _ in range(5):
    state, metrics = go(state)
  assert metrics["skipped"] == 0
  before = jax.tree.map(np.asarray, (state.params, state.opt_state))
  state, metrics = go(state, np.nan)
  assert np.isnan(metrics["loss"]) and metrics["skipped"] == 1
  # A finite outlier: poison the level that the history remembers.
  low = dataclasses.replace(state.history, values=state.history.values * 0.01)
  state, metrics = go(dataclasses.replace(state, history=low))
  assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 2
  after = jax.tree.map(np.asarray, (state.params, state.opt_state))
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(a, b)
  assert state.step == 7
  # The new level entered the history; in time it is the usual one.
  for _ in range(4):
    state, metrics = go(state)
  assert metrics["skipped"] < 6


def test_layers_add_nothing_to_the_program():
  """What is compiled for 48 layers is what is compiled for 4, but for sizes."""

  def lowered(n_layers):
    config = _config(model__n_layers=n_layers)
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
      return (
        jax.jit(step_lib.train_step(config))
        .lower(
          step_lib.abstract_state(config, mesh),
          batch_lib.abstract(config, step_lib.batch_sharding(config, mesh)),
        )
        .as_text()
        .count("\n")
      )

  assert lowered(48) == lowered(4)


GOLDEN = pathlib.Path(__file__).parent / "goldens" / "shardings.json"
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def shardings() -> dict[str, dict[str, str]]:
  """Layout of every array of every shipped config's state on a 2x2x2 mesh
  (2x4x1 where the vocabulary or the heads are odd).
  """
  found = {}
  for path in sorted(CONFIGS.glob("*.py")):
    config = door.load(str(path))
    config.train.batch_size = 8
    config.train.microbatches = 1
    odd = config.model.vocab_size % 2 or config.model.n_heads % 2
    config.mesh = config_lib.MeshConfig(
      data=2, fsdp=4 if odd else 2, tensor=2 - odd
    )
    mesh = sharding.make_mesh(config)
    state = step_lib.abstract_state(config, mesh)
    found[path.stem] = {
      jax.tree_util.keystr(
        where
      ): f"{list(leaf.shape)} {list(leaf.sharding.spec)}"
      for where, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
  return found


def test_shardings_of_shipped_configs():
  """Golden. Rewrite it (python tests/test_step.py) when a layout is changed on
  purpose, and read the difference: a weight that lost its axis costs memory.
  """
  assert shardings() == json.loads(GOLDEN.read_text())


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  GOLDEN.write_text(json.dumps(shardings(), indent=1) + "\n")
