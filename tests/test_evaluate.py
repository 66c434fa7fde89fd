"""Evaluation against one forward per token in float64 NumPy.

Each row of the table of published mistakes that can apply here has its test:
a wrong or second bos, means of means, scored padding, sums cut on one side of
the fraction only, and aggregates that are weighted by something else.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import resource
import shutil
import subprocess
import sys

import doors
import families
import jax
import jax.numpy as jnp
import lm_eval.utils
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import batch as batch_lib
from lm import checkpoint, schema, sharding, terminal
from lm import config as config_lib
from lm.data import sources, tokenizer_training, windows
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import corpora, perplexity, provenance
from lm.evaluate import output as output_lib
from lm.model import decoder

BYTES = tokenizer_lib.Tokenizer()
# Learned positions: a window that did not start again from 0 would show.
MODEL = dataclasses.replace(
  families.LLAMA3,
  vocab_size=BYTES.size,
  d_mlp=34,
  context_length=11,
  loss_chunk=5,
  positions="learned",
)
PARAMS = reference.random_params(MODEL)
# Numbers of targets around the context of 11: 1, 2, 10, 11, 12, 14, 38; the
# last few share rows.
TEXTS = [
  "héllo\nwörld",
  "",
  "def f(x):\n  return x  # one of several\n",
  "a",
  "nine char",
  None,
  "ten chars ",
  "11 chars ..",
  "four",
  "",
  "of a row",
]
DOCUMENTS = {f"doc{i}": t for i, t in enumerate(TEXTS) if t is not None}


# Tests that share shapes share programs.
compiled_step = functools.cache(perplexity.eval_step)


class Listed:
  """A source of given texts."""

  spec = "listed"
  chat = False

  def __init__(self, texts):
    self.texts = texts

  def __len__(self):
    return len(self.texts)

  def __getitem__(self, i):
    text = self.texts[i]
    return None if text is None else sources.Document(f"doc{i}", text)

  def fingerprint(self):
    return "listed"

  def changed(self):
    return None


def run(
  texts=TEXTS,
  model=MODEL,
  params=PARAMS,
  tokenizer=BYTES,
  n_rows=3,
  stride=None,
):
  """Totals of each document, by name."""
  context = model.context_length
  scores = perplexity.evaluate_source(
    compiled_step(model),
    params,
    Listed(texts),
    tokenizer,
    n_rows=n_rows,
    context=context,
    stride=context if stride is None else stride,
  )
  return {score.name: score.totals for score in scores}


def tokens_of(text):
  return [BYTES.bos, *BYTES.encode(text), BYTES.eos]


def conditional(context, target):
  """-log p(target | context), from a forward over just these tokens."""
  batch = batch_lib.unscored(np.array([context]))
  logits = reference.forward(PARAMS, MODEL, batch)[0, -1]
  return np.log(np.exp(logits - logits[target]).sum())


def token_by_token(text, stride):
  """Nats of each target; the context grows from where its window starts."""
  tokens, context = tokens_of(text), MODEL.context_length
  n = len(tokens) - 1
  nats = []
  for t in range(n):
    start = 0
    if t >= context:
      stop = context + stride * ((t - context) // stride + 1)
      start = min(stop, n) - context
    nats.append(conditional(tokens[start : t + 1], tokens[t + 1]))
  return nats


# --- windows -----------------------------------------------------------------


def test_windows_are_those_of_lm_eval():
  """Token for token, of every length around a few contexts, at every stride."""
  for context in range(1, 10):
    for stride in range(1, context + 1):
      for n in range(1, 4 * context + 3):
        tokens = [*range(n)]
        theirs = lm_eval.utils.get_rolling_token_windows(
          tokens, -1, max_seq_len=context, context_len=context - stride + 1
        )
        text = [-1, *tokens]
        ours = []
        for w in windows.cut(n, context, stride):
          scored = text[w.stop + 1 - w.n_scored : w.stop + 1]
          ours.append((text[w.first : w.stop], scored))
        theirs = [*theirs]
        assert ours == theirs
        # What its models are given: a context, and what is scored behind it.
        for (inputs, scored), pair in zip(ours, theirs, strict=True):
          before, continuation = lm_eval.utils.make_disjoint_window(pair)
          assert inputs == [*before, *continuation][:-1]
          assert scored == continuation


def test_eos_moves_the_last_window_by_a_token():
  """Against windows of the text alone, as lm-evaluation-harness cuts them."""

  def cut(text):
    return [
      (text[w.first : w.stop], text[w.stop + 1 - w.n_scored : w.stop + 1])
      for w in windows.cut(len(text) - 1, 4, 4)
    ]

  first = [("P012", "0123"), ("3456", "4567")]
  assert cut("P0123456789") == [*first, ("5678", "89")]
  assert cut("P0123456789E") == [*first, ("6789", "89E")]
  assert cut("P01234567E") == [*first, ("4567", "E")]
  assert cut("P012E") == [("P012", "012E")]


@pytest.mark.parametrize("stride", range(1, 8))
def test_each_target_is_scored_once_with_the_context_promised(stride):
  context = 7
  for n_targets in range(1, 40):
    seen = []
    for w in windows.cut(n_targets, context, stride):
      scored = range(w.stop - w.n_scored, w.stop)
      seen += scored
      assert w.stop - w.first == min(context, n_targets)
      for target in scored:
        wanted = target if target < context else context - stride
        assert target - w.first >= wanted
    assert seen == list(range(n_targets))


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_packing_loses_nothing_and_scores_nothing_twice(n_rows):
  context, stride = 11, 5
  documents = [np.array(tokens_of(t)) for t in DOCUMENTS.values()]
  scored = [[] for _ in documents]
  last = []
  for batch, places in windows.pack(documents, n_rows, context, stride):
    assert {a.shape for a in jax.tree.leaves(batch)} == {(n_rows, context)}
    weights = np.zeros((n_rows, context))
    for place in places:
      here = (place.row, slice(place.first, place.stop))
      weights[here] += 1
      scored[place.document] += batch.targets[here].tolist()
      last += [place.document] * place.is_last
    np.testing.assert_array_equal(batch.weights, weights)
    for row in range(n_rows):
      segments = batch.segments[row]
      for s in set(segments) - {0}:
        (columns,) = np.nonzero(segments == s)
        assert (np.diff(columns) == 1).all()
        inside = batch.positions[row, columns]
        np.testing.assert_array_equal(inside, np.arange(len(columns)))
        np.testing.assert_array_equal(
          batch.inputs[row, columns[1:]],
          batch.targets[row, columns[:-1]],
        )
      assert not weights[row, segments == 0].any()
  assert scored == [d[1:].tolist() for d in documents]
  assert last == list(range(len(documents)))


def test_rows_are_as_long_as_documents_need_not_as_the_context():
  """For models with a context of 131,072: powers of two, so few programs."""
  documents = [np.arange(n + 1, dtype=np.int32) for n in (50, 60, 300, 999, 9)]
  lengths, found = [], [[] for _ in documents]
  for batch, places in windows.pack(documents, 1, 700, 700, usual=100):
    lengths.append(batch.inputs.shape[1])
    for place in places:
      part = batch.targets[place.row, place.first : place.stop]
      found[place.document].extend(part.tolist())
  assert lengths == [128, 512, 700, 700, 128]  # 999 tokens: two windows
  assert found == [document[1:].tolist() for document in documents]


def test_short_documents_share_a_row():
  documents = [np.arange(n + 1) for n in (4, 8, 3, 4, 3)]
  ((batch, places),) = windows.pack(documents, 2, 11, 11)
  assert [p.row for p in places] == [0, 1, 0, 0, 1]
  assert (batch.segments > 0).all()


def test_bos_is_read_once_and_never_scored():
  """A second bos scores p(bos | bos); eos as the prefix shifts everything."""
  documents = [np.array(tokens_of(t)) for t in DOCUMENTS.values()]
  batches = [b for b, _ in windows.pack(documents, 2, 11, 4)]
  inputs, targets, weights, segments, positions = (
    np.concatenate([getattr(b, name) for b in batches])
    for name in ("inputs", "targets", "weights", "segments", "positions")
  )
  real = segments > 0
  assert (inputs[real] == BYTES.bos).sum() == len(documents)
  assert (positions[real & (inputs == BYTES.bos)] == 0).all()
  assert not (real & (inputs == BYTES.eos)).any()
  assert not (targets[weights > 0] == BYTES.bos).any()
  assert (targets[weights > 0] == BYTES.eos).sum() == len(documents)


# --- documents ---------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 4, 11])
def test_log_probability_is_the_sum_of_conditionals(stride):
  found = run(stride=stride)
  assert list(found) == list(DOCUMENTS)
  for name, text in DOCUMENTS.items():
    nats = token_by_token(text, stride)
    np.testing.assert_allclose(found[name].nll, sum(nats), rtol=1e-5)
    np.testing.assert_allclose(found[name].nll_eos, nats[-1], rtol=1e-5)


def test_counts_of_documents():
  for name, totals in run(stride=3).items():
    text = DOCUMENTS[name]
    assert totals.n_tokens == len(BYTES.encode(text)) + 1
    assert totals.n_eos == 1
    assert totals.n_bytes == len(text.encode())
    assert totals.n_words == len(text.split())


def test_empty_document_is_eos_alone():
  totals = run(texts=[""])["doc0"]
  nats = conditional([BYTES.bos], BYTES.eos)
  np.testing.assert_allclose(totals.nll, nats, rtol=1e-5)
  assert totals.nll == totals.nll_eos
  assert (totals.n_tokens, totals.n_bytes, totals.n_words) == (1, 0, 0)
  assert math.isnan(totals.bits_per_byte)
  assert math.isnan(totals.word_perplexity)
  assert math.isnan(totals.perplexity_without_eos)


@pytest.mark.parametrize("n_rows", [1, 7])
def test_batch_size_and_padding_change_nothing(n_rows):
  alone = {name: run([text])["doc0"] for name, text in DOCUMENTS.items()}
  together = run(n_rows=n_rows)
  for name, totals in together.items():
    np.testing.assert_allclose(totals.nll, alone[name].nll, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_mesh_changes_nothing(shape):
  expected = run(n_rows=8)
  devices = jax.devices()[: math.prod(shape)]
  mesh = jax.make_mesh(shape, sharding.MESH_AXES, devices=devices)
  with jax.set_mesh(mesh):
    found = run(n_rows=8, params=shard(PARAMS, mesh))
  for name, totals in found.items():
    np.testing.assert_allclose(totals.nll, expected[name].nll, rtol=1e-5)


def shard(params, mesh):
  def init():
    return decoder.init_params(MODEL, jax.random.key(0))

  target = sharding.abstract(init, mesh=mesh)
  return jax.tree.map(
    lambda p, t: jax.device_put(p, t.sharding), params, target
  )


def test_without_a_limit_windows_sum_to_one_long_forward():
  """Two layers that each see the token before reach three back: contexts of
  three more tokens than are scored say all that a long one says.
  """
  model = dataclasses.replace(MODEL, positions="rope", windows=(2,))
  params = reference.random_params(model)
  texts = ["one document, of more than a few windows, at any rate"]
  long = dataclasses.replace(model, context_length=97)
  whole = run(texts, long, params)["doc0"]
  for stride in (1, 5, 9):
    parts = run(texts, model, params, stride=stride)["doc0"]
    np.testing.assert_allclose(parts.nll, whole.nll, rtol=1e-5)
    assert parts.n_tokens == whole.n_tokens
  cut = run(texts, model, params, stride=10)["doc0"]
  assert abs(cut.nll - whole.nll) > 1e-3


def test_bytes_are_those_of_the_text_whatever_the_tokenizer():
  """With uniform predictions bits per byte is log2 V tokens / bytes."""
  text = "naïve café → ▁ <eos> 日本\n\t" * 3
  config = config_lib.Config()
  config.model.vocab_size = 390
  pieces = tokenizer_training.train(config, [text * 20])
  for tokenizer in (BYTES, pieces):
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.size)
    params = reference.random_params(model)
    params["head"][:] = 0
    totals = run([text], model, params, tokenizer)["doc0"]
    n_tokens = len(tokenizer.encode(text)) + 1
    bits = math.log2(tokenizer.size) * n_tokens / len(text.encode())
    np.testing.assert_allclose(totals.bits_per_byte, bits, rtol=1e-6)
    np.testing.assert_allclose(totals.perplexity, tokenizer.size, rtol=1e-5)


def test_a_tokenizer_that_miscounts_bytes_is_refused():
  tokenizer = tokenizer_lib.Tokenizer()
  tokenizer.byte_lengths[tokenizer.encode("é")[0]] = 0
  with pytest.raises(ValueError, match="doc0.*1 bytes and it has 2"):
    run(["é"], tokenizer=tokenizer)


# --- totals ------------------------------------------------------------------


def test_totals_divide_sums_once():
  a = perplexity.Totals(6.0, 3, 8, 2, 1.0, 1)
  b = perplexity.Totals(30.0, 5, 1, 1, 3.0, 2)
  both = a + b
  assert both.loss == 36 / 8  # not (6/3 + 30/5) / 2
  assert both.perplexity == math.exp(36 / 8)
  assert both.perplexity_without_eos == math.exp(32 / 5)
  assert both.word_perplexity == math.exp(36 / 3)
  # Not weighted by tokens: (6/8 * 3 + 30/1 * 5) / 8 / ln 2.
  assert math.isclose(both.bits_per_byte, 36 / 9 / math.log(2))


def test_rates_beyond_numbers():
  assert math.isnan(perplexity.Totals().loss)
  assert math.isnan(perplexity.Totals().perplexity)
  assert perplexity.Totals(9000.0, 2, n_words=1).word_perplexity == math.inf


# --- batches -----------------------------------------------------------------


def batch_of(texts, n_rows):
  """One packed batch."""
  documents = [np.array(tokens_of(t)) for t in texts]
  ((batch, _),) = windows.pack(documents, n_rows, MODEL.context_length, 11)
  return batch


def evaluate_batches(batches, **options):
  batches = [jax.tree.map(jnp.asarray, b) for b in batches]
  step = compiled_step(MODEL)
  return perplexity.evaluate_batches(
    step, PARAMS, batches, BYTES.byte_lengths, **options
  )


def test_batches_of_unequal_content_are_no_mean_of_means():
  texts = list(DOCUMENTS.values())
  short, long = batch_of([""], 4), batch_of([texts[0], "a", texts[4]], 4)
  # What padding holds must not matter.
  padding = long.segments == 0
  long.targets[padding] = BYTES.eos
  long.inputs[padding] = BYTES.bos
  totals = evaluate_batches([short, long, short])
  scored = ["", texts[0], "a", texts[4], ""]
  nats = [token_by_token(text, 11) for text in scored]
  np.testing.assert_allclose(totals.nll, sum(map(sum, nats)), rtol=1e-5)
  last = sum(n[-1] for n in nats)
  np.testing.assert_allclose(totals.nll_eos, last, rtol=1e-5)
  assert totals.n_tokens == sum(map(len, nats))
  assert totals.n_bytes == sum(len(text.encode()) for text in scored)
  assert totals.n_eos == 5
  mean_of_means = np.mean(
    [evaluate_batches([b]).loss for b in (short, long, short)]
  )
  assert abs(mean_of_means - totals.loss) > 0.01


def test_bytes_follow_the_weights():
  batch = batch_of(["héllo"], 1)
  batch.weights[0, 1] = 0  # the first byte of é
  totals = evaluate_batches([batch])
  nats = token_by_token("héllo", 11)
  del nats[1]
  np.testing.assert_allclose(totals.nll, sum(nats), rtol=1e-5)
  assert (totals.n_tokens, totals.n_bytes, totals.n_eos) == (6, 5, 1)


@pytest.mark.parametrize(
  ("shape", "mode"), [((2, 2, 2), "jit"), ((8, 1, 1), "pmap")]
)
def test_batches_on_a_mesh(shape, mode):
  """As the loop has them: mode pmap keeps whole parameters on an Auto mesh,
  and sets none.
  """
  batch = batch_of(["two rows", "or rather", "eight", "of them"], 8)
  expected = evaluate_batches([batch])
  kind = getattr(jax.sharding.AxisType, "Explicit" if mode == "jit" else "Auto")
  mesh = jax.make_mesh(shape, sharding.MESH_AXES, axis_types=(kind,) * 3)
  rows = NamedSharding(mesh, sharding.partition("batch"))
  jitted = mode == "jit"
  with jax.set_mesh(mesh) if jitted else contextlib.nullcontext():
    found = perplexity.evaluate_batches(
      compiled_step(MODEL),
      shard(PARAMS, mesh)
      if jitted
      else jax.device_put(PARAMS, NamedSharding(mesh, P())),
      [sharding.place(batch, rows, 8)],
      BYTES.byte_lengths,
    )
  np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-5)
  np.testing.assert_allclose(found.nll_eos, expected.nll_eos, rtol=1e-5)
  for name in ("n_tokens", "n_bytes", "n_eos"):
    assert getattr(found, name) == getattr(expected, name)


def test_evaluation_can_be_stopped():
  answers = iter([False, True])
  batch = batch_of(["a"], 1)
  assert (
    evaluate_batches([batch] * 5, should_stop=lambda: next(answers)) is None
  )


def test_batches_are_dispatched_ahead_of_what_is_read():
  events = []

  def step(params, batch, byte_lengths):
    events.append("dispatch")
    one = np.ones((1, 1))
    return perplexity.Scores(one, one > 0, one.astype(int))

  def should_stop():
    events.append("read")
    return False

  totals = perplexity.evaluate_batches(
    step, {}, [batch_of(["a"], 1)] * 4, np.zeros(1), should_stop
  )
  d, r = "dispatch", "read"
  assert events == [d, d, d, r, d, r, r, r]
  assert totals.n_tokens == 4


def test_one_program_per_shape():
  step = perplexity.eval_step(MODEL)
  list(
    perplexity.evaluate_source(
      step, PARAMS, Listed(TEXTS), BYTES, n_rows=2, context=11, stride=4
    )
  )
  assert step._cache_size() == 1


# --- the command -------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with one checkpoint, and texts beside it."""
  path = tmp_path_factory.mktemp("run")
  config = config_lib.Config(
    model=MODEL,
    tokenizer=config_lib.TokenizerConfig(kind="bytes"),
    data=config_lib.DataConfig(
      validation=(f"text:{path}/a*.txt",), text_unit="line"
    ),
    train=config_lib.TrainConfig(batch_size=3, sequence_length=11),
  )
  (path / "a.txt").write_text("first line, long\n\nsecond\n3\n")
  (path / "b.txt").write_text("日本\n" * 9)
  (path / "empty.txt").write_text("")
  checkpoints = checkpoint.Checkpoints(str(path), config.checkpoint)
  meta = checkpoint.Meta(7, config, BYTES.to_json(), "none")
  checkpoints.save({"params": PARAMS, "rest": {"step": np.zeros(())}}, meta)
  checkpoints.close()
  return path


