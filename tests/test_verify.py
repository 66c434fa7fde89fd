"""`lm.verify`: each check passes correct code and fails on mutants.

A mutant is the code that the check runs, with a plausible bug injected. Checks
yield each result at once, so that a mutant costs the time to the first failure.
"""

import copy
import dataclasses
import itertools
import json
import pathlib

import doors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lm import checkpoint, cli, schema, sharding, validation
from lm import config as config_lib
from lm.data import objectives, pipeline
from lm.model import (
  attention,
  chunks,
  counts,
  decoder,
  dropout,
  kernels,
  layers,
  loss,
  stack,
  weights,
)
from lm.sample import decoding
from lm.train import optimizer
from lm.train import step as step_lib
from lm.verify import checks, result, shrink
from lm.verify.checks import harness

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def mutate(monkeypatch):
  """mutate(module, "name", mutant): calls of module.name become calls of
  mutant(original, *args). Caches of compiled programs and of models' graphs are
  cleared before and after.
  """

  def clear():
    jax.clear_caches()
    decoder._graph.cache_clear()

  def replace(module, name, mutant):
    clear()
    original = getattr(module, name)
    monkeypatch.setattr(
      module, name, lambda *args, **named: mutant(original, *args, **named)
    )

  yield replace
  monkeypatch.undo()
  clear()


def config(**fields):
  """A run of the smallest model that can show the bugs of the mutants below."""
  c = config_lib.Config()
  c.model = config_lib.ModelConfig(
    vocab_size=40,
    n_layers=1,
    d_model=16,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_mlp=24,
    context_length=24,
  )
  c.tokenizer.kind = "bytes"
  c.optimizer = config_lib.OptimizerConfig(name="adamw", ema_decay=0.9)
  c.train = config_lib.TrainConfig(steps=9, batch_size=8, sequence_length=24)
  for path, value in fields.items():
    section, field = path.split("__")
    setattr(getattr(c, section), field, value)
  return validation.validate(c)


@pytest.fixture
def freeze(monkeypatch):
  """freeze(c): stops the training of one weight of each layer."""

  def one(c):
    weight = decoder.declared(c.model)["layers"]["mlp"]["down"]
    monkeypatch.setitem(weight.__dict__, "frozen", True)

  return one


def failures(name, c):
  return (r for r in checks.CHECKS[name](c) if not r.passed)


def caught(name, c):
  """The first result that fails; its error is finite and above the limit."""
  found = next(failures(name, c), None)
  assert found is not None, "not caught"
  assert found.check == name and found.error > found.limit
  return found


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("accumulation", {"model__residual_dropout": 0.1}),
    ("shardings", {"model__biases": ("qkv", "o", "mlp")}),
    ("checkpoint", {"optimizer__skip": config_lib.SkipConfig()}),
  ],
)
def test_a_clean_config_with_a_frozen_weight_passes(freeze, name, fields):
  c = config(**fields)
  freeze(c)
  found = list(checks.CHECKS[name](c))
  assert found and not [r for r in found if not r.passed]


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["packing", "accumulation", "shardings", "parameters", "checkpoint"]
)
def test_a_clean_config_with_adapters_passes(name):
  c = config(model__lora=config_lib.LoraConfig(rank=3, dropout=0.1))
  found = list(checks.CHECKS[name](c))
  assert found and not [r for r in found if not r.passed]


# --- correct code -------------------------------------------------------------

