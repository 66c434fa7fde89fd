"""Sampling rules: from logits to a token, exactly.

The contract, per row, in this order:

1. Logits are float32; -inf is allowed. If a logit is NaN or +inf, or no logit
   is finite, every score of the row is NaN, id 0 is drawn, and other rows are
   unaffected. Ids from `n_ids` on pad the vocabulary and are never drawn.
2. `bias` is added; a bias of -inf forbids the id.
3. Repetition penalty, on ids of prompt and output: a logit above 0 is divided
   by the penalty, a logit up to 0 is multiplied (arXiv:1909.05858).
4. On ids of the output: the frequency penalty is subtracted once per
   occurrence, then the presence penalty once.
5. Temperature 0, or a subnormal number, is greedy: the largest logit wins, ties
   to the lowest id, and rules 6 to 10 have no effect. Otherwise logits are
   divided by the temperature, up to a constant of the row.
6. Min-p removes ids less likely than min_p times the likeliest; equal stays.
7. Top-k keeps exactly k ids, ordered by (logit descending, id ascending), with
   logits from before the temperature.
8. Top-p takes the ids left, in the order of rule 7, and keeps the shortest
   prefix with a share p of the probability left; the id crossing p stays.
9. Typical (arXiv:2202.00666) takes the ids left, ordered by (distance of the
   surprisal from the entropy ascending, id ascending), and keeps the shortest
   prefix with a share typical_p of the probability left.
10. The token is argmax(score + Gumbel noise) over the ids kept. The noise is a
   function of (seed, absolute position, id) alone: a row draws the same token
   in any batch and any slot.

With `temperature_last`, rules 6 to 9 use the probabilities at temperature 1,
and the temperature is applied to the ids kept.

Neutral values change no bit: bias 0, repetition penalty 1, frequency and
presence 0, temperature 1, min_p 0, top_k 0 or >= V, top_p 1, typical_p 1. A
bias or penalty that overflows is clipped to float32's largest number. At least
one id is always kept. Comparisons of sums with shares, and of two distances,
are decided in float32.

The noise has 32 random bits: ids below a probability of about 1e-9 are drawn
too rarely.

The vocabulary is never sorted: prefixes are found by bisection. Rules used by
no row of the batch are not computed. `benchmarks/rules.py` times each rule.

B batch, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_LARGEST = float(jnp.finfo(jnp.float32).max)
_LEAST = float(jnp.finfo(jnp.float32).tiny)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parameters:
  """Sampling parameters per row, as arrays: no recompilation per request.

  All fields but `seed` and `bias` are fields of lm/sample/request.py.
  """

  temperature: Float[Array, "B"]
  top_k: Int[Array, "B"]
  top_p: Float[Array, "B"]
  min_p: Float[Array, "B"]
  typical_p: Float[Array, "B"]
  repetition_penalty: Float[Array, "B"]
  frequency_penalty: Float[Array, "B"]
  presence_penalty: Float[Array, "B"]
  temperature_last: Bool[Array, "B"]
  seed: UInt32[Array, "B"]
  bias: Float[Array, "B V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
  """Input of the penalties: ids of the prompt, and a count of draws per id.

  The caller must leave out padding.
  """

  prompt: Bool[Array, "B V"]
  counts: Int[Array, "B V"]


def sample(
  logits: Float[Array, "B V"],
  parameters: Parameters,
  past: Past,
  positions: Int[Array, "B"],
  n_ids: int,
) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
  """Draws a token for each row; also returns the processed scores.

  `positions` are the positions of the drawn tokens.
  """
  processed = process(logits, parameters, past, n_ids)
  return draw(processed, parameters, positions), processed


def process(
  logits: Float[Array, "B V"], parameters: Parameters, past: Past, n_ids: int
) -> Float[Array, "B V"]:
  """Rules 1 to 9: scores up to a constant of the row, -inf where removed.

  A greedy row is 0 at the chosen id and -inf elsewhere.
  """
  scores = _penalise(logits, parameters, past, n_ids)
  return _final(scores, _cut(scores, parameters)[-1], parameters)


def draw(
  processed: Float[Array, "B V"],
  parameters: Parameters,
  positions: Int[Array, "B"],
) -> Int[Array, "B"]:
  """Rule 10. Greedy rows get no noise; an all-greedy batch skips the noise."""
  hot = _hot(parameters)

  def noisy():
    # Shifts the largest score to 0, where float spacing suits the noise.
    largest = jnp.max(processed, axis=-1, keepdims=True)
    noise = _noise(parameters.seed, positions, processed.shape[1])
    return jnp.where(hot, processed - largest + noise, processed)

  return _argmax(jax.lax.cond(jnp.any(hot), noisy, lambda: processed))


def stages(
  logits: Float[Array, "B V"], parameters: Parameters, past: Past, n_ids: int
) -> dict[str, Float[Array, "B V"]]:
  """Probability of each id after each of STAGES, 0 where removed.

  "raw" includes the ids that pad the vocabulary, as the loss does. A greedy row
  is one-hot from "temperature" on. With `temperature_last`, "temperature" is
  the final distribution, after all cuts. (jit returns dicts sorted by name.)
  """
  scores = _penalise(logits, parameters, past, n_ids)
  cuts = _cut(scores, parameters)
  final = _final(scores, cuts[-1], parameters)
  early = _temper(scores, _cutting_temperature(parameters))
  greedy = ~_hot(parameters)
  last = parameters.temperature_last[:, None]
  found = {
    "raw": logits,
    "penalties": scores,
    "temperature": jnp.where(greedy | last, final, early),
  }
  for cut, kept in zip(CUTS, cuts, strict=True):
    found[cut.field] = jnp.where(
      greedy, final, jnp.where(kept, early, -jnp.inf)
    )
  return {name: jax.nn.softmax(found[name], axis=-1) for name in STAGES}


def _penalise(logits, parameters, past, n_ids):
  """Rules 2 to 4: bias and penalties."""

  def column(name):
    return getattr(parameters, name)[:, None]

  def change(where, before, after):
    # Non-finite scores are unchanged; finite scores stay finite.
    after = jnp.clip(after, -_LARGEST, _LARGEST)
    return jnp.where(where & jnp.isfinite(before), after, before)

  bias = parameters.bias
  allowed = (jnp.arange(logits.shape[1])[None] < n_ids) & (bias > -jnp.inf)
  scores = jnp.where(allowed, logits, -jnp.inf)
  scores = change(bias != 0, scores, scores + bias)
  repetition = column("repetition_penalty")
  frequency, presence = column("frequency_penalty"), column("presence_penalty")

  def penalties():
    drawn = past.counts > 0
    x = scores
    seen = (repetition != 1) & (past.prompt | drawn)
    smaller = _divide(x, x > 0, repetition)
    x = change(seen, x, jnp.where(x > 0, smaller, x * repetition))
    drawn &= (frequency != 0) | (presence != 0)
    return change(drawn, x, x - frequency * past.counts - presence)

  some = (repetition != 1) | (frequency != 0) | (presence != 0)
  return jax.lax.cond(jnp.any(some), penalties, lambda: scores)


def _cut(scores, parameters):
  """Rules 6 to 9: a mask per rule, of the ids left after the rule."""
  temperature, hot = _cutting_temperature(parameters), _hot(parameters)

  def apply(cut, before):
    value = getattr(parameters, cut.field)[:, None]
    rows = hot & cut.acts(value, scores.shape[1])

    def keep():
      kept = cut.keep(scores, _temper(scores, temperature), before, value)
      return before & (kept | ~rows)

    return jax.lax.cond(jnp.any(rows), keep, lambda: before)

  kept = [jnp.ones_like(scores, bool)]
  for cut in CUTS:
    kept.append(apply(cut, kept[-1]))
  return kept[1:]


# --- cuts: (scores, scores over the temperature, mask of the ids left, value of
# the rule [B, 1]) -> mask of the ids that the rule keeps ----------------------


def _min_p(scores, tempered, before, p):
  # The largest weight is exp(0) = 1.
  return jnp.exp(tempered) >= p


def _top_k(scores, tempered, before, k):
  k = jnp.where(k > 0, k, scores.shape[1])
  return _prefix(_sortable(scores), jnp.ones_like(k), k)


def _top_p(scores, tempered, before, p):
  return _nucleus(_sortable(scores), tempered, before, p)


def _typical(scores, tempered, before, p):
  # Surprisal is a constant minus the score: |surprisal - entropy| equals
  # |score - mean score|.
  x = tempered
  weights = jnp.where(before, jnp.exp(x), 0)
  moment = jnp.sum(jnp.where(weights > 0, weights * x, 0), -1, keepdims=True)
  mean = moment / jnp.sum(weights, axis=-1, keepdims=True)
  return _nucleus(_sortable(-jnp.abs(x - mean)), x, before, p)


class Cut(NamedTuple):
  """A rule that removes ids: the field of Parameters, whether a value of the
  field can remove any of `n_ids` ids, and the function above.
  """

  field: str
  acts: Callable[[Any, int], Any]
  keep: Callable[..., Bool[Array, "B V"]]


# In order of application.
CUTS = (
  Cut("min_p", lambda p, n_ids: p > 0, _min_p),
  Cut("top_k", lambda k, n_ids: (k > 0) & (k < n_ids), _top_k),
  Cut("top_p", lambda p, n_ids: p < 1, _top_p),
  Cut("typical_p", lambda p, n_ids: p < 1, _typical),
)
# Keys of `stages`, in order; `temperature_last` rows apply temperature last.
STAGES = ("raw", "penalties", "temperature", *(cut.field for cut in CUTS))


def _nucleus(order, tempered, before, p):
  """Shortest prefix of `order` with a share p of the weight in `before`."""
  weights = jnp.where(before, jnp.exp(tempered), 0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  # A target of 0, by underflow of a tiny p, would keep no id.
  return _prefix(order, weights, jnp.maximum(p * total, _LEAST))


def _final(scores, kept, parameters):
  """Rule 5 on the ids kept; makes invalid rows NaN (rule 1)."""
  temperature = parameters.temperature[:, None]
  x = jnp.where(kept, scores, -jnp.inf)
  x = jnp.where(temperature == 1, x, _temper(x, temperature))
  greedy = ~_hot(parameters)

  def takes_one():
    here = jnp.arange(x.shape[1])[None] == _argmax(scores)[:, None]
    return jnp.where(greedy, jnp.where(here, 0.0, -jnp.inf), x)

  x = jax.lax.cond(jnp.any(greedy), takes_one, lambda: x)
  sound = jnp.isfinite(jnp.max(scores, axis=-1, keepdims=True))
  return jnp.where(sound, x, jnp.nan)


def _hot(parameters):
  """Rows that are not greedy. Subnormal temperatures are greedy everywhere,
  because some devices flush subnormals to 0.
  """
  return parameters.temperature[:, None] >= _LEAST


def _cutting_temperature(parameters):
  last, temperature = parameters.temperature_last, parameters.temperature
  return jnp.where(last, 1.0, temperature)[:, None]


def _temper(x, temperature):
  """Divides scores by the temperature, after a shift of the largest to 0:
  avoids overflow at any temperature. Greedy rows get meaningless values.
  """
  largest = jnp.max(x, axis=-1, keepdims=True)
  return _divide(x - largest, x > -jnp.inf, temperature)


def _divide(x, where, by):
  """Divides where `where` is True. With a single divisor per row, XLA would
  multiply by the reciprocal: off by a bit for a fifth of all numbers.
  """
  return x / jnp.where(where, by, 1.0)


def _argmax(x):
  """Argmax, ties to the lowest id; 0 in a row with NaN.

  On CPU `jnp.argmax` takes eight times as long.
  """
  n_ids = x.shape[1]
  largest = x == jnp.max(x, axis=-1, keepdims=True)
  ids = jnp.where(largest, jnp.arange(n_ids, dtype=jnp.int32)[None], n_ids)
  return jnp.min(ids, axis=-1) % n_ids


def _noise(seeds, positions, n_ids) -> Float[Array, "B V"]:
  """Gumbel noise, from -2.8 to 22.9, from `_bits` of a key per row."""

  def words(seed, position):
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.key_data(jax.random.fold_in(key, position))

  bits = _bits(jax.vmap(words)(seeds, positions), n_ids)
  # The noise is large for `uniform` near 0, where floats keep all 32 bits.
  uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
  return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))


def _bits(words: UInt32[Array, "B 2"], n_ids: int) -> UInt32[Array, "B V"]:
  """`jax.random.bits(key, (n_ids,))` of each row's key, to the bit.

  Threefry-2x32-20 (Salmon et al. 2011) of the id. On CPU jax.random loops over
  the rounds and takes three times as long as this fused pass.
  """
  words = jnp.broadcast_to(words[:, :, None], (*words.shape, n_ids))
  first, second = words[:, 0], words[:, 1]
  keys = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
  x = keys[0]
  y = keys[1] + jnp.arange(n_ids, dtype=jnp.uint32)[None]
  for i in range(5):
    for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
      x = x + y
      y = x ^ ((y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn)))
    x = x + keys[(i + 1) % 3]
    y = y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
  return x ^ y


def _sortable(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
  """Maps floats to integers of the same order; -0 equals 0."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
  return jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)