def command(*arguments, **environment):
  return subprocess.Popen(
    [sys.executable, "-m", "lm.evaluate", *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "120"} | environment,
  )


def evaluate(workdir, **options):
  defaults = {
    "specs": (),
    "step": None,
    "stride": None,
    "batch_size": None,
    "data": {},
    "output": None,
  }
  return corpora.evaluate(str(workdir), **(defaults | options))


def test_command_from_a_checkpoint_to_json(workdir, tmp_path):
  output = tmp_path / "eval.json"
  process = command(
    f"--workdir={workdir}",
    f"--source=text:{workdir}/a.txt",
    f"--source=text:{workdir}/[be]*.txt",
    "--text_unit=file",
    "--stride=4",
    f"--output={output}",
    "--documents",
  )
  stdout, stderr = process.communicate()
  assert process.returncode == 0, stderr
  content = json.loads(output.read_text())
  texts = [(workdir / f"{n}.txt").read_text() for n in ("a", "b", "empty")]
  expected = list(run(texts, stride=4).values())
  a, rest = content["sources"]
  documents = a["documents"] + rest["documents"]
  for document, totals in zip(documents, expected, strict=True):
    np.testing.assert_allclose(document["nll"], totals.nll, rtol=1e-5)
    assert document["n_tokens"] == totals.n_tokens
    assert document["n_bytes"] == totals.n_bytes
  total = sum(expected, perplexity.Totals())
  for name in ("loss", "perplexity", "word_perplexity", "bits_per_byte"):
    wanted = getattr(total, name)
    np.testing.assert_allclose(content["total"][name], wanted, rtol=1e-5)
  assert (content["step"], content["stride"], content["context"]) == (7, 4, 11)
  assert content["tokenizer"] == {
    "kind": "bytes",
    "fingerprint": BYTES.fingerprint,
    "size": BYTES.size,
  }
  assert content["trained_on"] == {
    "sources": [*config_lib.DataConfig().train],
    "fingerprint": "none",
  }
  age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(
    content["date"]
  )
  assert datetime.timedelta() <= age < datetime.timedelta(minutes=10)
  assert content["code"]["jax"] == jax.__version__
  assert content["code"]["commit"] == provenance.code()["commit"]
  bare = (total.nll - total.nll_eos) / math.log(2) / total.n_bytes
  rate = content["total"]["bits_per_byte_without_eos"]
  np.testing.assert_allclose(rate, bare, rtol=1e-5)
  assert "eos is scored" in content["end_of_document"]
  assert f"Without it: {bare:.4f} bits/byte" in stdout
  # The empty document has no bits per byte, so that it is in no ranking.
  assert documents[2]["bits_per_byte"] is None
  assert [d["name"] for d in rest["best"]] == [str(workdir / "b.txt")]
  assert f"{total.bits_per_byte:.4f}" in stdout
  assert list(tmp_path.iterdir()) == [output]