BFLOAT16 = {"model__dtype": "bfloat16"}
WINDOWED = {"model__windows": (5, None), "model__n_layers": 3}
# Of OLMo 3, SmolLM 3 and Phi 4, with two patterns of layers.
SWITCHES = WINDOWED | {
  "model__norm_placement": "post",
  "model__qk_norm": "projection",
  "model__biases": ("qkv",),
  "model__mlp": "geglu_exact",
  "model__rope_layers": (True, False, True),
  "model__rotary_fraction": 0.67,
  "model__rope_scaling": config_lib.RopeScaling(
    kind="longrope",
    original_length=12,
    short_factors=(1.0, 2.0),
    long_factors=(1.0, 4.0),
  ),
}
# Of BERT and ModernBERT.
ENCODER = {
  "model__causal": False,
  "model__norm": "layernorm",
  "model__embedding_norm": True,
  "model__first_attention_norm": False,
  "model__head_transform": True,
  "model__head_bias": True,
  "model__windows": (None, 5),
  "model__biases": ("mlp",),
  "data__train": ("text:a|masked",),
  "data__validation": (),
}
CLEAN = [
  ("causality", ENCODER),
  ("decode", ENCODER),
  ("shardings", ENCODER),
  ("causality", BFLOAT16 | WINDOWED),
  ("packing", {"model__positions": "learned", "model__biases": ("qkv", "mlp")}),
  ("padding", {"model__norm_placement": "residual"}),
  ("decode", BFLOAT16 | {"model__windows": (5,)}),
  ("decode", SWITCHES),
  ("shardings", SWITCHES),
  ("layers", {"model__residual_dropout": 0.1}),
  ("initial_loss", {}),
  ("dtypes", {}),
  (
    "parameters",
    {"model__biases": ("qkv", "o", "mlp"), "model__qk_norm": "head"},
  ),
  ("batches", {"tokenizer__kind": "sentencepiece"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields"), CLEAN)
def test_clean_config_passes(name, fields):
  found = list(checks.CHECKS[name](config(**fields)))
  assert found and all(r.passed for r in found), found


@pytest.mark.slow
def test_clean_config_passes_on_meshes(monkeypatch):
  monkeypatch.setattr(harness, "mesh_shapes", lambda n: [(8, 1, 1), (2, 2, 2)])
  found = list(checks.CHECKS["meshes"](config(model__embedding_dropout=0.1)))
  assert len(found) == 6 and all(r.passed for r in found), found


# --- attention mask, packing, padding, decoding -------------------------------


def off_by_one(original, queries, keys, window):
  return original(
    dataclasses.replace(queries, positions=queries.positions + 1), keys, window
  )


def wide_window(original, queries, keys, window):
  return original(queries, keys, window and window + 1)


def narrow_window(original, queries, keys, window):
  return original(queries, keys, window and window - 1)


def no_segments(original, queries, keys, window):
  def one_segment(tokens):
    return dataclasses.replace(tokens, segments=jnp.minimum(tokens.segments, 1))

  return original(one_segment(queries), one_segment(keys), window)


def sees_padding(original, queries, keys, window):
  visible = original(queries, keys, window)
  return visible | (keys.segments == 0)[:, None]


@pytest.mark.parametrize(
  "mutant", [off_by_one, wide_window, narrow_window, no_segments]
)
def test_causality(mutate, mutant):
  mutate(attention, "visible", mutant)
  caught("causality", config(model__windows=(5,)))


def test_packing_segments(mutate):
  mutate(attention, "visible", no_segments)
  caught("packing", config())


def test_packing_positions_go_on(mutate):
  def mutant(original, tokens, documents):
    row = original(tokens, documents)
    positions = np.arange(len(tokens) - 1, dtype=np.int32)
    return dataclasses.replace(row, positions=positions)

  mutate(objectives, "causal", mutant)
  caught("packing", config(model__positions="learned"))


def test_packing_scores_the_first_token_of_the_next_document(mutate):
  def mutant(original, tokens, documents):
    row = original(tokens, documents)
    return dataclasses.replace(
      row, weights=(row.segments > 0).astype(np.float32)
    )

  mutate(objectives, "causal", mutant)
  assert "loss" in caught("packing", config()).compared


def test_padding_is_attended_to(mutate):
  mutate(attention, "visible", sees_padding)
  caught("padding", config())


def test_padding_is_scored(mutate):
  def mutant(original, sums, nll, log_z, weights, z_loss):
    return original(sums, nll, log_z, jnp.ones_like(weights), z_loss)

  mutate(loss, "_add", mutant)
  assert "loss" in caught("padding", config()).compared


def test_decode_is_a_position_late(mutate):
  def mutant(original, logits, proposed, slots, drawn, **options):
    slots, drawn = original(logits, proposed, slots, drawn, **options)
    return dataclasses.replace(slots, lengths=slots.lengths + 1), drawn

  mutate(decoding, "_accept", mutant)
  caught("decode", config())


def test_prefill_is_a_position_late(mutate):
  def mutant(original, graph, state, inputs, lengths, **options):
    return original(graph, state, inputs, lengths + 1, **options)

  mutate(decoding, "read", mutant)
  caught("decode", config())


# --- accumulation, meshes, scan and remat -------------------------------------


def test_accumulation_divides_by_microbatch(mutate):
  def mutant(original, c, params, frozen, batch, key, rows):
    scale = batch.weights.size / jnp.maximum(jnp.sum(batch.weights), 1)
    total, (nll, aux) = original(c, params, frozen, batch, key, rows)
    return total * scale, (nll * scale, aux)

  mutate(step_lib, "_loss_sums", mutant)
  caught("accumulation", config())


def test_accumulation_repeats_dropout(mutate):
  def mutant(original, key, rows):
    return original(key, rows - rows[0])

  mutate(dropout, "row_keys", mutant)
  caught("accumulation", config(model__residual_dropout=0.2))


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_meshes_without_a_psum(mutate, monkeypatch, axis):
  def mutant(original, x, *axes):
    names = sharding.mesh_axes(*axes)
    return jax.lax.psum(x, tuple(name for name in names if name != axis))

  monkeypatch.setattr(harness, "mesh_shapes", lambda n: [(1, 2, 2)])
  mutate(chunks, "psum", mutant)
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  caught("meshes", config())


@pytest.mark.slow
def test_meshes_without_the_psum_of_pmap(mutate, monkeypatch):
  def mutant(original, x, axes):
    return x if axes == step_lib.PMAP_AXIS else original(x, axes)

  monkeypatch.setattr(harness, "mesh_shapes", lambda n: [(8, 1, 1)])
  mutate(jax.lax, "psum", mutant)
  assert "pmap" in caught("meshes", config()).compared


def test_meshes_that_cannot_cut_the_config_are_named():
  fit, rejected = harness.fitting_shapes(config(model__n_kv_heads=1))
  assert set(fit) == {(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)}
  assert len(rejected) == 6 and "4x1x2 (model.n_kv_heads=1)" in rejected


def test_layers_scanned_with_the_first_window(mutate):
  def mutant(original, run, stacked, x, keys, cfg):
    def first(graph, x, layer, which, i, keys):
      return run(graph, x, layer, 0, i, keys)

    return original(first, stacked, x, keys, cfg)

  mutate(stack, "_scan", mutant)
  c = config(model__windows=(2, None), model__n_layers=2)
  assert "scan" in caught("layers", c).compared


def test_layers_recomputed_under_another_mask(mutate):
  def mutant(original, graph, x, state, which, i, keys, *, cfg, **named):
    if cfg.remat == "dots":
      keys = dropout.fold_rows(keys, 1)
    return original(graph, x, state, which, i, keys, cfg=cfg, **named)

  mutate(stack, "_run_layer", mutant)
  found = caught("layers", config(model__residual_dropout=0.2))
  assert "remat dots" in found.compared


# --- initial loss, dtypes, parameters, shardings ------------------------------


def test_initial_loss_of_large_weights(mutate):
  def mutant(original, rngs, shape, axes, scale, **given):
    return original(rngs, shape, axes, 20 * scale, **given)

  mutate(weights, "matrix", mutant)
  caught("initial_loss", config(model__tied_embedding=False))


def dtype_notes(c):
  """Notes of the failed results of `dtypes`."""
  return " ".join(r.note for r in failures("dtypes", c))


def test_dtypes_of_a_projection(mutate):
  def mutant(original, equation, x, matrix, *axes, **adapter):
    wide = x.astype(jnp.float32)
    return original(equation, wide, matrix, *axes, **adapter).astype(x.dtype)

  c = config(**BFLOAT16)
  assert "weights.py" not in dtype_notes(c)
  mutate(weights, "dot", mutant)
  assert "weights.py" in dtype_notes(c) and "dot" in dtype_notes(c)


def test_dtypes_of_the_softmax(mutate):
  def mutant(original, q, k, v, seen, causal, window, softcap):
    del original, causal, window, softcap
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    scores = jnp.where(seen[:, None], scores, jnp.bfloat16(-1e30))
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v)

  mutate(kernels, "blocked", mutant)
  assert "exp in " in dtype_notes(config(**BFLOAT16, model__n_kv_heads=4))


def test_dtypes_of_the_loss(mutate):
  def mutant(original, *operands):
    scores, slope = original(*operands)
    return scores.astype(jnp.bfloat16), slope

  mutate(loss, "chunk_logits", mutant)
  assert "log in loss.py" in dtype_notes(config(**BFLOAT16))


def test_dtypes_of_a_norm(mutate):
  def mutant(original, self, x):
    del original
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + jnp.bfloat16(self.epsilon))

  mutate(layers.Norm, "__call__", mutant)
  assert "rsqrt in " in dtype_notes(config(**BFLOAT16))


def test_dtypes_of_the_state(mutate):
  def mutant(original, c):
    state = original(c)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    return dataclasses.replace(state, ema=half)

  mutate(step_lib, "init_state", mutant)
  assert ".ema" in dtype_notes(config())


@pytest.mark.parametrize("term", ["_layer_biases", "_layer_matrices"])
def test_parameters_of_a_formula_that_forgets(mutate, term):
  mutate(counts, term, lambda original, cfg: original(cfg) - cfg.d_mlp)
  caught("parameters", config(model__biases=("qkv", "o", "mlp")))


def test_shardings_of_a_weight_that_lost_its_axes(mutate):
  def mutant(original, rngs, shape, axes, scale, **given):
    cut = axes == ("mlp", "embed")
    return original(rngs, shape, (None, None) if cut else axes, scale, **given)

  mutate(weights, "matrix", mutant)
  found = list(itertools.islice(failures("shardings", config()), 3))
  assert found[0].note == "ema.layers.mlp.down, params.layers.mlp.down"
  assert "whole on every device" in found[-1].compared


def test_shardings_of_slots_that_are_whole(mutate):
  def mutant(original, params, opt_state):
    return jax.tree.map(lambda _: P(), original(params, opt_state))

  mutate(optimizer, "state_specs", mutant)
  found = caught("shardings", config())
  assert "slots" in found.compared and "nu.embed" in found.note


# --- batches and checkpoints --------------------------------------------------


def test_batches_that_depend_on_the_processes(mutate):
  def mutant(original, c, prepared, *, start_step=0, rows=None):
    if rows is not None:
      c = copy.deepcopy(c)
      c.seed += rows[0]  # "so that processes read different rows"
    return original(c, prepared, start_step=start_step, rows=rows)

  mutate(pipeline, "train_batches", mutant)
  assert "2 process" in caught("batches", config()).compared


def test_batches_that_start_again(mutate):
  def mutant(original, c, prepared, *, start_step=0, rows=None):
    del start_step
    return original(c, prepared, rows=rows)

  mutate(pipeline, "train_batches", mutant)
  assert "1 process" in caught("batches", config()).compared


def test_checkpoint_that_is_rounded(mutate):
  def mutant(original, self, trees, meta):
    params = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16) * 1.0, trees["params"]
    )
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return original(self, {**trees, "params": params}, meta)

  mutate(checkpoint.Checkpoints, "save", mutant)
  caught("checkpoint", config())


