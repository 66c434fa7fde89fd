"""lm-evaluation-harness: in process, over HTTP, and by hand in NumPy.

The hand computation has one float64 forward per text (reference.py), and knows
neither batches nor windows of ours nor lm-eval's own model classes.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import doors
import families
import jax
import numpy as np
import pytest
import reference
import test_evaluate

from lm import batch as batch_lib
from lm import checkpoint, schema, sharding, validation
from lm import config as config_lib
from lm.convert import vocabulary
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import harness, harness_model, likelihood, perplexity
from lm.huggingface import folder as hf_folder
from lm.model import decoder
from lm.sample import sampler as sampler_lib
from lm.train import loop
from lm.train import metrics as metrics_lib
from lm.train import stop as stop_lib

CONTEXT = 101
MODEL = dataclasses.replace(
  families.LLAMA3,
  vocab_size=tokenizer_lib.BYTES_SIZE,
  d_mlp=34,
  n_layers=1,
  context_length=CONTEXT,
  loss_chunk=50,
)
PARAMS = reference.random_params(MODEL)
TOKENIZER = tokenizer_lib.Tokenizer()
QUESTIONS = [
  {"question": "def f(x):", "choices": [" return x", " pass", "é"], "gold": 2},
  {"question": "", "choices": ["a", "bb", "ccc"], "gold": 0},
  {"question": "q" * 120, "choices": ["x ", "yy", "z\n"], "gold": 1},
]
TEXTS = [{"text": "nine char"}, {"text": "a b\n" * 80}, {"text": "é"}]
TASKS = {
  "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
  "last": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
""",
  "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
  "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "b"], do_sample: false, max_gen_toks: 9}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(autouse=True, scope="module")
def _offline():
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield


def write_tasks(path, questions, texts):
  """Task files in lm-eval's format, beside their data."""
  for name, content in TASKS.items():
    data = path / f"{name}.jsonl"
    rows = texts if name == "rolling" else questions
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / f"{name}.yaml").write_text(
      f"task: {name}\ntest_split: test\ndataset_path: json\n"
      f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {path}}}\n"
      f"metadata: {{version: 1.5}}\n{content}"
    )
  return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_tasks(tmp_path_factory.mktemp("tasks"), QUESTIONS, TEXTS)


def make(
  params=PARAMS, cfg=MODEL, mesh=None, n_rows=3, max_length=None, **options
):
  answerer = harness_model.Answerer(
    cfg, params, TOKENIZER, mesh, n_rows, **options
  )
  return harness_model.HarnessModel(answerer, max_length)


@pytest.fixture(scope="module")
def own():
  return make()


def ask(model, kind, *arguments):
  from lm_eval.api import instance

  asked = [
    instance.Instance(kind, {}, args, 0, ("task", i, 1))
    for i, args in enumerate(arguments)
  ]
  return getattr(model, kind)(asked)


# --- by hand -----------------------------------------------------------------


def log_probabilities(tokens):
  """[n, V]: of the token after each of `tokens`."""
  batch = batch_lib.unscored(np.array([tokens]))
  logits = reference.forward(PARAMS, MODEL, batch)[0].astype(np.float64)
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def by_hand(context, continuation, limit=CONTEXT):
  """(log-likelihood, is greedy) of ids given ids."""
  tokens = [*context, *continuation][-limit - 1 :]
  n = len(continuation)
  logs = log_probabilities(tokens[:-1])[-n:]
  chosen = logs[np.arange(n), tokens[-n:]]
  return chosen.sum(), bool((logs.argmax(-1) == tokens[-n:]).all())


def by_hand_text(context, continuation):
  """Spaces that end the context belong to the continuation, as in lm-eval."""
  n_spaces = len(context) - len(context.rstrip())
  continuation = context[len(context) - n_spaces :] + continuation
  context = context.rstrip()
  whole = [TOKENIZER.bos, *TOKENIZER.encode(context + continuation)]
  n = len(TOKENIZER.encode(continuation))
  return by_hand(whole[:-n], whole[-n:])


