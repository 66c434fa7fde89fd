"""LoRA: updates, what is trained, merging, and runs from start to sampling."""

import copy
import dataclasses
import functools
import math
import shutil

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lm import checkpoint, schema, validation
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm.evaluate import corpora
from lm.model import counts, decoder, dropout, inference, lora
from lm.sample import sampler as sampler_lib
from lm.train import init_from, loop, programs
from lm.train import metrics as metrics_lib
from lm.verify.checks import harness

LENGTHS = [[7, 5, 4], [19], [1, 17]]
LORA = config_lib.LoraConfig(rank=3, alpha=5.0)


def adapted(cfg, **fields):
  return dataclasses.replace(cfg, lora=dataclasses.replace(LORA, **fields))


def random_params(cfg):
  """Of tests/reference.py, with random factors that weigh as much."""
  rng = np.random.default_rng(3)
  params = reference.random_params(lora.base(cfg))
  make = functools.partial(decoder.init_params, cfg)
  shapes = jax.eval_shape(make, jax.random.key(0))["layers"]["lora"]
  params["layers"]["lora"] = jax.tree.map(
    lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes
  )
  return params


def merged_by_numpy(cfg, params, scale):
  """W + scale * A B in float64, as two matrices."""
  found = {**params, "layers": dict(params["layers"])}
  adapters = found["layers"].pop("lora")
  for name, factors in adapters.items():
    room = "attention" if name in "qkvo" else "mlp"
    part = found["layers"][room] = dict(found["layers"][room])
    a, b = (factors[key].astype(np.float64) for key in "ab")
    rank = a.shape[-1]
    update = [
      scale * x.reshape(-1, rank) @ y.reshape(rank, -1)
      for x, y in zip(a, b, strict=True)
    ]
    part[name] = part[name] + np.stack(update).reshape(part[name].shape)
  return found


CASES = {
  "llama3": (adapted(families.LLAMA3), 5 / 3),
  "gpt2": (adapted(families.GPT2, rank=2), 5 / 2),
  "gemma2": (adapted(families.GEMMA2, targets=("v", "o", "gate")), 5 / 3),
  "biased": (adapted(families.BIASED, rank_stabilized=True), 5 / 3**0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_updated_matrices(name):
  """With adapters, merged by `merge`, and in NumPy; rsLoRA's scale too."""
  cfg, scale = CASES[name]
  params = random_params(cfg)
  batch = families.packed_batch(LENGTHS, 19, cfg.vocab_size)
  want = reference.forward(
    merged_by_numpy(cfg, params, scale), lora.base(cfg), batch
  )
  read = batch.segments != 0
  logits = harness.logits(cfg, params, batch)
  np.testing.assert_allclose(logits[read], want[read], rtol=0, atol=2e-5)
  plain = jax.jit(lora.merge, static_argnums=0)(cfg, params)
  assert jax.tree.structure(plain) == jax.tree.structure(
    reference.random_params(lora.base(cfg))
  )
  merged = harness.logits(lora.base(cfg), plain, batch)
  np.testing.assert_allclose(merged[read], logits[read], rtol=0, atol=1e-5)
  plain = reference.random_params(lora.base(cfg))
  base = harness.logits(lora.base(cfg), plain, batch)
  assert np.abs(base - logits)[read].max() > 0.01


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_model_is_its_base_to_the_bit(name):
  cfg, _ = CASES[name]
  params, base = (
    jax.jit(functools.partial(decoder.init_params, c))(jax.random.key(7))
    for c in (cfg, lora.base(cfg))
  )
  sizes = [x.size for x in jax.tree.leaves(params)]
  assert sum(sizes) == counts.parameter_count(cfg)
  batch = families.packed_batch(LENGTHS, 19, cfg.vocab_size)
  logits = harness.logits(cfg, params, batch)
  adapters = params["layers"].pop("lora")
  assert set(adapters) == set(lora.targets(cfg))
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, base)))
  np.testing.assert_array_equal(
    logits, harness.logits(lora.base(cfg), base, batch)
  )
  for factors in adapters.values():
    assert not np.any(factors["b"])
    n = math.prod(factors["a"].shape[1:-1])
    np.testing.assert_allclose(np.std(factors["a"]), (3 * n) ** -0.5, rtol=0.3)


def test_the_scale_is_over_the_rank_or_its_root():
  cfg = config_lib.LoraConfig(rank=9, alpha=6.0)
  assert cfg.scale == 6 / 9
  assert dataclasses.replace(cfg, rank_stabilized=True).scale == 2


