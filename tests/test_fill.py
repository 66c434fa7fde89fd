"""Filling gaps: masks, sentinels, and the text between two others."""

import dataclasses
import functools
import json

import doors
import jax
import numpy as np
import pytest
from test_explain import CFG, TOKENIZER, params, save_run
from test_sample import LLAMA, WIDE, params_of, sampler_of

from lm import batch as batch_lib
from lm import schema
from lm.data import marked
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder
from lm.sample import sampler as sampler_lib
from lm.sample.request import Request

T = tokenizer_lib.Tokenizer()
MASK, EOS, BOS = T.mask, T.eos, T.bos


def in_both_directions(cfg, weights, ids) -> np.ndarray:
  """log P(id at each position | the whole text), float64 [T, V]."""
  batch = dataclasses.replace(
    batch_lib.unscored(np.array([ids])), prefix=np.ones((1, len(ids)), bool)
  )
  hidden, _ = jax.jit(functools.partial(decoder.forward, cfg))(weights, batch)
  logits = decoder.bind(cfg, weights).logits(hidden)
  x = np.asarray(logits, np.float64)[0]
  x -= x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def check(found, logs, n):
  """Candidates and entropies against log-probabilities of all positions."""
  for mask in found:
    own = logs[mask.place]
    entropy = -np.sum(np.exp(own) * own) / np.log(2)
    np.testing.assert_allclose(mask.entropy, entropy, atol=1e-4)
    best = np.argsort(-own[: T.size], kind="stable")[:n]
    assert [c.id for c in mask.candidates] == best.tolist()
    np.testing.assert_allclose(
      [c.log_probability for c in mask.candidates], own[best], atol=1e-5
    )


@pytest.mark.parametrize("name", WIDE)
def test_masks_are_those_of_a_forward_pass_in_both_directions(name):
  """One mask, and more than one block of them; the ends of the text too."""
  for text in ("def f(<mask>):", "<mask>" * 19 + "x<mask>"):
    ids = marked.mask_ids(T, text)
    found = sampler_of(WIDE[name]).fill(text, 4)
    assert [m.place for m in found] == [
      i for i, token in enumerate(ids) if token == MASK
    ]
    check(found, in_both_directions(WIDE[name], params_of(WIDE[name]), ids), 4)


def test_masks_on_a_mesh():
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
  with jax.set_mesh(mesh):
    make = jax.jit(functools.partial(decoder.init_params, LLAMA))
    placed = make(jax.random.key(0))
  sampler = sampler_lib.Sampler(LLAMA, placed, T, mesh)
  ids = marked.mask_ids(T, "a<mask>b<mask>")
  logs = in_both_directions(LLAMA, params_of(LLAMA), ids)
  check(sampler.fill("a<mask>b<mask>", 3), logs, 3)


def test_what_stands_after_a_mask_counts():
  one, other = (
    sampler_of(LLAMA).fill(f"def f(<mask>){end}", 1) for end in (":", "!")
  )
  assert one[0].candidates != other[0].candidates


def test_texts_with_marks_are_ids():
  encode = T.encode
  assert marked.mask_ids(T, "a<mask><mask>b <eos>") == (
    [BOS, *encode("a"), MASK, MASK, *encode("b <eos>"), EOS]
  )
  first, second = T.sentinels[:2]
  assert marked.sentinel_ids(T, "<sentinel_0>b<mask><sentinel_1>") == (
    [BOS, first, *encode("b<mask>"), second]
  )
  drawn = [*encode("no"), first, *encode("ab"), second, first, EOS]
  assert marked.spans(T, drawn) == {"<sentinel_0>": "ab", "<sentinel_1>": ""}
  text = "x<sentinel_0>y<sentinel_1>z<sentinel_2>"
  parts = marked.filled(text, marked.spans(T, drawn))
  assert "".join(part for part, _ in parts) == "xabyz<sentinel_2>"
  assert [part for part, own in parts if own] == ["ab", ""]
  half = encode("é")
  assert marked.fill_masks(T, "a<mask><mask>b<mask>", [*half, EOS]) == (
    "aéb<eos>"
  )


@pytest.mark.parametrize(
  "fill, message",
  [
    (lambda: marked.mask_ids(T, "a"), "fill='a': has no <mask>"),
    (lambda: marked.mask_ids(T, "<sentinel_0>"), "lm.sample --fill"),
    (lambda: marked.sentinel_ids(T, "a<mask>"), "lm.explain --fill"),
    (lambda: marked.sentinel_ids(T, "<sentinel_1>"), "in order, each once"),
    (lambda: marked.sentinel_ids(T, 2 * "<sentinel_0>"), "in order"),
    (lambda: marked.sentinel_ids(T, "<sentinel_100>"), "at most 100"),
    (lambda: sampler_of(LLAMA).fill("<mask>" * 100), "tokens=102: the text"),
    (lambda: sampler_of(LLAMA).fill("<mask>", 385), "candidates=385: must"),
  ],
)
def test_texts_that_cannot_be_filled_are_refused(fill, message):
  with pytest.raises(schema.ConfigError, match=message):
    fill()


# --- the commands ------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("filled")
  save_run(str(path), params())
  return f"--workdir={path}"


@pytest.fixture(scope="module")
def sampler():
  return sampler_lib.Sampler(CFG, params(), TOKENIZER)


