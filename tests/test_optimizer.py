"""Schedules and optimizers against closed forms, NumPy and optax itself."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import batch as batch_lib
from lm import config as config_lib
from lm import schema, sharding, validation
from lm.model import weights
from lm.train import muon, optimizer
from lm.train import step as step_lib

L, D, N, H, F = 3, 5, 2, 7, 11
NAMES = ("adamw", "lion", "adafactor", "muon")


def _params(seed=0):
  rng = np.random.default_rng(seed)

  def make(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    "embed": make(13, D),
    "final_norm": {"scale": make(D)},
    "layers": {
      "attention": {"q": make(L, D, N, H), "o": make(L, N, H, D)},
      "attention_norm": {"scale": make(L, D), "bias": make(L, D)},
      "mlp": {"up": make(L, D, F), "up_bias": make(L, F)},
    },
  }


def _config(**fields):
  return config_lib.OptimizerConfig(
    **{"warmup_steps": 0, "schedule": "constant", "peak_lr": 0.1, **fields}
  )


DECLARED = {
  "embed": weights.Weight(("vocab", "embed"), "embedding"),
  "final_norm": {"scale": weights.Weight((None,), "vector")},
  "layers": {
    "attention": {
      "q": weights.Weight(("embed", "heads", None), "matrix", 1, True),
      "o": weights.Weight(("heads", None, "embed"), "matrix", 2, True),
    },
    "attention_norm": {
      "scale": weights.Weight((None,), "vector", 0, True),
      "bias": weights.Weight((None,), "vector", 0, True),
    },
    "mlp": {
      "up": weights.Weight(("embed", "mlp"), "matrix", 1, True),
      "up_bias": weights.Weight(("mlp",), "vector", 0, True),
    },
  },
}


def _make(cfg, steps):
  return optimizer.make(cfg, steps, DECLARED, "float32")


def _run(transform, params, n=3):
  """Parameters after n updates with known gradients."""
  state = transform.init(params)
  update = jax.jit(transform.update)
  for i in range(n):
    changes, state = update(_params(100 + i), state, params)
    params = optax.apply_updates(params, changes)
  return params


def _leaves(tree):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("constant", {0: 0.2, 4: 1, 50: 1, 99: 1}),
    ("linear", {0: 0.2, 4: 1, 52: 1 - 48 / 96, 99: 1 - 95 / 96}),
    ("cosine", {4: 1, 52: 0.5, 99: 0.5 * (1 + math.cos(math.pi * 95 / 96))}),
    ("rsqrt", {4: 1, 16: 0.5, 64: 0.25}),
    ("wsd", {4: 1, 75: 1, 76: 24 / 25, 82: 18 / 25, 99: 1 / 25}),
  ],
)
def test_schedule_closed_form(name, expected):
  """100 steps, 4 of warm-up; `wsd` decays over the last quarter of all."""
  cfg = _config(schedule=name, warmup_steps=4, decay_fraction=0.25)
  rate = optimizer.schedule(cfg, 100, peak=3.0)
  for step, value in expected.items():
    assert rate(step) == pytest.approx(3.0 * value, rel=1e-5, abs=1e-6), step


def test_wsd_decays_over_its_fraction_whatever_the_warmup():
  cfg = _config(schedule="wsd", warmup_steps=500, decay_fraction=0.2)
  rates = [optimizer.rate_at(cfg, 1000, step) for step in range(0, 1000, 10)]
  assert rates[50:81] == [pytest.approx(0.1)] * 31
  assert rates[81:] == [pytest.approx(0.1 * i / 20) for i in range(19, 0, -1)]


def test_schedule_ends_at_its_floor():
  cfg = _config(schedule="cosine", final_lr_fraction=0.1)
  assert optimizer.schedule(cfg, 100, 1.0)(100) == pytest.approx(0.1)


def test_adamw_is_the_papers_and_decays_matrices_only():
  cfg = _config(name="adamw", b1=0.9, b2=0.95, weight_decay=0.3)
  got = _leaves(_run(_make(cfg, 10), _params()))
  gradients = [_leaves(_params(100 + i)) for i in range(3)]
  for name, w in _leaves(_params()).items():
    w = w.astype(np.float64)
    decay = 0.0 if "scale" in name or "bias" in name else 0.3
    m = v = 0.0
    for t, g in enumerate((g[name].astype(np.float64) for g in gradients), 1):
      m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
      step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
      w = w - 0.1 * (step + decay * w)
    np.testing.assert_allclose(got[name], w, rtol=1e-4, atol=1e-5)


def test_lion_is_the_papers():
  cfg = _config(name="lion", b1=0.9, b2=0.99, weight_decay=0.3)
  got = _leaves(_run(_make(cfg, 10), _params()))
  gradients = [_leaves(_params(100 + i)) for i in range(3)]
  for name, w in _leaves(_params()).items():
    decay = 0.0 if "scale" in name or "bias" in name else 0.3
    m = 0.0
    for g in (g[name] for g in gradients):
      w = w - 0.1 * (np.sign(0.9 * m + 0.1 * g) + decay * w)
      m = 0.99 * m + 0.01 * g
    np.testing.assert_allclose(got[name], w, rtol=1e-4, atol=1e-5)


def test_muon_treats_each_layer_as_a_matrix_of_its_own():
  cfg = _config(name="muon", momentum=0.9, adam_peak_lr=0.02)
  got = _leaves(_run(_make(cfg, 10), _params()))
  shapes = {
    "['layers']['attention']['q']": (D, N * H),
    "['layers']['attention']['o']": (N * H, D),
    "['layers']['mlp']['up']": (D, F),
  }
  for name, shape in shapes.items():
    for layer in range(L):
      alone: Any = {"w": _leaves(_params())[name][layer].reshape(shape)}
      library = optax.contrib.muon(0.1, beta=0.9)
      state = library.init(alone)
      for i in range(3):
        gradient = _leaves(_params(100 + i))[name][layer].reshape(shape)
        changes, state = library.update({"w": gradient}, state, alone)
        alone = optax.apply_updates(alone, changes)
      np.testing.assert_allclose(
        got[name][layer].reshape(shape), alone["w"], rtol=2e-3, atol=2e-4
      )
  # Embeddings and vectors are AdamW's with Nesterov momentum, at its own rate.
  adam = optax.nadamw(0.02, b1=cfg.b1, b2=cfg.b2, weight_decay=0.0)
  want = _leaves(_run(adam, _params()))
  for name in got.keys() - shapes.keys():
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("n", "dtype", "least", "error"),
  [(16, "float32", 1e-8, 5e-5), (24, "float32", 1e-8, 5e-5)]
  # Products of x x^T alone: its rounding is that of squares.
  + [(25, "float32", 1e-8, 1e-3), (64, "float32", 1e-8, 1e-3)]
  + [(64, "float32", 0.1, 5e-6), (64, "bfloat16", 0.1, 0.1)],
)
def test_newton_schulz_is_its_polynomial_of_the_singular_values(
  n, dtype, least, error
):
  """From 1 down to `least`, in float64."""
  rng, m = np.random.default_rng(0), 16
  values = np.geomspace(1, least, m)
  values /= np.linalg.norm(values)
  left = np.linalg.qr(rng.normal(size=(2, m, m)))[0]
  right = np.linalg.qr(rng.normal(size=(2, n, m)))[0].mT
  x = (left * values) @ right
  for _ in range(5):
    values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
  got = jax.jit(muon.newton_schulz)(jnp.asarray(x, dtype))
  assert got.dtype == dtype
  want = (left * values) @ right
  assert np.linalg.norm(got - want) < error * np.linalg.norm(want)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_a_device_orthogonalizes_its_share_of_whole_matrices(shape, capfd):
  """Collectives stand before and after the iterations, none within; 9 matrices
  of each of two shapes make 2 a device. The update is that of a single device.
  """
  declared = {
    name: weights.Weight(axes, "matrix", n_inputs, True)
    for name, axes, n_inputs in (
      ("q", ("embed", "heads", None), 1),
      ("k", ("embed", "kv_heads", None), 1),
      ("o", ("heads", None, "embed"), 2),
      ("up", ("embed", "mlp"), 1),
      ("gate", ("embed", "mlp"), 1),
      ("down", ("mlp", "embed"), 1),
    )
  }
  sizes = {"embed": 16, "heads": 8, "kv_heads": 8, None: 2, "mlp": 40}
  rng = np.random.default_rng(0)
  gradients = {
    name: rng.normal(size=[3, *(sizes[axis] for axis in weight.axes)]).astype(
      np.float32
    )
    for name, weight in declared.items()
  }
  transform = optimizer.make(_config(name="muon"), 10, declared, "float32")

  def changes(gradients):
    return transform.update(gradients, transform.init(gradients), gradients)[0]

  want = jax.jit(changes)(gradients)
  names = ("data", "fsdp", "tensor")
  auto = (jax.sharding.AxisType.Auto,) * 3
  with jax.set_mesh(jax.make_mesh(shape, names, axis_types=auto)):
    where = {
      name: jax.NamedSharding(
        jax.sharding.get_mesh(), sharding.partition(None, *weight.axes)
      )
      for name, weight in declared.items()
    }
    placed = jax.tree.map(jax.device_put, gradients, where)
    program = jax.jit(changes, out_shardings=where).lower(placed).compile()
    got = program(placed)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=2e-5)
  text = program.as_text() or ""
  lines = [line for line in text.splitlines() if "newton_schulz" in line]
  products = [line for line in lines if re.search(r" dot\(", line)]
  assert len(products) >= 15 + 16
  assert {line.split("[")[1].split(",")[0] for line in products} == {"2"}
  collective = r" (all|reduce|collective)-[a-z-]+\("
  assert not [line for line in lines if re.search(collective, line)]
  assert "rematerialization" not in capfd.readouterr().err


def test_adafactor_treats_each_layer_as_a_tensor_of_its_own():
  got = _leaves(_run(_make(_config(name="adafactor"), 10), _params()))

  def layer_alone(i):
    def cut(tree):
      return jax.tree.map(lambda a: a[i], tree["layers"])

    transform, params = optax.adafactor(0.1), cut(_params())
    state = transform.init(params)
    for step in range(3):
      changes, state = transform.update(cut(_params(100 + step)), state, params)
      params = optax.apply_updates(params, changes)
    return _leaves(params)

  for i in range(L):
    for name, value in layer_alone(i).items():
      np.testing.assert_allclose(
        got["['layers']" + name][i], value, rtol=1e-4, atol=1e-5
      )


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_a_step_is_the_weight_decay(name):
  """Every leaf against -lr * weight_decay * parameter, and 0 for vectors, at
  each step of a schedule; what Muon leaves to Adam decays at Adam's rate.
  """
  fields = {"schedule": "wsd", "warmup_steps": 2, "adam_peak_lr": 0.03}
  cfg = _config(name=name, weight_decay=0.3, **fields)
  transform, params = _make(cfg, 8), _params()
  zeros = jax.tree.map(np.zeros_like, params)
  state, update = transform.init(params), jax.jit(transform.update)
  matrices = {"['layers']['attention']['q']", "['layers']['attention']['o']"}
  matrices |= {"['layers']['mlp']['up']"}
  # Warm-up 1/3, 2/3, then flat, and the last 8/5 of 8 steps decay.
  shape = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1 / 1.6]
  for step, part in enumerate(shape):
    changes, state = update(zeros, state, params)
    got, before = _leaves(changes), _leaves(params)
    for leaf, w in before.items():
      peak = 0.03 if name == "muon" and leaf not in matrices else 0.1
      rate = 0.0 if "scale" in leaf or "bias" in leaf else peak * part * 0.3
      np.testing.assert_allclose(
        got[leaf], -rate * w, rtol=1e-5, atol=1e-30, err_msg=f"{leaf} {step}"
      )
    params = optax.apply_updates(params, changes)


# A value of each field that is not its default.
OTHER = {
  "peak_lr": 0.5,
  "adam_peak_lr": 0.5,
  "b1": 0.5,
  "b2": 0.5,
  "epsilon": 1e-3,
  "momentum": 0.5,
  "weight_decay": 0.5,
  "clip_norm": 0.5,
  "warmup_steps": 7,
  "decay_fraction": 0.5,
  "final_lr_fraction": 0.5,
  "ema_decay": 0.5,
  "skip": config_lib.SkipConfig(),
}
SCHEDULES = ("constant", "cosine", "rsqrt", "wsd")
FIELDS = [field.name for field in dataclasses.fields(_config())]


def _program(o):
  """Text of a whole step of a small model, its first state included."""
  config = config_lib.Config()
  config.optimizer = o
  config.model = config_lib.ModelConfig(
    vocab_size=13,
    n_layers=1,
    d_model=D,
    n_heads=N,
    n_kv_heads=N,
    d_head=2,
    d_mlp=F,
  )
  validation.validate(config)
  state = jax.eval_shape(lambda: step_lib.init_state(config))
  batch = batch_lib.empty(2, 3)
  return str(jax.make_jaxpr(step_lib.train_step(config))(state, batch))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "schedule"),
  [*((name, "linear") for name in NAMES), *(("lion", s) for s in SCHEDULES)],
)
def test_every_field_changes_the_program_or_is_refused(name, schedule):
  plain = config_lib.OptimizerConfig(name=name, schedule=schedule)
  before = _program(plain)
  refused = set()
  for field in set(FIELDS) - {"name", "schedule"}:
    try:
      after = _program(dataclasses.replace(plain, **{field: OTHER[field]}))
    except schema.ConfigError as error:
      assert f"config.optimizer.{field}=" in str(error)
      assert "has no effect" in str(error)
      refused.add(field)
    else:
      assert after != before, field
  unread = {
    "adamw": {"adam_peak_lr", "momentum"},
    "lion": {"adam_peak_lr", "momentum", "epsilon"},
    "adafactor": {"adam_peak_lr", "momentum", "epsilon", "b1", "b2"},
    "muon": set(),
  }[name]
  unread |= {"decay_fraction"} if schedule != "wsd" else set()
  unread |= (
    {"final_lr_fraction"} if schedule in ("constant", "rsqrt") else set()
  )
  assert refused == unread


# Where leaves of the state stand, `{part}` of the partition; the parameters'
# own paths come after them.
STATES = {
  "adamw": "[0].count [0].mu [0].nu [2].count",
  "lion": "[0].count [0].mu [2].count",
  "adafactor": " ".join(
    f".inner_states[{part}].inner_state{leaf}"
    for part in (False, True)
    for leaf in "[0].count [0].v [0].v_col [0].v_row [2].count".split()
  ),
  "muon": " ".join(
    f".inner_states['{part}'].inner_state{leaf}"
    for part, leaves in (
      ("adam", "[0].count [0].mu [0].nu [2].count"),
      ("muon", "[0].count [0].mu [0].ns_coeffs [3].count"),
    )
    for leaf in leaves.split()
  ),
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_state_is_a_tree_that_stored_runs_have(name, decay):
  """A checkpoint is read by these paths. A change here, ours or optax's, ends
  all runs of that optimizer: CHANGELOG.md must say so.
  """
  transform = _make(_config(name=name, weight_decay=decay), 10)
  state = jax.eval_shape(transform.init, _params())
  found = {
    re.sub(r"\['(embed|final_norm|layers)'\].*", "", jax.tree_util.keystr(path))
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  }
  wanted = set(STATES[name].split())
  if name == "adafactor" and decay:  # its decay follows the schedule
    counts = ".inner_states[{}].inner_state[4].inner_state.count"
    wanted |= {counts.format(part) for part in (False, True)}
  assert found == wanted


def test_muons_state_is_optaxs_to_the_empty_nodes():
  """Runs that began with optax.contrib.muon go on: orbax compares trees."""
  transform = _make(_config(name="muon"), 10)

  def dimensions(params):
    def of(path, _):
      weight = weights.of(DECLARED, path)
      if weight.role == "matrix":
        return optax.contrib.MuonDimensionNumbers(
          weight.input_axes, weight.output_axes
        )

    return jax.tree_util.tree_map_with_path(of, params)

  library = optax.contrib.muon(
    optax.constant_schedule(0.1),
    weight_decay_mask=lambda params: jax.tree.map(lambda p: True, params),
    adam_learning_rate=optax.constant_schedule(0.1),
    muon_weight_dimension_numbers=dimensions,
  )
  ours, theirs = (
    jax.tree.structure(jax.eval_shape(t.init, _params()))
    for t in (transform, library)
  )
  assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_slots_lie_as_their_weights(name):
  """No slot as large as its weight is whole on every device."""
  P = jax.sharding.PartitionSpec
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))

  def place(spec, *shape):
    where = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=where)

  params = {
    "embed": place(P("tensor", "fsdp"), 256, 128),
    "layers": {"mlp": {"up": place(P(None, "fsdp", "tensor"), 3, 128, 512)}},
  }
  transform = _make(_config(name=name), 10)
  state = jax.eval_shape(transform.init, params)
  specs = optimizer.state_specs(params, state)
  seen = set()
  for leaf, spec in zip(
    jax.tree.leaves(state),
    jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
    strict=True,
  ):
    seen.add((leaf.shape, tuple(spec)))
  full = {
    ((256, 128), ("tensor", "fsdp")),
    ((3, 128, 512), (None, "fsdp", "tensor")),
  }
  factored = {
    ((256,), ("tensor",)),
    ((128,), ("fsdp",)),
    ((3, 128), (None, "fsdp")),
    ((3, 512), (None, "tensor")),
  }
  assert (factored if name == "adafactor" else full) <= seen
  for shape, spec in seen:
    assert math.prod(shape) < 128 or any(spec), (shape, spec)