def test_dropout_is_of_the_input_of_each_update():
  """Each row by its key, each adapter by a mask of its own."""
  cfg = adapted(families.LLAMA3, dropout=0.5)
  params = jax.tree.map(jnp.asarray, random_params(cfg))
  block = decoder.bind(cfg, params).unroll().layers[0]
  x = jax.random.normal(jax.random.key(1), (2, 5, cfg.d_model))
  keys = dropout.row_keys(jax.random.key(2), jnp.arange(2))
  masks = []
  for name in ("q", "k"):
    factors = getattr(block.lora, name)
    update = functools.partial(block.lora.updates(keys)[name], "BTD,DNH->BTNH")
    own = dropout.fold_rows(keys, 2 + lora.targets(cfg).index(name))
    mask = np.asarray(dropout.dropout(jnp.ones(x.shape), 0.5, own))
    assert set(np.unique(mask)) == {0, 2}
    masks.append(mask)
    h = np.einsum("BTD,DR->BTR", x * mask, factors.a[...])
    want = 5 / 3 * np.einsum("BTR,RNH->BTNH", h, factors.b[...])
    heads = ("batch", "length", None, None)
    np.testing.assert_allclose(update(x, *heads), want, rtol=1e-4, atol=1e-5)
    still = block.lora.updates(None)[name]("BTD,DNH->BTNH", x, *heads)
    assert np.abs(still - want).max() > 0.1
  assert not np.array_equal(*masks)


@pytest.mark.parametrize(
  ("fields", "mlp", "says"),
  [
    ({"targets": ("q", "qkv")}, "swiglu", "targets[1]='qkv': unknown; did you"),
    ({"targets": ("embed",)}, "swiglu", "Known: q, k, v, o, gate, up, down"),
    ({"targets": ("gate",)}, "gelu", "mlp='gelu' has no matrix 'gate'; leave"),
    ({"full": ("norm",)}, "swiglu", "Known: embed, head"),
    ({"rank": 0}, "swiglu", "config.model.lora.rank=0: must be at least 1"),
    ({"rank": 17}, "swiglu", "rank=17: must be at most d_model=16: no update"),
    ({"alpha": 0.0}, "swiglu", "config.model.lora.alpha=0.0: must be positive"),
    ({"dropout": 1.0}, "swiglu", "config.model.lora.dropout=1.0: must be in"),
  ],
)
def test_wrong_adapters_are_refused(fields, mlp, says, make):
  with pytest.raises(schema.ConfigError) as error:
    make(model__mlp=mlp, model__lora=dataclasses.replace(LORA, **fields))
  assert says in str(error.value)


def test_a_tied_head_is_no_array_of_its_own(make):
  with pytest.raises(schema.ConfigError) as error:
    make(
      model__tied_embedding=True,
      model__lora=dataclasses.replace(LORA, full=("head",)),
    )
  assert "full=('head',): tied_embedding=True has no 'head'" in str(error.value)


def test_muon_is_refused_as_nothing_is_left_for_it(make):
  with pytest.raises(schema.ConfigError) as error:
    make(model__lora=LORA, optimizer__name="muon")
  assert "optimizer.name='muon': makes updates of full" in str(error.value)


# --- steps --------------------------------------------------------------------


def train_config(name="adamw", **fields):
  c = config_lib.Config()
  c.model = config_lib.ModelConfig(
    vocab_size=48,
    n_layers=3,
    d_model=16,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_mlp=24,
    context_length=12,
    residual_dropout=0.1,
    tied_embedding="head" not in fields.get("full", ()),
    lora=dataclasses.replace(LORA, dropout=0.2, **fields),
  )
  c.optimizer = config_lib.OptimizerConfig(
    name=name, warmup_steps=1, peak_lr=1e-2, ema_decay=0.9
  )
  c.train = config_lib.TrainConfig(
    steps=10, batch_size=8, sequence_length=12, statistics_every=1
  )
  return harness.sensitive(validation.validate(c))


def flat(tree):
  return {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  "name", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)]
)
def test_only_adapters_are_trained(name):
  """The others have no gradient, optimizer state or average, and stay as they
  are, whichever the optimizer.
  """
  config = harness.with_mesh(train_config(name), (1, 1, 1))
  batches = [harness.random_batch(config, seed) for seed in range(2)]
  found = harness.train_steps(config, batches)
  fresh = flat(harness.random_params(config.model))
  params, frozen = flat(found.state.params), flat(found.state.frozen)
  assert params.keys() | frozen.keys() == fresh.keys()
  assert all("['lora']" in path for path in params) and len(params) == 14
  assert not any("lora" in path for path in frozen)
  for path, value in frozen.items():
    np.testing.assert_array_equal(value, fresh[path], err_msg=path)
  for path, value in params.items():
    assert np.any(value != fresh[path]), path
  assert flat(found.state.ema).keys() == params.keys()
  shapes = {x.shape for x in params.values()} | {(1,)}
  for path, leaf in flat(found.state.opt_state).items():
    if "['layers']" in path:
      assert "['lora']" in path, path
      # Adafactor's factored moments lack an axis.
      assert leaf.shape in shapes or name == "adafactor", path
    else:  # counts, in Adafactor of each layer
      assert leaf.shape in ((), (3,)), path
  n_bytes = sum(x.nbytes for x in jax.tree.leaves(found.state.opt_state))
  n_adapters = sum(x.nbytes for x in params.values())
  assert n_bytes <= 2 * n_adapters + 200