def test_checkpoint_whose_average_is_lost(mutate):
  def mutant(original, self, meta, like):
    found = original(self, meta, like)
    return {**found, "ema": found["params"]}

  mutate(checkpoint.Checkpoints, "restore", mutant)
  caught("checkpoint", config())


# --- errors, shrinking, the command -------------------------------------------


def test_relative_error():
  wanted = {"a": np.array([3.0, -4.0]), "b": np.array([0.5])}
  found = {"a": np.array([3.0, -4.2]), "b": np.array([0.6])}
  assert harness.relative_error(found, wanted) == pytest.approx(0.2)
  found["a"][0] = np.nan
  assert np.isnan(harness.relative_error(found, wanted))
  assert not result.judge("x", "y", float("nan"), 1.0).passed
  assert (
    harness.count_unequal({"a": np.float32([1, 2])}, {"a": np.float32([1, 3])})
    == 1
  )
  assert (
    harness.count_unequal({"a": np.int32([1, 2])}, {"a": np.float32([1, 2])})
    == 2
  )


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=str)
def test_shrinking_keeps_every_switch(path):
  c = cli.load(str(path))
  small = shrink.shrink(c)
  assert not shrink.is_large(small)
  reduced = set(
    "vocab_size n_layers d_model n_heads n_kv_heads d_head d_mlp loss_chunk"
    " context_length original_length rope_scaling steps batch_size"
    " sequence_length microbatches".split()
  )
  changed = validation.differences(c, small)
  assert {name.rsplit(".", 1)[1] for name in changed} <= reduced
  a, b = c.model, small.model
  for field in ("vocab_size", "d_model", "d_mlp", "n_kv_heads"):
    for n in (2, 4, 8):
      cut = [getattr(m, field) % n == 0 for m in (a, b)]
      assert cut[0] == cut[1], (field, n)
  assert a.n_heads // a.n_kv_heads == b.n_heads // b.n_kv_heads
  assert (c.train.microbatches > 1) == (small.train.microbatches > 1)
  assert small.train.batch_size % (8 * small.train.microbatches) == 0


