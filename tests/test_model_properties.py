"""What holds for every model: masks, causality, packing, remat, dropout."""

import dataclasses
import typing

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lm import config as config_lib
from lm.model import attention, decoder, dropout
from lm.model import remat as remat_lib


def random_params(cfg):
  return jax.tree.map(jnp.asarray, reference.random_params(cfg))


def forward(cfg, params, batch, keys=None):
  """`decoder.forward` of a host batch."""
  batch = jax.tree.map(jnp.asarray, batch)
  return decoder.forward(cfg, params, batch, keys=keys)[0]


# --- masks -------------------------------------------------------------------


def seen(segments, window=None, prefix=None):
  """attention.visible of one row, as a 0/1 matrix [T, S]."""
  segments = np.array([segments], np.int32)
  starts = np.concatenate([[True], np.diff(segments[0]) != 0])
  place = np.arange(len(starts))
  positions = place - np.maximum.accumulate(np.where(starts, place, 0))
  tokens = attention.Tokens(
    positions=jnp.asarray(positions[None]),
    segments=jnp.asarray(segments),
    prefix=None if prefix is None else jnp.array([prefix], bool),
  )
  return np.asarray(attention.visible(tokens, tokens, window)[0]).astype(int)


def test_causal_mask():
  np.testing.assert_array_equal(
    seen([1, 1, 1, 1]),
    [
      [1, 0, 0, 0],
      [1, 1, 0, 0],
      [1, 1, 1, 0],
      [1, 1, 1, 1],
    ],
  )


def test_window_mask_counts_the_query_itself():
  np.testing.assert_array_equal(
    seen([1, 1, 1, 1, 1], window=2),
    [
      [1, 0, 0, 0, 0],
      [1, 1, 0, 0, 0],
      [0, 1, 1, 0, 0],
      [0, 0, 1, 1, 0],
      [0, 0, 0, 1, 1],
    ],
  )
  np.testing.assert_array_equal(seen([1, 1, 1], window=1), np.eye(3))


def test_packed_mask_with_padding():
  np.testing.assert_array_equal(
    seen([1, 1, 1, 2, 2, 0, 0]),
    [
      [1, 0, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0, 0],
      [1, 1, 1, 0, 0, 0, 0],
      [0, 0, 0, 1, 0, 0, 0],
      [0, 0, 0, 1, 1, 0, 0],
      [0, 0, 0, 0, 0, 0, 0],
      [0, 0, 0, 0, 0, 0, 0],
    ],
  )


def test_prefix_mask_is_seen_ahead_within_its_segment():
  np.testing.assert_array_equal(
    seen([1, 1, 1, 1, 2, 2, 2], prefix=[1, 1, 0, 0, 1, 1, 0]),
    [
      [1, 1, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0, 0],
      [1, 1, 1, 0, 0, 0, 0],
      [1, 1, 1, 1, 0, 0, 0],
      [0, 0, 0, 0, 1, 1, 0],
      [0, 0, 0, 0, 1, 1, 0],
      [0, 0, 0, 0, 1, 1, 1],
    ],
  )


def test_prefix_mask_under_a_window():
  """The window bounds the distance on both sides."""
  np.testing.assert_array_equal(
    seen([1, 1, 1, 1, 1], window=2, prefix=[1, 1, 1, 0, 0]),
    [
      [1, 1, 0, 0, 0],
      [1, 1, 1, 0, 0],
      [0, 1, 1, 0, 0],
      [0, 0, 1, 1, 0],
      [0, 0, 0, 1, 1],
    ],
  )


# --- what a position depends on ----------------------------------------------


def influence(cfg, params, batch):
  """[T, S]: largest |d hidden[t] / d embedding of the token at s|, one row.

  Tokens are all different, so a row of the embedding table is one position.
  """
  T = batch.inputs.shape[1]
  tokens = np.arange(T, dtype=np.int32)[None]
  direction = jax.random.normal(jax.random.key(3), (cfg.d_model,))

  @jax.jit
  def gradients(embed):
    def project(embed):
      everything = dict(params, embed=embed)
      rows = dataclasses.replace(batch, inputs=tokens)
      hidden = forward(cfg, everything, rows)
      return hidden[0] @ direction

    return jax.jacrev(project)(embed)

  found = np.asarray(gradients(params["embed"]))
  return np.abs(found).max(axis=-1)[:, :T]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gemma3", "biased"])
