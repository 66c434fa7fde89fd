"""Prefill and decoding, token by token, against the NumPy reference."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from lm import batch as batch_lib
from lm import schema
from lm.data import marked
from lm.data import tokenizer as tokenizer_lib
from lm.model import attention, inference, kv_cache
from lm.sample import sampler as sampler_lib

T, READ = 19, 7


def test_an_encoder_fills_masks_and_generates_nothing():
  tokenizer = tokenizer_lib.Tokenizer()
  cfg = dataclasses.replace(
    families.MODERNBERT, vocab_size=tokenizer_lib.BYTES_SIZE
  )
  params = reference.random_params(cfg)
  sampler = sampler_lib.Sampler(cfg, params, tokenizer)
  ids = marked.mask_ids(tokenizer, "ab<mask>cd<mask>e")
  batch = batch_lib.unscored(np.array([ids], np.int32))
  logits = reference.forward(params, cfg, batch)[0, :, : tokenizer.size]
  found = sampler.fill("ab<mask>cd<mask>e", 3)
  assert len(found) == 2
  for mask in found:
    best = np.argsort(-logits[mask.place])[:3].tolist()
    assert [c.id for c in mask.candidates] == best
  request = sampler_lib.Request("ab")
  for refused in (
    lambda: sampler.generate([request]),
    lambda: sampler.beam(request, 2),
    lambda: sampler.score("ab"),
  ):
    with pytest.raises(schema.ConfigError, match="causal=False: every token"):
      refused()


@pytest.mark.parametrize(
  "name", ["gemma3", "starcoder2", "olmo3", "phi3", "smollm3", "residual"]
)
def test_a_kv_cache_changes_no_logit(name):
  """Beyond windows, in patterns of several periods, two tokens a step."""
  cfg = dataclasses.replace(families.ALL[name], scan_layers=False)
  params = reference.random_params(cfg)
  ids = np.random.default_rng(1).integers(cfg.vocab_size, size=(2, T))
  batch = batch_lib.unscored(ids.astype(np.int32))
  graph, state = inference.unroll(cfg, params)

  @jax.jit
  def prefill(state, ids):
    model = nnx.merge(graph, state)
    places = jnp.arange(READ)[None] * jnp.ones((2, 1), jnp.int32)
    tokens = attention.Tokens(places, jnp.ones_like(places), None)
    pairs = inference.prefill(model, ids, tokens)
    lengths = jnp.full(2, READ)
    return kv_cache.of_prompts(model.cfg, pairs, lengths, T, n_new=2)

  @jax.jit
  def step(state, ids, cache):
    model = nnx.merge(graph, state)
    hidden, cache = inference.extend(model, ids, cache)
    cache = dataclasses.replace(cache, lengths=cache.lengths + ids.shape[1])
    return model.logits(hidden), cache

  cache, found = prefill(state, batch.inputs[:, :READ]), []
  for start in range(READ, T, 2):
    logits, cache = step(state, batch.inputs[:, start : start + 2], cache)
    found.append(np.asarray(logits))
  expected = reference.forward(params, cfg, batch)[:, READ:]
  np.testing.assert_allclose(
    np.concatenate(found, axis=1), expected, rtol=0, atol=5e-5
  )
