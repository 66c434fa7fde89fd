"""The server, over real sockets: what it answers is what the Sampler gives."""

import dataclasses
import functools
import json
import math
import time

import httpx
import hypothesis
import jax
import openai
import pytest
import serving
import vocabularies
from hypothesis import strategies as st

from lm.data import chat as chat_lib
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib
from lm.serve import answers, fields, protocol

Request = request_lib.Request
post = serving.post
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def sampler():
  return serving.sampler_of(serving.TEMPLATE)


@pytest.fixture(scope="module")
def tiny(sampler):
  with serving.serve(sampler) as running:
    yield running


@pytest.fixture(scope="module")
def client(tiny):
  with openai.OpenAI(
    base_url=f"{tiny.url}/v1", api_key="none", max_retries=0
  ) as client:
    yield client


def names(sampler, ids):
  return [answers.token_name(sampler.tokenizer, i) for i in ids]


def check_choice(sampler, choice, result):
  """A choice of the openai client, with logprobs, against a Result."""
  reason = {"eos": "stop"}.get(result.finish_reason, result.finish_reason)
  assert (choice.text, choice.finish_reason) == (result.text, reason)
  assert choice.seed == result.seed
  assert choice.logprobs.tokens == names(sampler, result.token_ids)
  assert choice.logprobs.token_logprobs == pytest.approx(
    result.log_probabilities, abs=2e-5
  )