def test_influence_is_the_past_of_the_same_document(name):
  """Gradients of the future and of other documents are exactly 0."""
  cfg = families.ALL[name]
  params = random_params(cfg)
  batch = families.packed_batch([[11, 6]], 19, cfg.vocab_size, prefix=False)
  found = influence(cfg, params, batch)[:17, :17]
  document = np.arange(17) >= 11
  past = np.tril(document[:, None] == document[None])
  # Each of these families has a layer without window, so all of the past is.
  assert (found[~past] == 0).all()
  assert (found[past] > 1e-7).all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prefixed", [False, True])
def test_influence_in_one_layer_is_the_mask(window, prefixed):
  cfg = dataclasses.replace(families.LLAMA3, n_layers=1, windows=(window,))
  params = random_params(cfg)
  batch = families.packed_batch([[8, 7]], 17, cfg.vocab_size)
  mask = reference.visible(batch.segments, batch.prefix & prefixed, window)[0]
  if not prefixed:
    batch = dataclasses.replace(batch, prefix=None)
  found = influence(cfg, params, batch)
  read = batch.segments[0] != 0
  np.testing.assert_array_equal(found[read] > 0, mask[read])


def hidden_of(cfg, params, batch):
  rows = dataclasses.replace(batch, prefix=None)
  return np.asarray(jax.jit(lambda p, b: forward(cfg, p, b))(params, rows))


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_packed_documents_read_as_alone(name):
  cfg = families.ALL[name]
  params = random_params(cfg)
  packed = families.packed_batch([[7, 5, 4]], 19, cfg.vocab_size)
  alone = families.packed_batch([[7], [5], [4]], 7, cfg.vocab_size)
  parts = [slice(0, 7), slice(7, 12), slice(12, 16)]
  for row, part in enumerate(parts):
    document = packed.inputs[0, part]
    alone.inputs[row, : len(document)] = document
  together = hidden_of(cfg, params, packed)[0]
  apart = hidden_of(cfg, params, alone)
  for row, part in enumerate(parts):
    length = part.stop - part.start
    np.testing.assert_allclose(
      together[part], apart[row, :length], rtol=0, atol=1e-5
    )


def test_padding_changes_nothing():
  """Neither what stands in it (bit for bit) nor how much there is of it."""
  cfg = families.GEMMA2
  params = random_params(cfg)
  batch = families.packed_batch([[7, 4], [3]], 13, cfg.vocab_size)
  read = batch.segments != 0
  other = dataclasses.replace(batch, inputs=np.where(read, batch.inputs, 36))
  assert (other.inputs != batch.inputs).any()
  base = hidden_of(cfg, params, batch)
  np.testing.assert_array_equal(hidden_of(cfg, params, other)[read], base[read])
  longer = jax.tree.map(lambda a: np.pad(a, ((0, 0), (0, 10))), batch)
  np.testing.assert_allclose(
    hidden_of(cfg, params, longer)[:, :13][read], base[read], rtol=0, atol=1e-5
  )


# --- how layers are run ------------------------------------------------------


def loss_of(cfg):
  """A scalar of all logits, under dropout."""
  batch = families.packed_batch([[7, 5], [13], [2, 9]], 13, cfg.vocab_size)
  direction = np.random.default_rng(5).standard_normal(cfg.vocab_size)

  def loss(params):
    keys = dropout.row_keys(jax.random.key(11), jnp.arange(3))
    hidden = forward(cfg, params, batch, keys)
    logits = decoder.bind(cfg, params).logits(hidden)
    return jnp.sum(jnp.sin(logits) @ direction.astype(np.float32)) / 100

  return loss


