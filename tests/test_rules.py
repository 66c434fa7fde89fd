"""The sampling contract of lm/sample/rules.py, line by line.

The reference sorts and sums in float64. Hugging Face's processors are in
test_rules_hf.py.
"""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from lm.sample import rules

# Most tests share one shape, so that few programs are compiled.
B, V = 32, 37
LARGEST = float(np.finfo(np.float32).max)
NEUTRAL = {
  "temperature": 1.0,
  "top_k": 0,
  "top_p": 1.0,
  "min_p": 0.0,
  "typical_p": 1.0,
  "repetition_penalty": 1.0,
  "frequency_penalty": 0.0,
  "presence_penalty": 0.0,
  "temperature_last": False,
  "seed": 0,
}
DTYPES = {"top_k": np.int32, "temperature_last": bool, "seed": np.uint32}
compiled_sample = jax.jit(rules.sample, static_argnames="n_ids")
compiled_stages = jax.jit(rules.stages, static_argnames="n_ids")


def arguments(logits, bias=0.0, prompt=False, counts=0, **rule):
  """Logits, Parameters and Past of these rules, the rest neutral."""
  logits = jnp.asarray(logits, jnp.float32)

  def array(value, shape, dtype):
    return jnp.asarray(np.broadcast_to(value, shape), dtype)

  assert rule.keys() <= NEUTRAL.keys()
  columns = {
    name: array(value, len(logits), DTYPES.get(name, np.float32))
    for name, value in (NEUTRAL | rule).items()
  }
  return (
    logits,
    rules.Parameters(**columns, bias=array(bias, logits.shape, np.float32)),
    rules.Past(
      array(prompt, logits.shape, bool), array(counts, logits.shape, np.int32)
    ),
  )


def draw(logits, positions=0, n_ids=None, **rule):
  """Ids and scores as NumPy."""
  logits, *others = arguments(logits, **rule)
  positions = jnp.asarray(np.broadcast_to(positions, len(logits)), jnp.int32)
  ids, scores = compiled_sample(
    logits, *others, positions, n_ids=n_ids or logits.shape[1]
  )
  return np.asarray(ids), np.asarray(scores)


def kept(logits, **rule):
  """Ids that are left of a single row."""
  return np.flatnonzero(np.isfinite(draw([logits], **rule)[1][0])).tolist()


def same_bits(a, b):
  a, b = np.asarray(a), np.asarray(b)
  assert a.shape == b.shape and a.tobytes() == b.tobytes()


def random_rules(rng, n):
  """Every rule in about half of the rows; some rows are greedy."""

  def some(values, neutral):
    return np.where(rng.random(n) < 0.5, values, neutral)

  return {
    "temperature": some(rng.choice([0, 0.5, 2], n), 1),
    "top_k": some(rng.integers(1, V, n), 0),
    "top_p": some(rng.uniform(0.2, 1, n), 1),
    "min_p": some(rng.uniform(0, 0.3, n), 0),
    "typical_p": some(rng.uniform(0.2, 1, n), 1),
    "repetition_penalty": some(rng.uniform(0.5, 2, n), 1),
    "frequency_penalty": some(rng.normal(0, 1, n), 0),
    "presence_penalty": some(rng.normal(0, 1, n), 0),
    "temperature_last": rng.random(n) < 0.5,
    "seed": rng.integers(2**32, size=n),
    "bias": np.where(rng.random((n, V)) < 0.2, rng.normal(size=(n, V)), 0),
    "prompt": rng.random((n, V)) < 0.2,
    "counts": rng.integers(0, 4, (n, V)) * (rng.random((n, V)) < 0.3),
  }


def tied_logits(n_rows, size=V, seed=0):
  """Multiples of 1/4, so that every row has ties; some -inf, some -0."""
  rng = np.random.default_rng(seed)
  logits = np.round(4 * rng.normal(0, 2, (n_rows, size))) / 4
  logits[rng.random(logits.shape) < 0.1] = -np.inf
  logits[rng.random(logits.shape) < 0.1] = -0.0
  return logits.astype(np.float32)


