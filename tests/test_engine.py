"""Slots and what goes through them: any company, any length, any help."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sample import (
  LLAMA,
  WIDE,
  full_logits,
  params_of,
  sampler_of,
  token_ids,
  widen,
)

from lm import batch as batch_lib
from lm import schema
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder
from lm.sample import decoding
from lm.sample import sampler as sampler_lib
from lm.sample.request import Request

PROMPTS = ["", "a", "def main(x, y):\n", "x" * 17, "(((", "the same again"]


def requests(n, longest=24):
  """Of all kinds: greedy and not, cut, penalised, short and long."""
  rng = np.random.default_rng(n)
  return [
    Request(
      PROMPTS[i % len(PROMPTS)],
      temperature=float(rng.choice([0.0, 0.7, 1.0])),
      top_k=int(rng.choice([0, 5])),
      top_p=float(rng.choice([0.8, 1.0])),
      repetition_penalty=float(rng.choice([1.0, 1.3])),
      max_new_tokens=int(rng.integers(1, longest)),
      seed=i,
    )
    for i in range(n)
  ]


def serve(engine, wanted, n_steps=7):
  """Results by request, with what is new submitted while others run."""
  waiting, results, numbers = list(wanted), {}, {}
  while waiting or not engine.idle:
    for request in [waiting.pop(0) for _ in range(min(2, len(waiting)))]:
      (number,) = engine.submit(request)
      numbers[number] = request.seed
    for piece in engine.step(n_steps):
      if piece.result is not None:
        results[numbers[piece.job]] = piece.result
  return [results[request.seed] for request in wanted]


def test_fixed_slots_give_the_same_bits():
  """Log-probabilities too, whatever the neighbours, slot and time."""
  sampler, wanted = sampler_of(LLAMA), requests(9)
  alone = []
  for request in wanted:
    alone += serve(sampler.engine(4, 64), [request])
  for order in (range(9), [5, 2, 8, 1, 7, 0, 3, 6, 4]):
    together = serve(sampler.engine(4, 64), [wanted[i] for i in order])
    assert together == [alone[i] for i in order]


def test_a_slot_is_refilled_while_others_go_on():
  sampler = sampler_of(LLAMA)
  long = Request("a", max_new_tokens=60, min_tokens=60)
  short = [Request("b", max_new_tokens=5, seed=i) for i in range(9)]
  engine, ended = sampler.engine(2), []
  for request in [long, *short]:
    engine.submit(request)
  while not engine.idle:
    for piece in engine.step():
      if piece.result is not None:
        ended.append(piece.job)
  assert set(ended[:8]) == set(range(1, 9)) and set(ended[8:]) == {0, 9}


def test_samples_of_a_request_share_one_reading(monkeypatch):
  calls, read = [], decoding.read

  def spy(*args, **options):
    calls.append(1)
    return read(*args, **options)

  monkeypatch.setattr(decoding, "read", spy)
  results = sampler_of(LLAMA).generate(
    [Request("abc", max_new_tokens=4, n_samples=6)], n_slots=4
  )
  assert len(calls) == 1 and len({str(r.token_ids) for r in results}) == 6


def test_a_job_that_is_called_off_frees_its_slot():
  sampler = sampler_of(LLAMA)
  engine = sampler.engine(2, 64)
  requests = [
    Request("a", max_new_tokens=40, min_tokens=40, seed=i) for i in range(4)
  ]
  first, second, third, fourth = (engine.submit(r)[0] for r in requests)
  engine.step(5)
  assert engine.n_free() == 0
  engine.cancel(first)
  engine.cancel(fourth)  # still queued
  engine.cancel(99)
  results = {}
  while not engine.idle:
    for piece in engine.step():
      if piece.result is not None:
        results[piece.job] = piece.result
  assert engine.n_free() == 2
  reasons = [results[job].finish_reason for job in (first, fourth)]
  assert reasons == ["cancelled"] * 2
  assert len(results[first].token_ids) == 5 and not results[fourth].token_ids
  expected = sampler.generate(requests[1:3])
  assert token_ids([results[second], results[third]]) == token_ids(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.DECODERS)
def test_greedy_is_the_full_argmax_over_200_tokens(name):
  """Of each family: over bucket borders, and far beyond each window."""
  cfg = widen(families.ALL[name], n_layers=2)
  # With a scaled embedding a tied head only repeats what it reads.
  tied = cfg.tied_embedding and not cfg.scale_embedding
  cfg = dataclasses.replace(cfg, context_length=256, tied_embedding=tied)
  sampler = sampler_of(cfg)
  (result,) = sampler.generate(
    [Request("def f(", temperature=0.0, max_new_tokens=200, min_tokens=200)]
  )
  before = sampler.encode("def f(")
  ids = np.zeros((1, 256), np.int32)
  ids[0, : len(before) + 200] = before + result.token_ids
  logits = np.array(full_logits(cfg, params_of(cfg), jnp.asarray(ids)))[0]
  logits = logits[len(before) - 1 :][:200, : sampler.tokenizer.size]
  logits[:, sampler.tokenizer.eos] = -np.inf
  assert result.token_ids == np.argmax(logits, axis=1).tolist()
  assert len(set(result.token_ids)) > 3


def test_a_windowed_layer_keeps_hardly_more_than_its_window():
  cfg = widen(families.GEMMA2)
  window = next(w for w in cfg.windows if w is not None)
  cache = sampler_of(cfg).engine(1).state[0][0]
  lengths = {keys.values.shape[2] for keys in cache.keys}
  assert lengths == {window, cfg.context_length}


@pytest.mark.slow
@pytest.mark.parametrize("helper", ["lookup", "itself", "another"])
def test_tokens_proposed_ahead_change_none(helper, monkeypatch):
  """Also with windows, penalties and ends; itself is always right."""
  cfg = widen(families.GEMMA2, n_layers=2)
  plain, tokenizer = sampler_of(cfg), tokenizer_lib.Tokenizer()
  draft = {"lookup": None, "itself": plain}.get(helper, sampler_of(LLAMA))
  ahead = sampler_lib.Sampler(
    cfg, params_of(cfg), tokenizer, ahead=3, draft=draft
  )
  wanted = [*requests(6), Request("abc" * 20, 0.0, max_new_tokens=40)]
  assert token_ids(ahead.generate(wanted)) == token_ids(plain.generate(wanted))
  n_steps, decode = [], decoding.decode

  def spy(*args, **options):
    *state, drawn = decode(*args, **options)
    n_steps.append(int(drawn.n[0]))
    return *state, drawn

  monkeypatch.setattr(decoding, "decode", spy)
  engine = ahead.engine(8, 128)  # as those that `generate` has made
  engine.submit(Request("a", max_new_tokens=16, min_tokens=16, seed=3))
  engine.step(4)
  assert n_steps[0] >= 4 and (helper != "itself" or n_steps == [16])


def test_a_cache_of_8_bits_is_close():
  cfg = LLAMA
  small = sampler_lib.Sampler(
    cfg, params_of(cfg), tokenizer_lib.Tokenizer(), int8_cache=True
  )
  wanted = [Request("def main(x)", max_new_tokens=20, min_tokens=20)]
  (found,) = small.generate(wanted)
  ids = small.encode("def main(x)") + found.token_ids
  exact = sampler_of(cfg).score(ids)
  error = np.abs(
    np.array(found.log_probabilities) - exact.log_probabilities[-20:]
  )
  assert 0 < error.max() < 0.3
  dtypes = {str(x.dtype) for x in jax.tree.leaves(small.engine(1).state[0][0])}
  assert "int8" in dtypes


def test_alternatives_and_log_probabilities_after_the_rules():
  sampler = sampler_of(LLAMA)
  request = Request(
    "abc", temperature=0.5, top_k=3, max_new_tokens=6, alternatives=4
  )
  raw, processed = sampler.generate(
    [request, dataclasses.replace(request, processed=True)]
  )
  assert raw.token_ids == processed.token_ids
  before = sampler.encode("abc")
  ids = np.zeros((1, LLAMA.context_length), np.int32)
  ids[0, : len(before) + 6] = before + raw.token_ids
  logits = np.asarray(full_logits(LLAMA, params_of(LLAMA), jnp.asarray(ids)))
  logits = logits[0, len(before) - 1 :][:6].astype(np.float64)
  for i, row in enumerate(logits):
    logs = row - np.log(np.sum(np.exp(row)))
    order = np.argsort(-logs)[:4]
    assert [a.id for a in raw.alternatives[i]] == order.tolist()
    found = [a.log_probability for a in raw.alternatives[i]]
    np.testing.assert_allclose(found, logs[order], atol=2e-5)
    cut = np.exp(row[order[:3]] / 0.5)
    logs = dict(zip(order[:3].tolist(), np.log(cut / cut.sum()), strict=True))
    token = raw.token_ids[i]
    np.testing.assert_allclose(
      processed.log_probabilities[i], logs[token], atol=2e-5
    )
    assert processed.alternatives[i][3].log_probability == -np.inf


@pytest.mark.parametrize(
  "name",
  [
    "gemma2",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("llama3", "gpt2")),
  ],
)
def test_a_prompt_that_sees_itself_both_ways(name):
  """As one forward pass in which the whole prompt is the prefix, its last token
  included; with a window that is shorter than the prompt (gemma2), after the
  same prompt was read causally, and by proposals of another model.
  """
  cfg, prompt = WIDE[name], "a prompt both ways"
  params = params_of(cfg)
  models = [sampler_of(cfg)]
  if name == "llama3":
    draft = dict(draft=sampler_of(cfg), ahead=2)
    tokenizer = models[0].tokenizer
    models.append(sampler_lib.Sampler(cfg, params, tokenizer, **draft))
  for sampler in models:
    (one, both) = sampler.generate(
      [
        Request(prompt, 0.0, max_new_tokens=5, bidirectional_prompt=way)
        for way in (False, True)
      ],
      n_slots=1,
    )
    ids = sampler.encode(prompt) + both.token_ids
    n = len(ids) - len(both.token_ids)
    batch = dataclasses.replace(
      batch_lib.unscored(np.array([ids])),
      prefix=(np.arange(len(ids)) < n)[None],
    )
    forward = jax.jit(functools.partial(decoder.forward, cfg))
    hidden, _ = forward(params, batch)
    logits = np.asarray(decoder.bind(cfg, params).logits(hidden), np.float64)
    logits = logits[0, n - 1 : -1]
    logs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    found = np.argmax(logits[:, : sampler.tokenizer.size], axis=1).tolist()
    assert both.token_ids == found
    np.testing.assert_allclose(
      both.log_probabilities, logs[np.arange(5), found], atol=1e-5
    )
    assert one.log_probabilities != both.log_probabilities


def test_no_end_before_the_least_and_ends_by_choice():
  tokenizer = tokenizer_lib.Tokenizer()
  sampler = sampler_lib.Sampler(LLAMA, params_of(LLAMA), tokenizer)
  (free,) = sampler.generate([Request("a", max_new_tokens=12, seed=4)])
  end = free.token_ids[2]
  n = free.token_ids.index(end) + 1
  ended, late, none = sampler.generate(
    [
      Request("a", max_new_tokens=12, seed=4, stop_ids=[end]),
      Request("a", max_new_tokens=12, seed=4, stop_ids=[end], min_tokens=12),
      Request("a", max_new_tokens=0),
    ]
  )
  assert ended.token_ids == free.token_ids[:n]
  assert ended.finish_reason == "eos"
  assert ended.text == tokenizer.decode(ended.token_ids[:-1])
  assert end not in late.token_ids and len(late.token_ids) == 12
  assert none.token_ids == [] and none.finish_reason == "length"


def test_a_stream_says_what_generate_says():
  sampler = sampler_of(LLAMA)
  (whole,) = sampler.generate([Request("abc", max_new_tokens=30, seed=1)])
  stop = whole.text[9:12]
  # What ends within the prompt, or begins there, is no match.
  stops = ["bc", "c" + whole.text[0], stop]
  stops = [s for s in stops if s not in whole.text or s is stop]
  wanted = [Request("abc", max_new_tokens=30, seed=1, stop=stops)]
  wanted += requests(3)
  results = sampler.generate(wanted)
  cut = whole.text[: whole.text.index(stop)]
  assert results[0].text == cut and results[0].finish_reason == "stop"
  texts, ids = [""] * 4, [[] for _ in wanted]
  for piece in sampler.stream(wanted):
    texts[piece.job] += piece.text
    ids[piece.job] += piece.token_ids
    assert len(piece.token_ids) <= 1
    if piece.result is not None:
      assert piece.result == results[piece.job]
  assert texts == [result.text for result in results]
  assert ids == token_ids(results)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_score_is_the_sum_of_conditionals(scan_layers):
  text = "def main(x):\n  return x  # é"
  cfg = dataclasses.replace(LLAMA, scan_layers=scan_layers)
  sampler = sampler_of(cfg)
  score = sampler.score(text, alternatives=3)
  ids = sampler.encode(text)
  inputs = np.zeros((1, cfg.context_length), np.int32)
  inputs[0, : len(ids)] = ids
  logits = np.asarray(full_logits(cfg, params_of(cfg), jnp.asarray(inputs)))
  logits = logits[0, : len(ids) - 1].astype(np.float64)
  logs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
  own = logs[np.arange(len(ids) - 1), ids[1:]]
  np.testing.assert_allclose(score.log_probabilities, own, atol=2e-5)
  np.testing.assert_allclose(score.total, own.sum(), rtol=1e-5)
  assert score.ranks == (1 + (logs > own[:, None]).sum(axis=1)).tolist()
  assert score.n_bytes == len(text.encode())
  for found, row in zip(score.alternatives, logs, strict=True):
    assert [a.id for a in found] == np.argsort(-row)[:3].tolist()
  empty = sampler.score("")
  assert empty.token_ids == [] and empty.total == 0


def test_a_long_text_is_scored_once_in_windows():
  """By a stride of half the context; the first window scores all it has."""
  cfg = LLAMA
  sampler, text = sampler_of(cfg), "the quick brown fox " * 15
  ids, context = sampler.encode(text), cfg.context_length
  start = context // 2
  score = sampler.score(text, stride=start)
  assert len(score.log_probabilities) == len(ids) - 1
  np.testing.assert_allclose(
    score.log_probabilities[:context],
    sampler.score(ids[: context + 1]).log_probabilities,
    atol=2e-5,
  )
  late = np.asarray(ids[start : start + context + 1])
  logits = np.asarray(
    full_logits(cfg, params_of(cfg), jnp.asarray(late[None, :-1], jnp.int32))
  )[0].astype(np.float64)
  logs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
  own = logs[np.arange(context), late[1:]]
  np.testing.assert_allclose(
    score.log_probabilities[context : start + context],
    own[context - start :],
    atol=2e-5,
  )


def test_the_next_token_is_the_one_that_is_drawn():
  sampler = sampler_of(LLAMA)
  for request in requests(5):
    look = sampler.next_token(request, n=6)
    (result,) = sampler.generate(
      [dataclasses.replace(request, max_new_tokens=1)]
    )
    assert look.chosen.id == result.token_ids[0]
    log = np.log(look.chosen.probability)
    np.testing.assert_allclose(log, result.log_probabilities[0], atol=2e-5)
    probabilities = [c.probability for c in look.candidates]
    assert probabilities == sorted(probabilities, reverse=True)
    assert [c.rank for c in look.candidates] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(
      look.candidates[3].cumulative, sum(probabilities[:4]), rtol=1e-6
    )
    last = list(look.chosen.stages)[-1]
    assert look.chosen.stages[last] > 0


def test_what_cannot_be_is_refused():
  cfg, tokenizer = LLAMA, tokenizer_lib.Tokenizer()
  params = params_of(cfg)
  for options, message in (
    ({"ahead": 17}, "ahead=17: must be in"),
    ({"draft": sampler_of(cfg)}, "ahead=0: .*at least 1 with a draft"),
    ({"ahead": -1}, "ahead=-1"),
  ):
    with pytest.raises(schema.ConfigError, match=message):
      sampler_lib.Sampler(cfg, params, tokenizer, **options)
  for name, value in {"context_length": 50, "causal": False}.items():
    draft = sampler_of(dataclasses.replace(cfg, **{name: value}))
    with pytest.raises(schema.ConfigError, match=f"draft: its {name} is"):
      sampler_lib.Sampler(cfg, params, tokenizer, ahead=2, draft=draft)
  engine = sampler_of(cfg).engine(1, 32)
  with pytest.raises(schema.ConfigError, match="context of 32"):
    engine.submit(Request("a" * 40))
  assert engine.idle
