"""The model against the NumPy reference, transformers and published sizes."""

import dataclasses
import functools
import math

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from lm import batch as batch_lib
from lm import chips, sharding
from lm.model import counts, decoder, weights

# Row 3 is padding alone, as in the last batch of a validation pass.
LENGTHS = [[7, 5, 4], [19], [1, 17], [], [2, 3, 11, 1]]


@functools.partial(jax.jit, static_argnums=0)
def run(cfg, params, batch):
  """Logits [B, T, V]."""
  hidden, _ = decoder.forward(cfg, params, batch)
  return decoder.bind(cfg, params).logits(hidden)


@pytest.mark.parametrize("name", families.ALL)
def test_logits_equal_the_reference(name):
  cfg = families.ALL[name]
  params = reference.random_params(cfg)
  batch = families.packed_batch(LENGTHS, 19, cfg.vocab_size)
  logits = np.asarray(run(cfg, params, batch))
  assert np.isfinite(logits).all()
  expected = reference.forward(params, cfg, batch)
  read = batch.segments != 0
  np.testing.assert_allclose(logits[read], expected[read], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["olmo3", "residual"])
def test_unrolled_layers_equal_the_reference(name):
  """`residual` has a pattern of six layers, and eight layers."""
  cfg = dataclasses.replace(families.ALL[name], scan_layers=False)
  params = reference.random_params(cfg)
  batch = families.packed_batch(LENGTHS, 19, cfg.vocab_size)
  logits = np.asarray(run(cfg, params, batch))
  read = batch.segments != 0
  expected = reference.forward(params, cfg, batch)
  np.testing.assert_allclose(logits[read], expected[read], rtol=0, atol=1e-5)


def test_fewer_layers_than_windows_are_laid_out_on_a_mesh():
  """The scan then has a group for all of them, not one of no layers."""
  cfg = families.BIASED
  assert cfg.n_layers < len(cfg.windows)
  mesh = jax.make_mesh((1, 1, 1), sharding.MESH_AXES)
  batch = families.packed_batch([[7, 5]], 19, cfg.vocab_size)
  with jax.set_mesh(mesh):
    params = jax.eval_shape(lambda: decoder.init_params(cfg, jax.random.key(0)))
    logits = jax.eval_shape(functools.partial(run, cfg), params, batch)
  assert logits.shape == (1, 19, cfg.vocab_size)


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_logits_equal_transformers(name):
  cfg = families.PUBLISHED[name]
  params, inputs, expected = families.golden(name)
  logits = np.asarray(run(cfg, params, batch_lib.unscored(inputs)))
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_bfloat16_is_near_the_reference_and_ends_in_float32():
  cfg = dataclasses.replace(families.GEMMA2, dtype="bfloat16")
  params = reference.random_params(cfg)
  batch = families.packed_batch(LENGTHS, 19, cfg.vocab_size)
  logits = np.asarray(run(cfg, params, batch))
  assert logits.dtype == np.float32
  error = np.abs(logits - reference.forward(params, cfg, batch))
  worst = error[batch.segments != 0].max()
  # Eight bits of mantissa: above float32's error, far below the soft-cap 3.
  assert 1e-3 < worst < 0.3


PRODUCTS = {
  "BTD,DF->BTF": ((16, 24), ("embed", "mlp"), 1),
  "BTD,DNH->BTNH": ((16, 4, 6), ("embed", "heads", None), 1),
  "BTNH,NHD->BTD": ((4, 6, 16), ("heads", None, "embed"), 2),
  # Stored as FD, in reverse.
  "reversed BTD,DF->BTF": ((16, 24), (None, None), 1),
}