RULES = {
  "temperature": 0.8,
  "top_k": 50,
  "top_p": 0.95,
  "min_p": 0.001,
  "typical_p": 0.99,
  "repetition_penalty": 1.1,
  "frequency_penalty": 0.2,
  "presence_penalty": 0.1,
  "min_tokens": 3,
  "forbidden": [200, 201],
  "temperature_last": True,
}


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
def test_completions_are_those_of_the_sampler(sampler, client, form):
  encode = sampler.tokenizer.encode
  prompts = {
    "text": "def f(",
    "texts": ["", "a\u00e9\u4f60"],
    "ids": encode("xyz"),
    "lists of ids": [[1, *encode("q")], encode("zz")],
  }[form]
  own = {name: value for name, value in RULES.items() if "p" != name}
  openai_names = ("temperature", "top_p", "frequency_penalty")
  openai_names += ("presence_penalty",)
  known = {name: own.pop(name) for name in openai_names}
  found = client.completions.create(
    model="tiny",
    prompt=prompts,
    max_tokens=9,
    n=2,
    seed=5,
    logprobs=3,
    user="somebody",
    logit_bias={"163": 4.0},
    stop=["\n\n", "q"],
    extra_body=own,
    **known,
  )
  each = prompts if form in ("texts", "lists of ids") else [prompts]
  requests = [
    Request(
      prompt,
      max_new_tokens=9,
      n_samples=2,
      seed=5,
      logit_bias={163: 4.0},
      stop=["\n\n", "q"],
      **RULES,
    )
    for prompt in each
  ]
  expected = sampler.generate(requests)
  assert [choice.index for choice in found.choices] == list(
    range(len(expected))
  )
  for choice, result in zip(found.choices, expected, strict=True):
    check_choice(sampler, choice, result)
    for own_log, top in zip(
      choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
      assert len(top) in (3, 4) and own_log in top.values()
  n_prompt = sum(len(sampler.encode(prompt)) for prompt in each)
  n_drawn = sum(len(result.token_ids) for result in expected)
  usage = found.usage
  assert (usage.prompt_tokens, usage.completion_tokens) == (n_prompt, n_drawn)
  assert found.model == "tiny" and found.object == "text_completion"


@pytest.mark.parametrize("late", [False, True])
def test_a_stream_is_the_whole_in_parts(
  sampler, tiny, client, monkeypatch, late
):
  """Also if all is drawn before the first chunk is written."""
  opening = answers.Completion.opening

  def slow(*arguments):
    while late and tiny.worker.n_live:
      time.sleep(0.01)
    return opening(*arguments)

  monkeypatch.setattr(answers.Completion, "opening", slow)
  asked = {
    "model": "tiny",
    "prompt": ["ab", "\u4f60"],
    "max_tokens": 30,
    "n": 2,
    "seed": 3,
    "logprobs": 1,
    "stop": "k",
  }
  whole = client.completions.create(**asked)
  chunks = list(
    client.completions.create(
      **asked, stream=True, stream_options={"include_usage": True}
    )
  )
  *chunks, last = chunks
  assert last.choices == [] and last.usage == whole.usage
  assert len({chunk.id for chunk in chunks}) == 1
  for expected in whole.choices:
    parts = [
      choice
      for chunk in chunks
      for choice in chunk.choices
      if choice.index == expected.index
    ]
    assert len(parts) > 3 or late
    assert "".join(part.text for part in parts) == expected.text
    assert [part.finish_reason for part in parts[:-1]] == [None] * (
      len(parts) - 1
    )
    assert parts[-1].finish_reason == expected.finish_reason
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
      joined = [
        x for p in parts if p.logprobs for x in getattr(p.logprobs, name)
      ]
      assert joined == getattr(expected.logprobs, name)


def test_a_stream_ends_as_openai_ends_it(tiny):
  body = {"prompt": "a", "max_tokens": 3, "stream": True, "seed": 1}
  found = post(tiny, "completions", body)
  assert found.headers["content-type"].startswith("text/event-stream")
  events = found.text.split("\n\n")
  assert events[-2:] == ["data: [DONE]", ""]
  assert all(e.startswith("data: {") for e in events[:-2])


def test_defaults_are_those_of_openai(sampler, client):
  """16 tokens, or what the context leaves; a seed of its own, which is told."""
  first, second = (
    client.completions.create(model="tiny", prompt="abc") for _ in range(2)
  )
  # Seeds of their own may draw eos before.
  assert max(x.usage.completion_tokens for x in (first, second)) <= 16
  assert first.choices[0].seed != second.choices[0].seed
  again = client.completions.create(
    model="tiny", prompt="abc", seed=first.choices[0].seed
  )
  assert again.choices[0].text == first.choices[0].text
  full = client.completions.create(model="tiny", prompt="a" * 95)
  assert full.usage.total_tokens == sampler.cfg.context_length
  # An explicit null is as good as nothing.
  found = client.completions.create(
    model="tiny", prompt="abc", seed=7, stop=None, suffix=None, logit_bias=None
  )
  (result,) = sampler.generate([Request("abc", max_new_tokens=16, seed=7)])
  assert found.choices[0].text == result.text
  assert found.usage.completion_tokens == 16


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_a_completion_is_put_between_prompt_and_suffix(sampler, client, order):
  """OpenAI's `suffix`, whole and in parts, of several prompts."""
  prompts, suffix = ["def f(", ""], "):\n  return \u4f60"
  asked = {
    "model": "tiny",
    "prompt": prompts,
    "suffix": suffix,
    "max_tokens": 7,
    "seed": 5,
    "logprobs": 0,
    "extra_body": {} if order == "psm" else {"fim_order": order},
  }
  found = client.completions.create(**asked)
  t = sampler.tokenizer
  after = [t.fim_suffix, *t.encode(suffix), t.fim_middle]
  expected = []
  for prompt in prompts:
    ids = [t.bos, t.fim_prefix, *t.encode(prompt), *after]
    if order == "spm":
      ids = [t.bos, t.fim_prefix, *after, *t.encode(prompt)]
    expected.append(Request(ids, max_new_tokens=7, seed=5))
  results = sampler.generate(expected)
  for choice, result in zip(found.choices, results, strict=True):
    check_choice(sampler, choice, result)
  n_prompt = sum(len(request.prompt) for request in expected)
  assert found.usage.prompt_tokens == n_prompt
  texts = ["", ""]
  for chunk in client.completions.create(**asked, stream=True):
    for choice in chunk.choices:
      texts[choice.index] += choice.text
  assert texts == [result.text for result in results]
  # Nor is a suffix anything that another program may put into the text.
  hidden = client.completions.create(
    **asked | {"suffix": suffix + "<fim_middle>"}
  )
  assert hidden.usage.prompt_tokens == n_prompt + 2 * len("<fim_middle>")


def loglikelihood(choice, n_context):
  """What lm-eval's `local-completions` makes of a choice."""
  logs = choice["logprobs"]["token_logprobs"][n_context:-1]
  tops = choice["logprobs"]["top_logprobs"][n_context:-1]
  greedy = all(
    log == max(top.values()) for log, top in zip(logs, tops, strict=True)
  )
  return sum(logs), greedy


def test_echo_scores_the_prompt_as_lm_eval_reads_it(sampler, tiny):
  """Ids as they are, up to all of the context but the one token it draws."""
  context = sampler.tokenizer.encode("ab")
  other = sampler.tokenizer.encode("other")
  (greedy,) = sampler.generate([Request(context, 0.0, max_new_tokens=5)])
  n = sampler.cfg.context_length
  full = sampler.tokenizer.encode("the quick brown fox " * 9)[: n - 1]
  prompts = [context + greedy.token_ids, context + other, [1, *context, 9]]
  prompts += [full, [1, *full[:-1]], [5]]
  body = {
    "model": "tiny",
    "prompt": prompts,
    "temperature": 0,
    "max_tokens": 1,
    "logprobs": 1,
    "seed": 1234,
    "echo": True,
  }
  found = post(tiny, "completions", body).json()
  choices = found["choices"]
  assert found["usage"]["prompt_tokens"] == sum(map(len, prompts))
  for choice, prompt in zip(choices, prompts, strict=True):
    logprobs = choice["logprobs"]
    assert {len(column) for column in logprobs.values()} == {len(prompt) + 1}
    score = sampler.score(prompt)
    # Nothing precedes the first, be it bos or not.
    assert logprobs["tokens"][:-1] == names(sampler, prompt)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    logs = logprobs["token_logprobs"][1:-1]
    assert logs == pytest.approx(score.log_probabilities, abs=2e-5)
    text = sampler.tokenizer.decode(prompt)
    assert choice["text"].startswith(text)
  total, is_greedy = loglikelihood(choices[0], 2)
  assert is_greedy
  assert total == pytest.approx(sum(greedy.log_probabilities), abs=1e-4)
  assert not loglikelihood(choices[1], 2)[1]
  found = post(tiny, "completions", {**body, "prompt": [*full, 9]})
  assert found.status_code == 400
  message = found.json()["error"]["message"]
  assert f"has {n} tokens" in message and "bos" not in message


def test_bos_is_put_where_it_is_asked_for(sampler, tiny):
  """In front of text, unless told otherwise; not in front of ids."""
  ids = sampler.tokenizer.encode("abc")
  echo = {"echo": True, "logprobs": 0, "max_tokens": 0}
  for prompt, add, literal, first in (
    ("abc", None, [1, *ids], "a"),
    ("abc", True, [1, *ids], "a"),
    ("abc", False, ids, None),
    (ids, None, ids, None),
    (ids, False, ids, None),
    (ids, True, [1, *ids], "a"),
    ("", False, [1], None),
    ([[]], None, [1], None),
  ):
    more = {} if add is None else {"add_bos": add}
    found = post(tiny, "next_token", {"prompt": prompt, **more}).json()
    assert found["prompt_ids"] == literal
    found = post(tiny, "score", {"input": prompt, **more}).json()
    assert found["token_ids"] == literal[1:]
    found = post(tiny, "completions", {"prompt": prompt, **more, **echo}).json()
    (choice,) = found["choices"]
    logs = choice["logprobs"]["token_logprobs"]
    assert (logs[0] is None) == (first is None)
    assert logs[first is None :] == pytest.approx(
      sampler.score(literal).log_probabilities, abs=2e-5
    )


def test_no_ids_and_a_bos_are_one_bos(tiny):
  found = post(tiny, "next_token", {"prompt": [[]], "add_bos": True}).json()
  assert found["prompt_ids"] == [1]


def test_errors_show_what_was_sent(tiny):
  text = "n_samples max_new_tokens and alternatives " * 9
  for path, body in (
    ("completions", {"prompt": text}),
    ("completions", {"prompt": text, "add_bos": False}),
    ("completions", {"prompt": "n_samples", "max_tokens": 999}),
    ("next_token", {"prompt": text}),
    ("chat/completions", {"messages": [{"role": "user", "content": text}]}),
  ):
    error = post(tiny, path, body).json()["error"]
    assert "n_samples" in error["message"], error
    assert error["param"] == (
      "max_tokens" if "max_tokens" in body else "prompt"
    )
  # Values that spell a field are left alone.
  body = {"prompt": "a", "stop": ["alternatives", 5]}
  assert "'alternatives'" in post(tiny, "completions", body).text


def test_another_model_is_not_found(tiny):
  for path, body in (
    ("completions", {"prompt": "a"}),
    ("chat/completions", {"messages": HELLO}),
    ("next_token", {"prompt": "a"}),
    ("score", {"input": "a"}),
  ):
    for name in ("other", 5):
      found = post(tiny, path, {"model": name, **body})
      assert found.status_code == 404
      error = found.json()["error"]
      assert error["code"] == "model_not_found" and error["param"] == "model"
      assert repr(name) in error["message"] and "'tiny'" in error["message"]
    assert post(tiny, path, {"model": "tiny", **body}).status_code == 200


def test_an_answer_lists_no_more_than_it_can(tiny, monkeypatch):
  monkeypatch.setattr(protocol, "MAX_LISTED", 60)
  echo = {"prompt": "a" * 14, "echo": True, "max_tokens": 0}
  for path, body, param in (
    ("score", {"input": "a" * 60}, "input"),
    ("score", {"input": "a" * 15, "alternatives": 3}, "input"),
    ("completions", {**echo, "n": 5}, "prompt"),
    ("completions", {**echo, "logprobs": 4}, "prompt"),
  ):
    found = post(tiny, path, body)
    assert found.status_code == 413, found.text
    assert found.json()["error"]["param"] == param
  assert post(tiny, "completions", {**echo, "n": 4}).status_code == 200


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text() | st.floats(-9, 9),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@hypothesis.given(value=VALUES, n=st.integers(1, 3))
def test_what_is_written_in_pieces_is_json(value, n):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(answers, "_PIECE", n)
    assert json.loads(answers.dump(value)) == value


def test_echo_may_draw_nothing(sampler, tiny, client):
  """Also of a text that is longer than the context, and of an empty one."""
  for text in ("", "abc", "long " * 50):
    for stream in (False, True):
      found = client.completions.create(
        model="tiny",
        prompt=text,
        echo=True,
        logprobs=2,
        max_tokens=0,
        stream=stream,
      )
      (choice,) = (list(found)[0] if stream else found).choices
      assert choice.text == text and choice.finish_reason == "length"
      score = sampler.score(text)
      assert choice.logprobs.token_logprobs == pytest.approx(
        score.log_probabilities, abs=2e-5
      )
      assert choice.logprobs.text_offset == list(range(len(text)))
  plain = client.completions.create(
    model="tiny", prompt="ab", echo=True, max_tokens=4, seed=2
  )
  (result,) = sampler.generate([Request("ab", max_new_tokens=4, seed=2)])
  assert plain.choices[0].text == "ab" + result.text
  assert plain.choices[0].logprobs is None


def test_offsets_count_characters(client):
  found = client.completions.create(
    model="tiny", prompt="a\u4f60b", echo=True, logprobs=0, max_tokens=0
  )
  logprobs = found.choices[0].logprobs
  assert logprobs.tokens == ["a", *names_of("\u4f60"), "b"]
  assert logprobs.text_offset == [0, 1, 1, 1, 2]


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory):
  """A model with a vocabulary of another program, with a dummy prefix."""
  path = vocabularies.folder(tmp_path_factory.mktemp("vocabulary"), "llama_2")
  tokenizer = tokenizer_lib.from_files(str(path))
  cfg = dataclasses.replace(serving.MODEL, vocab_size=tokenizer.size)
  make = jax.jit(functools.partial(decoder.init_params, cfg))
  return sampler_lib.Sampler(cfg, make(jax.random.key(0)), tokenizer)