def test_shrinking_keeps_the_decay_after_the_warmup():
  c = config(train__steps=1000, train__batch_size=4096)
  c.optimizer.schedule, c.optimizer.warmup_steps = "wsd", 800
  small = shrink.shrink(c)
  assert (small.train.steps, small.optimizer.warmup_steps) == (100, 80)


def test_a_shortened_run_traces_no_step_beyond_its_last():
  c = config(train__steps=900, train__profile=(800, 3))
  assert shrink.shrink(c).train.profile is None
  shrink.shorten(c, 12)
  validation.validate(c)


def test_shrinking_keeps_groups_remainder_and_rope_scaling():
  c = config(
    model__windows=(512, 512, None),
    model__n_layers=26,
    model__rope_scaling=config_lib.RopeScaling(original_length=1024),
    model__context_length=8192,
    train__sequence_length=4096,
    model__query_scale_dim=24,
  )
  model = shrink.shrink(c).model
  assert model.n_layers == 7 and model.windows == (8, 8, None)
  assert model.rope_scaling.original_length == 16
  assert model.context_length == 128 and model.query_scale_dim == 24


@pytest.mark.parametrize("context", [4096, 131_072])
def test_shrinking_keeps_patterns_and_divisors(context):
  """Of Phi-4-mini, with NoPE layers."""
  c = config(
    model__d_head=128,
    model__rotary_fraction=0.75,
    model__n_layers=32,
    model__windows=(512, None),
    model__rope_layers=(True, True, False),
    model__rope_scaling=config_lib.RopeScaling(
      kind="longrope",
      factor=32.0,
      original_length=4096,
      short_factors=(1.0,) * 48,
      long_factors=tuple(1 + i / 2 for i in range(48)),
    ),
    model__context_length=context,
    train__sequence_length=2048,
  )
  model = shrink.shrink(c).model
  assert model.n_layers == 13 and model.windows == (16, None)
  assert model.rope_layers == (True, True, False)
  assert (model.d_head, model.d_rotary) == (8, 6)
  scaling = model.rope_scaling
  assert scaling.short_factors == (1.0,) * 3
  assert scaling.long_factors == (1.0, 9.0, 17.0)
  long = model.context_length > scaling.original_length
  assert long == (context > 4096) and scaling.factor == 32