# Section 2.1 of the project's survey of samplers. Where systems differ, ours
# keeps the lowest ids of a tie and stops at the boundary, as llama.cpp does
# there; the temperature comes first, as in Hugging Face and vLLM, or last, as
# in llama.cpp and MaxText. The typical ones follow from surprisals of 1, 2, 3
# and 3 bits around an entropy of 1.75.
HALVES, TIES = (0.5, 0.25, 0.125, 0.125), (0.4, 0.2, 0.2, 0.2)
ALL = [0, 1, 2, 3]
GOLDENS = (
  (HALVES, {"top_p": 0.5}, [0]),
  (HALVES, {"top_p": 0.75}, [0, 1]),
  (HALVES, {"top_p": 0.875}, [0, 1, 2]),
  (HALVES, {"top_p": 0.9}, ALL),
  (HALVES, {"top_p": 1.0}, ALL),
  (HALVES, {"top_p": 1e-9}, [0]),
  (HALVES, {"top_p": 1e-45}, [0]),
  (HALVES, {"temperature": 0.5, "top_p": 0.8}, [0, 1]),
  (HALVES, {"temperature": 2.0, "top_p": 0.8}, [0, 1, 2]),
  *(
    (HALVES, {"temperature": T, "top_p": 0.8, "temperature_last": True}, kept)
    for T, kept in ((0.5, [0, 1, 2]), (2.0, [0, 1, 2]), (0, [0]))
  ),
  (HALVES, {"top_k": 2, "top_p": 0.7}, [0, 1]),
  (HALVES, {"top_k": 2, "top_p": 0.66}, [0]),
  (HALVES, {"min_p": 0.3, "top_p": 0.6}, [0]),
  (HALVES, {"min_p": 0.3}, [0, 1]),
  (HALVES, {"min_p": 0.5}, [0, 1]),
  (HALVES, {"min_p": 0.51}, [0]),
  (HALVES, {"min_p": 0.25}, ALL),
  (HALVES, {"min_p": 1.0}, [0]),
  (TIES, {"min_p": 0.49}, ALL),
  (TIES, {"top_k": 2}, [0, 1]),
  (TIES, {"top_p": 0.6}, [0, 1]),
  (TIES, {"top_k": 4}, ALL),
  (HALVES, {"typical_p": 1e-45}, [1]),
  (HALVES, {"typical_p": 0.25}, [1]),
  (HALVES, {"typical_p": 0.26}, [0, 1]),
  (HALVES, {"typical_p": 0.75}, [0, 1]),
  (HALVES, {"typical_p": 0.8}, [0, 1, 2]),
  (HALVES, {"typical_p": 0.9}, ALL),
  # 0.92 and 1.61 nats around 1.33: the ties are nearer.
  (TIES, {"typical_p": 0.3}, [1, 2]),
  (TIES, {"typical_p": 0.5}, [1, 2, 3]),
  # Of (4, 2)/6, 0.41 and 1.10 nats around 0.64, the first is nearer.
  (HALVES, {"top_k": 2, "typical_p": 0.6}, [0]),
)


@pytest.mark.parametrize("probabilities, rule, expected", GOLDENS)
def test_golden_vectors(probabilities, rule, expected):
  logits = np.log(np.asarray(probabilities, np.float32))
  assert kept(logits, **rule) == expected