def by_hand_rolling(text, limit=CONTEXT):
  """lm-eval's own windows, a forward each."""
  from lm_eval import utils

  windows = utils.get_rolling_token_windows(
    TOKENIZER.encode(text), TOKENIZER.bos, limit, 1
  )
  pairs = [utils.make_disjoint_window(window) for window in windows]
  return math.fsum(by_hand(*pair)[0] for pair in pairs)


def by_hand_greedy(prompt, n, stops):
  tokens, text = [TOKENIZER.bos, *TOKENIZER.encode(prompt)], ""
  tokens = tokens[-(CONTEXT - n) :]
  new = []
  for _ in range(n):
    token = int(log_probabilities(tokens)[-1][: TOKENIZER.size].argmax())
    if token == TOKENIZER.eos:
      break
    tokens.append(token)
    new.append(token)
    text = TOKENIZER.decode(new)
    if any(stop in text for stop in stops):
      return min((text.split(stop)[0] for stop in stops), key=len)
  return text


# --- likelihoods -------------------------------------------------------------


def test_likelihoods_are_those_by_hand(own):
  pairs = [
    ("def f(x):", " return x"),
    ("", "abc"),
    ("trailing ", "space"),
    ("c" * 99, "a"),
    ("c" * 101, "a"),
    ("c" * 300, "dd"),
    ("<bos>", "<eos>"),
  ]
  found = ask(own, "loglikelihood", *pairs)
  for pair, (total, is_greedy) in zip(pairs, found, strict=True):
    expected, greedy = by_hand_text(*pair)
    assert total == pytest.approx(expected, rel=1e-6), pair
    assert is_greedy == greedy, pair


def test_nothing_has_probability_one(own):
  found = ask(own, "loglikelihood", ("a", ""), ("", ""), ("a", "b"))
  assert found[:2] == [(0.0, True), (0.0, True)]
  assert found[2][0] < -1


def test_a_continuation_beyond_the_context_is_scored_as_far_as_it_fits(own):
  ((total, _),) = ask(own, "loglikelihood", ("a", "b" * 300))
  tokens = TOKENIZER.encode("b" * (CONTEXT + 1))
  assert total == pytest.approx(by_hand(tokens[:1], tokens[1:])[0], rel=1e-6)


def test_greedy_is_exact_also_at_ties(own):
  """The likeliest token is, the next is not; of equal logits the lower id."""
  ids = [TOKENIZER.bos, *TOKENIZER.encode("def")]
  logs = log_probabilities(ids)[-1]
  best, second = (int(i) for i in logs.argsort()[::-1][:2])
  spans = [likelihood.Span([*ids, best], 1), likelihood.Span([*ids, second], 1)]
  found = own._answerer.likelihoods(spans)
  assert [one.is_greedy for one in found] == [True, False]
  flat = jax.tree.map(np.zeros_like, PARAMS)
  ties = make(flat)._answerer.likelihoods(
    [likelihood.Span([1, 0], 1), likelihood.Span([1, 1], 1)]
  )
  assert [one.is_greedy for one in ties] == [True, False]


def test_rolling_is_that_by_hand_and_that_of_perplexity(own):
  texts = [row["text"] for row in TEXTS] + ["", "x" * 101, "x" * 102]
  found = ask(own, "loglikelihood_rolling", *((text,) for text in texts))
  step, context = perplexity.eval_step(MODEL), CONTEXT
  scores = perplexity.evaluate_source(
    step,
    PARAMS,
    test_evaluate.Listed(texts),
    TOKENIZER,
    n_rows=3,
    context=context,
    stride=context,
  )
  for text, total, score in zip(texts, found, scores, strict=True):
    assert total == pytest.approx(by_hand_rolling(text), rel=1e-6, abs=0)
    if len(TOKENIZER.encode(text)) < context:  # else eos moves the window
      of_text = score.totals.nll_eos - score.totals.nll
      assert total == pytest.approx(of_text, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 1, 8)])