def _prefix(
  order: Int[Array, "B V"], weights: Array, target: Array
) -> Bool[Array, "B V"]:
  """Shortest prefix by (order descending, id ascending) of weight `target`.

  Keeps the whole row if the row weighs less. `weights` is [B, V], or [B, 1] for
  equal weights. Both bisections set bits from the top.
  """
  n_rows, n_ids = order.shape
  ids = jnp.arange(n_ids, dtype=jnp.int32)[None]
  weights = jnp.broadcast_to(weights, order.shape)

  def weight(where):
    return jnp.sum(jnp.where(where, weights, 0), axis=-1, keepdims=True)

  # Finds the largest threshold where the ids at or above weigh at least
  # `target`; stops early at equality. Least integer + bit 31 = 0.
  def lower(state):
    i, threshold, found = state
    higher = threshold + (jnp.int32(1) << (31 - i))
    there = weight(order >= higher)
    better = (there >= target) & (found != target)
    found = jnp.where(better, there, found)
    return i + 1, jnp.where(better, higher, threshold), found

  def unsure(state):
    i, _, found = state
    return (i < 32) & jnp.any(found != target)

  least = jnp.full((n_rows, 1), -(2**31), jnp.int32)
  whole = weight(jnp.ones_like(order, bool))
  _, threshold, _ = jax.lax.while_loop(unsure, lower, (0, least, whole))
  above, tied = order > threshold, order == threshold

  # Finds the last id needed among the ties at the threshold.
  def later(i, last):
    bit = (1 << (n_ids.bit_length() - 1)) >> i
    short = weight(above | (tied & (ids < last + bit))) < target
    return jnp.where(short, last + bit, last)

  def first_ties():
    last = jax.lax.fori_loop(
      0, n_ids.bit_length(), later, jnp.zeros((n_rows, 1), jnp.int32)
    )
    return above | (tied & (ids <= last))

  several = jnp.any(jnp.sum(tied, axis=-1) > 1)
  return jax.lax.cond(several, first_ties, lambda: above | tied)
