"""The sampling rules against Hugging Face's logits processors.

Their results are in a golden file, so that no test needs torch. Remaking it is
legitimate when cases are added, never when this test fails
(tests/goldens/make_rules.py).
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.sample import rules

FILE = pathlib.Path(__file__).parent / "goldens/hf_rules.npz"
RULES = (
  "repetition_penalty",
  "temperature",
  "min_p",
  "top_k",
  "top_p",
  "typical_p",
)


@pytest.fixture(scope="module")
def cases():
  with np.load(FILE) as file:
    return {name: file[name] for name in file}


@pytest.fixture(scope="module")
def processed(cases):
  """Ours, log-probabilities of all rows by one program."""
  n_rows, n_ids = cases["logits"].shape
  prompt = np.zeros((n_rows, n_ids), bool)
  np.put_along_axis(prompt, cases["prompts"], True, axis=1)
  none = jnp.zeros(n_rows)
  dtypes = {"top_k": jnp.int32, "temperature_last": bool}
  given = {field.name for field in dataclasses.fields(rules.Parameters)}
  parameters = rules.Parameters(
    **{
      name: jnp.asarray(cases[name], dtypes.get(name, jnp.float32))
      for name in given & cases.keys()
    },
    frequency_penalty=none,
    presence_penalty=none,
    seed=none.astype(jnp.uint32),
  )
  past = rules.Past(jnp.asarray(prompt), jnp.zeros((n_rows, n_ids), jnp.int32))
  process = jax.jit(functools.partial(rules.process, n_ids=n_ids))
  scores = process(jnp.asarray(cases["logits"]), parameters, past)
  return np.asarray(jax.nn.log_softmax(scores))


def test_every_combination_keeps_the_same_ids_with_the_same_probability(
  cases, processed
):
  np.testing.assert_array_equal(
    np.isfinite(processed), np.isfinite(cases["expected"])
  )
  np.testing.assert_allclose(processed, cases["expected"], rtol=0, atol=3e-5)


def test_every_rule_bites_in_many_cases(cases):
  """Alone, and in both places of the temperature."""
  neutral = {"repetition_penalty": 1, "temperature": 1, "min_p": 0, "top_k": 0}
  on = np.array([cases[name] != neutral.get(name, 1) for name in RULES])
  on = np.vstack([on, (cases["bias"] != 0).any(axis=1)])
  logits = cases["logits"].astype(np.float64)
  raw = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  changed = ~np.isclose(raw, cases["expected"], atol=1e-3).all(axis=1)
  for last in (False, True):
    here = changed & (cases["temperature_last"] == last)
    for rule in on:
      assert (here & rule & (on.sum(axis=0) == 1)).sum() >= 2
      assert (here & rule & (on.sum(axis=0) > 2)).sum() > 50