@pytest.mark.parametrize("mesh", [None, (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("equation", PRODUCTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_rounded_once(dtype, equation, mesh):
  """As are their gradients: each is that of NumPy in float64, in bfloat16 to
  half of the last of its eight bits.
  """
  shape, axes, n_inputs = PRODUCTS[equation]
  equation, in_reverse = equation.split()[-1], "reversed" in equation
  inputs, rest = equation.split(",")
  letters, outputs = rest.split("->")
  sizes = dict(zip(letters, shape, strict=True)) | {"B": 4, "T": 5}
  rng = np.random.default_rng(0)

  def draw(which):
    x = rng.standard_normal([sizes[letter] for letter in which])
    return jnp.asarray(x, dtype)

  x, w, dy = draw(inputs), draw(letters), draw(outputs)
  heads = ("batch", "length", "heads", None)
  wide = ("batch", "length", "mlp")
  named = {"BTD": wide[:2] + (None,), "BTF": wide, "BTNH": heads}
  declared = weights.Weight(axes, "matrix", n_inputs)

  def product(x, w):
    if in_reverse:
      w = weights.Reversed(w.T)
    param = nnx.Param(w, declared=declared)
    return weights.dot(equation, x, param, *named[outputs])

  @jax.jit
  def run(x, w, dy):
    y, back = jax.vjp(product, x, w.astype(jnp.float32))
    return y, *back(dy)

  if mesh is None:
    y, dx, dw = run(x, w, dy)
  else:
    mesh = jax.make_mesh(mesh, sharding.MESH_AXES)
    with jax.set_mesh(mesh):
      placed = [
        jax.device_put(
          a, jax.sharding.NamedSharding(mesh, sharding.partition(*names))
        )
        for a, names in ((x, named[inputs]), (w, axes), (dy, named[outputs]))
      ]
      y, dx, dw = run(*placed)
  assert (y.dtype, dx.dtype) == (dtype, dtype)
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  for got, want in (
    (y, np.einsum(equation, x, w)),
    (dx, np.einsum(f"{outputs},{letters}->{inputs}", dy, w)),
    (dw, np.einsum(f"{inputs},{outputs}->{letters}", x, dy)),
  ):
    got = np.asarray(got, np.float64)
    half = 2**-8 if dtype == "bfloat16" else 1e-6
    np.testing.assert_allclose(got, want, rtol=1.01 * half, atol=1e-5)


@pytest.mark.parametrize(
  "equation",
  ["CV,CD->VD", "BKRS,BKRH->BKSH", "BKRH,BKSH->BKRS", "CBA,ACD->BD"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_in_float32(dtype, equation, optimised):
  """They may be transposed, as the gradient of an untied head is."""
  operands, output = equation.split("->")
  sizes = {letter: i for i, letter in enumerate("ABDCHKRSV", 2)}
  rng = np.random.default_rng(0)
  a, b = (
    jnp.asarray(rng.standard_normal([sizes[x] for x in letters]), dtype)
    for letters in operands.split(",")
  )
  want = np.einsum(equation, *(np.asarray(x, np.float64) for x in (a, b)))
  for transposed in (False, True):

    def run(a, b, transposed=transposed):
      sums = weights.float32_sums(equation, a, b)
      return jnp.swapaxes(sums, -1, -2) if transposed else sums

    options = chips.compiler_options("cpu", dtype)
    got = jax.jit(run, compiler_options=options)(a, b)
    assert got.dtype == jnp.float32
    got = np.swapaxes(got, -1, -2) if transposed else got
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --- parameters --------------------------------------------------------------


def init_shapes(cfg):
  return jax.eval_shape(lambda: decoder.init_params(cfg, jax.random.key(0)))


@pytest.mark.parametrize("name", families.ALL)
def test_parameter_tree(name):
  cfg = families.ALL[name]
  tree = init_shapes(cfg)
  assert jax.tree.map(lambda x: x.shape, tree) == reference.shapes(cfg)
  assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
  assert counts.parameter_count(cfg) == _count(cfg)


def test_initial_values():
  """GPT-2's rule: normal 0.02, residual outputs divided by sqrt(2 L)."""
  cfg = dataclasses.replace(families.GPT2, n_layers=5, init_scale=0.03)
  params = jax.jit(lambda key: decoder.init_params(cfg, key))(jax.random.key(7))
  residual = {("layers", "attention", "o"), ("layers", "mlp", "down")}

  def check(path, x):
    x = np.asarray(x, np.float64)
    if path[-1] == "scale":
      assert (x == 1).all(), path
    elif path[-1].endswith("bias"):
      assert (x == 0).all(), path
    else:
      expected = 0.03 / (math.sqrt(10) if path in residual else 1)
      # Five standard errors of a mean and of a deviation.
      assert abs(x.mean()) < 5 * expected / math.sqrt(x.size), path
      error = 5 * expected / math.sqrt(2 * x.size)
      assert abs(x.std() - expected) < error, path

  reference.map_tree(check, params)
  # Layers are stacked, not copied.
  q = np.asarray(params["layers"]["attention"]["q"]).reshape(5, -1)
  assert np.abs(np.corrcoef(q) - np.eye(5)).max() < 0.4


def test_initial_norms_of_unit_offset_multiply_by_one():
  cfg = dataclasses.replace(families.GEMMA3, n_layers=1)
  params = jax.jit(lambda key: decoder.init_params(cfg, key))(jax.random.key(0))
  norms = [params["final_norm"], params["layers"]["attention"]["q_norm"]]
  assert all((np.asarray(norm["scale"]) == 0).all() for norm in norms)


def _gpt2_count(c):
  per_layer = 4 * c.d_model**2 + 2 * c.d_model * c.d_mlp + c.d_mlp
  per_layer += 9 * c.d_model  # biases of q, k, v, o, down; two norms
  tables = (c.vocab_size + c.context_length) * c.d_model
  return c.n_layers * per_layer + tables + 2 * c.d_model


def _llama_count(c, norms=2, head_norms=0, tables=1):
  heads = 2 * c.n_heads + 2 * c.n_kv_heads
  per_layer = c.d_model * (heads * c.d_head + 3 * c.d_mlp + norms)
  per_layer += head_norms * c.d_head
  return c.n_layers * per_layer + tables * c.vocab_size * c.d_model + c.d_model


# (family, its fields, its published number of parameters, closed form)
SIZES = {
  "gpt2": (
    families.GPT2,
    (50257, 12, 768, 12, 12, 64, 3072, 1024),
    124_439_808,
    _gpt2_count,
  ),
  "llama3_8b": (
    families.LLAMA3,
    (128256, 32, 4096, 32, 8, 128, 14336, 8192),
    8_030_261_248,
    functools.partial(_llama_count, tables=2),
  ),
  "llama3_70b": (
    families.LLAMA3,
    (128256, 80, 8192, 64, 8, 128, 28672, 8192),
    70_553_706_496,
    functools.partial(_llama_count, tables=2),
  ),
  "qwen3_0.6b": (
    families.QWEN3,
    (151936, 28, 1024, 16, 8, 128, 3072, 40960),
    596_049_920,
    functools.partial(_llama_count, head_norms=2),
  ),
  "gemma2_2b": (
    families.GEMMA2,
    (256000, 26, 2304, 8, 4, 256, 9216, 8192),
    2_614_341_888,
    functools.partial(_llama_count, norms=4),
  ),
  "gemma3_1b": (
    families.GEMMA3,
    (262144, 26, 1152, 4, 1, 256, 6912, 32768),
    999_885_952,
    functools.partial(_llama_count, norms=4, head_norms=2),
  ),
}
FIELDS = (
  "vocab_size n_layers d_model n_heads n_kv_heads d_head d_mlp context_length"
).split()


def _count(cfg):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(init_shapes(cfg)))


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
  family, values, published, closed_form = SIZES[name]
  cfg = dataclasses.replace(family, **dict(zip(FIELDS, values, strict=True)))
  assert _count(cfg) == published == closed_form(cfg)
  assert counts.parameter_count(cfg) == published
  assert _count(family) == closed_form(family)
