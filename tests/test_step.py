"""The step: any mesh, pmap and any microbatch split give the same numbers."""

import copy
import dataclasses
import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lm import batch as batch_lib
from lm import checkpoint, cli, schema, sharding, validation
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm.model import decoder, weights
from lm.train import programs, resume
from lm.train import step as step_lib
from lm.verify.checks import harness

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
    qk_norm="head",
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
  return validation.validate(c)


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


@functools.cache
def _first_state(text):
  """The initial state of a config, in NumPy; compiled once for all meshes."""
  config = validation.from_json(text)
  mesh = mesh_lib.make(config, jax.devices()[:1])
  return jax.tree.map(np.asarray, programs.create_state(config, mesh))


def _run(config, n=2, prefix=False, created=False):
  """(loss, gradient norm) of each of n steps and, if asked for, what layers
  report; the state after them, and the optimizer's after the first: AdamW's m
  is then the gradient itself. The first state is placed on the mesh, or
  `created` there, as training does.
  """
  devices = jax.devices()
  if config.mesh.mode == "jit":
    devices = devices[: math.prod(config.mesh.sizes().values())]
  mesh = mesh_lib.make(config, devices)
  if created:
    state = programs.create_state(config, mesh)
  else:
    alone = dataclasses.replace(config, mesh=config_lib.MeshConfig())
    state = harness.to_devices(
      _first_state(config_lib.to_json(alone)),
      programs.abstract_state(config, mesh),
    )
  if prefix:
    data = config_lib.DataConfig(train=("text:a|prefix",))
    config = dataclasses.replace(config, data=data)
  step = programs.compile_step(config, mesh)
  where = programs.batch_sharding(config, mesh)
  numbers, first = [], None
  for i in range(n):
    batch = sharding.place(_batch(i, prefix), where, B)
    state, metrics = step(state, batch)
    layers = jax.tree.leaves(metrics["layers"])
    parts = (metrics["loss"], metrics["grad_norm"], *layers)
    numbers.append(np.concatenate([np.ravel(x) for x in parts]))
    if i == 0:
      first = jax.tree.map(np.asarray, state.opt_state)
  return np.array(numbers), state, first


DROPOUT = {"model__residual_dropout": 0.1, "model__embedding_dropout": 0.1}
STATISTICS = {"train__statistics_every": 1}


@pytest.fixture(scope="module")
def one_device():
  return _run(_config(**DROPOUT, **STATISTICS), prefix=True)


@pytest.mark.parametrize(
  ("mesh", "mode", "parts"),
  [
    ((8, 1, 1), "jit", 1),
    ((1, 8, 1), "jit", 1),
    pytest.param((2, 2, 2), "jit", 1, marks=pytest.mark.slow),
    ((2, 2, 2), "jit", 4),
    pytest.param((1, 1, 1), "jit", 2, marks=pytest.mark.slow),
    pytest.param((8, 1, 1), "pmap", 1, marks=pytest.mark.slow),
    ((8, 1, 1), "pmap", 2),
  ],
)
def test_same_numbers_however_it_is_computed(
  mesh, mode, parts, one_device, capfd, compiled_anew
):
  """Batches have a prefix, and dropout is on: its masks belong to the rows,
  wherever they lie. What the layers report is compared, too.
  """
  config = _config(
    mesh=mesh, mode=mode, train__microbatches=parts, **DROPOUT, **STATISTICS
  )
  numbers, _, first = _run(config, prefix=True, created=mesh == (2, 2, 2))
  want, _, reference = one_device
  assert want.shape == (2, 2 + 5 * config.model.n_layers)
  np.testing.assert_allclose(numbers, want, rtol=1e-5)
  for (path, ours), theirs in zip(
    jax.tree_util.tree_leaves_with_path(first[0].mu),
    jax.tree.leaves(reference[0].mu),
    strict=True,
  ):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), path
  assert "rematerialization" not in capfd.readouterr().err


# A norm over all heads sums over the devices of the tensor axis. Two patterns
# of layers, of which neither stops where a model of three layers does.
SWITCHES = {
  "model__norm_placement": "post",
  "model__qk_norm": "projection",
  "model__biases": ("qkv", "o"),
  "model__mlp": "geglu_exact",
  "model__rotary_fraction": 2 / 3,
  "model__rope_layers": (True, True, False),
  "model__windows": (5, None),
}