def test_kernels_of_other_platforms_are_replaced():
  c = config(model__attention="splash")
  checked, changes = shrink.config_to_check(c, False)
  assert checked.model.attention == "reference" and "splash" in changes
  assert c.model.attention == "splash"


def test_an_exception_is_a_failed_result():
  def check(c):
    yield result.judge("x", "one", 0, 0)
    raise ValueError("two\n lines")

  first, second = checks.attempt("x", check, config())
  assert first.passed and not second.passed
  assert second.note == "ValueError: two lines"


def test_unknown_checks_are_refused():
  with pytest.raises(schema.ConfigError, match="did you mean 'causality'"):
    checks.choose(["causalty"])
  assert checks.choose(["dtypes", "causality"]) == ["causality", "dtypes"]


def run(*arguments):
  return doors.run("lm.verify", arguments, doors.ROOT, timeout=120)


def test_the_command_on_a_large_config(tmp_path):
  """A large config is shrunk by default, and still traced at full size."""
  output = tmp_path / "verify.json"
  ended = run(
    "--config=configs/llama3_70b.py", "--only=parameters", f"--output={output}"
  )
  assert ended.code == 0, ended.err
  assert "70,553,706,496" in ended.out and "pass" in ended.out
  found = json.loads(output.read_text())
  assert found["passed"] and len(found["results"]) == 1
  assert "model.d_model 8192 -> 64" in found["title"]


def test_the_command_exits_with_1_where_a_check_fails():
  ended = run(
    "--config=configs/tiny.py",
    "--only=initial_loss",
    "--config.model.init_scale=9",
  )
  assert ended.code == 1 and "FAIL" in ended.out, ended.err


def test_the_command_refuses_an_unknown_check():
  ended = run("--config=configs/tiny.py", "--only=meshs")
  assert ended.code == 2 and ended.out == ""
  assert "did you mean 'meshes'" in ended.err