def test_commit_of_a_checkout(tmp_path):
  """Only of one whose top is asked for: code that is installed below another
  project's checkout is not of it.
  """
  root = tmp_path / "root"
  root.mkdir()
  assert provenance.commit(str(root)) is None

  def git(*arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
      ["git", "-C", str(root), *who, *arguments],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  git("init", "-q")
  (root / "lm").mkdir()
  (root / "lm" / "a.py").write_text("1")
  git("add", ".")
  git("commit", "-q", "-m", "one")
  git("tag", "-a", "v1", "-m", "one")
  head = git("rev-parse", "HEAD")
  assert len(head) == 40 and provenance.commit(str(root)) == head
  assert provenance.commit(str(root / "lm")) is None
  (root / "lm" / "a.py").write_text("2")
  assert provenance.commit(str(root)) == f"{head}-dirty"
  os.symlink(root, tmp_path / "link")
  assert provenance.commit(str(tmp_path / "link")) == f"{head}-dirty"


@pytest.mark.slow
def test_processes_change_nothing(workdir, tmp_path):
  """Two processes of two devices against this one of eight."""
  processes = doors.joined(
    "lm.evaluate",
    lambda i: [f"--workdir={workdir}", f"--output={tmp_path}/{i}.json"],
    2,
    JAX_NUM_CPU_DEVICES="2",
  )
  outputs = [process.communicate() for process in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  assert "bits/byte" in outputs[0][0] and "bits/byte" not in outputs[1][0]
  (written,) = tmp_path.iterdir()  # by the first process alone
  total = json.loads(written.read_text())["total"]
  expected = evaluate(workdir).totals
  np.testing.assert_allclose(total["nll"], expected.nll, rtol=1e-5)
  assert total["n_tokens"] == expected.n_tokens
  assert total["n_bytes"] == expected.n_bytes


def test_an_encoder_scores_nothing_but_masked_sources(monkeypatch):
  config = config_lib.Config()
  config.model.causal = False
  meta = checkpoint.Meta(1, config, tokenizer="", fingerprint="")
  monkeypatch.setattr(checkpoint, "load_meta", lambda *_: meta)
  rule = r"--source='text:b': the model is an encoder .*write SOURCE\|masked"
  with pytest.raises(schema.ConfigError, match=rule):
    corpora.evaluate(
      "run",
      specs=["text:a|masked", "text:b"],
      step=None,
      stride=None,
      batch_size=None,
      data={},
      output=None,
    )


def test_processes_join_with_the_heartbeat_of_the_run(tmp_path):
  """Where its config.json says one; a checkpoint can be read only later."""
  config = config_lib.Config()
  config.mesh.heartbeat_seconds = 7
  for name, content in {
    "said": config_lib.to_json(config).encode(),
    "binary": b"\x00\xff",
    "cut": b"{",
  }.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_bytes(content)
  ask = (
    "import sys; from lm.evaluate import __main__ as cli\n"
    "print(*map(cli._heartbeat_seconds, sys.argv[1:]))"
  )
  names = ("said", "binary", "cut", "absent")
  found = subprocess.run(
    [sys.executable, "-c", ask, *(str(tmp_path / name) for name in names)],
    capture_output=True,
    text=True,
  )
  assert found.stdout.split() == ["7", "100", "100", "100"], found.stderr


def test_validation_sources_are_the_default(workdir):
  evaluation = evaluate(workdir)
  (result,) = evaluation.results
  assert result.source == f"text:{workdir}/a*.txt"
  # Lines, as the run's config says; blank ones are no documents.
  texts = ["first line, long", "second", "3"]
  for document, totals in zip(
    result.documents, run(texts).values(), strict=True
  ):
    np.testing.assert_allclose(document.totals.nll, totals.nll, rtol=1e-5)
  names = [d.name for d in result.ranked]
  bits = [d.totals.bits_per_byte for d in result.ranked]
  assert bits == sorted(bits) and len(set(names)) == 3


def test_a_run_without_validation_sources_needs_a_source(workdir):
  meta = checkpoint.load_meta(str(workdir))
  meta.config.data.validation = ()
  rest = {"stride": None, "batch_size": None, "data": {}}
  with pytest.raises(schema.ConfigError, match="no validation sources"):
    corpora.prepare(str(workdir), meta, specs=(), **rest)


def test_total_weighs_sources_by_their_sums(workdir):
  specs = [f"text:{workdir}/{name}.txt" for name in "ab"]
  evaluation = evaluate(workdir, specs=specs, data={"text_unit": "file"})
  a, b = (r.totals for r in evaluation.results)
  assert evaluation.totals == a + b
  assert a.n_tokens != b.n_tokens
  loss = (a.nll + b.nll) / (a.n_tokens + b.n_tokens)
  assert math.isclose(evaluation.totals.loss, loss)


def test_a_source_named_twice_is_scored_once(workdir):
  specs = [f"text:{workdir}/{name}.txt" for name in "aba"]
  evaluation = evaluate(workdir, specs=specs, data={"text_unit": "file"})
  assert [r.source for r in evaluation.results] == specs[:2]
  a, b = (r.totals for r in evaluation.results)
  assert evaluation.totals == a + b


def test_skipped_documents_are_counted(workdir, tmp_path, capsys):
  (tmp_path / "good.txt").write_text("good")
  (tmp_path / "bad.txt").write_bytes(b"b\xffd")
  options = {"text_unit": "file", "invalid_utf8": "skip"}
  specs = [f"text:{tmp_path}/*.txt"]
  evaluation = evaluate(workdir, specs=specs, data=options)
  (result,) = evaluation.results
  assert [d.name for d in result.documents] == [str(tmp_path / "good.txt")]
  assert result.n_skipped == 1
  output_lib.show(evaluation, terminal.console(), False)
  assert "*.txt: 1 more document skipped, as inv" in capsys.readouterr().out
  (tmp_path / "good.txt").unlink()
  with pytest.raises(schema.ConfigError, match="has 1 document, and none has"):
    evaluate(workdir, specs=specs, data=options)


def test_a_source_without_text_has_no_bits_per_byte(workdir, tmp_path):
  """One that has some is scored, its empty documents with it."""
  (tmp_path / "a.txt").touch()
  (tmp_path / "b.txt").touch()
  options = {"text_unit": "file"}
  specs = [f"text:{tmp_path}/*.txt"]
  with pytest.raises(schema.ConfigError, match="has 2 documents, and none"):
    evaluate(workdir, specs=specs, data=options)
  (tmp_path / "b.txt").write_text("b")
  (result,) = evaluate(workdir, specs=specs, data=options).results
  assert [d.totals.n_bytes for d in result.documents] == [0, 1]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"stride": 0}, "--stride=0: must be from 1 to .*=11"),
    ({"stride": 12}, "--stride=12: must be from 1 to .*=11"),
    ({"step": 6}, r"--step=6: no such checkpoint.*\[7\]"),
    ({"specs": ["text:{}/none*.txt"]}, "no file matches"),
    ({"specs": ["text:{}/empty.txt"]}, "empty, holds no document"),
    ({"specs": ["nothing"]}, "'nothing': malformed"),
    ({"batch_size": 10**9}, "--batch_size=1000000000: with a context of 11"),
    ({"chat_template": "a"}, "a[*].txt' is of chats; leave it out"),
    ({"output": "{}/none/eval.json"}, "no directory .*; create it"),
    ({"output": "{}"}, "cannot be written"),
  ],
)
def test_bad_input_is_refused_before_parameters_are_loaded(
  workdir, monkeypatch, options, message
):
  monkeypatch.setattr(checkpoint, "load_params", None)
  if "output" in options:
    options = {"output": options["output"].format(workdir)}
  if "specs" in options:
    options = {"specs": [s.format(workdir) for s in options["specs"]]}
  with pytest.raises(schema.ConfigError, match=message):
    evaluate(workdir, **options)