@pytest.mark.slow
def test_an_encoder_on_a_mesh_under_muon():
  """Its head has a matrix, vectors, and a bias that the vocabulary's devices
  share.
  """
  fields = {
    "model__causal": False,
    "model__norm": "layernorm",
    "model__norm_placement": "residual",
    "model__biases": ("mlp", "norm"),
    "model__embedding_norm": True,
    "model__head_transform": True,
    "model__head_bias": True,
    "data__train": ("text:a|masked",),
    "data__validation": (),
  }
  want, _, _ = _run(_config("muon", **fields), prefix=True)
  got, state, _ = _run(_config("muon", mesh=(2, 2, 2), **fields), prefix=True)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert np.abs(np.asarray(state.params["head_bias"])).max() > 1e-3


@pytest.mark.slow
def test_switches_of_families_on_a_mesh(capfd, compiled_anew):
  config = _config(optimizer__clip_norm=None, **SWITCHES)
  want, _, reference = _run(config)
  got, _, first = _run(
    _config(mesh=(2, 2, 2), optimizer__clip_norm=None, **SWITCHES)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
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
  got, state, _ = _run(config, n=1, created=True)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert "context" in state.params["embed"].sharding.mesh.axis_names


def test_statistics_of_layers_against_numpy():
  """In a batch with padding, which counts nowhere."""
  config = _config(**STATISTICS, optimizer__clip_norm=0.01)
  mesh = mesh_lib.make(config, jax.devices()[:1])
  state = programs.create_state(config, mesh)
  params = jax.tree.map(np.array, state.params)
  batch = _batch(0)
  real = np.arange(T) < np.arange(B)[:, None]
  batch = dataclasses.replace(
    batch, segments=batch.segments * real, weights=batch.weights * real
  )
  where = programs.batch_sharding(config, mesh)
  step = programs.compile_step(config, mesh)
  state, metrics = step(state, sharding.place(batch, where, B))
  got = metrics["layers"]
  seen: list[dict[str, np.ndarray]] = []
  reference.forward(params, config.model, batch, seen)
  for name in ("residual", "attention", "mlp"):
    want = [np.sqrt(np.mean(np.square(at[name][real]))) for at in seen]
    np.testing.assert_allclose(got[f"{name}_rms"], want, rtol=1e-5)

  def norms(tree):
    arrays = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return [
      np.sqrt(sum(np.sum(np.square(x[i])) for x in arrays)) for i in range(3)
    ]

  # AdamW's m, of gradients clipped to 0.01.
  moment = state.opt_state[0].mu["layers"]
  factor = (1 - config.optimizer.b1) * 0.01 / metrics["grad_norm"]
  np.testing.assert_allclose(got["grad_norm"] * factor, norms(moment), 1e-5)
  changes = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, params)
  np.testing.assert_allclose(
    got["update_norm"], norms(changes["layers"]), rtol=1e-3
  )


def test_a_layer_reports_through_aux(monkeypatch):
  """As a router will report its balance: one more entry, with no other change.
  It is empty if no layer reports.
  """
  real = decoder.Block.__call__

  def block(self, x, tokens, *args, **options):
    x, kept, aux = real(self, x, tokens, *args, **options)
    return x, kept, aux | {"position": jnp.sum(tokens.positions * 1.0)}

  def reported(config):
    mesh = mesh_lib.make(config)
    step = programs.compile_step(config, mesh)
    where = programs.batch_sharding(config, mesh)
    state = programs.create_state(config, mesh)
    return step(state, sharding.place(_batch(0), where, B))[1]["layers"]

  config = _config()
  state = jax.eval_shape(lambda: step_lib.init_state(config))
  _, metrics = jax.eval_shape(step_lib.train_step(config), state, _batch(0))
  assert metrics["layers"] == {}
  monkeypatch.setattr(decoder.Block, "__call__", block)
  for options in (
    {"mesh": (2, 2, 2), "train__microbatches": 2},
    {"mesh": (8, 1, 1), "mode": "pmap", "model__windows": (3, None)},
  ):
    found = reported(_config(**options))
    np.testing.assert_allclose(found["position"], [(T - 1) / 2] * 3)