def test_any_mesh_gives_the_same(own, shape):
  cfg = dataclasses.replace(
    MODEL, d_model=16, n_heads=8, n_kv_heads=8, d_mlp=32
  )
  params = reference.random_params(cfg)
  pairs = [("a" * i, "bc" * i) for i in (0, 1, 20, 60)]
  alone = ask(make(params, cfg), "loglikelihood", *pairs)
  explicit = (jax.sharding.AxisType.Explicit,) * 3
  mesh = jax.make_mesh(shape, sharding.MESH_AXES, axis_types=explicit)
  begin = functools.partial(decoder.init_params, cfg)
  like = sharding.abstract(begin, jax.random.key(0), mesh=mesh)
  placed = jax.tree.map(
    lambda x, to: jax.device_put(x, to.sharding), params, like
  )
  joint = ask(make(placed, cfg, mesh, 8), "loglikelihood", *pairs)
  for one, other in zip(alone, joint, strict=True):
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1] == other[1]


def test_a_program_per_power_of_two():
  cfg = dataclasses.replace(MODEL, context_length=300)
  step = likelihood.make_step(cfg)
  model = make(cfg=cfg, step=step, n_rows=1)
  for _ in range(2):
    lengths = (1, 2, 5, 90, 127, 128, 130, 200, 290, 400)
    ask(model, "loglikelihood", *(("a" * n, "b" * 7) for n in lengths))
  assert step._cache_size() == 3  # 128, 256, 300


def test_batches_hold_every_span_once_and_the_longest_first():
  rng = np.random.default_rng(0)
  spans = [
    likelihood.Span(rng.integers(0, 99, n).tolist(), int(rng.integers(0, n)))
    for n in rng.integers(1, 302, 60).tolist()
  ]
  seen, lengths = {}, []
  for batch, places in likelihood.pack(spans, 3, 301):
    lengths.append(batch.inputs.shape[1])
    for place in places:
      row, columns = place.row, slice(place.first, place.stop)
      seen[place.document] = batch.targets[row, columns].tolist()
    assert batch.weights.sum() == sum(p.stop - p.first for p in places)
  assert lengths == sorted(lengths, reverse=True)
  assert set(lengths) <= {128, 256, 301}
  assert seen == {
    i: span.tokens[-span.n_scored :]
    for i, span in enumerate(spans)
    if span.n_scored
  }


# --- text --------------------------------------------------------------------


def test_generation_is_that_by_hand(own):
  prompts = ["def f(x):", "", "q" * 120]
  given = {"until": ["\n", "b"], "max_gen_toks": 9}
  found = ask(own, "generate_until", *((prompt, given) for prompt in prompts))
  assert found == [by_hand_greedy(p, 9, ["\n", "b"]) for p in prompts]


def test_repetitions_differ_and_a_second_run_does_not(own):
  from lm_eval.api import instance

  given = {"until": [], "do_sample": True, "temperature": 1.0, "top_k": 50}
  given["max_new_tokens"] = 8
  one, other = (
    instance.Instance("generate_until", {}, ("a", given), 0, ("t", i, 3))
    for i in range(2)
  )
  first = own.generate_until([one] * 3 + [other] * 3)
  assert len(set(first)) == 6
  assert own.generate_until([other] * 3 + [one] * 3) == first[3:] + first[:3]


@pytest.mark.parametrize(
  ("kind", "arguments"),
  [
    ("loglikelihood", ("a", "b")),
    ("loglikelihood_rolling", ("a",)),
    ("generate_until", ("a", {"until": [], "max_gen_toks": 3})),
  ],
)
def test_a_model_of_nan_has_no_score(kind, arguments):
  """lm-eval would take the first of choices that are all NaN."""
  broken = make(jax.tree.map(lambda x: x * np.float32(np.nan), PARAMS))
  with pytest.raises(schema.RunError, match="logits are NaN.* earlier check"):
    ask(broken, kind, arguments)


def test_disabled_progress_bars_stay_disabled():
  import datasets

  def set_bars(enabled):
    name = "enable" if enabled else "disable"
    getattr(datasets, f"{name}_progress_bars")()

  enabled = datasets.is_progress_bar_enabled()
  try:
    for disable in (True, False):
      set_bars(not disable)
      with harness._quiet():
        assert not datasets.is_progress_bar_enabled()
      assert datasets.is_progress_bar_enabled() is not disable
  finally:
    set_bars(enabled)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"max_gen_toks": CONTEXT}, r"max_gen_toks=101: must be in \[1, 101\)"),
    ({"topk": 3}, "generation_kwargs.topk: unknown; did you mean 'top_k'"),
  ],
)
def test_generation_that_cannot_be_is_refused(own, given, message):
  with pytest.raises(schema.ConfigError, match=message):
    ask(own, "generate_until", ("a", {"until": [], **given}))