def whole(sampler, **body):
  """The one choice of /v1/completions, without a server."""
  content = json.dumps(body).encode()
  plan = protocol.completion(sampler, "tiny", content)
  scores = [sampler.score(ids, 1) for ids in plan.prompts if plan.echo]
  results = sampler.generate(plan.requests)
  answer = answers.Completion(plan, sampler.tokenizer, "tiny")
  (choice,) = answer.whole(results, scores)["choices"]
  return choice


@pytest.mark.parametrize("prompt, echo", [("ab cd", True), ("", False)])
def test_offsets_count_no_dummy_prefix(llama_2, prompt, echo):
  t = llama_2.tokenizer
  ids = [i for i in range(t.size) if t.decode_bytes([i]).startswith(b" ")]
  others = sorted({*range(t.size)} - {*ids})  # Each token begins a word.
  choice = whole(
    llama_2, prompt=prompt, echo=echo, logprobs=1, forbidden=others
  )
  found, text = choice["logprobs"], choice["text"]
  bounds = [*found["text_offset"], len(text)]
  first, *rest = found["tokens"]
  assert first.startswith(" ")  # the text leaves that space out
  assert [text[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)] == [
    first[1:],
    *rest,
  ]


def test_bytes_of_ids_without_a_bos(llama_2):
  """Only the first id, which is not scored, can have the dummy prefix."""
  t = llama_2.tokenizer
  ids = t.encode("ab cd")
  words = [i for i in ids if t.decode_bytes([i]).startswith(b" ")]
  assert len(words) == 2
  assert llama_2.score(words).n_bytes == len(t.decode_bytes(words[1:]))
  assert llama_2.score([t.bos, *ids]).n_bytes == len("ab cd")