# The baseline is ("none", False); tests/test_verify.py has all combinations.
LAYER_RUNS = [
  ("none", True),
  ("full", True),
  ("save_out_proj", True),
  ("minimal_with_context", True),
  pytest.param("dots", False, marks=pytest.mark.slow),
  pytest.param("save_context", False, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def plain_loss_and_gradients():
  # Two groups of the two windows, and a layer left over.
  cfg = dataclasses.replace(
    families.LLAMA3,
    n_layers=5,
    windows=(5, None),
    remat="none",
    scan_layers=False,
    residual_dropout=0.2,
  )
  params = random_params(cfg)
  return cfg, params, jax.jit(jax.value_and_grad(loss_of(cfg)))(params)


@pytest.mark.parametrize("remat,scan", LAYER_RUNS)
def test_scan_and_remat_change_no_number(remat, scan, plain_loss_and_gradients):
  cfg, params, expected = plain_loss_and_gradients
  other = dataclasses.replace(cfg, remat=remat, scan_layers=scan)
  found = jax.jit(jax.value_and_grad(loss_of(other)))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    found,
    expected,
  )


def test_offloaded_values_change_no_number(plain_loss_and_gradients):
  cfg, params, expected = plain_loss_and_gradients
  cfg = dataclasses.replace(
    cfg, remat="minimal_with_context", remat_offload=True, scan_layers=True
  )
  run = jax.value_and_grad(loss_of(cfg))
  # The context with its log-sum, the result, q, k, v, up and gate, of a layer
  # of each window and the layer left over.
  assert str(jax.make_jaxpr(run)(params)).count("MemorySpace.Host") == 3 * 8
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    jax.jit(run)(params),
    expected,
  )


@pytest.mark.parametrize("scan", [True, False])
def test_remat_computes_again_what_it_says(scan):
  """Matrix products of a layer that its backward pass repeats. It never needs
  the MLP's result: of all nine (four with weights and two without in attention,
  three in the MLP) `full` repeats eight.
  """
  products = {}
  policies = typing.get_args(
    typing.get_type_hints(config_lib.ModelConfig)["remat"]
  )
  for remat in policies:
    cfg = dataclasses.replace(families.LLAMA3, remat=remat, scan_layers=scan)
    params = random_params(cfg)
    text = str(jax.make_jaxpr(jax.grad(loss_of(cfg)))(params))
    products[remat] = text.count("dot_general[")
  layers = 1 if scan else families.LLAMA3.n_layers
  repeated = {
    remat: (n - products["none"]) / layers for remat, n in products.items()
  }
  assert repeated == {
    "none": 0,
    "full": 8,
    "save_context": 6,
    "save_out_proj": 5,
    "save_attention": 2,
    "minimal_with_context": 0,
    "dots": 2,
  }


def test_kept_context_runs_the_kernel_once():
  """Splash, lowered for TPUs: forward, and backward of queries and of keys."""
  cfg = dataclasses.replace(
    families.LLAMA3, context_length=128, attention="splash"
  )
  params = random_params(cfg)
  batch = families.packed_batch([[50, 78]], 128, cfg.vocab_size)

  def kernels(remat):
    model = dataclasses.replace(cfg, remat=remat)
    loss = jax.grad(lambda params: jnp.sum(forward(model, params, batch)))
    lowered = jax.jit(loss).trace(params).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("tpu_custom_call")

  runs = {remat: kernels(remat) for remat in ("none", "full", "save_context")}
  assert runs == {"none": 3, "full": 4, "save_context": 3}


def test_names_of_values_are_no_operations(monkeypatch):
  """Without remat the program is what it was without names."""
  cfg = dataclasses.replace(families.LLAMA3, remat="none")
  params = random_params(cfg)

  def program():
    return jax.jit(jax.grad(loss_of(cfg))).lower(params).as_text()

  named = program()
  monkeypatch.setattr(remat_lib, "name", lambda x, name: x)
  assert program() == named


