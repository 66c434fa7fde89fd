"""Beam search against Hugging Face's, exhaustive search, and greedy drawing."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from test_sample import (
  GEMMA2,
  GPT2,
  LLAMA,
  full_logits,
  params_of,
  reforward,
  sampler_of,
)

from lm import schema
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder
from lm.sample import beam
from lm.sample import sampler as sampler_lib
from lm.sample.request import Request

TOKENIZER = tokenizer_lib.Tokenizer()
N_NEW = 10
CFG = dataclasses.replace(
  families.GPT2, vocab_size=tokenizer_lib.BYTES_SIZE, context_length=32
)


def weights():
  """Random ones, whose logits are far from uniform."""
  params = reference.random_params(CFG, seed=4)
  params["final_norm"]["scale"] *= 3
  return params


@functools.cache
def golden():
  path = pathlib.Path(__file__).parent / "goldens/hf_beams.npz"
  with np.load(path) as file:
    cases = json.loads(str(file["cases"]))
    return cases, file["ids"], file["scores"]


@functools.cache
def small():
  params = jax.tree.map(jnp.asarray, weights())
  return sampler_lib.Sampler(CFG, params, TOKENIZER)


def score(result, length_penalty):
  n_tokens = len(result.token_ids)
  return math.fsum(result.log_probabilities) / n_tokens**length_penalty


def test_equals_transformers():
  """Every hypothesis, its place and its score."""
  reasons = set()
  for case, ids, scores in zip(*golden(), strict=True):
    prompt, stop_ids, n_beams, length_penalty, early = case
    prompt = [TOKENIZER.bos, *prompt]
    request = Request(prompt, max_new_tokens=N_NEW, stop_ids=stop_ids)
    found = beam.search(small(), request, n_beams, length_penalty, early)
    expected = [[i for i in row if i >= 0] for row in ids[:n_beams].tolist()]
    assert [result.token_ids for result in found] == expected, case
    np.testing.assert_allclose(
      [score(result, length_penalty) for result in found],
      scores[:n_beams],
      rtol=2e-6,
    )
    for result in found:
      ended = result.token_ids[-1] in (TOKENIZER.eos, *stop_ids)
      assert result.finish_reason == ("eos" if ended else "length")
      reasons.add(result.finish_reason)
  assert reasons == {"eos", "length"}


def test_the_goldens_tell_settings_apart():
  """Else equality to them would show little."""
  by_early, by_penalty = {}, {}
  for case, ids, _ in zip(*golden(), strict=True):
    *same, length_penalty, early = case
    key = str(same)
    by_early.setdefault((key, length_penalty), []).append(ids.tobytes())
    by_penalty.setdefault((key, early), []).append(ids.tobytes())
  apart = [len(set(found)) for found in by_early.values()]
  assert 3 in apart
  assert max(len(set(found)) for found in by_penalty.values()) >= 3


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_equals_exhaustive_search(length_penalty):
  """All texts of up to 4 tokens over eos and three others: 121 of them."""
  letters = TOKENIZER.encode("abc")
  allowed = [TOKENIZER.eos, *letters]
  prompt = [TOKENIZER.bos, *TOKENIZER.encode("ab")]
  starts = [
    list(s) for n in range(4) for s in itertools.product(letters, repeat=n)
  ]
  ids = np.zeros((len(starts), len(prompt) + 3), np.int32)
  for row, start in enumerate(starts):
    ids[row, : len(prompt) + len(start)] = prompt + start
  logits = np.asarray(full_logits(GPT2, params_of(GPT2), jnp.asarray(ids)))
  logs = {}
  for row, start in enumerate(starts):
    x = logits[row, len(prompt) + len(start) - 1][allowed].astype(np.float64)
    x -= x.max() + np.log(np.sum(np.exp(x - x.max())))
    for i, log in zip(allowed, x, strict=True):
      logs[*start, i] = log
  worth = {
    text: sum(logs[text[: n + 1]] for n in range(len(text)))
    / len(text) ** length_penalty
    for text in logs
    if len(text) == 4 or text[-1] == TOKENIZER.eos
  }
  best = sorted(worth, key=lambda text: -worth[text])
  assert len(best) == 121
  request = Request(
    "ab",
    max_new_tokens=4,
    forbidden=[i for i in range(TOKENIZER.size) if i not in allowed],
    processed=True,
  )
  found = beam.search(sampler_of(GPT2), request, 128, length_penalty, "never")
  assert [tuple(r.token_ids) for r in found] == best
  np.testing.assert_allclose(
    [score(r, length_penalty) for r in found],
    [worth[text] for text in best],
    atol=1e-4,
  )


@pytest.mark.parametrize("cfg", [GPT2, GEMMA2], ids=["gpt2", "gemma2"])
def test_one_beam_is_greedy(cfg):
  """With every rule that a search follows, and beyond a sliding window."""
  sampler = sampler_of(cfg)
  for rules in (
    {},
    {"repetition_penalty": 1.5, "max_new_tokens": 12},
    {
      "frequency_penalty": 0.7,
      "presence_penalty": 0.5,
      "logit_bias": {TOKENIZER.eos: 9.0, 70: 5.0},
      "min_tokens": 5,
      "forbidden": [99, 200],
      "processed": True,
    },
  ):
    request = Request("def", **{"max_new_tokens": 20, **rules})
    greedy = dataclasses.replace(request, temperature=0.0, processed=False)
    (expected,) = sampler.generate([greedy])
    (found,) = beam.search(sampler, request, 1)
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    if not request.processed:
      np.testing.assert_allclose(
        found.log_probabilities, expected.log_probabilities, atol=1e-5
      )


def test_more_beams_find_what_one_misses():
  request = Request("x", max_new_tokens=8, min_tokens=8)
  one, *_ = beam.search(sampler_of(LLAMA), request, 1)
  found = beam.search(sampler_of(LLAMA), request, 8)
  sums = [math.fsum(r.log_probabilities) for r in found]
  assert len({str(r.token_ids) for r in found}) == 8
  assert sums == sorted(sums, reverse=True)
  assert sums[0] > math.fsum(one.log_probabilities) + 0.1


def test_each_beam_is_penalised_by_its_own_past():
  """Log-probabilities again, from each hypothesis alone, without cache."""
  request = Request(
    "x",
    max_new_tokens=8,
    repetition_penalty=1.1,
    frequency_penalty=0.3,
    presence_penalty=0.1,
    processed=True,
  )
  found = beam.search(sampler_of(LLAMA), request, 8)
  assert any(len(set(r.token_ids)) < len(r.token_ids) for r in found)
  for result in found:
    seen = [TOKENIZER.bos, *TOKENIZER.encode("x")]
    n_prompt, logits = len(seen), reforward(LLAMA, "x", result.token_ids)
    for x, i, log in zip(
      logits, result.token_ids, result.log_probabilities, strict=True
    ):
      x = x.astype(np.float64)
      known = np.unique(seen)
      x[known] = np.where(x[known] > 0, x[known] / 1.1, x[known] * 1.1)
      drawn, counts = np.unique(seen[n_prompt:], return_counts=True)
      x[drawn.astype(int)] -= 0.3 * counts + 0.1
      x -= x.max()
      assert abs(x[i] - np.log(np.sum(np.exp(x))) - log) < 1e-4
      seen.append(i)


@pytest.mark.slow
def test_a_mesh_changes_no_token_and_an_int8_cache_little():
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
  with jax.set_mesh(mesh):
    init = functools.partial(decoder.init_params, LLAMA)
    params = jax.jit(init)(jax.random.key(0))
  request = Request("ab(", max_new_tokens=9)
  sharded = sampler_lib.Sampler(LLAMA, params, TOKENIZER, mesh)
  one = sampler_lib.Sampler(LLAMA, jax.device_get(params), TOKENIZER)
  found, expected = (beam.search(s, request, 3) for s in (sharded, one))
  assert [r.token_ids for r in found] == [r.token_ids for r in expected]
  rough = sampler_lib.Sampler(
    LLAMA, jax.device_get(params), TOKENIZER, int8_cache=True
  )
  best = beam.search(rough, request, 3)[0]
  assert abs(score(best, 1.0) - score(expected[0], 1.0)) < 0.1


def test_nan_is_an_error():
  params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params_of(GPT2))
  sampler = sampler_lib.Sampler(GPT2, params, TOKENIZER)
  for n_beams in (1, 3):
    found = beam.search(sampler, Request("a", max_new_tokens=5), n_beams)
    assert {r.finish_reason for r in found} == {"error"}


def test_nothing_to_find():
  (found,) = beam.search(small(), Request("a", max_new_tokens=0), 3)
  assert found.token_ids == [] and found.finish_reason == "length"


@pytest.mark.parametrize(
  "fields, options, message",
  [
    ({"temperature": 0.5}, {}, "temperature=0.5: means nothing"),
    ({"seed": 5}, {}, "seed=5: means nothing"),
    ({"stop": ["a"]}, {}, "stop=.*ends at ids"),
    ({"n_samples": 2}, {}, "n_samples=2"),
    ({}, {"n_beams": 0}, "n_beams=0"),
    ({}, {"n_beams": 100_000}, r"n_beams=100000: must be in \[1, 256\]"),
    ({}, {"length_penalty": math.nan}, "length_penalty=nan"),
    ({}, {"early_stopping": "always"}, "early_stopping='always'"),
    ({"max_new_tokens": 99}, {}, "at most"),
  ],
)
def test_refuses_in_one_line(fields, options, message):
  with pytest.raises(schema.ConfigError, match=message) as error:
    beam.search(small(), Request("a", **fields), **{"n_beams": 2, **options})
  assert "\n" not in str(error.value)