def test_a_vocabulary_without_infilling_is_said(llama_2):
  body = json.dumps({"prompt": "a", "suffix": "b"}).encode()
  with pytest.raises(fields.Refusal, match="has no <fim_prefix>") as found:
    protocol.completion(llama_2, "tiny", body)
  assert (found.value.status, found.value.param) == (400, "suffix")


def names_of(character):
  """As OpenAI writes the bytes of a part of a character."""
  return [f"bytes:\\x{byte:02x}" for byte in character.encode()]


def expected_chat(sampler, messages, **fields):
  tokenizer = sampler.tokenizer
  ids = chat_lib.chat_ids(tokenizer, messages)
  stops = chat_lib.stop_ids(tokenizer)
  return sampler.generate([Request(ids, stop_ids=stops, **fields)])


def test_chats_are_those_of_the_template(sampler, client):
  asked = {
    "model": "tiny",
    "messages": [
      *HELLO,
      {"role": "assistant", "content": "<user>"},
      {"role": "user", "content": [{"type": "text", "text": "again"}]},
    ],
    "max_completion_tokens": 20,
    "n": 2,
    "seed": 4,
    "logprobs": True,
    "top_logprobs": 2,
  }
  whole = client.chat.completions.create(**asked)
  messages = [*asked["messages"][:2], {"role": "user", "content": "again"}]
  expected = expected_chat(
    sampler, messages, max_new_tokens=20, n_samples=2, seed=4
  )
  for choice, result in zip(whole.choices, expected, strict=True):
    assert choice.message.content == result.text
    assert choice.message.role == "assistant"
    content = choice.logprobs.content
    assert [entry.token for entry in content] == names(
      sampler, result.token_ids
    )
    assert [entry.logprob for entry in content] == pytest.approx(
      result.log_probabilities, abs=2e-5
    )
    assert all(len(entry.top_logprobs) == 2 for entry in content)
  chunks = list(client.chat.completions.create(**asked, stream=True))
  for choice in whole.choices:
    parts = [p for c in chunks for p in c.choices if p.index == choice.index]
    assert parts[0].delta.role == "assistant"
    text = "".join(part.delta.content or "" for part in parts)
    assert text == choice.message.content
    assert parts[-1].finish_reason == choice.finish_reason
    content = [x for p in parts if p.logprobs for x in p.logprobs.content]
    assert content == choice.logprobs.content