def test_golden_penalties():
  """Section 2.2: output ids 0, 0, 2; Hugging Face's with a prompt of 0, 2."""
  logits, counts = [[2.0, 1.0, -1.0, 0.0]], [[2, 0, 1, 0]]
  strong = {"repetition_penalty": 2.0}
  both = {"frequency_penalty": 0.5, "presence_penalty": 0.25}
  for rule, expected in (
    ({"counts": counts} | strong | both, (-0.25, 1, -2.75, 0)),
    ({"counts": counts} | strong, (1, 1, -2, 0)),
    ({"prompt": [[True, False, True, False]]} | strong, (1, 1, -2, 0)),
    ({"prompt": np.ones((1, 4), bool)} | both, (2, 1, -1, 0)),
    ({"counts": counts, "frequency_penalty": 0.5}, (1, 1, -1.5, 0)),
    ({"counts": counts, "presence_penalty": 0.5}, (1.5, 1, -1.5, 0)),
    ({"bias": [[0, 0.5, 4, -np.inf]]}, (2, 1.5, 3, -np.inf)),
    # The bias comes first: 0 + 4 is divided.
    (
      {"bias": [[0, 0, 0, 4]], "prompt": [[False] * 3 + [True]]} | strong,
      (2, 1, -1, 2),
    ),
  ):
    _, scores = draw(logits, **rule)
    np.testing.assert_array_equal(scores, np.array([expected], np.float32))


def test_what_is_divided_is_divided_to_the_bit():
  """XLA would rather multiply by the reciprocal."""
  logits = np.random.default_rng(5).normal(0, 3, (2, V)).astype(np.float32)
  logits[:, 0] = 30
  divisor = np.float32([[1.3], [2.7]])
  seen = {"prompt": np.ones((2, V), bool), "repetition_penalty": divisor[:, 0]}
  _, scores = draw(logits, **seen)
  expected = np.where(logits > 0, logits / divisor, logits * divisor)
  np.testing.assert_array_equal(scores, expected)
  _, scores = draw(logits, temperature=divisor[:, 0])
  np.testing.assert_array_equal(scores, (logits - 30) / divisor)


def test_zero_ties_with_minus_zero():
  assert kept([-0.0, 0.0, -0.0, -9.0], top_k=1) == [0]
  assert kept([-9.0, -0.0, -0.0, 0.0], top_p=0.5) == [1, 2]


class Border(Exception):
  """Float32 may decide either way."""


def by_share(distance, ids, weights, share):
  """Shortest prefix by (distance, id) of this share, by sorting and summing."""
  order = ids[np.lexsort((ids, distance[ids]))]
  shares = np.cumsum(weights[order]) / weights[order].sum()
  if np.abs(shares[:-1] - share).min(initial=1) < 1e-5:
    raise Border
  n = 1 + np.searchsorted(shares[:-1], share)
  if n < len(order):
    inside, outside = distance[order[n - 1]], distance[order[n]]
    if 0 < outside - inside < 1e-5 * (1 + abs(inside)):
      raise Border
  return np.sort(order[:n])


def reference_scores(
  logits, bias, prompt, counts, temperature, temperature_last, **rule
):
  """Log-probabilities of one row after the rules; penalties in float32."""
  r = {name: np.float32(value) for name, value in rule.items()}
  x = (logits + bias).astype(np.float32)
  seen = prompt | (counts > 0)
  factor = r["repetition_penalty"]
  x = np.where(seen, np.where(x > 0, x / factor, x * factor), x)
  x = np.where(counts > 0, x - r["frequency_penalty"] * counts, x)
  x = np.where(counts > 0, x - r["presence_penalty"], x).astype(np.float64)
  result = np.full(len(x), -np.inf)
  if temperature == 0:
    result[np.argmax(x)] = 0
    return result
  temperature = float(np.float32(temperature))
  tempered = (x - x.max()) / (1.0 if temperature_last else temperature)
  weights, ids = np.exp(tempered), np.flatnonzero(x > -np.inf)
  if rule["min_p"]:
    if np.abs(weights[ids] / r["min_p"] - 1).min() < 1e-4:
      raise Border
    ids = ids[weights[ids] >= r["min_p"]]
  if rule["top_k"]:
    ids = np.sort(ids[np.lexsort((ids, -x[ids]))][: rule["top_k"]])
  if rule["top_p"] < 1:
    ids = by_share(-x, ids, weights, r["top_p"])
  if rule["typical_p"] < 1:
    surprisal = np.log(weights[ids].sum()) - tempered
    # What float64 still sees may be nothing in float32.
    seen = ids[weights[ids] > 0]
    entropy = (weights[seen] * surprisal[seen]).sum() / weights[seen].sum()
    ids = by_share(np.abs(surprisal - entropy), ids, weights, r["typical_p"])
  result[ids] = (x[ids] - x[ids].max()) / temperature
  return result - np.log(np.exp(result).sum())


