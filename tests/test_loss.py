"""The chunked cross-entropy against NumPy in float64 and the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sharding
from lm.model import loss, scoring

B, T, D, V = 2, 11, 7, 37


def _inputs(seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(B, T, D)).astype(np.float32),
    rng.normal(size=(V, D)).astype(np.float32),
    rng.integers(0, V, (B, T)).astype(np.int32),
    (rng.integers(0, 3, (B, T)) / 2).astype(np.float32),
  )


def _by_hand(x, head, targets, weights, softcap, z_loss):
  """Per-token nll and the two sums, in float64."""
  scores = x.astype(np.float64) @ head.astype(np.float64).T
  if softcap is not None:
    scores = softcap * np.tanh(scores / softcap)
  log_z = np.log(np.exp(scores).sum(-1))
  nll = log_z - np.take_along_axis(scores, targets[..., None], -1)[..., 0]
  total = (weights * (nll + z_loss * log_z**2)).sum()
  return nll, total, (weights * nll).sum()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 6, 22, 1000])
def test_sums_equal_numpy(chunk, z_loss, softcap):
  x, head, targets, weights = _inputs()
  nll, total, plain = _by_hand(x, head, targets, weights, softcap, z_loss)
  x, head, targets, weights = map(jnp.asarray, (x, head, targets, weights))
  got = loss.cross_entropy(
    x, head, targets, weights, chunk=chunk, softcap=softcap, z_loss=z_loss
  )
  np.testing.assert_allclose(got, (total, plain), rtol=1e-5)
  tokens = scoring.token_nll(x, head, targets, chunk=chunk, softcap=softcap)
  np.testing.assert_allclose(tokens, nll, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [6, 1000])
def test_gradients_equal_finite_differences(chunk, softcap):
  x, head, targets, weights = _inputs(1)

  def total(x, head):
    return loss.cross_entropy(
      x,
      head,
      jnp.asarray(targets),
      jnp.asarray(weights),
      chunk=chunk,
      softcap=softcap,
      z_loss=0.1,
    )[0]

  slopes = jax.grad(total, argnums=(0, 1))
  dx, dhead = slopes(jnp.asarray(x), jnp.asarray(head))
  rng, step = np.random.default_rng(2), 1e-4
  for turn in range(3):
    u, w = rng.normal(size=x.shape), rng.normal(size=head.shape)
    ends = [
      _by_hand(x + s * u, head + s * w, targets, weights, softcap, z_loss=0.1)[
        1
      ]
      for s in (step, -step)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    got = (np.asarray(dx) * u).sum() + (np.asarray(dhead) * w).sum()
    np.testing.assert_allclose(got, slope, rtol=1e-4, err_msg=str(turn))


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_bias_is_a_column_of_the_head(on_mesh):
  """That of an input of 1: also in its gradient, with and without a mesh."""
  x, head, targets, weights = _inputs(3)
  x, targets, weights = (
    np.concatenate([a] * 2) for a in (x[..., :6], targets % 36, weights)
  )
  head, bias = head[:36, :6], head[:36, 6]
  ones = np.ones_like(x[..., :1])
  wider = (
    np.concatenate([x, ones], -1),
    np.concatenate([head, bias[:, None]], 1),
  )
  options = {"chunk": 5, "softcap": 3.0}

  def total(x, head, bias=None):
    return loss.cross_entropy(x, head, *rows, bias=bias, z_loss=0.1, **options)[
      0
    ]

  rows = [jnp.asarray(targets), jnp.asarray(weights)]
  want, (dx, dhead) = jax.value_and_grad(total, (0, 1))(
    *map(jnp.asarray, wider)
  )
  tokens = scoring.token_nll(*map(jnp.asarray, wider), rows[0], **options)
  mesh = jax.make_mesh((2, 2, 2) if on_mesh else (1, 1, 1), sharding.MESH_AXES)
  with jax.set_mesh(mesh):

    def placed(a, *axes):
      spec = jax.sharding.NamedSharding(mesh, sharding.partition(*axes))
      return jax.device_put(a, spec)

    x, head = placed(x, "batch"), placed(head, "vocab", "embed")
    bias, rows = placed(bias, "vocab"), [placed(a, "batch") for a in rows]
    got, slopes = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(x, head, bias)
    nll = scoring.token_nll(x, head, rows[0], bias=bias, **options)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(nll, tokens, rtol=1e-5, atol=1e-6)
  for a, b in zip(
    slopes, (dx[..., :6], dhead[:, :6], dhead[:, 6]), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_cotangent_scales_and_weightless_tokens_have_no_gradient():
  x, head, targets, weights = map(jnp.asarray, _inputs())

  def total(x, factor):
    return factor * loss.cross_entropy(x, head, targets, weights, chunk=6)[0]

  once = jax.grad(total)(x, 1.0)
  np.testing.assert_allclose(jax.grad(total)(x, -3.0), -3 * once, rtol=1e-6)
  np.testing.assert_array_equal(once[weights == 0], 0)


def _plain(x, head, targets, weights):
  """What a reader would write first: all logits in float32 at once."""
  scores = jnp.einsum(
    "BTD,VD->BTV", x, head, preferred_element_type=jnp.float32
  )
  picked = jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
  nll = jax.nn.logsumexp(scores, -1) - picked
  return jnp.sum(weights * nll)


def _chunked(x, head, targets, weights):
  return loss.cross_entropy(x, head, targets, weights, chunk=512)[0]


def test_memory_is_an_eighth_of_the_plain_form_at_llama_3_size(optimised):
  """B * T = 8192 tokens, V = 128256: compiled, not run."""
  shapes = (
    jax.ShapeDtypeStruct((8, 1024, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((128256, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((8, 1024), jnp.int32),
    jax.ShapeDtypeStruct((8, 1024), jnp.float32),
  )

  def temporary(function):
    both = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    return both.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  ours, theirs = temporary(_chunked), temporary(_plain)
  print(f"temporary memory: {ours:,} bytes, plain form {theirs:,}")
  assert ours <= theirs / 8


def test_gradients_equal_the_plain_form_at_a_wide_vocabulary():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(2, 512, 8)).astype(np.float32)
  head = rng.normal(size=(4001, 8)).astype(np.float32)
  targets = rng.integers(0, 4001, (2, 512)).astype(np.int32)
  weights = rng.random((2, 512)).astype(np.float32)
  a, b = (
    jax.jit(jax.grad(f, argnums=(0, 1)))(x, head, targets, weights)
    for f in (_chunked, _plain)
  )
  for ours, theirs in zip(a, b, strict=True):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_same_on_every_mesh(shape):
  rng = np.random.default_rng(4)
  x = rng.normal(size=(8, 5, 16)).astype(np.float32)
  head = rng.normal(size=(38, 16)).astype(np.float32)
  targets = rng.integers(0, 38, (8, 5)).astype(np.int32)
  weights = rng.random((8, 5)).astype(np.float32)

  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def total(x, head, targets, weights):
    return loss.cross_entropy(
      x, head, targets, weights, chunk=3, softcap=5.0, z_loss=0.1
    )

  want = jax.jit(total)(x, head, targets, weights)
  mesh = jax.make_mesh(shape, sharding.MESH_AXES)
  with jax.set_mesh(mesh):
    rows = sharding.partition("batch", None)
    placed = [
      jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))
      for a, spec in (
        (x, sharding.partition("batch", None, None)),
        (head, sharding.partition("vocab", "embed")),
        (targets, rows),
        (weights, rows),
      )
    ]
    got = jax.jit(total)(*placed)
    assert got[1][1].sharding.spec == sharding.partition("vocab", "embed")
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def _n_products(function, *arguments):
  text = str(jax.make_jaxpr(function)(*arguments))
  return text.count("dot_general")


def test_a_frozen_head_has_no_product_for_its_gradient():
  """As under LoRA; the gradient of the hidden states is the same to the bit, on
  a mesh too.
  """
  x, head, targets, weights = _inputs(2)
  x, targets, weights = (
    np.tile(a, (4, *[1] * (a.ndim - 1))) for a in (x, targets, weights)
  )
  x, head = x[..., :6], head[:36, :6]
  x, head, targets, weights = map(jnp.asarray, (x, head, targets % 36, weights))

  def total(x, head):
    return loss.cross_entropy(x, head, targets, weights, chunk=5)[0]

  both, one = jax.grad(total, (0, 1)), jax.grad(total)
  assert _n_products(one, x, head) == _n_products(both, x, head) - 1
  want = jax.jit(both)(x, head)[0]
  np.testing.assert_array_equal(jax.jit(one)(x, head), want)
  mesh = jax.make_mesh((2, 2, 2), sharding.MESH_AXES)
  with jax.set_mesh(mesh):

    def placed(a, *axes):
      spec = jax.sharding.NamedSharding(mesh, sharding.partition(*axes))
      return jax.device_put(a, spec)

    x, head = placed(x, "batch", None, None), placed(head, "vocab", "embed")
    rows = [placed(a, "batch", None) for a in (targets, weights)]

    def on_mesh(x, head):
      return loss.cross_entropy(x, head, *rows, chunk=5)[0]

    got = jax.jit(jax.grad(on_mesh))(x, head)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