def test_scan_keeps_the_program_small():
  """Depth must not lengthen the program; as a loop it does."""

  def length(n_layers, scan):
    cfg = dataclasses.replace(
      families.LLAMA3, n_layers=n_layers, scan_layers=scan
    )
    params = random_params(cfg)
    return str(jax.make_jaxpr(loss_of(cfg))(params)).count("dot_general[")

  assert length(5, True) == length(2, True)
  assert length(5, False) > length(2, False)


# --- dropout -----------------------------------------------------------------


def test_dropout_scales_and_drops_its_share():
  x = jax.random.normal(jax.random.key(0), (5, 31, 37)) + 10
  keys = dropout.row_keys(jax.random.key(1), jnp.arange(5))
  rate = 0.3
  y = np.asarray(dropout.dropout(x, rate, keys))
  kept = y != 0
  np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / 0.7, rtol=1e-6)
  error = 5 * (rate * (1 - rate) / x.size) ** 0.5
  assert abs((~kept).mean() - rate) < error
  # Rows, positions and features are dropped apart from one another.
  assert (kept[0] != kept[1]).any()
  for axis in (0, 1, 2):
    share = kept.mean(axis=axis)
    assert 0 < share.std() < 2 * (rate * 0.7 / x.shape[axis]) ** 0.5


def test_dropout_of_rate_zero_or_without_keys_is_identity():
  x = jax.random.normal(jax.random.key(0), (2, 3, 5))
  keys = dropout.row_keys(jax.random.key(1), jnp.arange(2))
  np.testing.assert_array_equal(dropout.dropout(x, 0.0, keys), x)
  np.testing.assert_array_equal(dropout.dropout(x, 0.3, None), x)


@pytest.mark.parametrize("knob", ["embedding_dropout", "residual_dropout"])
def test_dropout_in_the_model(knob):
  """Each knob acts, only with keys, and a row's mask is its key's alone."""
  cfg = dataclasses.replace(families.GPT2, **{knob: 0.3})
  params = random_params(cfg)
  lengths = [[11], [11], [11]]
  batch = families.packed_batch(lengths, 11, cfg.vocab_size, prefix=False)
  batch.inputs[:] = batch.inputs[0]  # equal rows, so keys alone differ
  keys = dropout.row_keys(jax.random.key(1), jnp.arange(3))
  run = jax.jit(lambda keys: forward(cfg, params, batch, keys))
  dropped = np.asarray(run(keys))
  plain = hidden_of(families.GPT2, params, batch)
  np.testing.assert_array_equal(hidden_of(cfg, params, batch), plain)
  assert np.abs(dropped - plain).max() > 0.1
  assert np.abs(dropped[0] - dropped[1]).max() > 0.1
  np.testing.assert_array_equal(np.asarray(run(keys[::-1])), dropped[::-1])


def test_each_sub_layer_of_each_layer_draws_its_own_mask():
  """Each of four adds exactly 1 to a residual of 0, before dropout; their sum
  then takes three values or fewer where any two share a mask.
  """
  cfg = dataclasses.replace(families.GPT2, residual_dropout=0.3)
  params = jax.tree.map(jnp.zeros_like, random_params(cfg))
  ones = jnp.ones((cfg.n_layers, cfg.d_model))
  params["layers"]["attention"]["o_bias"] = ones
  params["layers"]["mlp"]["down_bias"] = ones
  params["final_norm"]["scale"] = ones[0]
  batch = families.packed_batch([[11]], 11, cfg.vocab_size, prefix=False)
  keys = dropout.row_keys(jax.random.key(1), jnp.arange(1))
  hidden = jax.jit(lambda keys: forward(cfg, params, batch, keys))
  values = [set(np.round(x, 4)) for x in np.asarray(hidden(keys))[0]]
  assert max(len(distinct) for distinct in values) > 3


def test_row_keys_are_by_number_in_the_global_batch():
  """So microbatches and processes draw what the whole batch would."""
  key = jax.random.key(1)
  whole = jax.random.key_data(dropout.row_keys(key, jnp.arange(7)))
  part = jax.random.key_data(dropout.row_keys(key, jnp.arange(3, 7)))
  np.testing.assert_array_equal(part, whole[3:])
  assert len(np.unique(whole, axis=0)) == 7