N = 13
QUARTERS = st.integers(-24, 24).map(lambda n: n / 4)
ROW = st.lists(QUARTERS | st.just(-np.inf), min_size=N, max_size=N)


def share(lowest, highest):
  return st.floats(
    lowest, highest, width=32, exclude_min=True, allow_subnormal=False
  )


@hypothesis.settings(deadline=None, max_examples=600, derandomize=True)
@hypothesis.given(
  logits=ROW.filter(lambda row: max(row) > -np.inf),
  bias=st.just([0.0] * N) | st.lists(QUARTERS, min_size=N, max_size=N),
  prompt=st.lists(st.booleans(), min_size=N, max_size=N),
  counts=st.lists(st.integers(0, 3), min_size=N, max_size=N),
  rule=st.fixed_dictionaries(
    {
      "temperature": st.sampled_from((0.0, 1e-6, 0.3, 1.0, 1.0, 2.5, 1e6)),
      "temperature_last": st.booleans(),
      "min_p": st.just(0.0) | share(0, 1),
      "top_k": st.just(0) | st.integers(1, N + 3),
      "top_p": st.just(1.0) | share(0, 1),
      "typical_p": st.just(1.0) | share(0, 1),
      "repetition_penalty": st.sampled_from((1.0, 0.5, 1.3, 2.0)),
      "frequency_penalty": st.sampled_from((0.0, -0.25, 0.75)),
      "presence_penalty": st.sampled_from((0.0, -0.5, 1.25)),
    }
  ),
)
def test_all_combinations_equal_a_reference_that_sorts(
  logits, bias, prompt, counts, rule
):
  row = [np.array(x) for x in (logits, bias, prompt, counts)]
  try:
    expected = reference_scores(*row, **rule)
  except Border:
    hypothesis.reject()
  names = ("bias", "prompt", "counts")
  past = {name: x[None] for name, x in zip(names, row[1:], strict=True)}
  ids, scores = draw(row[0][None], **past, **rule)
  found = np.asarray(jax.nn.log_softmax(scores[0]))
  np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
  assert np.isfinite(expected[ids[0]])


def test_long_rows_equal_the_reference():
  """Where thresholds have many bits and sums many terms; ties and none."""
  rng, size = np.random.default_rng(0), 5003
  plain = rng.normal(0, 2, (30, size)).astype(np.float32)
  logits = np.concatenate([plain, tied_logits(30, size)])
  names = ("top_k", "top_p", "typical_p", "temperature")
  grid = itertools.product((0, 40, 1500), (1, 0.3, 0.9), (1, 0.8), (0.7, 2))
  rule = dict(zip(names, np.array([*grid] * 2)[: len(logits)].T, strict=True))
  _, scores = draw(logits, **rule)
  n_compared = 0
  for i, row in enumerate(logits):
    try:
      expected = reference_scores(
        row,
        np.zeros(size),
        np.zeros(size, bool),
        np.zeros(size, int),
        **NEUTRAL
        | {name: value[i].item() for name, value in rule.items()}
        | {"top_k": int(rule["top_k"][i])},
      )
    except Border:
      continue
    n_compared += 1
    np.testing.assert_array_equal(np.isfinite(scores[i]), np.isfinite(expected))
  assert n_compared > 40


