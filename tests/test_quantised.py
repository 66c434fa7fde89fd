"""Weights in int8, against qwix's own dequantised ones in the plain model."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from test_sample import GEMMA2, GPT2, LLAMA, params_of, token_ids

from lm import schema
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder
from lm.sample import sampler as sampler_lib
from lm.sample.request import Request

TOKENIZER = tokenizer_lib.Tokenizer()
TEXT = "def main(argv):\n  print(argv)"


def sampler_of(cfg, params, mesh=None, **options):
  return sampler_lib.Sampler(cfg, params, TOKENIZER, mesh, **options)


def rounded(params):
  """`params` after a way to int8 and back: of each layer's matrices [L, inputs,
  outputs], a scale for every layer and output.
  """
  n_inputs = {"q": 1, "k": 1, "v": 1, "o": 2, "up": 1, "gate": 1, "down": 1}

  def back(path, x):
    name = path[-1].key
    if name not in n_inputs:
      return x
    inputs = range(1, 1 + n_inputs[name])
    axes = [axis for axis in range(x.ndim) if axis not in inputs]
    quantised = qwix.quantize(x, jnp.int8, channelwise_axes=axes)
    return qwix.dequantize(quantised)

  layers = jax.tree_util.tree_map_with_path(back, params["layers"])
  return params | {"layers": layers}


@pytest.mark.parametrize(
  "cfg", [GPT2, LLAMA, GEMMA2], ids=["gpt2", "llama3", "gemma2"]
)
def test_equals_dequantised_weights(cfg):
  params = params_of(cfg)
  found, expected, exact = (
    sampler.score(TEXT).log_probabilities
    for sampler in (
      sampler_of(cfg, params, weights="int8"),
      sampler_of(cfg, rounded(params)),
      sampler_of(cfg, params),
    )
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  # The rounding is there.
  assert np.max(np.abs(np.subtract(found, exact))) > 1e-2


def test_decodes_what_dequantised_weights_would():
  requests = [
    Request(TEXT[:n], temperature=0.0, max_new_tokens=9) for n in (3, 20)
  ]
  params = params_of(LLAMA)
  found, expected = (
    sampler.generate(requests)
    for sampler in (
      sampler_of(LLAMA, params, weights="int8"),
      sampler_of(LLAMA, rounded(params)),
    )
  )
  assert token_ids(found) == token_ids(expected)


def test_bytes():
  """Of a layer's matrices, a byte for each weight and 4 for each output."""
  cfg = dataclasses.replace(LLAMA, n_layers=1)

  def size(**options):
    layers = sampler_of(cfg, params_of(cfg), **options).state["layers"]
    return sum(x.nbytes for x in jax.tree.leaves(layers))

  D, F, H = cfg.d_model, cfg.d_mlp, cfg.d_head
  N, K = cfg.n_heads, cfg.n_kv_heads
  weights = D * (2 * N * H + 2 * K * H + 3 * F)
  outputs = N * H + 2 * K * H + D + 2 * F + D
  assert size() == 4 * (weights + 2 * D)
  assert size(weights="int8") == weights + 4 * outputs + 4 * 2 * D


def test_bfloat16_computes_in_bfloat16():
  """Scales are float32; what is added to the residual is not."""
  cfg = dataclasses.replace(GPT2, dtype="bfloat16")
  params = params_of(cfg)
  found, exact = (
    sampler_of(cfg, params, **options).score(TEXT).log_probabilities
    for options in ({"weights": "int8"}, {})
  )
  assert 0 < np.max(np.abs(np.subtract(found, exact))) < 1.0


def test_a_mesh_changes_no_token():
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
  with jax.set_mesh(mesh):
    init = functools.partial(decoder.init_params, LLAMA)
    params = jax.jit(init)(jax.random.key(0))
  sharded = sampler_of(LLAMA, params, mesh, weights="int8")
  one = sampler_of(LLAMA, jax.device_get(params), weights="int8")
  for x in jax.tree.leaves(sharded.state["layers"]):
    assert "fsdp" not in str(x.sharding.spec)
  requests = [Request(TEXT, temperature=0.0, max_new_tokens=5)]
  found, expected = (s.generate(requests) for s in (sharded, one))
  assert token_ids(found) == token_ids(expected)
  np.testing.assert_allclose(
    found[0].log_probabilities, expected[0].log_probabilities, atol=1e-4
  )


def test_refuses_in_one_line(monkeypatch):
  with pytest.raises(schema.ConfigError, match="weights='int4'"):
    sampler_of(GPT2, params_of(GPT2), weights="int4")
  monkeypatch.setitem(sys.modules, "qwix", None)
  cfg = dataclasses.replace(GPT2, n_layers=1)
  with pytest.raises(schema.ConfigError, match="pip install"):
    sampler_of(cfg, params_of(cfg), weights="int8")