def test_the_end_of_the_turn_ends_a_chat(sampler, client):
  end = sampler.tokenizer.end_of_turn
  found = client.chat.completions.create(
    model="tiny", messages=HELLO, seed=1, logit_bias={str(end): 100}
  )
  assert found.choices[0].finish_reason == "stop"
  assert found.choices[0].message.content == ""
  assert found.usage.completion_tokens == 1


def test_a_chat_fills_what_the_context_leaves(sampler, client):
  found = client.chat.completions.create(model="tiny", messages=HELLO, seed=1)
  (result,) = expected_chat(sampler, HELLO, seed=1)
  assert found.choices[0].message.content == result.text
  assert found.choices[0].finish_reason == (
    "length" if result.finish_reason == "length" else "stop"
  )


def test_a_checkpoint_without_a_template_refuses_chats():
  with serving.serve(serving.sampler_of()) as running:
    found = post(running, "chat/completions", {"messages": HELLO})
  assert found.status_code == 400
  assert "no chat template" in found.json()["error"]["message"]


def test_a_next_token_of_many_is_the_first(sampler, tiny):
  """`min_tokens` is of the whole answer, whose length is not said here."""
  body = {"prompt": "a", "seed": 3, "min_tokens": 5}
  found = post(tiny, "next_token", body).json()
  request = Request("a", seed=3, min_tokens=5, max_new_tokens=5)
  (whole,) = sampler.generate([request])
  assert found["chosen"]["id"] == whole.token_ids[0]


def test_steps_by_next_token_are_the_completion(sampler, tiny, client):
  """Also by ids, as the page does it."""
  rules = {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 11}
  prompt, drawn = "def ", []
  for _ in range(6):
    found = post(tiny, "next_token", {"prompt": prompt, **rules}).json()
    request = Request(prompt, **rules)
    expected = sampler.next_token(request, 20)
    assert found["prompt_ids"] == expected.prompt_ids
    assert found["entropy"] == pytest.approx(expected.entropy)
    assert found["chosen"]["id"] == expected.chosen.id
    for one, other in zip(
      found["candidates"], expected.candidates, strict=True
    ):
      # Slots of another length may sum in another order.
      assert one["stages"] == pytest.approx(other.stages, rel=1e-5)
      for name in ("id", "rank", "probability", "cumulative"):
        assert one[name] == pytest.approx(getattr(other, name), rel=1e-5)
      content = sampler.tokenizer.decode_bytes([other.id])
      assert bytes(one["bytes"]) == content
      assert one["ends"] == (other.id == sampler.tokenizer.eos)
    drawn.append(found["chosen"]["id"])
    prompt = [*found["prompt_ids"], found["chosen"]["id"]]
  asked = {name: rules[name] for name in ("temperature", "top_p", "seed")}
  whole = client.completions.create(
    model="tiny",
    prompt="def ",
    max_tokens=6,
    logprobs=0,
    extra_body={"top_k": 40},
    **asked,
  )
  assert whole.choices[0].logprobs.tokens == names(sampler, drawn)


def test_score_is_that_of_the_sampler(sampler, tiny):
  for text in ("some text \u4f60", [1, 200, 201], ""):
    found = post(tiny, "score", {"input": text, "alternatives": 3}).json()
    expected = sampler.score(text, 3)
    assert found["token_ids"] == expected.token_ids
    assert found["tokens"] == names(sampler, expected.token_ids)
    assert found["log_probabilities"] == pytest.approx(
      expected.log_probabilities, abs=2e-5
    )
    assert found["ranks"] == expected.ranks
    assert [[a["id"] for a in place] for place in found["alternatives"]] == [
      [a.id for a in place] for place in expected.alternatives
    ]
    assert found["total"] == pytest.approx(expected.total, abs=1e-4)
    if expected.n_bytes:
      bits = -expected.total / math.log(2) / expected.n_bytes
      assert found["bits_per_byte"] == pytest.approx(bits, abs=1e-4)
    else:
      assert found["bits_per_byte"] is None