def test_a_run_of_another_machine_takes_another_cache(tmp_path, workdir):
  """The run's own cannot be made: a file is in its place."""
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "data").touch()
  source = f"--source=text:{tmp_path}/run/a.txt|masked"
  arguments = [f"--workdir={tmp_path}/run", source]
  ended = doors.run("lm.evaluate", arguments, str(tmp_path))
  assert ended.code == 2 and "cache_dir=data: " in ended.err
  arguments.append(f"--cache_dir={tmp_path}/other")
  ended = doors.run("lm.evaluate", arguments, str(tmp_path))
  assert ended.code == 0, ended
  assert (tmp_path / "other").is_dir()


def test_command_reports_a_mistake_in_one_line(tmp_path):
  process = command(f"--workdir={tmp_path}/none")
  _, stderr = process.communicate()
  assert process.returncode == 2
  assert stderr.startswith("error: --workdir=") and stderr.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_takes_no_file_with_it(workdir, tmp_path):
  """`lm.evaluate --output=FILE | head -1` writes FILE."""
  path = tmp_path / "eval.json"
  arguments = [f"--workdir={workdir}", f"--output={path}"]
  with doors.Popen("lm.evaluate", arguments, tmp_path) as program:
    program.stdout.close()
    assert program.wait(60) == 141
  assert json.loads(path.read_text())["step"] == 7


def test_a_full_disk_leaves_the_old_file(tmp_path):
  """The system lets no file grow beyond ten bytes."""
  path = tmp_path / "eval.json"
  path.write_text("old")
  evaluation = corpora.Evaluation("runs/a", 7, 11, 11, [])
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    with pytest.raises(OSError, match="too large: .*eval.json"):
      output_lib.write(evaluation, str(path), documents=False)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]