def test_what_is_trained_whole_has_its_gradient():
  """By differences of the logits' loss in NumPy; the rest stays frozen."""
  config = harness.with_mesh(train_config(full=("embed", "head")), (1, 1, 1))
  config.model.residual_dropout = config.model.lora.dropout = 0.0
  config.optimizer.clip_norm, cfg = None, config.model
  batch, params = harness.random_batch(config, 0), harness.random_params(cfg)
  found = harness.train_steps(config, [batch])
  assert set(found.state.params) == {"embed", "head", "layers"}
  assert set(found.state.params["layers"]) == {"lora"}
  assert set(found.state.frozen) == {"layers", "final_norm"}

  def loss(changed):
    logits = harness.logits(cfg, changed, batch).astype(np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    logits -= peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return np.sum(nll * batch.weights) / np.sum(batch.weights)

  rng = np.random.default_rng(0)
  for name in cfg.lora.full:
    gradient = found.moments[0].mu[name] / (1 - config.optimizer.b1)
    assert found.state.ema[name].shape == gradient.shape
    # Along the gradient and some noise, which has a slope of its own.
    size = np.linalg.norm(gradient) / math.sqrt(gradient.size)
    noise = size * rng.standard_normal(gradient.shape)
    along = (gradient + noise).astype(np.float32) * (1e-4 / size)
    slope = [
      loss({**params, name: params[name] + sign * along}) for sign in (1, -1)
    ]
    wanted = np.sum(gradient * along)
    np.testing.assert_allclose((slope[0] - slope[1]) / 2, wanted, rtol=0.02)


@pytest.fixture(scope="module")
def on_a_device():
  config = train_config()
  batches = [harness.random_batch(config, seed) for seed in range(2)]
  one = harness.with_mesh(config, (1, 1, 1))
  return config, batches, harness.train_steps(one, batches)


@pytest.mark.parametrize(
  ("shape", "mode", "parts"),
  [
    ((2, 2, 2), "jit", 2),
    pytest.param((8, 1, 1), "pmap", 1, marks=pytest.mark.slow),
  ],
)
def test_adapters_on_a_mesh(shape, mode, parts, on_a_device):
  """Same losses and factors as on a device, dropout included."""
  config, batches, want = on_a_device
  many = harness.with_mesh(config, shape, mode)
  many.train.microbatches = parts if mode == "jit" else 1
  if mode == "jit":
    many.train.batch_size = 8
  got = harness.train_steps(many, batches)
  np.testing.assert_allclose(got.numbers, want.numbers, rtol=1e-5)
  for (path, a), b in zip(
    flat(got.moments[0].mu).items(),
    flat(want.moments[0].mu).values(),
    strict=True,
  ):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), path
  if mode == "jit":
    q = got.state.params["layers"]["lora"]["q"]
    assert q["a"].sharding.spec[1] == "fsdp"
    assert q["b"].sharding.spec[2] == "tensor"


def test_a_frozen_matrix_costs_two_products_in_place_of_three():
  """By the compiled program's own count, without scan and attention."""
  config = train_config()
  cfg = config.model
  one = counts.forward_flops(cfg, 12)
  base = counts.forward_flops(lora.base(cfg), 12)
  D, F, N, K, H, V, R = 16, 24, 4, 2, 6, 48, 3
  matrices = 3 * (D * H * 2 * (N + K) + 3 * D * F) + V * D
  adapters = 3 * R * (2 * (D + N * H) + 2 * (D + K * H) + 3 * (D + F))
  assert one - base == 2 * adapters
  assert counts.train_flops(cfg, 12) == 3 * one - 2 * matrices
  whole = adapted(cfg, full=("embed",))  # the head, too: they are tied
  assert counts.train_flops(whole, 12) == 3 * one - 2 * (matrices - V * D)


# --- runs ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(make, tmp_path_factory):
  """(config, directory) of a base run, and of a LoRA run that starts there."""
  folder = tmp_path_factory.mktemp("runs")
  base = make(train__steps=6)
  assert loop.train(base, str(folder / "base")) == 0
  tuned = make(
    train__steps=6,
    data__train=base.data.validation,
    model__lora=dataclasses.replace(LORA, dropout=0.1),
    optimizer__peak_lr=3e-2,
  )
  tuned.init_from = str(folder / "base")
  assert loop.train(tuned, str(folder / "tuned")) == 0
  return (base, folder / "base"), (tuned, folder / "tuned")