def gumbel(seed, position, size):
  """In float64, of what jax.random draws."""
  key = jax.random.key(seed, impl="threefry2x32")
  bits = jax.random.bits(jax.random.fold_in(key, position), (size,))
  uniform = (np.asarray(bits, np.float64) + 0.5) / 2**32
  return -np.log(-np.log1p(-uniform))


def test_the_noise_is_that_of_seed_position_and_id():
  seeds = jnp.asarray([0, 1, 2**32 - 1, 77, 77], jnp.uint32)
  positions = jnp.asarray([0, 5, 2**31 - 1, 3, 4], jnp.int32)
  noise = rules._noise(seeds, positions, 1001)
  for row, seed, position in zip(noise, seeds, positions, strict=True):
    expected = gumbel(int(seed), int(position), 1001)
    np.testing.assert_allclose(row, expected, rtol=0, atol=2e-3)
    # Worst where 1 - v has few bits; elsewhere as good as floats are.
    assert np.abs(row - expected).mean() < 1e-6
    # An id owns its noise, however large the vocabulary is.
    fewer = rules._noise(seed[None], position[None], 10)
    same_bits(row[:10], fewer[0])
  assert np.unique(np.asarray(noise)).size > 4900


def test_the_noise_is_finite_for_all_bits(monkeypatch):
  extremes = jnp.asarray([[0, 1, 2**31, 2**32 - 129, 2**32 - 1]], jnp.uint32)
  monkeypatch.setattr(rules, "_bits", lambda words, n_ids: extremes)
  one = jnp.zeros(1, jnp.int32)
  noise = rules._noise(one.astype(jnp.uint32), one, 5)[0]
  expected = [22.8739, 21.7753, 0.3665, -2.8115, -2.8115]
  np.testing.assert_allclose(noise, expected, rtol=0, atol=1e-4)


def test_the_draw_is_the_argmax_of_scores_and_noise():
  rng = np.random.default_rng(1)
  for seed in range(5):
    logits, rule = tied_logits(B, seed=seed), random_rules(rng, B)
    positions = rng.integers(2**31, size=B)
    ids, scores = draw(logits, positions, **rule)
    for i, row in enumerate(scores.astype(np.float64)):
      noisy = row + gumbel(int(rule["seed"][i]), int(positions[i]), V)
      best = row if rule["temperature"][i] == 0 else noisy
      assert ids[i] == best.argmax()


CHI_SQUARE = (
  {},
  {"temperature": 0.7, "top_k": 6},
  {"temperature": 1.5, "top_p": 0.8},
  {"temperature": 1.3, "top_k": 7, "top_p": 0.9},
  {"temperature": 2.0, "min_p": 0.1},
  {"typical_p": 0.8},
  {"temperature": 1.4, "min_p": 0.02, "top_k": 8, "top_p": 0.95},
  {"temperature": 1.2, "top_k": 8, "typical_p": 0.9},
  {"temperature": 0.8, "top_p": 0.9, "temperature_last": True},
  {
    "temperature": 3.0,
    "min_p": 0.1,
    "typical_p": 0.9,
    "temperature_last": True,
  },
)


