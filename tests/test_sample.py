"""Sampling from a model, against full forward passes without any cache."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import doors
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import batch as batch_lib
from lm import checkpoint, schema
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder, inference, kv_cache
from lm.sample import decoding
from lm.sample import sampler as sampler_lib

Request = sampler_lib.Request


def widen(cfg, **changes):
  """A family for the bytes tokenizer, with logits far from uniform."""
  size = tokenizer_lib.BYTES_SIZE
  return dataclasses.replace(
    cfg, vocab_size=size, context_length=101, init_scale=0.4, **changes
  )


# Learned positions; windows that end within what was generated, and soft-caps.
GPT2 = widen(families.GPT2)
GEMMA2 = widen(families.GEMMA2, tied_embedding=False, n_layers=2)
# Grouped queries, rotary positions, an untied head; a 2x2x2 mesh can cut it.
LLAMA = widen(families.LLAMA3, n_heads=4, d_mlp=34)
WIDE = {"gpt2": GPT2, "llama3": LLAMA, "gemma2": GEMMA2}


@functools.cache
def params_of(cfg):
  return jax.jit(functools.partial(decoder.init_params, cfg))(jax.random.key(0))


@functools.cache
def sampler_of(cfg):
  return sampler_lib.Sampler(cfg, params_of(cfg), tokenizer_lib.Tokenizer())


def full_logits(cfg, params, inputs):
  return _full_logits(cfg, params, batch_lib.unscored(np.asarray(inputs)))


@functools.partial(jax.jit, static_argnames="cfg")
def _full_logits(cfg, params, batch):
  hidden, _ = decoder.forward(cfg, params, batch)
  return decoder.bind(cfg, params).logits(hidden)


def reforward(cfg, prompt, token_ids):
  """Logits [n, V] from which each of the n tokens was drawn, without cache.

  One padded shape for all, as what follows a position cannot change it.
  """
  tokenizer = tokenizer_lib.Tokenizer()
  before = [tokenizer.bos, *tokenizer.encode(prompt)]
  ids = np.zeros((1, cfg.context_length), np.int32)
  ids[0, : len(before) + len(token_ids)] = before + token_ids
  logits = np.asarray(full_logits(cfg, params_of(cfg), jnp.asarray(ids)))[0]
  return logits[len(before) - 1 :][: len(token_ids)]


def token_ids(results):
  return [result.token_ids for result in results]


@pytest.fixture
def steps(monkeypatch):
  """Tokens that the slowest row drew, a number per program that ran."""
  seen, decode = [], decoding.decode

  def spy(*args, **options):
    *state, drawn = decode(*args, **options)
    seen.append(int(drawn.n.max()))
    return *state, drawn

  monkeypatch.setattr(decoding, "decode", spy)
  return seen


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_cached_logits_equal_the_full_forward_at_every_step(name, n_new):
  """Two prompts of unequal length are read, then 8 steps of `n_new` tokens, of
  which one is taken back where there are several.
  """
  cfg = dataclasses.replace(families.ALL[name], init_scale=0.3, n_layers=2)
  params, lengths, n_prompt, n_steps = params_of(cfg), np.array([5, 2]), 5, 6
  ids = np.random.default_rng(0).integers(
    cfg.vocab_size, size=(2, 23), dtype=np.int32
  )
  expected = np.asarray(full_logits(cfg, params, jnp.asarray(ids)))
  graph, state = inference.unroll(cfg, params)
  prompt = np.where(
    np.arange(n_prompt) < lengths[:, None], ids[:, :n_prompt], 36
  )
  cache = decoding.read(
    graph,
    state,
    jnp.asarray(prompt),
    jnp.asarray(lengths, jnp.int32),
    longest=23,
    n_new=n_new,
  )

  @jax.jit
  def extend(inputs, cache):
    model = nnx.merge(graph, state)
    hidden, cache = inference.extend(model, inputs, cache)
    return model.logits(hidden), cache

  rows = np.arange(2)[:, None]
  for _ in range(n_steps):
    at = np.asarray(cache.lengths)[:, None] + np.arange(n_new)
    new = ids[rows, at]
    new[:, n_new - 1 :] += n_new > 1  # a mistake, to be taken back
    found, cache = extend(jnp.asarray(new % cfg.vocab_size), cache)
    right = max(1, n_new - 1)
    np.testing.assert_allclose(
      found[:, :right], expected[rows, at][:, :right], atol=1e-5
    )
    cache = dataclasses.replace(cache, lengths=cache.lengths + right)


@pytest.mark.parametrize("name", WIDE)
def test_greedy_is_the_argmax_of_the_full_forward(name):
  """70 tokens, over the borders of prompt buckets and of powers of two."""
  cfg = WIDE[name]
  prompts = ["", "a" * 14, "def main(x, y):\n"]
  requests = [
    Request(prompt, temperature=0.0, max_new_tokens=70) for prompt in prompts
  ]
  for prompt, result in zip(
    prompts, sampler_of(cfg).generate(requests), strict=True
  ):
    logits = reforward(cfg, prompt, result.token_ids)
    size = sampler_of(cfg).tokenizer.size
    assert result.token_ids == np.argmax(logits[:, :size], axis=1).tolist()
    logs = jax.nn.log_softmax(logits)[
      np.arange(len(logits)), np.array(result.token_ids)
    ]
    np.testing.assert_allclose(result.log_probabilities, logs, atol=2e-5)
    assert len(set(result.token_ids)) > 3
    ended = result.token_ids[-1] == sampler_of(cfg).tokenizer.eos
    assert ended or len(result.token_ids) == 70


MIXED = [
  Request("if a", temperature=0.0, max_new_tokens=9),
  Request("", temperature=1.0, top_k=7, max_new_tokens=20, seed=3),
  Request("x = [1, 2, 3]", temperature=0.8, top_p=0.9, max_new_tokens=13),
  Request("the same again", temperature=1.5, max_new_tokens=20, seed=11),
]


def test_a_request_gets_the_same_tokens_in_any_company():
  sampler = sampler_of(LLAMA)
  together = sampler.generate(MIXED)
  order = [3, 0, 1, 2]
  permuted = sampler.generate([MIXED[i] for i in order])
  assert token_ids(permuted) == [together[i].token_ids for i in order]
  for i, request in enumerate(MIXED):
    assert token_ids(sampler.generate([request])) == [together[i].token_ids]
  # Nor does it matter that another asks for the very same.
  twice = sampler.generate([MIXED[2]] * 3)
  assert token_ids(twice) == [together[2].token_ids] * 3
  assert len({str(ids) for ids in token_ids(together)}) == 4


def test_samples_of_a_request_are_those_of_seeds_that_follow_each_other():
  sampler = sampler_of(LLAMA)
  request = Request("def ", max_new_tokens=11, seed=5, n_samples=3)
  results = sampler.generate([request, Request("x", max_new_tokens=3)])
  assert [result.seed for result in results] == [5, 6, 7, 0]
  single = dataclasses.replace(request, seed=6, n_samples=1)
  assert token_ids(sampler.generate([single])) == [results[1].token_ids]
  assert results[0].token_ids != results[1].token_ids


def test_eos_ends_each_row_and_the_loop_ends_with_the_last(steps):
  """Any id can be made eos: the continuation must be cut after it."""
  n = 30
  tokenizer = tokenizer_lib.Tokenizer()
  sampler = sampler_lib.Sampler(LLAMA, params_of(LLAMA), tokenizer)
  tokenizer.eos = never = tokenizer.size - 1
  requests = [
    Request(prompt, max_new_tokens=n, seed=i, top_k=4, forbidden=[never])
    for i, prompt in enumerate(["a", "hello", "", "(((("])
  ]
  whole = token_ids(sampler.generate(requests))
  assert [len(ids) for ids in whole] == [n] * 4 and steps == [n]
  lengths = set()
  for eos in (whole[0][0], whole[1][4], whole[3][n - 1], *whole[2][7:9]):
    tokenizer.eos = eos
    results = sampler.generate(requests)
    cut = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in whole]
    assert token_ids(results) == cut
    assert steps[-1] == max(map(len, cut))
    for result in results:
      ended = result.token_ids[-1] == eos
      assert result.finish_reason == ("eos" if ended else "length")
      assert len(result.log_probabilities) == len(result.token_ids)
    lengths |= set(map(len, cut))
  assert 1 in lengths and n in lengths
  # One token each, whatever it is.
  ones = [dataclasses.replace(r, max_new_tokens=1) for r in requests]
  assert token_ids(sampler.generate(ones)) == [ids[:1] for ids in whole]
  assert steps[-1] == 1
  # Every row ends early.
  tokenizer.eos = whole[0][2]
  sampler.generate([requests[0]] * 4)
  assert steps[-1] == whole[0].index(whole[0][2]) + 1


def test_the_text_is_that_of_the_tokens_without_eos():
  tokenizer = tokenizer_lib.Tokenizer()
  sampler = sampler_lib.Sampler(LLAMA, params_of(LLAMA), tokenizer)
  (result,) = sampler.generate([Request("a", max_new_tokens=20, seed=2)])
  assert result.text == tokenizer.decode(result.token_ids)
  tokenizer.eos = result.token_ids[7]
  (cut,) = sampler.generate([result.request])
  n = result.token_ids.index(tokenizer.eos) + 1
  assert cut.token_ids == result.token_ids[:n]
  assert cut.text == tokenizer.decode([*cut.token_ids[:-1], tokenizer.pad])


def test_a_full_context():
  sampler, context = sampler_of(GPT2), GPT2.context_length
  prompt = "b" * 60
  # With bos there is room for 40 more, which is also what None gives; beside
  # them, the longest prompt there may be.
  exact, rest, last = sampler.generate(
    [
      Request(prompt, temperature=0.0, max_new_tokens=context - 61),
      Request(prompt, temperature=0.0),
      Request("c" * (context - 2)),
    ]
  )
  assert exact.token_ids == rest.token_ids
  logits = reforward(GPT2, prompt, exact.token_ids)
  assert exact.token_ids == np.argmax(logits, axis=1).tolist()
  assert len(exact.token_ids) == 40 or exact.finish_reason == "eos"
  assert len(last.token_ids) == 1


def test_bos_stands_in_front_of_text_and_ids_are_as_they_are():
  sampler = sampler_of(LLAMA)
  bos, ids = sampler.tokenizer.bos, sampler.tokenizer.encode("abc")
  requests = [
    Request(prompt, temperature=0.0, max_new_tokens=5)
    for prompt in ("abc", ids, [bos, *ids])
  ]
  text, bare, whole = token_ids(sampler.generate(requests))
  assert text == whole != bare
  logits = reforward(LLAMA, "abc", text)
  assert text == np.argmax(logits, axis=1).tolist()


def test_a_pad_id_within_a_prompt_is_read():
  """Padding is known by its place, not by its id."""
  sampler = sampler_of(LLAMA)
  ids, pad = sampler.tokenizer.encode("abc"), sampler.tokenizer.pad
  requests = [
    Request(prompt, temperature=0.0, max_new_tokens=3)
    for prompt in (ids, [*ids, pad], [*ids, pad, pad])
  ]
  results = sampler.generate(requests)
  assert len({str(result.log_probabilities) for result in results}) == 3


def test_programs_are_compiled_once_per_bucket():
  cfg = dataclasses.replace(LLAMA, n_layers=1)
  sampler = sampler_of(cfg)

  def compiled(*requests):
    before = decoding.read._cache_size(), decoding.decode._cache_size()
    sampler.generate(requests)
    after = decoding.read._cache_size(), decoding.decode._cache_size()
    return after[0] - before[0], after[1] - before[1]

  # One row, 16 prompt tokens before the last, 64 places.
  assert compiled(Request("a", max_new_tokens=9)) == (1, 1)
  other = Request("abc" * 5 + "d", 0.7, 3, 0.5, max_new_tokens=47, seed=4)
  assert compiled(other) == (0, 0)
  # 17 tokens before the last; then two rows; then 66 places.
  assert compiled(Request("a" * 17, max_new_tokens=9)) == (1, 0)
  assert compiled(Request("a" * 25, max_new_tokens=20)) == (0, 0)
  short = Request("a", max_new_tokens=50)
  assert compiled(short, other) == (0, 1)
  assert compiled(Request("a", max_new_tokens=64)) == (1, 1)
  # Other weights, as after more training, are the same program.
  params = jax.tree.map(lambda x: 2 * x, params_of(cfg))
  sampler = sampler_lib.Sampler(cfg, params, sampler.tokenizer)
  assert compiled(other, short) == (0, 0)


EOS = tokenizer_lib.Tokenizer().eos
ALL_BUT_ENDS = [i for i in range(384) if i not in (7, EOS)]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"prompt": "a" * 101}, "prompt='aaaa.*has 102 tokens.*context of 101"),
    ({"prompt": "a" * 100}, "has 101 tokens.*shorten"),
    ({"prompt": "abc", "max_new_tokens": 98}, "max_new_tokens=98.*at most 97"),
    ({"prompt": [384]}, r"id 384 is not in \[0, 384\)"),
    ({"prompt": [5, -1]}, "id -1 is not in"),
    ({"temperature": -0.5}, "temperature=-0.5: must not be negative"),
    ({"temperature": float("nan")}, "temperature=nan: must be finite"),
    ({"temperature": 1e39}, "temperature=1e.39: must be finite, also in"),
    ({"top_p": 0.0}, r"top_p=0.0: must be in \(0, 1\]"),
    ({"top_p": 1.5}, r"top_p=1.5: must be in \(0, 1\]"),
    ({"top_k": -1}, "top_k=-1: must not be negative"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1: must not be negative"),
    ({"n_samples": 0}, "n_samples=0: must be at least 1"),
    ({"n_samples": 10**9}, "n_samples=1000000000: .* at most 65536"),
    (
      {"prompt": "caf\udce9"},
      r"prompt='caf.udce9': holds half a char",
    ),
    ({"stop": ["ok", "\udce9"]}, r"stop='.udce9': holds half a char"),
    ({"max_new_tokens": 10**18}, "max_new_tokens=1000000000000000000: .* most"),
    # Neither an end nor a forbidden id may be drawn: nothing would be left.
    (
      {"min_tokens": 1, "stop_ids": [7], "forbidden": ALL_BUT_ENDS},
      "min_tokens=1: forbidden leaves eos and stop ids alone",
    ),
    ({"seed": -1}, "seed=-1: must not be negative"),
    (
      {"seed": 2**32 - 1, "n_samples": 2},
      "seed=4294967295.*at most 4294967294",
    ),
  ],
)
def test_requests_that_cannot_be_met_are_refused(changes, message, monkeypatch):
  """Before anything runs: the programs are taken away."""
  monkeypatch.setattr(decoding, "read", None)
  good = Request("ok", max_new_tokens=1)
  bad = dataclasses.replace(Request(), **changes)
  with pytest.raises(schema.ConfigError, match=message):
    sampler_of(LLAMA).generate([good, bad])


def test_no_request_and_a_foreign_tokenizer_are_refused():
  with pytest.raises(schema.ConfigError, match=r"requests=\[\]"):
    sampler_of(LLAMA).generate([])
  cfg = families.LLAMA3
  with pytest.raises(schema.ConfigError, match="384 ids, the model 37"):
    sampler_lib.Sampler(cfg, None, tokenizer_lib.Tokenizer())


def test_nan_ends_its_row_with_an_error_and_no_other():
  tokenizer = tokenizer_lib.Tokenizer()
  (bad,) = tokenizer.encode("Z")
  params = dict(params_of(LLAMA))
  params["embed"] = params["embed"].at[bad].set(jnp.nan)
  sampler = sampler_lib.Sampler(LLAMA, params, tokenizer)
  requests = [
    Request(prompt, max_new_tokens=4, temperature=0.0)
    for prompt in ("aZ", "a", "b")
  ]
  poisoned, *clean = sampler.generate(requests)
  assert poisoned.finish_reason == "error"
  assert len(poisoned.token_ids) == 1
  assert clean == sampler_of(LLAMA).generate(requests)[1:]


def test_weights_in_the_compute_dtype_change_no_bit():
  """Casting once is casting at every use."""
  cfg = dataclasses.replace(families.BIASED, dtype="bfloat16", n_layers=1)
  params = params_of(cfg)
  graph, state = inference.unroll(cfg, params)
  dtypes = {str(x.dtype) for x in jax.tree.leaves(state)}
  assert dtypes == {"bfloat16", "float32"}

  @jax.jit
  def logits(state):
    model = nnx.merge(graph, state)
    places = jnp.arange(7)[None]
    cache = kv_cache.empty(cfg, 1, 7)
    return model.logits(inference.extend(model, places, cache)[0])

  @jax.jit
  def unroll(params):
    return nnx.split(decoder.bind(cfg, params).unroll())[1]

  uncast = unroll(params)
  np.testing.assert_array_equal(logits(state), logits(uncast))


def test_a_mesh_changes_no_token():
  """Float32 on 2x2x2 devices; five rows do not divide by data * fsdp = 4."""
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
  with jax.set_mesh(mesh):
    make = jax.jit(functools.partial(decoder.init_params, LLAMA))
    params = make(jax.random.key(0))
  assert not params["embed"].sharding.is_fully_replicated
  sampler = sampler_lib.Sampler(LLAMA, params, tokenizer_lib.Tokenizer(), mesh)
  laid = {
    axis for x in jax.tree.leaves(sampler.state) for axis in x.sharding.spec
  }
  assert laid == {None, "tensor"}  # gathered over fsdp once, not at each step
  found = sampler.generate([*MIXED, MIXED[1]])
  expected = sampler_of(LLAMA).generate(MIXED)
  expected.append(expected[1])
  assert token_ids(found) == token_ids(expected)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(
      one.log_probabilities, other.log_probabilities, atol=2e-5
    )


def save_run(path, cfg):
  """A run directory of two checkpoints: steps 3 and 7."""
  config = config_lib.Config()
  config.model, config.tokenizer.kind = cfg, "bytes"
  config.train.sequence_length = 100
  tokenizer = tokenizer_lib.Tokenizer().to_json()
  checkpoints = checkpoint.Checkpoints(path, config.checkpoint)
  params = params_of(cfg)
  for step, factor in ((3, 2), (7, 1)):
    scaled = jax.tree.map(lambda x, f=factor: x * f, params)
    meta = checkpoint.Meta(step, config, tokenizer, "none", loss=1.0)
    rest = {"step": jnp.asarray(step)}
    checkpoints.save({"params": scaled, "rest": rest}, meta)
  checkpoints.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("run"))
  save_run(path, LLAMA)
  return path


def test_a_checkpoint_samples_as_its_model_does(workdir):
  expected = sampler_of(LLAMA).generate(MIXED)
  assert (
    sampler_lib.Sampler.from_checkpoint(workdir).generate(MIXED) == expected
  )
  earlier = sampler_lib.Sampler.from_checkpoint(workdir, step=3)
  assert earlier.generate(MIXED) != expected
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
  sharded = sampler_lib.Sampler.from_checkpoint(workdir, mesh=mesh)
  leaves = jax.tree.leaves(sharded.state)
  assert any(not x.sharding.is_fully_replicated for x in leaves)


def test_a_checkpoint_needs_its_parameters_only(workdir, tmp_path):
  """No byte of the optimizer is read: it is not there any more. Each device
  gets its own part, also where it was trained on another mesh.
  """
  run = tmp_path / "run"
  shutil.copytree(workdir, run)
  shutil.rmtree(run / "checkpoints" / "7" / "rest")
  expected = sampler_of(LLAMA).generate(MIXED)
  assert (
    sampler_lib.Sampler.from_checkpoint(str(run)).generate(MIXED) == expected
  )
  mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"))
  params = checkpoint.load_params(str(run), LLAMA, 7, mesh)
  mlp = params["layers"]["mlp"]["up"]
  parts = {shard.data.shape for shard in mlp.addressable_shards}
  L, D, F = mlp.shape
  assert parts == {(L, D // 2, F // 2)}


def run_door(*arguments):
  return doors.run("lm.sample", [*arguments], doors.ROOT)


def test_the_command_needs_a_workdir_and_nothing_else(workdir):
  """In a process of its own, as users start it."""
  found = subprocess.run(
    [sys.executable, "-m", "lm.sample", f"--workdir={workdir}"],
    cwd=doors.ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert found.returncode == 0, found.stderr
  assert found.stdout.strip() and "tokens/s" in found.stderr
  assert "---" not in found.stdout


def test_the_command_shows_every_continuation(workdir, tmp_path):
  file = tmp_path / "prompt.txt"
  file.write_text("second\nprompt\n")
  found = run_door(
    f"--workdir={workdir}",
    "--prompt=first",
    f"--prompt_file={file}",
    "--temperature=0.5",
    "--top_k=3",
    "--top_p=0.9",
    "--max_new_tokens=4",
    "--n_samples=2",
    "--seed=9",
  )
  assert found.code == 0, found.err
  expected = sampler_of(LLAMA).generate(
    [
      Request(prompt, 0.5, 3, 0.9, max_new_tokens=4, seed=9, n_samples=2)
      for prompt in ("first", "second\nprompt\n")
    ]
  )
  shown = [
    f"--- {i} of 4: seed {result.seed}, {result.finish_reason} ---\n"
    f"{result.request.prompt}{result.text}\n"
    for i, result in enumerate(expected, 1)
  ]
  assert found.out.splitlines() == "".join(shown).splitlines()
  assert f"{sum(len(r.token_ids) for r in expected)} tokens in" in found.err


def test_the_command_refuses_in_one_line(workdir):
  found = run_door(f"--workdir={workdir}", "--top_p=0")
  assert found.code == 2 and found.out == ""
  assert found.err == "error: top_p=0.0: must be in (0, 1]; 1 keeps all ids\n"


@pytest.mark.slow
def test_the_command_lays_a_model_on_a_mesh_with_help(workdir):
  """Four devices, 8 bits of cache, proposals by a draft (the same model)."""
  command = doors.Popen(
    "lm.sample",
    [f"--workdir={workdir}", "--mesh=1,2,2", "--ahead=2", "--int8_cache"]
    + [f"--draft={workdir}", "--prompt=first", "--max_new_tokens=8"]
    + ["--temperature=0"],
    JAX_NUM_CPU_DEVICES="4",
  )
  out, err = command.communicate(timeout=120)
  assert command.returncode == 0, err
  small = sampler_lib.Sampler(
    LLAMA, params_of(LLAMA), tokenizer_lib.Tokenizer(), int8_cache=True
  )
  (expected,) = small.generate(
    [Request("first", temperature=0.0, max_new_tokens=8)]
  )
  assert out == f"first{expected.text}\n"


def test_the_command_refuses_a_draft_that_the_mesh_cannot_cut(
  workdir, tmp_path
):
  odd = dataclasses.replace(LLAMA, n_layers=1, d_mlp=29)
  save_run(str(tmp_path / "odd"), odd)
  flags = f"--workdir={workdir}", f"--draft={tmp_path}/odd", "--ahead=2"
  found = run_door(*flags, "--mesh=1,1,2")
  said = f"error: --draft={tmp_path}/odd, --mesh=1,1,2: config.model.d_mlp=29:"
  assert found.code == 2 and found.err.startswith(said)


@pytest.mark.parametrize("mesh", ["2,0,1", "1,1,64"])
def test_the_command_refuses_a_mesh_that_cannot_be(workdir, mesh):
  found = run_door(f"--workdir={workdir}", f"--mesh={mesh}")
  assert found.code == 2 and f"error: --mesh={mesh}: " in found.err


def test_the_command_searches_with_beams(workdir):
  found = run_door(
    f"--workdir={workdir}", "--prompt=a", "--beams=2", "--max_new_tokens=4"
  )
  assert found.code == 0, found.err
  expected = sampler_of(LLAMA).beam(Request("a", max_new_tokens=4), 2)
  for result in expected:
    assert f"a{result.text}" in found.out
  assert found.out.count("---\n") == len(expected)
