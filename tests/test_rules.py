"""The sampling contract of lm/sample/rules.py, line by line.

The reference sorts and sums in float64; noise and seeds are the contract's.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lm.sample import rules

V = 37
sample = jax.jit(rules.sample, static_argnames="n_ids")
keep = jax.jit(rules.keep)


def parameters(n_rows, temperature=1.0, top_k=0, top_p=1.0, seed=0):
  def column(value, dtype):
    return jnp.asarray(np.broadcast_to(value, n_rows), dtype)

  return rules.Parameters(
    column(temperature, jnp.float32),
    column(top_k, jnp.int32),
    column(top_p, jnp.float32),
    column(seed, jnp.uint32),
  )


def draw(logits, positions=0, n_ids=None, **rule):
  """Ids and log-probabilities as NumPy."""
  logits = jnp.asarray(logits, jnp.float32)
  n_rows, size = logits.shape
  positions = jnp.asarray(np.broadcast_to(positions, n_rows), jnp.int32)
  ids, logs = sample(
    logits, parameters(n_rows, **rule), positions, n_ids=n_ids or size
  )
  return np.asarray(ids), np.asarray(logs)


def tied_logits(n_rows, size=V, seed=0):
  """Multiples of 1/4, so that every row has ties; some -inf, some -0."""
  rng = np.random.default_rng(seed)
  logits = np.round(4 * rng.normal(0, 2, (n_rows, size))) / 4
  logits[rng.random(logits.shape) < 0.1] = -np.inf
  logits[rng.random(logits.shape) < 0.1] = -0.0
  return logits.astype(np.float32)


def reference_order(logits):
  return np.lexsort((np.arange(len(logits)), -logits))


def reference_probabilities(logits, temperature):
  scaled = logits.astype(np.float64) / temperature
  weights = np.exp(scaled - scaled.max())
  return weights / weights.sum()


def reference_keep(logits, temperature, top_k, top_p):
  """Kept ids of one row, by sorting and summing."""
  order = reference_order(logits)[: top_k or None]
  if top_p < 1:
    share = reference_probabilities(logits[order], temperature)
    order = order[: 1 + np.searchsorted(np.cumsum(share), top_p)]
  return set(order.tolist())


# Section 2.1 of the project's survey of samplers. Where systems differ, ours
# keeps the lowest ids of a tie and stops at the boundary, as llama.cpp does
# there; the temperature comes first, as in Hugging Face and vLLM.
HALVES, TIES = (0.5, 0.25, 0.125, 0.125), (0.4, 0.2, 0.2, 0.2)
GOLDENS = (
  (HALVES, {"top_p": 0.5}, [0]),
  (HALVES, {"top_p": 0.75}, [0, 1]),
  (HALVES, {"top_p": 0.875}, [0, 1, 2]),
  (HALVES, {"top_p": 0.9}, [0, 1, 2, 3]),
  (HALVES, {"top_p": 1.0}, [0, 1, 2, 3]),
  (HALVES, {"top_p": 1e-9}, [0]),
  (HALVES, {"top_p": 1e-45}, [0]),
  (HALVES, {"temperature": 0.5, "top_p": 0.8}, [0, 1]),
  (HALVES, {"temperature": 2.0, "top_p": 0.8}, [0, 1, 2]),
  (HALVES, {"top_k": 2, "top_p": 0.7}, [0, 1]),
  (HALVES, {"top_k": 2, "top_p": 0.66}, [0]),
  (TIES, {"top_k": 2}, [0, 1]),
  (TIES, {"top_p": 0.6}, [0, 1]),
  (TIES, {"top_k": 4}, [0, 1, 2, 3]),
)


@pytest.mark.parametrize("probabilities, rule, expected", GOLDENS)
def test_golden_vectors(probabilities, rule, expected):
  logits = jnp.log(jnp.asarray([probabilities], jnp.float32))
  kept = keep(logits, parameters(1, **rule))
  assert np.flatnonzero(kept[0]).tolist() == expected


GRID = list(
  itertools.product(
    (0.3, 1.0, 2.5), (0, 1, 2, 5, 36, V, 1000), (1e-6, 0.3, 0.8, 0.97, 1.0)
  )
)


def test_kept_ids_equal_the_reference_with_ties():
  logits = tied_logits(len(GRID) * 7)
  rule = np.array(GRID * 7)
  kept = keep(
    jnp.asarray(logits),
    parameters(len(rule), rule[:, 0], rule[:, 1], rule[:, 2]),
  )
  n_cut = 0
  for row, (T, k, p), found in zip(logits, rule, kept, strict=True):
    found = set(np.flatnonzero(found).tolist())
    # A cumulative sum that meets p to rounding may fall on either side.
    fewest, most = (
      reference_keep(row, T, int(k), q) for q in (p - 1e-6, min(p + 1e-6, 1))
    )
    assert (fewest if p < 1 else most) <= found <= most
    n_cut += len(found) < V
  assert n_cut > len(rule) / 2


def test_draws_equal_the_reference_argmax_of_kept_logits_and_noise():
  logits = tied_logits(len(GRID), seed=1)
  T, k, p = np.array(GRID).T
  seeds, positions = np.arange(len(GRID)) + 5, np.arange(len(GRID)) * 3
  ids, _ = draw(logits, positions, temperature=T, top_k=k, top_p=p, seed=seeds)
  for row, rule in enumerate(GRID):
    key = jax.random.fold_in(
      jax.random.key(int(seeds[row])), int(positions[row])
    )
    noisy = logits[row] / rule[0] + np.asarray(jax.random.gumbel(key, (V,)))
    kept = sorted(reference_keep(logits[row], *rule))
    assert ids[row] == kept[np.argmax(noisy[kept])]


def test_draws_follow_the_truncated_softmax():
  """Chi-square of 200,000 draws each; seeds and positions both vary."""
  n, size = 200_000, 11
  logits = np.random.default_rng(2).normal(0, 1.5, size).astype(np.float32)
  rows, number = np.tile(logits, (n, 1)), np.arange(n)
  for T, k, p in ((1.0, 0, 1.0), (0.7, 6, 1.0), (1.5, 0, 0.8), (1.3, 7, 0.9)):
    ids, _ = draw(
      rows, number % 500, temperature=T, top_k=k, top_p=p, seed=number // 500
    )
    kept = sorted(reference_keep(logits, T, k, p))
    counts = np.bincount(ids, minlength=size)
    assert counts[kept].sum() == n
    expected = n * reference_probabilities(logits[kept], T)
    assert scipy.stats.chisquare(counts[kept], expected).pvalue > 1e-3


def test_greedy_takes_the_lowest_id_of_a_tie_whatever_else_is_asked():
  """Also where another row of the batch is drawn."""
  logits = np.array([[1.0, 3.0, -np.inf, 3.0], [-0.0, 0.0, -1.0, 0.0]])
  for seed, rule in enumerate(9 * [{}, {"top_k": 3, "top_p": 0.1}]):
    for last in (0.0, 1.0):
      ids, _ = draw(
        logits[[0, 1, 0]], temperature=(0, 0, last), seed=seed, **rule
      )
      assert ids[:2].tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 2e-38, 1e-45])
def test_tiny_temperature_is_greedy(temperature):
  logits = np.random.default_rng(3).normal(0, 50, (13, V))
  logits[:, 0] = -np.inf
  ids, logs = draw(logits, temperature=temperature, seed=np.arange(13))
  assert ids.tolist() == np.argmax(logits, axis=1).tolist()
  assert np.isfinite(logs).all()


def test_rules_that_ask_for_nothing_change_no_bit():
  """Neither on their own nor beside a row for which they work."""
  n = 1000
  logits = np.random.default_rng(4).normal(0, 0.1, (n, V))
  seeds = np.arange(n)
  plain = draw(logits, seed=seeds)
  for k, p in ((V, 1.0), (V + 1, 1.0), (2**31 - 1, 1.0)):
    again = draw(logits, seed=seeds, top_k=k, top_p=p)
    np.testing.assert_array_equal(plain, again)
  k, p = np.zeros(n), np.ones(n)
  k[0], p[0] = 1, 0.1
  beside = draw(logits, seed=seeds, top_k=k, top_p=p)
  np.testing.assert_array_equal(np.array(plain)[:, 1:], np.array(beside)[:, 1:])


def test_a_row_is_the_same_in_any_company():
  n = 23
  logits = tied_logits(n, seed=5)
  rng = np.random.default_rng(6)
  rule = {
    "temperature": rng.choice([0, 0.5, 1, 2], n),
    "top_k": rng.integers(0, V, n),
    "top_p": rng.uniform(0.2, 1, n),
    "seed": rng.integers(2**32, size=n),
  }
  positions = rng.integers(1000, size=n)
  together = np.array(draw(logits, positions, **rule))
  order = rng.permutation(n)
  permuted = draw(
    logits[order],
    positions[order],
    **{name: value[order] for name, value in rule.items()},
  )
  np.testing.assert_array_equal(np.array(permuted), together[:, order])
  for i in range(0, n, 5):
    alone = draw(
      logits[i : i + 1],
      positions[i],
      **{name: value[i] for name, value in rule.items()},
    )
    np.testing.assert_array_equal(np.array(alone), together[:, i : i + 1])


def test_a_poisoned_row_is_flagged_and_disturbs_no_other():
  logits = tied_logits(7, seed=7)
  rule = {"seed": np.arange(7), "top_k": 20, "top_p": 0.9}
  clean = np.array(draw(logits, **rule))
  logits[2, 5], logits[4] = np.nan, -np.inf
  for temperature in (0.0, 1.0):
    ids, logs = draw(logits, temperature=temperature, **rule)
    assert np.isnan(logs).tolist() == [i in (2, 4) for i in range(7)]
    assert ((0 <= ids) & (ids < V)).all()
  others = [0, 1, 3, 5, 6]
  np.testing.assert_array_equal(
    np.array([ids, logs])[:, others], clean[:, others]
  )


def test_log_probabilities_are_those_of_the_raw_logits():
  logits = np.random.default_rng(8).normal(0, 3, (11, V)).astype(np.float32)
  for rule in ({"temperature": 0.0}, {"temperature": 3.0, "top_k": 5}):
    ids, logs = draw(logits, n_ids=V - 4, seed=np.arange(11), **rule)
    for row, i, log in zip(logits, ids, logs, strict=True):
      expected = np.log(reference_probabilities(row, 1.0)[i])
      assert log == pytest.approx(expected, abs=2e-6)


def test_padding_of_the_vocabulary_is_never_drawn():
  logits = np.zeros((200, V))
  logits[:, 30:] = 20.0
  for temperature in (0.0, 1.0):
    ids, _ = draw(
      logits, n_ids=30, temperature=temperature, seed=np.arange(200)
    )
    assert ids.max() == (29 if temperature else 0)


def test_one_program_serves_all_parameters_and_sorts_nothing():
  logits, positions = jnp.zeros((3, 5)), jnp.zeros(3, jnp.int32)
  before = sample._cache_size()
  for rule in ((0.0, 0, 1.0), (1.0, 2, 0.5), ((0, 1, 2), 9, (0.1, 1, 0.3))):
    jax.block_until_ready(
      sample(logits, parameters(3, *rule), positions, n_ids=5)
    )
  assert sample._cache_size() == before + 1
  program = str(
    jax.make_jaxpr(sample, static_argnums=3)(
      logits, parameters(3), positions, 5
    )
  )
  assert "argmax[" in program
  assert "sort[" not in program and "top_k[" not in program
