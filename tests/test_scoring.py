"""One text, one likelihood, one number: `Sampler.score` is `lm.evaluate`."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import test_evaluate

from lm import schema
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import perplexity
from lm.sample import sampler as sampler_lib

TEXT = "def f(x):\n  return x  # one of several, é and all\n"
BOS, EOS = test_evaluate.BYTES.bos, test_evaluate.BYTES.eos
step = functools.cache(perplexity.eval_step)


@functools.cache
def sampler_of(context):
  cfg = dataclasses.replace(test_evaluate.MODEL, context_length=context)
  params = jax.tree.map(np.copy, test_evaluate.PARAMS)
  params["position_embed"] = params["position_embed"][:context]
  return sampler_lib.Sampler(cfg, params, tokenizer_lib.Tokenizer())


def evaluated(sampler, text, stride):
  (found,) = perplexity.evaluate_source(
    step(sampler.cfg),
    test_evaluate.PARAMS
    | {
      "position_embed": test_evaluate.PARAMS["position_embed"][
        : sampler.cfg.context_length
      ]
    },
    test_evaluate.Listed([text]),
    sampler.tokenizer,
    n_rows=2,
    context=sampler.cfg.context_length,
    stride=stride or sampler.cfg.context_length,
  )
  return found.totals


# With bos, shorter than the context of 11, as long, by one longer, and far.
@pytest.mark.parametrize("n", [1, 5, 9, 10, 11, 12, len(TEXT)])
@pytest.mark.parametrize("context, stride", [(11, None), (11, 4), (1, None)])
def test_a_score_is_the_evaluation_of_the_document(n, context, stride):
  sampler, text = sampler_of(context), TEXT[:n]
  totals = evaluated(sampler, text, stride)
  found = sampler.score(text, eos=True, stride=stride)
  assert found.total == pytest.approx(-totals.nll, rel=1e-6)
  assert found.n_bytes == totals.n_bytes
  bits = -found.total / math.log(2) / found.n_bytes
  assert bits == pytest.approx(totals.bits_per_byte, rel=1e-6)
  plain = sampler.score(text, stride=stride)
  without = totals.nll - totals.nll_eos
  # Without eos the last window may begin a token earlier.
  if stride is None and (n <= context or context == 1):
    assert plain.total == pytest.approx(-without, rel=1e-6)


def test_ids_are_taken_as_they_are():
  """The first is not scored, be it bos or not."""
  sampler = sampler_of(11)
  ids = sampler.tokenizer.encode(TEXT)
  assert sampler.encode(ids) == ids and sampler.encode(TEXT) == [BOS, *ids]
  assert sampler.encode([]) == sampler.encode("") == [BOS]
  assert sampler.score([BOS, *ids]) == sampler.score(TEXT)
  found = sampler.score(ids)
  assert found.token_ids == ids[1:] and len(found.log_probabilities) == 50
  assert found.log_probabilities[0] != sampler.score(TEXT).log_probabilities[1]
  assert sampler.score([BOS]).log_probabilities == []
  assert sampler.score("", eos=True).token_ids == [EOS]


def test_alternatives_change_no_score():
  sampler = sampler_of(11)
  plain, more = sampler.score(TEXT), sampler.score(TEXT, 3)
  assert plain.log_probabilities == more.log_probabilities
  assert [len(others) for others in more.alternatives] == [3] * 51
  assert plain.alternatives == [[]] * 51


@pytest.mark.parametrize("stride", [0, 12])
def test_a_stride_beyond_the_context_is_refused(stride):
  with pytest.raises(schema.ConfigError, match="from 1 to the context"):
    sampler_of(11).score(TEXT, stride=stride)