def test_draws_follow_the_truncated_softmax():
  """Chi-square of 200,000 draws each; seeds and positions both vary."""
  n, size = 200_000, 11
  logits = np.random.default_rng(2).normal(0, 1.5, size).astype(np.float32)
  rows, number = np.tile(logits, (n, 1)), np.arange(n)
  nothing = np.zeros(size)
  for rule in CHI_SQUARE:
    ids, _ = draw(rows, number % 500, seed=number // 500, **rule)
    expected = np.exp(
      reference_scores(logits, nothing, nothing > 0, nothing, **NEUTRAL | rule)
    )
    counts, left = np.bincount(ids, minlength=size), expected > 0
    assert left.sum() > 2 and counts[left].sum() == n
    p_value = scipy.stats.chisquare(counts[left], n * expected[left]).pvalue
    assert p_value > 1e-3, rule


def test_greedy_takes_the_lowest_id_of_a_tie_whatever_else_is_asked():
  """Also where another row of the batch is drawn."""
  logits = np.array([[1.0, 3.0, -np.inf, 3.0], [-0.0, 0.0, -1.0, 0.0]])
  all_at_once = {
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 1.0,
    "typical_p": 0.01,
    "temperature_last": True,
  }
  expected = np.full((2, 4), -np.inf, np.float32)
  expected[0, 1] = expected[1, 0] = 0
  for seed, rule in enumerate(9 * [{}, all_at_once]):
    for last in (0.0, 1.0):
      ids, scores = draw(
        logits[[0, 1, 0]], temperature=(0, 0, last), seed=seed, **rule
      )
      assert ids[:2].tolist() == [1, 0]
      same_bits(scores[:2], expected)


def test_greedy_is_taken_after_bias_and_penalties():
  logits = [[3.0, 2.0, 1.0]]
  for rule, expected in (
    ({"bias": [[-2.5, 0, 0]]}, 1),
    ({"repetition_penalty": 4.0, "prompt": [[True, True, False]]}, 2),
    ({"frequency_penalty": 0.75, "counts": [[2, 0, 0]]}, 1),
    ({"presence_penalty": 1.5, "counts": [[2, 0, 0]]}, 1),
  ):
    assert draw(logits, temperature=0.0, **rule)[0].tolist() == [expected]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 2e-38, 1e-45])
def test_tiny_temperature_is_greedy(temperature):
  logits = np.random.default_rng(3).normal(0, 50, (B, V))
  logits[:, 0] = -np.inf
  for rule in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}):
    ids, scores = draw(
      logits, temperature=temperature, seed=np.arange(B), **rule
    )
    assert ids.tolist() == np.argmax(logits, axis=1).tolist()
    # Log-probabilities are sound: 0 where it is drawn, none NaN.
    assert (scores.max(axis=1) == 0).all() and not np.isnan(scores).any()


def test_tiny_temperature_last_takes_the_likeliest_that_typical_left():
  logits = np.log([HALVES])
  rule = {"typical_p": 0.2, "temperature_last": True}
  for temperature in (1e-6, 2e-38):
    ids, scores = draw(logits, temperature=temperature, **rule)
    assert ids.tolist() == [1]
    np.testing.assert_array_equal(scores, [[-np.inf, 0, -np.inf, -np.inf]])


def test_no_number_overflows():
  """Beyond float32 stands its largest number; forbidden stays forbidden."""
  seen = {"prompt": np.ones((1, 3), bool), "counts": np.full((1, 3), 9)}
  big = LARGEST
  for row, rule, expected in (
    ((1e38, -1e38, -np.inf), {"repetition_penalty": 1e37}, (10, -big, -np.inf)),
    ((1e38, 0, -1e38), {"repetition_penalty": 1e-37}, (big, 0, -10)),
    ((0, 1, -np.inf), {"frequency_penalty": 1e38}, (-big, -big, -np.inf)),
    ((0, 1, -np.inf), {"frequency_penalty": -big}, (big, big, -np.inf)),
    ((0, 1, -np.inf), {"presence_penalty": -big}, (big, big, -np.inf)),
    (
      (big, -big, -np.inf),
      {"bias": [[big, -big, big]]},
      (big, -big, -np.inf),
    ),
  ):
    ids, scores = draw([row], **seen, **rule)
    np.testing.assert_allclose(
      scores[0], np.array(expected, np.float32), rtol=1e-6
    )
    assert scores[0, ids[0]] == scores[0].max()
  # The noise is not lost where logits are large.
  ids, _ = draw(np.full((B, V), 1e30), seed=np.arange(B))
  assert len(set(ids.tolist())) > 12