def _changed(monkeypatch, path, **fields):
  """A test config in which the weight at `path` is declared otherwise."""
  config = _config(optimizer__ema_decay=0.9, optimizer__clip_norm=None)
  declared = decoder.declared(config.model)
  weight = weights.of(declared, tuple(map(jax.tree_util.DictKey, path)))
  for name, value in fields.items():
    monkeypatch.setitem(weight.__dict__, name, value)
  return config


@pytest.mark.parametrize(
  ("name", "mesh", "mode"),
  [
    ("adamw", (2, 2, 2), "jit"),
    pytest.param("muon", (8, 1, 1), "pmap", marks=pytest.mark.slow),
    pytest.param("adafactor", (1, 1, 1), "jit", marks=pytest.mark.slow),
  ],
)
def test_a_frozen_weight(name, mesh, mode, monkeypatch, tmp_path):
  """It has no gradient, no optimizer state and no average, and is saved,
  restored and read with the others.
  """
  config = _changed(monkeypatch, ("layers", "mlp", "down"), frozen=True)
  config.optimizer.name = name
  config.mesh = _config(name, mesh, mode).mesh
  _, state, first = _run(config, created=True)
  assert list(state.frozen) == ["layers"]
  if name == "adamw":  # the other gradients are what they were
    mu = dict(jax.tree_util.tree_leaves_with_path(first[0].mu))
    monkeypatch.undo()
    free = _run(_config(name, mesh, optimizer__clip_norm=None), n=1)[2][0].mu
    for path, want in jax.tree_util.tree_leaves_with_path(free):
      if "down" not in jax.tree_util.keystr(path):
        scale = np.abs(want).max()
        np.testing.assert_allclose(mu[path], want, rtol=0, atol=1e-6 * scale)
    config = _changed(monkeypatch, ("layers", "mlp", "down"), frozen=True)
  frozen = state.frozen["layers"]["mlp"]["down"]
  make = jax.jit(functools.partial(decoder.init_params, config.model))
  fresh = make(jax.random.key(config.seed))["layers"]["mlp"]["down"]
  np.testing.assert_allclose(frozen, fresh, rtol=1e-6)
  for tree in (state.params, state.ema, state.opt_state):
    named = map(
      jax.tree_util.keystr, dict(jax.tree_util.tree_leaves_with_path(tree))
    )
    assert not [path for path in named if "down" in path]
  meta = checkpoint.Meta(2, config, tokenizer="", fingerprint="")
  saved = checkpoint.Checkpoints(str(tmp_path), config.checkpoint)
  saved.save(resume.to_trees(state), meta)
  saved.wait()
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  meta = checkpoint.load_meta(str(tmp_path))
  back = resume.from_trees(saved.restore(meta, resume.to_trees(like)))
  saved.close()
  alone = checkpoint.load_params(str(tmp_path), config.model)
  for got, want in ((back, state), (alone, state.model)):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_weight_of_a_new_role(monkeypatch):
  """As a router's: AdamW trains it, beside Muon, and it decays."""
  config = _changed(monkeypatch, ("layers", "mlp", "down"), role="router")
  config.optimizer = config_lib.OptimizerConfig(name="muon", weight_decay=0.1)
  mesh = mesh_lib.make(config, jax.devices()[:1])
  state = programs.abstract_state(config, mesh)
  slots = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  ]
  of_muon = [s for s in slots if "'muon'" in s]
  assert any("'up'" in s for s in of_muon)
  assert [s for s in slots if "'down'" in s]
  assert not [s for s in of_muon if "'down'" in s]


def test_layout_is_kept_by_the_step():
  config = _config(mesh=(2, 2, 2), optimizer__ema_decay=0.9)
  mesh = mesh_lib.make(config)
  promised = programs.abstract_state(config, mesh)
  _, state, _ = _run(config, n=1)
  for (path, want), got in zip(
    jax.tree_util.tree_leaves_with_path(promised),
    jax.tree.leaves(state),
    strict=True,
  ):
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim), path


