"""Rotary positions against transformers' functions of each kind of scaling."""

import dataclasses
import math
import re

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers import modeling_rope_utils

from lm import config as config_lib
from lm.model import rotary

LONG = {
  "short_factors": tuple(1 + 0.1 * i for i in range(6)),
  "long_factors": tuple(2 + 1.5 * i for i in range(6)),
  "original_length": 64,
}
# (scaling, rotary_fraction, context_length), of d_head 16: at a fraction of
# 0.75, twelve dimensions turn.
CASES = {
  "llama3": ({"kind": "llama3", "original_length": 64}, 1.0, 512),
  "linear": ({"kind": "linear", "factor": 3.0}, 1.0, 512),
  "linear_partial": ({"kind": "linear", "factor": 3.0}, 0.5, 512),
  "yarn": ({"kind": "yarn", "original_length": 512}, 1.0, 4096),
  "yarn_exact": (
    {"kind": "yarn", "original_length": 512, "truncate": False},
    0.75,
    4096,
  ),
  "yarn_betas": (
    {
      "kind": "yarn",
      "original_length": 512,
      "beta_fast": 16.0,
      "beta_slow": 2.0,
      "attention_factor": 1.3,
    },
    1.0,
    4096,
  ),
  # The blend lies before the first pair: its two ends are one.
  "yarn_all": ({"kind": "yarn", "original_length": 4}, 1.0, 32),
  "yarn_none": (
    {"kind": "yarn", "original_length": 512, "factor": 0.5},
    1.0,
    4096,
  ),
  "longrope_short": ({"kind": "longrope"} | LONG, 0.75, 64),
  "longrope_long": ({"kind": "longrope"} | LONG, 0.75, 65),
  "longrope_factor": (
    {"kind": "longrope", "attention_factor": 1.2} | LONG,
    0.75,
    65,
  ),
  "longrope_one": ({"kind": "longrope", "factor": 1.0} | LONG, 0.75, 65),
}


def theirs(cfg: config_lib.ModelConfig):
  """(frequencies, attention factor) by transformers, at the full context."""
  s = cfg.rope_scaling
  parameters = {
    "rope_type": s.kind,
    "rope_theta": cfg.rope_theta,
    "factor": s.factor,
    "partial_rotary_factor": cfg.rotary_fraction,
    "original_max_position_embeddings": s.original_length,
    "low_freq_factor": s.low_frequency_factor,
    "high_freq_factor": s.high_frequency_factor,
    "beta_fast": s.beta_fast,
    "beta_slow": s.beta_slow,
    "truncate": s.truncate,
    "short_factor": [*s.short_factors],
    "long_factor": [*s.long_factors],
    "attention_factor": s.attention_factor,
  }
  config = transformers.LlamaConfig(
    hidden_size=cfg.d_head * 2,
    num_attention_heads=2,
    max_position_embeddings=cfg.context_length,
  )
  config.rope_parameters = parameters  # not validated: keys of other kinds
  compute = modeling_rope_utils.ROPE_INIT_FUNCTIONS[s.kind]
  frequencies, factor = compute(config, seq_len=cfg.context_length)
  return frequencies.double().numpy(), factor


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_scaling_is_what_transformers_computes(name):
  scaling, fraction, context = CASES[name]
  cfg = config_lib.ModelConfig(
    d_head=16,
    context_length=context,
    rotary_fraction=fraction,
    rope_scaling=config_lib.RopeScaling(**scaling),
  )
  frequencies, factor = theirs(cfg)
  assert rotary.attention_factor(cfg.rope_scaling) == pytest.approx(factor)
  positions = jnp.arange(7)[None]
  ((cos, sin),) = rotary.angles(cfg, positions)
  angle = np.arange(7)[:, None] * frequencies
  assert cos.shape == (1, 7, int(16 * fraction) // 2)
  np.testing.assert_allclose(cos[0], factor * np.cos(angle), atol=2e-6)
  np.testing.assert_allclose(sin[0], factor * np.sin(angle), atol=2e-6)
  plain = rotary.angles(dataclasses.replace(cfg, rope_scaling=None), positions)
  assert np.abs(plain[0][0] - cos).max() > 1e-3


def test_angles_follow_the_pattern_of_layers():
  """A layer without rotary positions has none; a windowed layer with a base of
  its own has that base, and neither scaling nor attention factor.
  """
  cfg = dataclasses.replace(
    families.OLMO3,
    n_layers=7,
    windows=(5, None),
    rope_layers=(True, True, False),
    rope_theta_windowed=50.0,
  )
  positions = jnp.arange(7)[None]
  found = rotary.angles(cfg, positions)
  assert cfg.layer_pattern == (
    (5, True), (None, True), (5, False), (None, True), (5, True), (None, False)
  )  # fmt: skip
  assert [angles is None for angles in found] == [0, 0, 1, 0, 0, 1]
  local = 7 * [50.0 ** np.array([0, -0.2, -0.4, -0.6, -0.8])]
  angle = np.arange(7)[:, None] * np.array(local)
  for i in (0, 4):
    np.testing.assert_allclose(found[i][0][0], np.cos(angle), atol=1e-6)
  factor = 0.1 * math.log(8) + 1
  np.testing.assert_allclose(found[1][0][0, 0], factor, atol=1e-6)
  np.testing.assert_array_equal(found[1][0], found[3][0])
  # A pattern stops at the last layer.
  short = dataclasses.replace(cfg, n_layers=2)
  assert short.layer_pattern == cfg.layer_pattern[:2]


def test_dimensions_that_do_not_turn_pass():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, 3, 2, 10)).astype(np.float32)
  cfg = config_lib.ModelConfig(d_head=10, rotary_fraction=0.6)
  (angles,) = rotary.angles(cfg, jnp.arange(3)[None])
  found = np.asarray(rotary.rotate(jnp.asarray(x), angles))
  np.testing.assert_array_equal(found[..., 6:], x[..., 6:])
  turn = np.exp(1j * np.arange(3)[:, None] * 1e4 ** (-np.arange(3) / 3))
  plane = (x[0, ..., :3] + 1j * x[0, ..., 3:6]) * turn[:, None]
  np.testing.assert_allclose(found[0, ..., :3], plane.real, atol=1e-6)
  np.testing.assert_allclose(found[0, ..., 3:6], plane.imag, atol=1e-6)


def test_cosines_are_computed_once_on_a_cpu(optimised):
  """Not in every rotation, which XLA would fuse them into."""
  cfg = families.LLAMA3

  def layers(x, positions):
    angles = rotary.angles(cfg, positions)[0]
    for _ in range(3):
      x = jnp.tanh(rotary.rotate(x, angles) @ jnp.ones((x.shape[-1],) * 2))
    return x

  arguments = jnp.ones((2, 8, 3, cfg.d_head)), jnp.zeros((2, 8), jnp.int32)
  program = jax.jit(layers).lower(*arguments).compile().as_text()
  assert len(re.findall(r" cosine\(", program)) == 1