def test_one_id_is_left_where_all_others_are_forbidden():
  bias = np.full((1, V), -np.inf)
  bias[0, 23] = 0
  logits = np.random.default_rng(4).normal(0, 9, (1, V))
  harsh = {"top_k": 1, "top_p": 0.01, "min_p": 1.0, "typical_p": 0.01}
  for rule in ({}, harsh, harsh | {"temperature_last": True}):
    for temperature in (0, 1e-6, 1, 1e30):
      ids, scores = draw(logits, temperature=temperature, bias=bias, **rule)
      assert (
        ids.tolist() == np.flatnonzero(np.isfinite(scores)).tolist() == [23]
      )


def test_rules_that_ask_for_nothing_change_no_bit():
  """Neither on their own nor beside a row for which they work."""
  n = B
  logits = tied_logits(n, seed=4)
  logits[:, 0] = 0.1
  past = {"prompt": np.ones((n, V), bool), "counts": np.ones((n, V), int)}
  ids, scores = draw(logits, seed=np.arange(n), **past)
  same_bits(scores, logits)
  for rule in (
    {"top_k": V},
    {"top_k": V + 1},
    {"top_k": 2**31 - 1},
    {"temperature_last": True},
    {"bias": -0.0},
    {"frequency_penalty": -0.0, "presence_penalty": -0.0},
  ):
    again = draw(logits, seed=np.arange(n), **past, **rule)
    same_bits(again[0], ids)
    same_bits(again[1], logits)
  for name, value in {
    "temperature": 0.5,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "repetition_penalty": 2.0,
    "frequency_penalty": 1.0,
    "presence_penalty": 1.0,
  }.items():
    column = np.full(n, NEUTRAL[name], DTYPES.get(name, np.float32))
    column[0] = value
    again = draw(logits, seed=np.arange(n), **past, **{name: column})
    assert (again[1][0] != logits[0]).any()
    same_bits(again[0][1:], ids[1:])
    same_bits(again[1][1:], logits[1:])


def test_a_row_is_the_same_in_any_company():
  """Permuted, in batches of any size, among other neighbours."""
  n, rng = B, np.random.default_rng(6)
  logits, rule = rng.normal(0, 2, (n, V)), random_rules(rng, n)
  positions = rng.integers(1000, size=n)

  def these(rows):
    taken = {name: value[rows] for name, value in rule.items()}
    return draw(logits[rows], positions[rows], **taken)

  ids, scores = these(np.arange(n))
  assert len(set(ids.tolist())) > 10
  orders = [rng.permutation(n), np.arange(n)[::-1]]
  orders += [
    np.arange(i, i + size) for size in (1, 2, 8) for i in range(0, n, size)
  ]
  # One row, among copies of another.
  orders += [np.where(np.arange(8) == i, 3, i) for i in range(8)]
  for rows in orders:
    again = these(rows)
    same_bits(again[0], ids[rows])
    same_bits(again[1], scores[rows])


@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf])
def test_a_poisoned_row_is_flagged_and_disturbs_no_other(poison):
  n, rng = B, np.random.default_rng(7)
  logits, rule = tied_logits(n, seed=7), random_rules(rng, n)
  clean = draw(logits, **rule)
  bad = rng.random(n) < 0.5
  logits[bad, rng.integers(V, size=bad.sum())] = poison
  nothing = np.flatnonzero(bad)[0]
  logits[nothing] = -np.inf
  ids, scores = draw(logits, **rule)
  assert np.isnan(scores).all(axis=1).tolist() == bad.tolist()
  assert ((0 <= ids) & (ids < V)).all()
  same_bits(ids[~bad], clean[0][~bad])
  same_bits(scores[~bad], clean[1][~bad])


