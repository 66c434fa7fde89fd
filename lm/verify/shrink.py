"""Shrinks a large config to a small copy with the same switches."""

import copy
import dataclasses
import math
from typing import Any

from lm import config as config_lib
from lm import sharding, validation
from lm.model import counts

# A training step of 2M parameters on 16k tokens takes about a second on a CPU
# core; the checks take some hundred steps and forward passes.
LARGE_PARAMETERS = 2_000_000
LARGE_TOKENS = 16_384


def is_large(config: config_lib.Config) -> bool:
  """Whether the checks would take long without shrinking the config."""
  return (
    counts.parameter_count(config.model) > LARGE_PARAMETERS
    or config.tokens_per_step > LARGE_TOKENS
  )


def shorten(config: config_lib.Config, steps: int) -> None:
  """Sets train.steps to `steps`, in place. A `wsd` schedule's warm-up is scaled
  to still end before the decay begins. The profiler is turned off, since the
  steps to profile may be beyond the last.
  """
  o, t = config.optimizer, config.train
  if o.schedule == "wsd":
    o.warmup_steps = o.warmup_steps * steps // t.steps
  t.steps, t.profile = steps, None


def shrink(config: config_lib.Config) -> config_lib.Config:
  """Reduces widths, depth, vocabulary, lengths and batch, and nothing else.

  A size divisible by 2, 4 or 8 devices remains so, and one that is not does not
  become so. The batch has a row for each of 8 devices where the config's has.
  """
  small = copy.deepcopy(config)
  m, t, before = small.model, small.train, config.model
  # Splash attention needs whole tiles of 128 positions.
  length = min(t.sequence_length, 128 if sharding.platform() == "tpu" else 64)
  ratio = length / t.sequence_length
  longer = before.context_length > t.sequence_length
  t.sequence_length = length
  m.context_length = 2 * length if longer else length
  m.windows = tuple(
    None if w is None else min(w, max(2, round(w * ratio))) for w in m.windows
  )
  m.n_layers = _layers(m.n_layers, math.lcm(len(m.windows), len(m.rope_layers)))
  m.vocab_size = _narrow(m.vocab_size, 256)
  m.d_model = _narrow(m.d_model, 56)
  m.d_mlp = _narrow(m.d_mlp, 120)
  m.d_head = min(m.d_head, 8 - m.d_head % 2)
  if m.rotary_fraction < 1:
    pairs = max(1, round(m.d_head * m.rotary_fraction / 2))
    m.rotary_fraction = 2 * pairs / m.d_head
  if m.rope_scaling is not None:
    m.rope_scaling = _scaling(before, m, ratio)
  if m.query_scale_dim is not None:
    scaled = m.query_scale_dim * m.d_head / before.d_head
    m.query_scale_dim = max(1, round(scaled))
  m.n_kv_heads = _narrow(m.n_kv_heads, 0)
  m.n_heads = m.n_kv_heads * min(8, before.n_heads // before.n_kv_heads)
  rows = _narrow(t.batch_size // t.microbatches, 0)
  t.microbatches = min(t.microbatches, 2)
  t.batch_size = rows * t.microbatches
  if m.loss_chunk < config.tokens_per_step:
    m.loss_chunk = 50  # several chunks on any mesh, the last one not full
  shorten(small, min(t.steps, 100))
  if small.optimizer.skip is not None:
    window = min(small.optimizer.skip.window, 8)
    small.optimizer.skip.window = window
  return validation.validate(small)


def config_to_check(
  config: config_lib.Config, small: bool | None
) -> tuple[config_lib.Config, str]:
  """The config to check, and a line on the changes; `small` None shrinks only a
  large config. A kernel of a different platform becomes "reference", and no
  other run is read, and no task is run.
  """
  checked = copy.deepcopy(config)
  if is_large(config) if small is None else small:
    checked = shrink(config)
  checked.init_from = checked.tasks = None
  kernel, platform = config.model.attention, sharding.platform()
  of = {"splash": "tpu", "cudnn": "gpu", "mosaic": "gpu"}
  if of.get(kernel, platform) != platform:
    checked.model.attention = "reference"
  changed = changes(config, checked)
  return checked, f"changed: {changed}" if changed else "as it stands"


def changes(config: config_lib.Config, small: config_lib.Config) -> str:
  """Fields that differ: `model.d_model 4096 -> 64, ...`."""
  changed = validation.differences(config, small).items()
  return ", ".join(
    f"{path.removeprefix('config.')} {_brief(a)} -> {_brief(b)}"
    for path, (a, b) in changed
  )


def _brief(value: Any) -> str:
  if isinstance(value, tuple):
    return "(" + " ".join(map(str, value)) + ")"
  return str(value)


def _narrow(size: int, about: int) -> int:
  """A size near `about` (a multiple of 8) with the divisibility of `size` by 2,
  4 and 8: 2, 4 or 8 more, or 3 more for an odd size; at most `size`.
  """
  common = math.gcd(size, 8)
  return min(size, about + (common if common > 1 else 3))


def _scaling(
  before: config_lib.ModelConfig, small: config_lib.ModelConfig, ratio: float
) -> config_lib.RopeScaling:
  """The RoPE scaling of `small`: lengths times `ratio`, and for `longrope` as
  many divisors as pairs rotate, of the same list: short or long.
  """
  scaling = before.rope_scaling
  assert scaling is not None
  original = max(1, round(scaling.original_length * ratio))
  if scaling.kind != "longrope":
    return dataclasses.replace(scaling, original_length=original)
  if before.context_length > scaling.original_length:
    original = min(original, small.context_length - 1)
  else:
    original = max(original, small.context_length)
  n, pairs = before.d_rotary // 2, small.d_rotary // 2
  some = [i * n // pairs for i in range(pairs)]
  return dataclasses.replace(
    scaling,
    original_length=max(2, original),
    short_factors=tuple(scaling.short_factors[i] for i in some),
    long_factors=tuple(scaling.long_factors[i] for i in some),
  )


def _layers(n: int, period: int) -> int:
  """At most two periods of the pattern of layers, and one more layer if `n`
  layers are not a multiple of the period.
  """
  if n < period:
    return n
  return min(n // period, 2) * period + min(n % period, 1)