def test_chats_are_those_of_the_tokenizer():
  """Token by token `chat.chat_ids`; a token's name in a message stays text."""
  import serving

  from lm.data import chat

  tokenizer = TOKENIZER.with_template(serving.TEMPLATE)
  answerer = harness_model.Answerer(MODEL, PARAMS, tokenizer, None, 3)
  model = harness_model.HarnessModel(answerer)
  messages = [
    {"role": "user", "content": "Say <user> and <eos>"},
    {"role": "assistant", "content": "é"},
    {"role": "user", "content": "again"},
  ]
  text = model.apply_chat_template(messages)
  assert text.encode().decode() == text
  ids = chat.chat_ids(tokenizer, messages)
  assert model.tok_encode(text) == ids
  assert model.tok_encode(text, add_special_tokens=False) == ids
  begun = [*messages, {"role": "assistant", "content": "It is"}]
  text = model.apply_chat_template(begun, add_generation_prompt=False)
  assert model.tok_encode(text) == [*ids, *tokenizer.encode("It is")]
  assert model.chat_template(True) == serving.TEMPLATE
  assert model.tokenizer_name == tokenizer.fingerprint
  with pytest.raises(schema.ConfigError, match="private-use"):
    model.apply_chat_template([{"role": "user", "content": "\U0010fc01"}])


# --- in process, over HTTP and by hand ---------------------------------------


def choices_by_hand(limit):
  """(accuracy, accuracy by log-likelihood per character)."""
  right, right_by_length = [], []
  for row in QUESTIONS:
    n = len(row["question"]) + 1
    totals, lengths = [], []
    for choice in row["choices"]:
      whole = [TOKENIZER.bos, *TOKENIZER.encode(row["question"] + choice)]
      totals.append(by_hand(whole[:n], whole[n:], limit)[0])
      lengths.append(len(choice))
    right.append(np.argmax(totals) == row["gold"])
    by_length = np.divide(totals, lengths)
    right_by_length.append(np.argmax(by_length) == row["gold"])
  return np.mean(right), np.mean(right_by_length)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """The model as a folder that transformers reads."""
  path = tmp_path_factory.mktemp("exported")
  hf_folder.write(str(path), MODEL, PARAMS)
  vocabulary.write(TOKENIZER, str(path))
  return str(path)


# Texts, beside the tasks' own.
PAIRS = [
  (row["question"], choice) for row in QUESTIONS for choice in row["choices"]
]
STOPS = {"until": ["\n", "b"], "max_gen_toks": 9}
PROMPTS = [("def f(x):", STOPS), ("a", STOPS)]


def answers(model, folder, pairs):
  """(likelihoods, rolling likelihoods, texts, the tasks' scores)."""
  return (
    ask(model, "loglikelihood", *pairs),
    ask(model, "loglikelihood_rolling", *((t["text"],) for t in TEXTS)),
    ask(model, "generate_until", *PROMPTS),
    harness.run(model, harness.find([*TASKS], folder)),
  )


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_in_process_is_the_backend_of_transformers(folder, exported):
  """On the exported checkpoint: choices, rolling and generation."""
  from lm_eval.models import huggingface

  def backend(add_bos: bool):
    return huggingface.HFLM(
      pretrained=exported,
      dtype="float32",
      device="cpu",
      batch_size=1,
      max_length=CONTEXT,
      add_bos_token=add_bos,
    )

  ours = answers(make(), folder, PAIRS)
  likelihoods, _, texts, scores = answers(backend(True), folder, PAIRS)
  for one, other in zip(ours[0], likelihoods, strict=True):
    assert one == (pytest.approx(other[0], abs=1e-4), other[1])
  assert ours[2] == texts
  # With add_bos_token it reads bos twice here, and scores the second (#3333).
  plain = backend(False)
  rolling = ask(plain, "loglikelihood_rolling", *((t["text"],) for t in TEXTS))
  assert ours[1] == pytest.approx(rolling, rel=1e-4)
  scores |= harness.run(plain, harness.find(["rolling"], folder))
  for name, found in scores.items():
    for metric, value in found["metrics"].items():
      mine = ours[3][name]["metrics"][metric]["value"]
      assert mine == pytest.approx(value["value"], rel=1e-4), (name, metric)