def test_padding_of_the_vocabulary_is_never_drawn():
  n_ids = V - 3
  logits = np.zeros((B, V))
  logits[:, n_ids:] = 20.0
  logits[::2, n_ids] = np.nan
  for temperature, highest in ((0.0, 0), (1.0, n_ids - 1)):
    ids, scores = draw(
      logits, n_ids=n_ids, temperature=temperature, seed=np.arange(B)
    )
    assert highest / 2 <= ids.max() <= highest
    assert (scores[:, n_ids:] == -np.inf).all()
  # Nor counted.
  _, scores = draw(logits, n_ids=n_ids, top_p=0.5)
  expected = np.tile(np.arange(V) < n_ids / 2, (B, 1))
  np.testing.assert_array_equal(np.isfinite(scores), expected)


def test_stages_are_what_the_rules_so_far_leave():
  n, rng = B, np.random.default_rng(9)
  logits, rule = tied_logits(n, seed=9), random_rules(rng, n)
  greedy, last = rule["temperature"] == 0, rule["temperature_last"]
  found = compiled_stages(*arguments(logits, **rule), n_ids=V - 3)
  assert set(found) == set(rules.STAGES)

  def expected(**neutral):
    scores = draw(logits, n_ids=V - 3, **rule | neutral)[1]
    return np.asarray(jax.nn.softmax(scores))

  off = {name: NEUTRAL[name] for name in rules.STAGES[3:]}
  complete = expected()
  want = {
    "raw": np.asarray(jax.nn.softmax(logits)),
    "penalties": expected(temperature=1.0, **off),
    "temperature": np.where(
      last[:, None], complete, expected(temperature_last=False, **off)
    ),
  }
  temperature = np.where(last & ~greedy, 1, rule["temperature"])
  for name in rules.STAGES[3:]:
    del off[name]
    want[name] = expected(temperature=temperature, **off)
  for name, value in want.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7)
  for name in rules.STAGES[2:]:
    assert (np.sum(found[name] == 1, axis=1) == 1)[greedy].all()
  assert (np.asarray(found["raw"])[:, V - 3 :] > 0).any()


def test_what_no_row_asks_for_is_not_computed(monkeypatch):
  computed = []

  def watched(function):
    def call(*args):
      name = function.__name__
      jax.debug.callback(lambda: computed.append(name))
      return function(*args)

    return call

  for name in ("_noise", "_nucleus", "_prefix"):
    monkeypatch.setattr(rules, name, watched(getattr(rules, name)))
  sample = jax.jit(lambda *args: rules.sample(*args, n_ids=V))
  logits = tied_logits(2)
  cuts = {"top_k": 3, "top_p": 0.5, "typical_p": 0.5}
  for rule, expected in (
    ({"temperature": 0.0} | cuts, set()),
    ({}, {"_noise"}),
    ({"temperature": (0, 1)} | cuts, {"_noise", "_nucleus", "_prefix"}),
    ({"top_k": (3, 0)}, {"_noise", "_prefix"}),
    ({"min_p": 0.5, "top_k": V}, {"_noise"}),
  ):
    computed.clear()
    jax.block_until_ready(
      sample(*arguments(logits, **rule), jnp.zeros(2, jnp.int32))
    )
    jax.effects_barrier()
    assert set(computed) == expected


def test_one_program_serves_all_parameters_and_sorts_nothing():
  logits, rng = tied_logits(B), np.random.default_rng(10)
  draw(logits)
  before = compiled_sample._cache_size()
  for _ in range(5):
    draw(logits, **random_rules(rng, B))
  assert compiled_sample._cache_size() == before
  program = str(
    jax.make_jaxpr(functools.partial(rules.sample, n_ids=V))(
      *arguments(logits), jnp.zeros(B, jnp.int32)
    )
  )
  assert "while[" in program and "cond[" in program
  assert not any(word in program for word in ("sort[", "top_k[", "cumsum["))


def test_parameters_are_all_there():
  """A field added to the rules is added to these tests."""
  fields = {field.name for field in dataclasses.fields(rules.Parameters)}
  assert fields == NEUTRAL.keys() | {"bias"}