def test_a_run_starts_at_its_base(runs, make):
  (base, folder), (tuned, _) = runs
  mesh, said = mesh_lib.make(tuned), []
  loaded = init_from.load(tuned, mesh, said.append)
  state = programs.create_state(tuned, mesh, loaded)
  want = flat(checkpoint.load_params(str(folder), base.model))
  frozen = flat(state.frozen)
  assert frozen.keys() == want.keys()
  for path, value in want.items():
    np.testing.assert_array_equal(frozen[path], value)
  merged = flat(lora.merge_on(mesh, tuned.model, state.model)[1])
  for path, value in want.items():
    np.testing.assert_array_equal(merged[path], value)
  assert "fresh: adapters of rank 3, optimizer" in said[0]
  assert said[1:] == []


def test_a_checkpoint_has_the_base_and_resumes_to_the_bit(runs, tmp_path):
  _, (tuned, folder) = runs
  meta = checkpoint.load_meta(str(folder))
  assert all("lora/" in name for name in meta.trees["params"])
  assert "embed" in meta.trees["frozen"]
  for name in ("ema", "params"):
    assert meta.trees[name] == meta.trees["params"]
  shutil.copytree(folder, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  assert loop.train(tuned, str(tmp_path / "run")) == 0
  again = checkpoint.load_meta(str(tmp_path / "run"))
  assert again.digests == meta.digests
  reports = metrics_lib.read(str(folder))
  assert reports[-1]["eval/loss"] < reports[0]["train/loss"]


def test_a_run_is_sampled_and_evaluated_without_another_flag(runs, tmp_path):
  """Merged in float32; int8 too, as the merged matrices quantised."""
  (base, _), (tuned, folder) = runs
  params = checkpoint.load_params(str(folder), tuned.model)
  plain = lora.merge(tuned.model, params)
  model = sampler_lib.Sampler.from_checkpoint(str(folder))
  assert model.cfg == base.model
  direct = sampler_lib.Sampler(tuned.model, params, model.tokenizer)
  merged = sampler_lib.Sampler(base.model, plain, model.tokenizer)
  text = "def main("
  scores = [
    np.asarray(each.score(text, eos=True).log_probabilities)
    for each in (model, direct, merged)
  ]
  for score in scores[1:]:
    np.testing.assert_allclose(score, scores[0], atol=1e-6)
  (tmp_path / "text.txt").write_text(text)
  evaluation = corpora.evaluate(
    str(folder),
    specs=[f"text:{tmp_path}/text.txt"],
    step=None,
    stride=None,
    batch_size=None,
    data={},
    output=None,
  )
  np.testing.assert_allclose(evaluation.totals.nll, -scores[0].sum(), rtol=1e-6)
  unrolled = [
    inference.unroll(cfg, p, int8=True)[1]
    for cfg, p in ((tuned.model, params), (base.model, plain))
  ]
  for a, b in zip(*map(jax.tree.leaves, unrolled), strict=True):
    if a.dtype == jnp.int8:  # a last bit of a matrix may round another way
      assert np.abs(a.astype(np.int32) - b).max() <= 1
      assert np.mean(a != b) < 0.02
    else:
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_adapters_go_on_or_are_merged_in_a_third_run(runs, make):
  (base, _), (tuned, folder) = runs
  params = checkpoint.load_params(str(folder), tuned.model)
  third = copy.deepcopy(tuned)
  third.init_from = str(folder)
  mesh, said = mesh_lib.make(third), []
  loaded = init_from.load(third, mesh, said.append)
  state = programs.create_state(third, mesh, loaded)
  got, want = flat(state.model), flat(params)
  assert got.keys() == want.keys()
  for path, value in want.items():
    np.testing.assert_array_equal(got[path], value)
  assert "adapters" not in said[0]
  third.model.lora = dataclasses.replace(LORA, rank=2)
  with pytest.raises(schema.ConfigError, match=r"lora/.*\[2, 16, 3\] there"):
    init_from.load(third, mesh, said.append)
  for mode in ("jit", "pmap"):
    whole = make(mesh__mode=mode, mesh__fsdp=2 if mode == "jit" else 1)
    whole.init_from = str(folder)
    mesh = mesh_lib.make(whole)
    loaded = init_from.load(whole, mesh, said.append)
    assert "adapters merged" in " ".join(said)
    state = programs.create_state(whole, mesh, loaded)
    merged = flat(lora.merge(tuned.model, params))
    for path, value in flat(state.params).items():
      np.testing.assert_allclose(value, merged[path], rtol=1e-6, atol=1e-7)
    assert not state.frozen