@pytest.mark.parametrize(
  "name", ["muon", pytest.param("adafactor", marks=pytest.mark.slow)]
)
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
  mesh = mesh_lib.make(config, jax.devices()[:1])
  state = programs.create_state(config, mesh)
  step = programs.compile_step(config, mesh)
  where = programs.batch_sharding(config, mesh)
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
  mesh = mesh_lib.make(config, jax.devices()[:1])
  state = programs.create_state(config, mesh)
  step = programs.compile_step(config, mesh)
  where = programs.batch_sharding(config, mesh)

  def go(state, weights_factor=1.0):
    batch = _batch(0)
    weights = batch.weights * np.float32(weights_factor)
    batch = dataclasses.replace(batch, weights=weights)
    return step(state, sharding.place(batch, where, B))

  for _ in range(5):
    state, metrics = go(state)
  assert metrics["skipped"] == 0
  before = jax.tree.map(np.asarray, (state.params, state.opt_state[:2]))
  state, metrics = go(state, np.nan)
  assert np.isnan(metrics["loss"]) and metrics["skipped"] == 1
  # A finite outlier: poison the level that the history remembers.
  low = dataclasses.replace(state.history, values=state.history.values * 0.01)
  state, metrics = go(dataclasses.replace(state, history=low))
  assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 2
  after = jax.tree.map(np.asarray, (state.params, state.opt_state[:2]))
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(a, b)
  # The rate follows the run: it is `lr` as reported, and ends with the steps.
  assert state.step == 7 == state.opt_state[2].count
  # The new level entered the history; in time it is the usual one.
  for _ in range(4):
    state, metrics = go(state)
  assert metrics["skipped"] < 6