def test_models_and_health(sampler, tiny, client):
  (card,) = client.models.list().data
  assert card.id == "tiny"
  assert card.context_length == sampler.cfg.context_length
  assert client.models.retrieve("tiny") == card
  with pytest.raises(openai.NotFoundError, match="model='gpt': not served"):
    client.models.retrieve("gpt")
  found = httpx.get(f"{tiny.url}/health")
  assert found.status_code == 200 and found.json()["status"] == "ok"
  missing = httpx.get(f"{tiny.url}/v1/nothing")
  assert missing.status_code == 404 and "error" in missing.json()
  wrong = httpx.get(f"{tiny.url}/v1/completions")
  assert wrong.status_code == 405 and "error" in wrong.json()


REFUSED = [
  ("completions", {"promt": "a"}, "promt", "did you mean 'prompt'"),
  (
    "completions",
    {"prompt": "a", "temprature": 1},
    "temprature",
    "temperature",
  ),
  ("completions", {}, "prompt", "missing"),
  ("completions", {"prompt": 5}, "prompt", "must be text"),
  ("completions", {"prompt": []}, "prompt", "not empty"),
  ("completions", {"prompt": ["a", 1]}, "prompt", "must be text"),
  ("completions", {"prompt": [1, True]}, "prompt", "must be text"),
  ("completions", {"prompt": [1.0]}, "prompt", "must be text"),
  ("completions", {"prompt": [384]}, "prompt", "384 is not in"),
  ("completions", {"prompt": [[-1]]}, "prompt", "-1 is not in"),
  ("completions", {"prompt": "a" * 101}, "prompt", "shorten it"),
  ("completions", {"prompt": "a", "max_tokens": 200}, "max_tokens", "at most"),
  ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
  (
    "completions",
    {"prompt": "a", "max_tokens": -1},
    "max_tokens",
    "negative",
  ),
  ("completions", {"prompt": "a", "max_tokens": "9"}, "max_tokens", "type int"),
  (
    "completions",
    {"prompt": "a", "temperature": -1},
    "temperature",
    "negative",
  ),
  ("completions", {"prompt": "a", "temperature": "1"}, "temperature", "float"),
  ("completions", {"prompt": "a", "top_p": 0}, "top_p", "must be in"),
  ("completions", {"prompt": "a", "top_k": 1.5}, "top_k", "type int"),
  ("completions", {"prompt": "a", "min_p": 2}, "min_p", "must be in"),
  ("completions", {"prompt": "a", "n": 0}, "n", "at least 1"),
  ("completions", {"prompt": "a", "n": True}, "n", "type int"),
  ("completions", {"prompt": "a", "seed": -1}, "seed", "not be negative"),
  (
    "completions",
    {"prompt": "a", "logprobs": 21},
    "logprobs",
    "must be at most",
  ),
  ("completions", {"prompt": "a", "logprobs": True}, "logprobs", "type int"),
  ("completions", {"prompt": "a", "stop": [""]}, "stop", "one character"),
  ("completions", {"prompt": "a", "stop": 5}, "stop", "must be texts"),
  ("completions", {"prompt": "a", "stop": [5]}, "stop", "must be texts"),
  (
    "completions",
    {"prompt": "a", "forbidden": ["a"]},
    "forbidden",
    "must be ids",
  ),
  (
    "completions",
    {"prompt": "a", "logit_bias": {"x": 1}},
    "logit_bias",
    "no id",
  ),
  (
    "completions",
    {"prompt": "a", "logit_bias": {"999": 1}},
    "logit_bias",
    "ids",
  ),
  (
    "completions",
    {"prompt": "a", "logit_bias": [1]},
    "logit_bias",
    "type dict",
  ),
  ("completions", {"prompt": "a", "stream": 1}, "stream", "type bool"),
  ("completions", {"prompt": "a", "stop_ids": 5}, "stop_ids", "must be ids"),
  (
    "completions",
    {"prompt": "a", "stop_ids": [*range(10)]},
    "stop_ids",
    "at most 7",
  ),
  (
    "completions",
    {"prompt": "a", "logit_bias": {"5": "x"}},
    "logit_bias",
    "must be numbers",
  ),
  (
    "completions",
    {"prompt": "a", "stream_options": {}},
    "stream_options",
    "needs stream",
  ),
  (
    "completions",
    {"prompt": "a", "stream": True, "stream_options": {"usage": True}},
    "stream_options",
    "did you mean 'include_usage'",
  ),
  ("completions", {"prompt": "a", "best_of": 2}, "best_of", "not supported"),
  ("completions", {"prompt": "a", "suffix": 5}, "suffix", "type str"),
  ("completions", {"prompt": [5], "suffix": "b"}, "suffix", "prompt of text"),
  ("completions", {"prompt": "a", "suffix": "b", "echo": True}, "echo", "no"),
  (
    "completions",
    {"prompt": "a", "suffix": "b", "fim_order": "pms"},
    "fim_order",
    "one of psm, spm",
  ),
  ("completions", {"prompt": "a", "fim_order": "psm"}, "fim_order", "beside"),
  (
    "completions",
    {"prompt": "a", "suffix": "b" * 101},
    "prompt",
    "has 106 tokens",
  ),
  ("completions", {"prompt": "a", "n": 2000}, None, "at most 516"),
  ("chat/completions", {"messages": []}, "messages", "at least one"),
  ("chat/completions", {"messages": "hi"}, "messages", "list of objects"),
  (
    "chat/completions",
    {"messages": HELLO, "stop_ids": [*range(300)]},
    "stop_ids",
    "at most 7",
  ),
  (
    "chat/completions",
    {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
    "messages",
    "more than text",
  ),
  ("chat/completions", {"messages": [{"role": "user"}]}, "messages", "needs"),
  (
    "chat/completions",
    {"messages": [{"role": "wizard", "content": "x"}]},
    "messages",
    "no role wizard",
  ),
  (
    "chat/completions",
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "messages",
    "more than text",
  ),
  (
    "chat/completions",
    {"messages": HELLO, "top_logprobs": 3},
    "top_logprobs",
    "needs logprobs",
  ),
  (
    "chat/completions",
    {"messages": HELLO, "tools": [{"type": "function"}]},
    "tools",
    "not supported",
  ),
  (
    "chat/completions",
    {"messages": HELLO, "response_format": {"type": "json_object"}},
    "response_format",
    "not supported",
  ),
  # In the client's own words.
  *(
    (
      "chat/completions",
      {"messages": HELLO, name: value},
      name,
      f"{name}={value!r}: ",
    )
    for name in ("max_tokens", "max_completion_tokens")
    for value in (-1, 0, 200, "x")
  ),
  (
    "chat/completions",
    {"messages": HELLO, "logprobs": True, "top_logprobs": 21},
    "top_logprobs",
    "top_logprobs=21: must be at most 20",
  ),
  (
    "completions",
    {"prompt": "a", "max_new_tokens": 200},
    "max_new_tokens",
    "max_new_tokens=200",
  ),
  (
    "chat/completions",
    {"messages": HELLO, "max_completion_tokens": 3, "min_tokens": 5},
    "min_tokens",
    "must be at most 3, the most tokens to draw",
  ),
  (
    "completions",
    {"prompt": "a", "n": 2, "seed": 2**32 - 1},
    "seed",
    "must be at most 4294967294, so that 2 samples have",
  ),
  ("completions", {"prompt": [10**2000]}, "prompt", "is not in [0"),
  ("completions", {"prompt": "a", "forbidden": [10**2000]}, "forbidden", "ids"),
  ("next_token", {"prompt": "a", "candidates": 0}, "candidates", "must be in"),
  ("next_token", {"prompt": ["a", "b"]}, "prompt", "one only"),
  ("next_token", {"prompt": "a", "max_tokens": 1}, "max_tokens", "unknown"),
  ("score", {"text": "a"}, "text", "unknown"),
  ("score", {"input": "a", "alternatives": 21}, "alternatives", "at most 20"),
]


@pytest.mark.parametrize("path, body, param, message", REFUSED)
def test_what_cannot_be_met_is_refused(tiny, path, body, param, message):
  found = post(tiny, path, body)
  error = found.json()["error"]
  assert found.status_code == 400, error
  assert set(error) == {"message", "type", "param", "code"}
  assert error["type"] == "invalid_request_error"
  assert error["param"] == param and message in error["message"]


def test_what_asks_for_nothing_is_taken(client):
  client.completions.create(
    model="tiny", prompt="a", best_of=1, suffix="", max_tokens=1
  )
  client.chat.completions.create(
    model="tiny",
    messages=HELLO,
    max_tokens=1,
    tools=[],
    response_format={"type": "text"},
    store=False,
    metadata={"a": "b"},
  )


# --- tokens for clients without the tokenizer --------------------------------


def test_tokens_are_those_of_the_tokenizer(sampler, tiny):
  tokenizer = sampler.tokenizer

  def ask(path, **body):
    found = httpx.post(f"{tiny.url}/{path}", json=body, timeout=120.0)
    assert found.status_code == 200, found.text
    return found.json()

  for text in ("", "def f(", "a\u00e9\u4f60\n", "is <eos> text? <bos>"):
    ids = tokenizer.encode(text)
    plain = ask("tokenize", prompt=text, add_special_tokens=False)
    assert plain["tokens"] == ids and plain["count"] == len(ids)
    assert plain["max_model_len"] == sampler.cfg.context_length
    with_bos = ask("tokenize", prompt=text, return_token_strs=True)
    assert with_bos["tokens"] == [tokenizer.bos, *ids]
    assert with_bos["token_strs"] == [
      tokenizer.piece(i) for i in with_bos["tokens"]
    ]
    assert ask("detokenize", tokens=with_bos["tokens"]) == {"prompt": text}
  # Clients find the ids of bos and eos so.
  for name in ("<bos>", "<eos>"):
    found = ask("tokenize", prompt=name, add_special_tokens=False)
    assert found["tokens"] == [tokenizer.named[name]]
  chats = ask("tokenize", messages=HELLO)["tokens"]
  assert chats == chat_lib.chat_ids(tokenizer, HELLO)
  info = httpx.get(f"{tiny.url}/tokenizer_info").json()
  assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
  assert info["chat_template"] == serving.TEMPLATE
  assert info["fingerprint"] == tokenizer.fingerprint


@pytest.mark.parametrize(
  ("path", "body", "message"),
  [
    ("tokenize", {}, "prompt: give this or messages"),
    ("tokenize", {"prompt": "a", "messages": HELLO}, "prompt: give this or"),
    ("tokenize", {"prompt": ["a"]}, "prompt=['a']: must be of type str"),
    ("tokenize", {"messages": "a"}, "messages: must be a list of objects"),
    ("tokenize", {"prompt": "a", "add_specials": True}, "did you mean 'add_sp"),
    ("detokenize", {}, "tokens: missing"),
    ("detokenize", {"tokens": "a"}, "tokens='a': must be ids"),
    ("detokenize", {"tokens": [384]}, "tokens: id 384 is not in [0, 384)"),
    ("detokenize", {"tokens": [-1]}, "tokens: id -1 is not in [0, 384)"),
    ("detokenize", {"tokens": [10**30]}, "tokens: id 1000000"),
  ],
)
def test_bad_tokens_are_refused(tiny, path, body, message):
  found = httpx.post(f"{tiny.url}/{path}", json=body, timeout=120.0)
  assert found.status_code == 400
  assert message in found.json()["error"]["message"]


def logprobs_of(found):
  assert found.status_code == 200, found.text
  choices = sorted(found.json()["choices"], key=lambda choice: choice["index"])
  return [choice["logprobs"]["token_logprobs"] for choice in choices]


@pytest.mark.parametrize(("n_prompt", "n_new"), [(100, 1), (100, 0), (101, 0)])
def test_prompts_as_long_as_the_context_are_scored(
  sampler, tiny, n_prompt, n_new
):
  """As ids and lists of ids, up to where a new token has no place."""
  prompts = [[1, *sampler.tokenizer.encode(c * (n_prompt - 1))] for c in "ab"]
  body = {"max_tokens": n_new, "echo": True, "logprobs": 1, "temperature": 0}
  both = logprobs_of(post(tiny, "completions", {"prompt": prompts, **body}))
  for prompt, logs in zip(prompts, both, strict=True):
    (alone,) = logprobs_of(
      post(tiny, "completions", {"prompt": prompt, **body})
    )
    score = sampler.score(prompt)
    assert len(logs) == n_prompt + n_new and logs[0] is None
    for found in (logs, alone):
      scored = found[1:n_prompt]
      assert scored == pytest.approx(score.log_probabilities, abs=2e-5)


def test_a_token_beyond_the_context_is_refused(tiny):
  body = {"prompt": [1] * 101, "max_tokens": 1, "echo": True, "logprobs": 1}
  found = post(tiny, "completions", body)
  assert found.status_code == 400
  assert "must leave room for one more" in found.json()["error"]["message"]


def test_ids_get_a_bos_on_request(sampler, tiny):
  """By a field of the call, or by --add_bos where it says nothing and the
  context has room; the client does not see it.
  """
  ids, bos = sampler.tokenizer.encode("def f("), sampler.tokenizer.bos
  body = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
  given = sampler.score([bos, *ids]).log_probabilities

  def logs(running, prompt, **fields):
    answer = post(running, "completions", {"prompt": prompt, **body, **fields})
    return logprobs_of(answer)[0]

  for name in ("add_bos", "add_special_tokens"):
    found = logs(tiny, ids, **{name: True})
    assert found[:-1] == pytest.approx(given, abs=2e-5)
  assert logs(tiny, ids)[0] is None
  assert logs(tiny, "def f(", add_special_tokens=False)[0] is None
  contradiction = {"add_bos": True, "add_special_tokens": False}
  found = post(tiny, "completions", {"prompt": ids, **body, **contradiction})
  assert found.status_code == 400
  with serving.serve(sampler, add_bos=True) as running:
    assert logs(running, ids)[:-1] == pytest.approx(given, abs=2e-5)
    assert logs(running, ids, add_bos=False)[0] is None
    once = logs(running, [bos, *ids])
    assert once[0] is None
    assert once[1:-1] == pytest.approx(given, abs=2e-5)
    full = logs(running, [ids[0]] * 100)
    assert full[0] is None and len(full) == 101
    assert logs(running, [ids[0]] * 99)[0] is not None


def test_a_task_of_lm_eval_names_the_new_tokens_as_it_does(tiny):
  """Its client sends the task's max_new_tokens beside its own max_tokens."""
  body = {"prompt": "a", "max_tokens": 256, "max_new_tokens": 3}
  found = post(tiny, "completions", {**body, "stop": ["<eos>"], "seed": 1})
  assert found.json()["usage"]["completion_tokens"] <= 3