def test_explain_fills_masks(run, sampler):
  text = "if <mask>x:<mask>"
  calls = [f"--fill={text}", "--candidates=3"], [f"--fill={text}", "--json"]
  found = doors.many("lm.explain", [[run, *call] for call in calls])
  assert [code for code, _ in found] == [0, 0]
  masks, out = sampler.fill(text, 5), json.loads(found[1][1])
  likeliest = [m.candidates[0].id for m in masks]
  filled = marked.fill_masks(TOKENIZER, text, likeliest)
  assert (out["text"], out["filled"]) == (text, filled)
  for mask, shown in zip(masks, out["masks"], strict=True):
    assert shown["place"] == mask.place
    assert [c["id"] for c in shown["candidates"]] == [
      c.id for c in mask.candidates
    ]
    np.testing.assert_allclose(
      [c["probability"] for c in shown["candidates"]],
      np.exp([c.log_probability for c in mask.candidates]),
      rtol=1e-4,
    )
  lines = found[0][1].splitlines()
  assert lines[0] == "mask 1, between <bos>if\u2423 and x:<mask><eos>"
  ranks = [line.split()[0] for line in lines if line.strip()[:1].isdigit()]
  assert ranks == ["1", "2", "3"] * 2
  share = np.exp(masks[0].candidates[0].log_probability)
  assert f"{share:.2%}" in found[0][1]
  assert found[0][1].rstrip("\n").endswith(filled.rstrip("\n"))


def test_sample_fills_sentinels(run, sampler):
  """The model is made to name the sentinels; the text around them is kept."""
  first, second = TOKENIZER.sentinels[:2]
  text, bias = "a<sentinel_0>b<sentinel_1>c", {first: 7.0, second: 7.0}
  others = [*TOKENIZER.sentinels[2:]]
  rules = ["--max_new_tokens=30", "--seed=4", "--n_samples=2"]
  rules += [f"--logit_bias={i}:{value}" for i, value in bias.items()]
  rules += [f"--forbidden={i}" for i in others]
  rules += ["--frequency_penalty=2"]
  calls = [rules, ["--noecho", *rules], ["--json", *rules]]
  found = doors.many("lm.sample", [[run, f"--fill={text}", *c] for c in calls])
  assert [code for code, _ in found] == [0, 0, 0]
  request = Request(
    marked.sentinel_ids(TOKENIZER, text),
    max_new_tokens=30,
    seed=4,
    n_samples=2,
    logit_bias=bias,
    forbidden=others,
    frequency_penalty=2.0,
    bidirectional_prompt=True,
  )
  results = sampler.generate([request])
  gaps = [marked.spans(TOKENIZER, result.token_ids) for result in results]
  assert all(len(gap) == 2 and any(gap.values()) for gap in gaps)
  wholes = ["".join(p for p, _ in marked.filled(text, gap)) for gap in gaps]
  out = [text for _, text in found]
  for whole, gap in zip(wholes, gaps, strict=True):
    assert f"\n{whole}\n" in out[0] and whole.startswith("a")
    spans = f"{gap['<sentinel_0>']}\n{gap['<sentinel_1>']}\n"
    assert f"---\n{spans}" in out[1]
  assert [r["filled"] for r in json.loads(out[2])["results"]] == wholes


def test_what_ends_a_fill_is_no_part_of_it(run, sampler):
  gap, text = TOKENIZER.sentinels[0], "a<sentinel_0>c"
  rules = {"frequency_penalty": 60.0, "max_new_tokens": 9, "seed": 4}
  request = Request(
    marked.sentinel_ids(TOKENIZER, text),
    logit_bias={gap: 50.0},
    bidirectional_prompt=True,
    **rules,
  )
  (free,) = sampler.generate([request])
  end = next(i for i in free.token_ids[3:] if TOKENIZER.byte_lengths[i])
  arguments = [run, f"--fill={text}", "--json", f"--logit_bias={gap}:50"]
  arguments += [f"--{name}={value}" for name, value in rules.items()]
  found = doors.many(
    "lm.sample",
    [[*arguments, f"--stop_ids={end}"], [*arguments, "--stop=x"]],
  )
  (one,) = json.loads(found[0][1])["results"]
  n = free.token_ids.index(end)
  assert one["finish_reason"] == "eos" and n >= 1
  between = TOKENIZER.decode(free.token_ids[1:n])
  assert (one["text"], one["filled"]) == (between, f"a{between}c")
  assert "--stop: has no part in --fill" in str(found[1][0])


def test_sample_fills_the_gap_between_two_files(run, sampler, tmp_path):
  before, after = tmp_path / "before", tmp_path / "after"
  before.write_text("def f(x):\n")
  after.write_text("\n  return y\n")
  gap = [run, f"--prefix_file={before}", f"--suffix_file={after}"]
  rules = ["--max_new_tokens=5", "--seed=3"]
  calls = [], ["--noecho"], ["--noecho", "--stream"], ["--json"]
  found = doors.many("lm.sample", [[*gap, *rules, *call] for call in calls])
  t = TOKENIZER
  ids = [t.bos, t.fim_prefix, *t.encode("def f(x):\n"), t.fim_suffix]
  ids += [*t.encode("\n  return y\n"), t.fim_middle]
  (result,) = sampler.generate([Request(ids, max_new_tokens=5, seed=3)])
  whole = f"def f(x):\n{result.text}\n  return y\n"
  assert found[:3] == [
    (0, f"{whole}\n"),
    (0, f"{result.text}\n"),
    (0, f"{result.text}\n"),
  ]
  (one,) = json.loads(found[3][1])["results"]
  assert (one["text"], one["filled"]) == (result.text, whole)
