"""Rotary positions (RoPE, arXiv:2104.09864): frequencies, scaling, rotation.

B batch, T query length, H head, R rotating pairs of a head: d_rotary / 2.
The kinds of scaling follow `modeling_rope_utils` of transformers.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm import config as config_lib
from lm import sharding

Angles = tuple[Float[Array, "B T R"], Float[Array, "B T R"]]


def angles(
  cfg: config_lib.ModelConfig, positions: Int[Array, "B T"]
) -> list[Angles | None]:
  """Returns (cos, sin) for each entry of cfg.layer_pattern, None for layers
  without rotary positions.
  """
  pattern = [(window is not None, rope) for window, rope in cfg.layer_pattern]
  made = {
    windowed: _angles(cfg, positions, windowed)
    for windowed in {windowed for windowed, rope in pattern if rope}
  }
  return [made[windowed] if rope else None for windowed, rope in pattern]


def _angles(cfg, positions, windowed) -> Angles:
  theta, scaling = cfg.rope_theta, cfg.rope_scaling
  if windowed and cfg.rope_theta_windowed is not None:
    theta, scaling = cfg.rope_theta_windowed, None
  pair = jnp.arange(0, cfg.d_rotary, 2, dtype=jnp.float32)
  frequency = theta ** (-pair / cfg.d_rotary)
  if scaling is not None:
    frequency = _scaled(frequency, theta, scaling, cfg.context_length)
  angle = positions[..., None].astype(jnp.float32) * frequency[None, None, :]
  cos, sin = _cos_and_sin(angle)
  if scaling is not None and (factor := attention_factor(scaling)) != 1:
    cos, sin = cos * factor, sin * factor
  return cos, sin


def _cos_and_sin(angle: Float[Array, "B T R"]) -> Angles:
  """On CPUs by a loop: XLA fuses them into every rotation of every layer that
  is unrolled, to be computed again for each head, unless a loop made them.
  """
  if sharding.platform() != "cpu":
    return jnp.cos(angle), jnp.sin(angle)
  turns = jnp.array([True, False])
  cos, sin = jax.lax.map(
    lambda turn: jnp.where(turn, jnp.cos(angle), jnp.sin(angle)), turns
  )
  return cos, sin


def _scaled(
  frequency: Float[Array, "R"],
  theta: float,
  scaling: config_lib.RopeScaling,
  context_length: int,
) -> Float[Array, "R"]:
  """Returns the frequencies (radians per position) after scaling.

  For `longrope` (arXiv:2402.13753), transformers takes the long factors if the
  positions of a call exceed original_length, and must then recompute a KV cache
  when a text grows beyond original_length. Here context_length decides: if
  context_length exceeds original_length, logits equal the logits of
  transformers for texts longer than original_length, else for shorter texts.
  """
  if scaling.kind == "longrope":
    long = context_length > scaling.original_length
    divisors = scaling.long_factors if long else scaling.short_factors
    return frequency / jnp.asarray(divisors, jnp.float32)
  if scaling.kind == "linear":
    return frequency / scaling.factor
  if scaling.kind == "yarn":
    keep = 1 - _ramp(2 * len(frequency), theta, scaling)
  else:
    # Llama 3.1 stretches wavelengths above original_length / low by `factor`,
    # keeps wavelengths below original_length / high, and blends in between.
    turns = scaling.original_length * frequency / (2 * jnp.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
  return frequency * (keep + (1 - keep) / scaling.factor)


def _ramp(
  d_rotary: int, theta: float, scaling: config_lib.RopeScaling
) -> Float[Array, "R"]:
  """Returns YaRN's ramp (arXiv:2309.00071), the share of a frequency divided by
  `factor`: 0 up to the pair with beta_fast turns in original_length, and 1 from
  the pair with beta_slow turns on.
  """

  def pair_of(turns: float) -> float:
    wavelength = scaling.original_length / (turns * 2 * math.pi)
    return d_rotary * math.log(wavelength) / (2 * math.log(theta))

  low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, d_rotary - 1)
  if low == high:
    high += 0.001
  pair = jnp.arange(d_rotary // 2, dtype=jnp.float32)
  return jnp.clip((pair - low) / (high - low), 0, 1)


def attention_factor(scaling: config_lib.RopeScaling) -> float:
  """Returns the factor on cos and sin, hence on rotated queries and keys:
  attention scores of rotated dimensions grow by the factor squared.
  """
  if scaling.kind not in ("yarn", "longrope"):
    return 1.0
  if scaling.attention_factor is not None:
    return scaling.attention_factor
  if scaling.factor <= 1:
    return 1.0
  if scaling.kind == "yarn":
    return 0.1 * math.log(scaling.factor) + 1
  ratio = math.log(scaling.factor) / math.log(scaling.original_length)
  return math.sqrt(1 + ratio)


def rotate(
  x: Float[Array, "B T heads H"], angles: Angles
) -> Float[Array, "B T heads H"]:
  """Rotates each pair (x[i], x[i + R]) by the angle of the position; the
  dimensions from 2 R on stay unchanged.
  """
  cos, sin = (a[:, :, None, :].astype(x.dtype) for a in angles)
  d_rotary = 2 * cos.shape[-1]
  turning, passing = x[..., :d_rotary], x[..., d_rotary:]
  left, right = jnp.split(turning, 2, axis=-1)
  parts = [left * cos - right * sin, right * cos + left * sin]
  if passing.shape[-1]:
    parts.append(passing)
  return jnp.concatenate(parts, axis=-1)