@pytest.mark.parametrize(
  ("backend", "batch_size"), [("remote", 1), ("huggingface", 3)]
)
def test_in_process_is_over_http_is_by_hand(
  folder, exported, backend, batch_size
):
  """lm-eval's own client, with its tokenizer at the server or in a folder, and
  a context of `max_length`, of which the client keeps two tokens for itself.
  """
  import serving
  from lm_eval.models import openai_completions

  sampler = sampler_lib.Sampler(MODEL, PARAMS, TOKENIZER)
  inner = CONTEXT - 2
  own = make(max_length=inner)
  with serving.serve(sampler, add_bos=True) as running:
    remote = openai_completions.LocalCompletionsAPI(
      base_url=f"{running.url}/v1/completions",
      model="tiny",
      tokenizer_backend=backend,
      tokenizer=exported if backend == "huggingface" else None,
      max_length=CONTEXT,
      batch_size=batch_size,
      max_retries=1,
    )
    assert remote.prefix_token_id == TOKENIZER.bos
    assert remote.eot_token_id == TOKENIZER.eos
    pairs = [*PAIRS, *(("c" * n, "d") for n in (97, 98, 99, 100))]
    found = [answers(model, folder, pairs) for model in (own, remote)]
  (likelihoods, rolling, texts, scores), over_http = found
  for one, other in zip(likelihoods, over_http[0], strict=True):
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1] == other[1]
  assert rolling == pytest.approx(over_http[1], rel=1e-6)
  assert texts == over_http[2]
  assert texts == [by_hand_greedy(text, 9, ["\n", "b"]) for text, _ in PROMPTS]
  by_rolling = [by_hand_rolling(row["text"], inner) for row in TEXTS]
  n_bytes = sum(len(row["text"].encode()) for row in TEXTS)
  bits = -sum(by_rolling) / n_bytes / math.log(2)
  acc, acc_norm = choices_by_hand(inner)
  last = np.mean([likelihoods[3 * i][0] for i in range(len(QUESTIONS))])
  for found in (scores, over_http[3]):
    metrics = found["choices"]["metrics"]
    assert metrics["acc"]["value"] == pytest.approx(acc)
    assert metrics["acc_norm"]["value"] == pytest.approx(acc_norm)
    score = found["last"]["metrics"]["perplexity"]
    assert score["value"] == pytest.approx(math.exp(-last), rel=1e-6)
    assert score["stderr"] > 0 and "DISABLE_MULTIPROC" not in os.environ
    metrics = found["rolling"]["metrics"]
    assert metrics["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-6)
    assert metrics["byte_perplexity"]["value"] == pytest.approx(
      2**bits, rel=1e-6
    )
  assert json.dumps(scores["writing"]) == json.dumps(over_http[3]["writing"])
  assert scores["writing"]["n"] == 3 and scores["writing"]["version"] == 1.5


# --- the command -------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with one checkpoint."""
  path = tmp_path_factory.mktemp("run")
  (path / "train.txt").write_text(f"In it: {QUESTIONS[0]['question']}\n")
  config = config_lib.Config(
    model=MODEL,
    tokenizer=config_lib.TokenizerConfig(kind="bytes"),
    data=config_lib.DataConfig(
      train=(f"text:{path}/train.txt",), cache_dir=str(path / "cache")
    ),
    train=config_lib.TrainConfig(batch_size=3, sequence_length=11),
  )
  checkpoints = checkpoint.Checkpoints(str(path), config.checkpoint)
  meta = checkpoint.Meta(7, config, TOKENIZER.to_json(), "none")
  checkpoints.save({"params": PARAMS, "rest": {"step": np.zeros(())}}, meta)
  checkpoints.close()
  return str(path)


def command(*arguments, **environment):
  return subprocess.Popen(
    [sys.executable, "-m", "lm.evaluate", *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "120"} | environment,
  )


@pytest.mark.slow
def test_two_processes_give_what_one_gives(workdir, folder, tmp_path):
  """The command, of all tasks; process 0 alone prints and writes. And both are
  told where process 0 alone finds that they cannot.
  """

  def two(*arguments):
    given = [f"--workdir={workdir}", f"--include_path={folder}", *arguments]
    return doors.joined(
      "lm.evaluate",
      lambda i: [*given, f"--output={tmp_path}/{i}.json"],
      2,
      JAX_NUM_CPU_DEVICES="2",
      COLUMNS="120",
    )

  # Its prompt leaves no place for 101 new tokens, which lm-eval asks last.
  long = pathlib.Path(folder, "writing.yaml").read_text()
  long = long.replace("max_gen_toks: 9", f"max_gen_toks: {CONTEXT}")
  pathlib.Path(folder, "long.yaml").write_text(
    long.replace("task: writing", "task: long")
  )
  for child in two("--tasks=choices,long"):
    said = child.communicate()[1]
    assert child.returncode == 2, said
    assert "long: generation_kwargs.max_gen_toks=101: must be in" in said
  children = two(f"--tasks={','.join(TASKS)}", "--overlap", "--overlap_words=3")
  alone = harness.evaluate(workdir, [*TASKS], include_path=folder)
  assert alone is not None
  (out, err), (other, other_err) = [child.communicate() for child in children]
  assert [child.returncode for child in children] == [0, 0], err + other_err
  content = json.loads((tmp_path / "0.json").read_text())
  assert "acc_norm" in out and "bits_per_byte" in out
  assert "acc_norm" not in other and not (tmp_path / "1.json").exists()
  assert content["tokenizer"]["fingerprint"] == TOKENIZER.fingerprint
  assert content["context"] == CONTEXT and content["step"] == 7
  assert content["date"] and content["lm_eval"]
  for name, task in alone["tasks"].items():
    written = content["tasks"][name]
    is_question = 0 if name == "rolling" else 1 / 3
    assert written["overlap"]["share_of_documents"] == is_question
    for metric, score in task["metrics"].items():
      assert written["metrics"][metric]["value"] == pytest.approx(
        score["value"], rel=1e-5
      )
      assert (written["metrics"][metric]["stderr"] is None) == (
        score["stderr"] is None
      )


def test_bodies_of_docstrings_are_questions_of_this_machine(workdir):
  """Offline, out of the box; every choice is one body, and one is right."""
  found = harness.find(["docstring_bodies"], None, f"{workdir}/cache")
  task = found["tasks"]["docstring_bodies"]
  documents = [*task.test_docs()]
  assert len(documents) > 100
  for one in documents:
    assert len(set(one["choices"])) == 4
    body = one["choices"][one["gold"]]
    compile(f"{one['head']}\n{body}\n", "task", "exec")
  counts = np.bincount([one["gold"] for one in documents], minlength=4)
  assert counts.min() > 0.15 * len(documents)
  longest = [
    np.argmax([*map(len, d["choices"])]) == d["gold"] for d in documents
  ]
  assert np.mean(longest) < 0.35
  scores = harness.run(make(), found, limit=3, num_fewshot=1)
  score = scores["docstring_bodies"]
  assert score["n"] == 3 and score["num_fewshot"] == 1
  assert 0 <= score["metrics"]["acc"]["value"] <= 1


@pytest.mark.parametrize(
  ("tasks", "options", "message"),
  [
    (["choice"], {}, "--tasks: 'choice' is unknown; did you mean 'choices'"),
    (["rolling", "x*y"], {}, "--tasks: 'x[*]y' is unknown"),
    (["hub"], {}, "--tasks=hub: cannot be loaded .*--include_path=FOLDER"),
    (["own"], {}, "^data.cache_dir: full$"),
    (["choices"], {"include_path": "/none"}, "--include_path='/none': no such"),
    (["choices"], {"chats": True}, "--apply_chat_template: this checkpoint"),
    (["choices"], {"chat_template": "a"}, "; add --apply_chat_template, or"),
    (["choices"], {"step": 6}, "--step=6: no such checkpoint"),
    (["choices"], {"output": "/none/a.json"}, "--output"),
  ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
  workdir, folder, tasks, options, message, monkeypatch, tmp_path
):
  from lm_eval import tasks as tasks_lib

  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  (tmp_path / "hub.yaml").write_text(
    "task: hub\ndataset_path: nobody/nothing\n"
    "output_type: loglikelihood_rolling\ntest_split: test\n"
    'doc_to_text: ""\ndoc_to_target: ""\nmetric_list: []\n'
  )
  (tmp_path / "own.yaml").write_text(
    "task: own\ncustom_dataset: !function own.load\n"
    "output_type: loglikelihood_rolling\ntest_split: test\n"
    'doc_to_text: ""\ndoc_to_target: ""\nmetric_list: []\n'
  )
  (tmp_path / "own.py").write_text(
    "from lm import schema\n\n\ndef load(**metadata):\n"
    "  raise schema.ConfigError('data.cache_dir: full')\n"
  )
  manager = tasks_lib.TaskManager
  monkeypatch.setattr(  # Its 14,683 tasks take 13 seconds to read.
    tasks_lib,
    "TaskManager",
    lambda include_defaults, **given: manager(include_defaults=False, **given),
  )
  monkeypatch.setattr(harness.load, "model", None)
  options = {"include_path": str(tmp_path)} | options
  with pytest.raises(schema.ConfigError, match=message):
    harness.evaluate(workdir, tasks, **options)


def test_what_is_not_installed_is_named(workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(schema.ConfigError, match=r"lm-eval is missing.*\[eval\]"):
    harness.evaluate(workdir, ["choices"])


def test_flags_of_another_evaluation_are_refused(workdir, tmp_path):
  run = f"--workdir={workdir}"
  for flags, says in (
    (
      [run, "--tasks=a", "--stride=4"],
      "--stride: has a meaning for sources, not --tasks only",
    ),
    ([run, "--limit=3"], "--limit: has a meaning for --tasks only"),
    (["--compare", "a", "b", "--limit=3"], "--limit=3: is about one run"),
  ):
    ended = doors.run("lm.evaluate", flags, str(tmp_path))
    assert ended.code == 2 and says in ended.err, ended


def test_without_tasks_lm_eval_is_not_imported():
  program = (
    "import sys, lm.evaluate.__main__, lm.evaluate.harness; "
    "print({'lm_eval', 'datasets', 'torch'} & set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout == "set()\n"


@pytest.mark.slow
def test_the_command_line_of_lm_eval_and_the_server(workdir, tmp_path):
  """Both as a user starts them, on texts that the context holds: the scores
  are those of `lm.evaluate --tasks`.
  """
  folder = write_tasks(tmp_path, QUESTIONS[:2], [TEXTS[0], TEXTS[2]])
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(
    [
      *(sys.executable, "-m", "lm.serve", f"--workdir={workdir}"),
      *("--add_bos", "--port=0", "--nowarmup"),
    ],
    stdout=subprocess.PIPE,
    text=True,
    env=environment,
  ) as server:
    try:
      assert server.stdout is not None
      name, _, url = server.stdout.readline().partition(": ")
      arguments = {
        "model": name,
        "base_url": f"{url.strip()}v1/completions",
        "tokenizer_backend": "remote",
        "max_length": CONTEXT,
        "max_retries": 1,
      }
      given = ",".join(f"{key}={value}" for key, value in arguments.items())
      client = subprocess.run(
        [
          *(sys.executable, "-m", "lm_eval", "run"),
          *("--model", "local-completions", "--model_args", given),
          *("--tasks", ",".join(TASKS), "--include_path", folder),
          *("--output_path", str(tmp_path / "found")),
        ],
        capture_output=True,
        text=True,
        env=environment | {"OPENAI_API_KEY": "none"},
      )
    finally:
      server.send_signal(signal.SIGTERM)
  assert client.returncode == 0, client.stderr
  assert server.returncode == 0
  (path,) = (tmp_path / "found").rglob("results_*.json")
  results = json.loads(path.read_text())["results"]
  alone = harness.evaluate(workdir, [*TASKS], include_path=folder)
  assert alone is not None and results.keys() == alone["tasks"].keys()
  n_metrics = 0
  for name, task in alone["tasks"].items():
    for metric, score in task["metrics"].items():
      over_http = results[name][f"{metric},none"]
      assert over_http == pytest.approx(score["value"], rel=1e-6), metric
      n_metrics += 1
  assert n_metrics == 7


# --- during training ---------------------------------------------------------


def training(make, folder, **fields):
  """A config whose tasks are due at steps 5, 10 and 12, the last."""
  fields = {"mesh__data": 2, "mesh__tensor": 2} | fields
  config = make(model__residual_dropout=0.0, **fields)
  config.tasks = config_lib.TasksConfig(
    names=tuple(TASKS), every=5, include_path=folder
  )
  return config


@pytest.fixture(scope="module")
def trained(make, folder, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("trained") / "run")
  config = training(make, folder)
  assert loop.train(config, workdir) == 0
  return workdir


def task_reports(workdir):
  return {
    report["step"]: {k: v for k, v in report.items() if k.startswith("task/")}
    for report in metrics_lib.read(workdir)
    if any(name.startswith("task/") for name in report)
  }


def test_training_reports_what_the_command_says(trained, folder):
  reports = task_reports(trained)
  assert sorted(reports) == [5, 10, 12]
  (last,) = [r for r in metrics_lib.read(trained) if r["step"] == 12]
  assert "eval/loss" in last and "train/loss" in last
  content = harness.evaluate(trained, [*TASKS], include_path=folder)
  assert content is not None
  found = {
    f"task/{name}/{metric}": score["value"]
    for name, task in content["tasks"].items()
    for metric, score in task["metrics"].items()
  }
  assert reports[12] == pytest.approx(found, rel=1e-5)
  before = reports[5]["task/rolling/bits_per_byte"]
  assert reports[12]["task/rolling/bits_per_byte"] < before


@pytest.mark.slow
def test_pmap_reports_the_same(make, folder, trained, tmp_path):
  mesh = {"mesh__data": 8, "mesh__fsdp": 1, "mesh__tensor": 1}
  config = training(make, folder, **mesh, mesh__mode="pmap")
  assert loop.train(config, str(tmp_path / "run")) == 0
  reports, wanted = task_reports(str(tmp_path / "run")), task_reports(trained)
  assert sorted(reports) == sorted(wanted)
  for step, report in reports.items():
    assert report == pytest.approx(wanted[step], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 12])
def test_a_stop_is_heeded_between_batches(
  make, folder, trained, tmp_path, monkeypatch, step
):
  """And a restart makes up for the tasks."""
  config, workdir = training(make, folder), str(tmp_path / "run")
  with stop_lib.Stop() as stop:
    score = likelihood.score

    def stopped(*arguments, should_stop, **options):
      now = metrics_lib.read(workdir)[-1:]
      if step == 5 or (now and now[0]["step"] == 12):
        stop.asked, stop.signal = True, signal.SIGTERM
      return score(*arguments, should_stop=should_stop, **options)

    monkeypatch.setattr(likelihood, "score", stopped)
    assert loop.train(config, workdir, stop) == 0
  assert checkpoint.steps(workdir)[-1] == step
  assert step not in task_reports(workdir)
  monkeypatch.undo()
  assert loop.train(config, workdir) == 0
  reports, wanted = task_reports(workdir), task_reports(trained)
  assert sorted(reports) == sorted(wanted)
  for each, report in reports.items():
    assert report == pytest.approx(wanted[each], rel=1e-4)


def test_tasks_that_cannot_run_stop_a_run_before_its_first_step(
  make, folder, tmp_path, monkeypatch
):
  config = training(make, folder)
  monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(schema.ConfigError, match="config.tasks: lm-eval is miss"):
    loop.train(config, str(tmp_path))
  config.tasks.names = ()
  with pytest.raises(schema.ConfigError, match="names.*must name one task"):
    validation.validate(config)