def _lowered(config):
  """The step's program for one device, as text."""
  mesh = mesh_lib.make(config, jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = jax.jit(step_lib.train_step(config)).lower(
      programs.abstract_state(config, mesh),
      batch_lib.abstract(config, programs.batch_sharding(config, mesh)),
    )
  return program.as_text()


def test_layers_add_nothing_to_the_program():
  """What is compiled for 48 layers is what is compiled for 4, but for sizes."""
  few, many = (_lowered(_config(model__n_layers=n)) for n in (4, 48))
  assert few.count("\n") == many.count("\n")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_device_has_no_collectives(name):
  """XLA copies the operand of a collective over one device, and computes
  nothing beside it.
  """
  text = _lowered(_config(name, **DROPOUT, **STATISTICS))
  found = re.findall(
    r"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)", text
  )
  assert not found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_products_have_the_form_that_is_fast_on_cpus(name, dtype):
  """In bfloat16 a left operand is summed over its last axes, into float32, of
  which alone XLA's CPU compiler has products; in float32 it is the narrow one
  if it is summed over other axes, where the sums are long.
  """
  options = {"model__dtype": dtype, "model__tied_embedding": False}
  text = _lowered(_config(name, **options))
  products = re.findall(
    r"stablehlo.dot_general .* contracting_dims = \[([\d, ]+)\].*"
    r" : \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>",
    text,
  )
  assert len(products) == text.count("stablehlo.dot_general") > 20
  others = 0
  for summed, *shapes in products:
    sizes, dtypes = [], []
    for shape in shapes:
      *axes, kind = shape.split("x")
      sizes.append([int(axis) for axis in axes])
      dtypes.append(kind)
    left, right, _ = sizes
    axes = [int(axis) for axis in summed.split(",")]
    assert dtypes[-1] == "f32" and dtypes[0] == dtypes[1]
    if axes == [*range(len(left) - len(axes), len(left))]:
      continue
    others += 1
    assert dtype == "float32"
    length = left[axes[0]]
    assert left[-1] <= right[-1] or length <= right[-1], (left, right)
  assert (others > 5) == (dtype == "float32")


def test_products_of_a_bfloat16_step_are_in_bfloat16_on_cpus():
  """XLA's CPU compiler converts an operand to float32 if it is a view."""
  options = {"model__dtype": "bfloat16", "model__scan_layers": False}
  config = _config("muon", **options)
  mesh = mesh_lib.make(config, jax.devices()[:1])
  text = programs.compile_step(config, mesh).as_text()
  products = 0
  for computation in text.split("\n\n"):
    kinds = dict(re.findall(r"%?([\w.-]+) = (\w+)\[", computation))
    for operands in re.findall(r" dot\(([^)]*)\)", computation):
      products += 1
      for name in operands.split(", "):
        assert kinds[name.lstrip("%")] == "bf16", (operands, computation)
  assert products > 20


def test_a_profile_reads_like_the_code():
  """Operations are named after their stage, forward and backward. Products are
  what takes the time; the loss computes its gradient with its value.
  """
  config = _config("muon", **STATISTICS)
  mesh = mesh_lib.make(config, jax.devices()[:1])
  text = programs.compile_step(config, mesh).as_text()
  found = re.findall(r' ([\w-]+)\(.*op_name="([^"]*)"', text)
  model = {"embed", "attention", "mlp", "final_norm"}
  others = {"loss", "gradient_norm", "optimizer", "newton_schulz", "statistics"}
  stages = model | others

  def seen(way):
    parts = (re.split(r"[/()]", name) for _, name in found if way in name)
    return stages & set().union(*parts)

  assert seen("") == stages
  assert seen("transpose(jvp(") >= model
  products = [name for what, name in found if what == "dot"]
  assert len(products) == len(re.findall(r" dot\(", text)) > 0
  assert all(stages & set(re.split(r"[/()]", name)) for name in products)


# Another value of each field that changes the program of a step or of the
# first state.
OTHER = {
  "seed": 5,
  "model.vocab_size": 49,
  "model.n_layers": 4,
  "model.d_model": 18,
  "model.n_heads": 8,
  "model.n_kv_heads": 4,
  "model.d_head": 8,
  "model.d_mlp": 25,
  "model.context_length": 13,
  "model.norm": "layernorm",
  "model.norm_epsilon": 1e-3,
  "model.causal": False,
  "model.embedding_norm": True,
  "model.first_attention_norm": False,
  "model.head_transform": True,
  "model.head_bias": True,
  "model.norm_unit_offset": True,
  "model.norm_placement": "both",
  "model.qk_norm": "projection",
  "model.mlp": "geglu",
  "model.biases": ("qkv",),
  "model.positions": "learned",
  "model.rope_theta": 500.0,
  "model.rope_scaling": config_lib.RopeScaling(),
  "model.rope_scaling.factor": 7.0,
  "model.rope_scaling.low_frequency_factor": 2.0,
  "model.rope_scaling.high_frequency_factor": 7.0,
  "model.rope_scaling.original_length": 7,
  "model.rope_scaling.kind": "linear",
  "model.rope_scaling.beta_fast": 400.0,
  "model.rope_scaling.beta_slow": 7.0,
  "model.rope_scaling.truncate": False,
  "model.rope_scaling.short_factors": (2.0, 2.0, 2.0),
  "model.rope_scaling.long_factors": (2.0, 2.0, 2.0),
  "model.rope_scaling.attention_factor": 2.0,
  "model.rope_layers": (True, False),
  "model.rotary_fraction": 0.67,
  "model.rope_theta_windowed": 500.0,
  "model.windows": (3, None),
  "model.query_scale_dim": 7,
  "model.attention_softcap": 30.0,
  "model.logit_softcap": 30.0,
  "model.tied_embedding": False,
  "model.scale_embedding": True,
  "model.init_scale": 0.5,
  "model.embedding_dropout": 0.1,
  "model.residual_dropout": 0.1,
  "model.lora": config_lib.LoraConfig(),
  "model.lora.rank": 7,
  "model.lora.alpha": 7.0,
  "model.lora.rank_stabilized": True,
  "model.lora.dropout": 0.1,
  "model.lora.targets": ("q", "down"),
  "model.lora.full": ("embed",),
  "model.dtype": "bfloat16",
  "model.remat": "full",
  "model.remat_offload": True,
  "model.scan_layers": False,
  "model.loss_chunk": 33,
  "train.steps": 11,
  "train.batch_size": 32,
  "train.sequence_length": 6,
  "train.microbatches": 2,
  "train.z_loss": 0.1,
  "train.statistics_every": 7,
}
YARN = config_lib.RopeScaling(kind="yarn", original_length=10_000)
LONGROPE = {
  f"{name}_factors": config_lib.RopeScaling(
    kind="longrope",
    original_length=original,
    short_factors=(1.0, 2.0, 3.0),
    long_factors=(3.0, 2.0, 1.0),
  )
  for name, original in (("short", T), ("long", T - 1))
}
# Settings under which a field is read.
UNDER = (
  {
    "model.context_length": {"model.positions": "learned"},
    "model.causal": {"data.train": ("text:a|masked",), "data.validation": ()},
    "model.remat_offload": {"model.remat": "save_context"},
    "model.rope_theta_windowed": {"model.windows": (3,)},
  }
  | {
    f"model.lora.{field.name}": {"model.lora": config_lib.LoraConfig()}
    for field in dataclasses.fields(config_lib.LoraConfig)
  }
  | {
    f"model.rope_scaling.{field.name}": {
      "model.rope_scaling": config_lib.RopeScaling()
    }
    for field in dataclasses.fields(config_lib.RopeScaling)
  }
  | {
    f"model.rope_scaling.{name}": {"model.rope_scaling": YARN}
    for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")
  }
  | {
    f"model.rope_scaling.{name}": {"model.rope_scaling": scaling}
    for name, scaling in LONGROPE.items()
  }
)
# Readers of fields that the program of a step does not show, or that
# tests/test_optimizer.py changes one by one. Mesh axes are read by iteration:
# a dead one would not multiply to the devices of the tests above.
READERS = {
  "": "train/init_from.py train/tasks.py",
  "tokenizer": "data/tokenizer.py data/tokenizer_cache.py",
  "data": "data/packing.py data/pipeline.py data/sources.py data/store.py "
  "data/tokenizing.py",
  "optimizer": "train/optimizer.py train/skip.py train/step.py",
  "mesh": "train/__main__.py train/step.py",
  "train": "data/pipeline.py train/evaluation.py train/loop.py train/report.py",
  "checkpoint": "checkpoint.py train/loop.py train/resume.py",
  "model": "model/kernels.py",
}


def _program(settings) -> str:
  config = _config()
  for path, value in settings.items():
    *rooms, field = path.split(".")
    node = functools.reduce(getattr, rooms, config)
    setattr(node, field, copy.deepcopy(value))
  validation.validate(config)

  def first():
    return step_lib.init_state(config)

  batch = batch_lib.empty(config.train.batch_size, config.train.sequence_length)
  step = jax.make_jaxpr(step_lib.train_step(config))
  made = jax.make_jaxpr(first)(), step(jax.eval_shape(first), batch)
  return "".join(f"{jaxpr}{jaxpr.consts}" for jaxpr in made)


@pytest.mark.slow
def test_no_field_of_the_config_is_dead():
  """Each changes the program, or is read where its part of the config is."""
  program = functools.lru_cache(lambda *items: _program(dict(items)))
  for path, value in OTHER.items():
    under = UNDER.get(path, {})
    changed = _program(under | {path: value})
    assert changed != program(*under.items()), path
  lm = pathlib.Path(step_lib.__file__).parent.parent
  for path, _ in schema.leaves(config_lib.Config(), "config"):
    room, field = path.removeprefix("config.").rpartition(".")[::2]
    dotted = f"{room}.{field}".removeprefix(".")
    if dotted not in OTHER and field not in sharding.MESH_AXES:
      texts = [(lm / name).read_text() for name in READERS[room].split()]
      assert any(re.search(rf"\.{field}\b", text) for text in texts), path


GOLDEN = pathlib.Path(__file__).parent / "goldens" / "shardings.json"
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def shardings() -> dict[str, dict[str, str]]:
  """Layout of every array of every shipped config's state on a 2x2x2 mesh
  (2x4x1 where the vocabulary or the heads are odd).
  """
  found = {}
  for path in sorted(CONFIGS.glob("*.py")):
    config = cli.load(str(path))
    config.train.batch_size = 8
    config.train.microbatches = 1
    odd = config.model.vocab_size % 2 or config.model.n_heads % 2
    config.mesh = config_lib.MeshConfig(
      data=2, fsdp=4 if odd else 2, tensor=2 - odd
    )
    mesh = mesh_lib.make(config)
    state = programs.abstract_state(config, mesh)
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
