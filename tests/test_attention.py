"""The choice of a kernel, and TPU's, interpreted, against the plain form."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
)

from lm import config as config_lib
from lm import schema
from lm.model import attention, kernels


def _config(**fields):
  return config_lib.ModelConfig(**{"dtype": "bfloat16", **fields})


@pytest.mark.parametrize(
  ("platform", "fields", "length", "kernel"),
  [
    ("cpu", {}, 128, "reference"),
    ("tpu", {}, 256, "splash"),
    ("tpu", {}, 100, "reference"),
    ("cuda", {}, 100, "cudnn"),
    ("cuda", {"dtype": "float32"}, 100, "reference"),
    ("cuda", {"attention_softcap": 50.0}, 100, "reference"),
    ("tpu", {"attention_softcap": 50.0}, 128, "splash"),
    ("tpu", {"attention": "reference"}, 128, "reference"),
  ],
)
def test_auto_takes_what_the_platform_and_the_model_allow(
  platform, fields, length, kernel, monkeypatch
):
  monkeypatch.setattr(attention.sharding, "platform", lambda: platform)
  got = kernels.choose(_config(**fields), length=length)
  assert got == kernel


@pytest.mark.parametrize(
  ("fields", "length", "message"),
  [
    ({"attention": "cudnn", "dtype": "float32"}, 128, "bfloat16 only"),
    ({"attention": "mosaic", "dtype": "float32"}, 128, "bfloat16 only"),
    ({"attention": "mosaic"}, 128, "tokamax is not installed"),
    (
      {"attention": "cudnn", "attention_softcap": 5.0},
      128,
      "no attention_softcap",
    ),
    ({"attention": "splash"}, 100, "rows of 100 tokens"),
  ],
)
def test_a_named_kernel_that_cannot_is_refused(fields, length, message):
  with pytest.raises(schema.ConfigError, match=message):
    kernels.choose(_config(**fields), length=length)


@pytest.mark.parametrize(
  ("capability", "installed", "kernel"),
  [
    *(("9.0", True, "mosaic"), ("10.0", True, "mosaic")),
    *(("8.0", True, "cudnn"), ("9.0", False, "cudnn")),
  ],
)
def test_newer_gpus_run_mosaic_where_it_is_installed(
  capability, installed, kernel, monkeypatch
):
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(attention.sharding, "platform", lambda: "gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  found = {"tokamax": object()} if installed else {}
  monkeypatch.setattr(kernels.importlib.util, "find_spec", found.get)
  assert kernels.choose(_config(), length=100) == kernel


@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("prefixes", [None, (3, 0, 5, 2), (1, 4, 6, 0)])
def test_the_keys_of_a_query_are_the_range_that_mosaic_is_given(
  prefixes, window
):
  lengths = (5, 4, 6, 3)  # of documents, of which the last is padding
  positions = np.concatenate([np.arange(n) for n in lengths])[None]
  segments = np.repeat([1, 2, 3, 0], lengths)[None]
  prefix = None
  if prefixes is not None:
    pairs = zip(lengths, prefixes, strict=True)
    prefix = jnp.concatenate([jnp.arange(n) < p for n, p in pairs])[None]
  first, stop = kernels.key_ranges(jnp.asarray(segments), prefix, window)
  keys = np.arange(sum(lengths))
  first = np.asarray(first)[..., None]
  stop = keys[:, None] + 1 if stop is None else np.asarray(stop)[..., None]
  got = (first <= keys) & (keys < stop)
  tokens = attention.Tokens(*map(jnp.asarray, (positions, segments)), prefix)
  real = segments[0] > 0
  wanted = attention.visible(tokens, tokens, window)
  np.testing.assert_array_equal(got[0, real], wanted[0, real])
  # Padding sees itself, so that no softmax is empty.
  assert not got[0, ~real][:, real].any() and got[0].any(1).all()


@pytest.mark.parametrize(
  ("length", "tile"),
  [
    (8192, (1024, 512)),
    (4608, (512, 512)),
    (768, (256, 256)),
    (384, (128,) * 2),
  ],
)
def test_tiles_of_splash_divide_the_row(length, tile):
  assert kernels.splash_blocks(length) == tile
  assert length % tile[0] == tile[0] % tile[1] == 0


@pytest.mark.parametrize(
  ("window", "softcap", "n_prefix", "T"),
  [
    *((None, None, None, 128), (37, None, None, 128), (None, 2.0, None, 128)),
    *((None, None, 31, 128), (19, None, 31, 128), (None, 2.0, 75, 128)),
    # A tile that is computed in two parts.
    (None, None, None, 1024),
  ],
)
def test_splash_is_the_plain_form(window, softcap, n_prefix, T, monkeypatch):
  """Grouped queries over packed documents, values and gradients."""
  make = splash_attention_kernel.make_splash_mha
  monkeypatch.setattr(
    splash_attention_kernel,
    "make_splash_mha",
    functools.partial(make, interpret=True),
  )
  B, N, K, H = 1, 4, 2, 8
  rng = np.random.default_rng(0)
  q, k, v, mix = (
    jnp.asarray(rng.normal(size=(B, T, n, H)).astype(np.float32))
    for n in (N, K, K, N)
  )
  lengths = (53, T - 53)
  tokens = attention.Tokens(
    jnp.concatenate([jnp.arange(n) for n in lengths])[None],
    jnp.concatenate([jnp.full(n, i + 1) for i, n in enumerate(lengths)])[None],
    None,
  )
  if n_prefix is not None:
    # All of the first document at most, and the start of the second.
    tokens.prefix = tokens.positions < n_prefix

  def run(q, k, v, kernel):
    out = attention.attend(
      q,
      k,
      v,
      tokens,
      tokens,
      scale=0.3,
      window=window,
      softcap=softcap,
      kernel=kernel,
    )
    return jnp.sum(out * mix), out

  differentiate = jax.grad(run, argnums=(0, 1, 2), has_aux=True)
  differentiate = jax.jit(differentiate, static_argnums=3)
  got, want = (differentiate(q, k, v, name) for name in ("splash", "reference"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("same", [True, False])
def test_keys_are_left_out_only_if_the_queries_are_the_same_tokens(
  same, monkeypatch
):
  """Of other tokens, places in a row tell nothing; positions do."""
  monkeypatch.setattr(kernels, "_BLOCK", 2)
  T, rng = 6, np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=(1, T, 1, 4)).astype(np.float32))
    for _ in range(3)
  )
  ones = jnp.ones((1, T), jnp.int32)
  queries = attention.Tokens(jnp.arange(T)[None], ones, None)
  # The same tokens, or the same in reverse order: one sum over the keys.
  back = slice(None, None, 1 if same else -1)
  turned = attention.Tokens(queries.positions[:, back], ones, None)
  keys = queries if same else turned
  got = attention.attend(
    q,
    k[:, back],
    v[:, back],
    queries,
    keys,
    scale=1.0,
    window=None,
    softcap=None,
    kernel="reference",
  )
  want = plain(q, k, v, jnp.tril(jnp.ones((1, T, T), bool)), None)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def plain(q, k, v, seen, softcap):
  """softmax(q k) v by the formula, all scores at once: H heads of q, K of k."""
  k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("BTNH,BSNH->BNTS", q, k)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(seen[:, None], scores, -jnp.inf)
  return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v)


@pytest.mark.parametrize(
  ("window", "softcap", "prefixed"),
  [
    (None, None, False),
    (7, None, False),
    (None, 2.0, False),
    (None, None, True),
    (7, 2.0, True),
  ],
)
def test_blocks_of_queries_are_the_plain_form(
  window, softcap, prefixed, monkeypatch
):
  """Values and gradients; the last block is shorter, heads are grouped."""
  monkeypatch.setattr(kernels, "_BLOCK", 8)
  B, T, N, K, H = 2, 37, 4, 2, 8
  rng = np.random.default_rng(0)
  q, k, v, mix = (
    jnp.asarray(rng.normal(size=(B, T, n, H)).astype(np.float32))
    for n in (N, K, K, N)
  )
  lengths = (21, 16)
  positions = np.concatenate([np.arange(n) for n in lengths])
  segments = np.repeat([1, 2], lengths)
  prefix = np.broadcast_to(positions < 5, (B, T))
  tokens = attention.Tokens(
    jnp.broadcast_to(positions, (B, T)),
    jnp.broadcast_to(segments, (B, T)),
    jnp.asarray(prefix) if prefixed else None,
  )
  seen = attention.visible(tokens, tokens, window)
  blocks = list(kernels._blocks(seen, T * N // K, not prefixed, window))
  assert len(blocks) == 5
  # Later keys cost nothing if the mask is causal, nor do keys before a window.
  n_scores = sum(mask.shape[2] * mask.shape[3] for *_, mask in blocks) * K / N
  most = T * T if prefixed else T * (8 + 7) if window else T * T * 0.65
  assert n_scores <= most

  def by_blocks(q, k, v):
    out = kernels.blocked(q, k, v, seen, not prefixed, window, softcap)
    return jnp.sum(out * mix), out

  def by_formula(q, k, v):
    out = plain(q, k, v, seen, softcap)
    return jnp.sum(out * mix), out

  got, want = (
    jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    for f in (by_blocks, by_formula)
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
