"""The server under stress: limits, clients that leave, failures, the door."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import gc
import itertools
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import doors
import httpx
import jax
import jax.numpy as jnp
import openai
import pytest
import serving

from lm import checkpoint, schema
from lm import config as config_lib
from lm.data import chat as chat_lib
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder, scoring
from lm.sample import decoding
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib
from lm.serve import compiling, listen
from lm.serve import worker as worker_lib

Request = request_lib.Request
HELLO = [{"role": "user", "content": "Hello"}]
JSON = {"content-type": "application/json"}
post = serving.post


@pytest.fixture(scope="module")
def sampler():
  return serving.sampler_of(serving.TEMPLATE)


@pytest.fixture(scope="module")
def tiny(sampler):
  with serving.serve(sampler) as running:
    yield running


MALFORMED = {
  b"": 400,
  b"{": 400,
  b"[]": 400,
  b'"a"': 400,
  b'{"prompt": "a", "temperature": NaN}': 400,
  b'{"prompt": "a", "temperature": 1e999}': 400,
  b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}": 400,
  b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}": 400,
  b'{"prompt": "a", "logit_bias": {"5": ' + b"9" * 400 + b"}}": 400,
  b'{"prompt": "\\ud800"}': 400,
  b'{"prompt": "\xff"}': 400,
  b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}": 400,
  b'{"prompt": "' + b"a" * 70000 + b'"}': 413,
}


def send(running, body, **headers):
  headers = {"content-type": "application/json", **headers}
  return httpx.post(
    f"{running.url}/v1/completions",
    content=body,
    headers=headers,
    timeout=120.0,
  )


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: body[:40])
def test_malformed_bodies_are_refused(tiny, body):
  for content in (body, iter([body])):  # With a length, and in chunks.
    found = send(tiny, content)
    assert found.status_code == MALFORMED[body], found.text
    assert found.json()["error"]["message"]


def test_web_pages_elsewhere_cannot_use_the_server(tiny):
  """Neither by a request that needs no leave, nor by a name of their own."""
  found = send(tiny, b'{"prompt": "a"}', **{"content-type": "text/plain"})
  assert found.status_code == 415
  found = send(tiny, b'{"prompt": "a"}', host="evil.example:8000")
  assert found.status_code == 403 and "127.0.0.1" in found.text
  assert "access-control-allow-origin" not in found.headers


def test_a_key_is_asked_for():
  with serving.serve(
    serving.sampler_of(), token="s3cret", loopback_only=False
  ) as running:
    for key in (None, "none", "s3cre", "s3crett", "\u00e9"):
      headers = {} if key is None else {"authorization": f"Bearer {key}"}
      headers = {k: v.encode("latin-1") for k, v in headers.items()}
      for path in ("completions", "next_token", "score"):
        found = post(running, path, {"prompt": "a"}, headers=headers)
        assert found.status_code == 401
        assert found.json()["error"]["type"] == "authentication_error"
        assert "s3cret" not in found.text
    assert httpx.get(f"{running.url}/v1/models").status_code == 401
    assert httpx.get(f"{running.url}/").status_code == 200
    assert httpx.get(f"{running.url}/health").status_code == 200
    with openai.OpenAI(
      base_url=f"{running.url}/v1", api_key="s3cret", max_retries=0
    ) as client:
      client.completions.create(model="tiny", prompt="a", max_tokens=1)


def test_a_call_that_has_ended_is_forgotten(tiny):
  """Also if the client leaves after the last token, before the event loop has
  heard of it: its drop is the last that the thread is told.
  """

  async def ask():
    ended = threading.Event()
    with tiny.worker.running([Request("a", max_new_tokens=1)], False) as ticket:
      # The loop waits; the thread goes on.
      tiny.worker._inbox.put(lambda: tiny.worker._inbox.put(ended.set))
      while tiny.worker._tickets or not ended.is_set():
        time.sleep(0.01)
    return weakref.ref(ticket)

  loop = tiny.worker._loop
  ticket = asyncio.run_coroutine_threadsafe(ask(), loop).result()
  tiny.settle()
  deadline = time.monotonic() + 20
  while ticket() is not None:
    assert time.monotonic() < deadline
    gc.collect()
    time.sleep(0.01)


class Slow:
  """The engine of `worker` with pauses, so that calls last."""

  def __init__(self, engine, seconds):
    self._engine, self._seconds = engine, seconds

  def __getattr__(self, name):
    return getattr(self._engine, name)

  def step(self, n_steps, max_prefills):
    time.sleep(self._seconds)
    return self._engine.step(1, max_prefills)


@contextlib.contextmanager
def slowed(sampler, make, **limits):
  """A server of two slots and a queue of one, its engine wrapped by `make`:
  slow, but not from compiling.
  """
  engine = sampler.engine(2)
  engine.submit(Request("a", max_new_tokens=1))
  engine.step(1)
  with serving.serve(sampler, n_slots=2, max_queue=1, **limits) as running:
    running.worker._engine = make(running.worker._engine)
    yield running


@pytest.fixture
def slow(sampler):
  """Calls that last are longer than the time allowed."""
  make = functools.partial(Slow, seconds=0.05)
  with slowed(sampler, make, timeout_seconds=1.5) as running:
    yield running


def test_a_full_queue_says_so(sampler):
  """Of three samples none ends before the others have been answered."""
  n_steps, go_on = itertools.count(1), threading.Event()

  class Held(Slow):
    def step(self, *args):
      assert next(n_steps) < 7 or go_on.wait(60)
      return super().step(*args)

  body = {"prompt": "a", "max_tokens": 8, "n": 3, "min_tokens": 8}
  with (
    slowed(sampler, functools.partial(Held, seconds=0.0)) as running,
    httpx.Client(timeout=120.0) as client,
    httpx.Client(timeout=120.0) as other,
  ):
    url = f"{running.url}/v1/completions"
    with client.stream("POST", url, json={**body, "stream": True}) as stream:
      chunks = stream.iter_bytes()
      next(chunks)
      for more in ({}, {"stream": True}):
        found = other.post(url, json={"prompt": "a", **more})
        assert found.status_code == 429
        assert "queue is full" in found.json()["error"]["message"]
      found = other.post(f"{running.url}/v1/score", json={"input": "a"})
      assert found.status_code == 429
      go_on.set()
      assert b"[DONE]" in b"".join(chunks)
    found = post(running, "completions", {"prompt": "a"})
    assert found.status_code == 200


def test_time_is_bounded(slow):
  body = {"prompt": "a", "max_tokens": 90, "min_tokens": 90}
  found = post(slow, "completions", body)
  assert found.status_code == 504
  slow.settle()
  with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x") as client:
    stream = client.completions.create(
      model="tiny",
      prompt="a",
      max_tokens=90,
      extra_body={"min_tokens": 90},
      stream=True,
    )
    with pytest.raises(openai.APIError, match="longer than 1.5 seconds"):
      list(stream)


def test_a_body_that_does_not_come_is_not_waited_for(slow):
  with socket.create_connection(("127.0.0.1", slow.port)) as connection:
    head = (
      f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{slow.port}\r\n"
      "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    connection.sendall(head.encode())
    assert connection.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(sampler, stream):
  """By themselves the samples would end after 45 s or more, and `settle` waits
  for less.
  """
  body = {"prompt": "a", "max_tokens": 90, "min_tokens": 90, "n": 3}
  content = json.dumps({**body, "stream": stream}).encode()
  kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
  with slowed(sampler, functools.partial(Slow, seconds=0.25)) as running:
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
      connection.sendall(HEAD + kind % len(content) + content)
      while running.worker._engine.n_free():
        time.sleep(0.01)
    running.settle()


def test_a_server_that_stops_says_so(sampler):
  with serving.serve(sampler, n_slots=1) as running:
    running.worker._engine = Slow(running.worker._engine, 0.5)
    found = {}

    def ask():
      body = {"prompt": "a", "max_tokens": 90, "min_tokens": 90}
      found["long"] = post(running, "completions", body)

    thread = threading.Thread(target=ask)
    thread.start()
    while running.worker._engine.n_free():
      time.sleep(0.01)
    loop = running.worker._loop
    loop.call_soon_threadsafe(running.worker.interrupt)
    thread.join()
    assert found["long"].status_code == 503
    assert post(running, "completions", {"prompt": "a"}).status_code == 503
    assert httpx.get(f"{running.url}/health").status_code == 503


def test_an_engine_that_breaks_is_replaced(sampler, capfd, monkeypatch):
  """After its slots are freed: there may be no room for two."""
  make, freed = sampler.engine, []
  with serving.serve(sampler, n_slots=2) as running:

    class Broken(Slow):
      def step(self, n_steps, max_prefills):
        raise RuntimeError("out of memory")

    running.worker._engine = Broken(running.worker._engine, 0)
    broken = weakref.ref(running.worker._engine)

    def engine(*args):
      freed.append(broken() is None)
      return make(*args)

    monkeypatch.setattr(sampler, "engine", engine)
    found = post(running, "completions", {"prompt": "a", "n": 3})
    assert found.status_code == 500
    assert "RuntimeError" in found.json()["error"]["message"]
    assert "out of memory" in capfd.readouterr().err
    found = post(running, "completions", {"prompt": "a", "seed": 1})
    assert found.status_code == 200
  assert freed == [True]


def test_nan_logits_are_an_error_of_the_server():
  clean = serving.sampler_of()
  sampler = sampler_lib.Sampler.__new__(sampler_lib.Sampler)
  vars(sampler).update(vars(clean))
  sampler.state = jax.tree.map(lambda x: x * jnp.nan, clean.state)
  with serving.serve(sampler) as running:
    for more in ({}, {"stream": True}):
      found = post(running, "completions", {"prompt": "a", **more})
      assert "became NaN" in found.text
      assert found.status_code == (200 if more else 500)


# --- scores, between the steps of the samples --------------------------------


class Spy:
  """Notes what the worker's thread does, in order."""

  def __init__(self, running, pause=0.0):
    """With a pause before each slice, a long text takes much longer than the
    call may.
    """
    self.running, self.events, self.pause = running, [], pause
    worker = running.worker
    step, scoring = worker._engine.step, worker.sampler.scoring

    def noted(*args):
      self.events.append("step")
      return step(*args)

    def sliced(ids, n=0, stride=None):
      for part in scoring(ids, n, stride):
        time.sleep(self.pause)
        self.events.append(("slice", len(ids)))
        yield part

    worker._engine.step = noted
    self.patch = pytest.MonkeyPatch()
    self.patch.setattr(worker.sampler, "scoring", sliced)

  def slices(self):
    return [event for event in self.events if event != "step"]

  def n_slices(self):
    return len(self.slices())

  def wait(self, n):
    """Until there are `n` more slices."""
    n += self.n_slices()
    while self.n_slices() < n:
      time.sleep(0.001)


@pytest.fixture
def spied(sampler):
  with serving.serve(sampler, n_slots=2) as running:
    spy = Spy(running)
    yield spy
    spy.patch.undo()


LONG = "the quick brown fox " * 2000
# Scores a long text, for a client that leaves.
LONG_CALLS = [
  ("score", {"input": LONG}),
  (
    "completions",
    {"prompt": LONG, "echo": True, "logprobs": 1, "max_tokens": 0},
  ),
]


def leave_after(running, path, body, until):
  """Sends the call, leaves once `until()` returns."""
  content = json.dumps(body).encode()
  head = (
    f"POST /v1/{path} HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n"
    f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
  )
  with socket.create_connection(("127.0.0.1", running.port)) as connection:
    connection.sendall(head.encode() + b"\r\n" + content)
    until()


@pytest.mark.parametrize("path, body", LONG_CALLS)
def test_a_score_ends_when_its_client_leaves(spied, path, body):
  spied.pause = 0.05
  leave_after(spied.running, path, body, lambda: spied.wait(3))
  spied.running.settle()
  n = spied.n_slices()
  assert n < len(LONG) / 101  # Of some 400 slices.
  time.sleep(0.2)
  assert spied.n_slices() == n


@pytest.mark.parametrize("path, body", LONG_CALLS)
def test_samples_step_between_the_slices_of_scores(spied, path, body):
  """However many scores there are, and these take turns."""

  def complete():
    while len(set(spied.slices())) < 2:
      time.sleep(0.001)
    spied.events.clear()
    fields = {"prompt": "a", "max_tokens": 80, "min_tokens": 80}
    assert post(spied.running, "completions", fields).status_code == 200
    while spied.n_slices() < 4:
      time.sleep(0.001)

  other = threading.Thread(
    target=leave_after,
    args=(spied.running, "score", {"input": LONG + "!"}, complete),
  )
  other.start()
  leave_after(spied.running, path, body, other.join)
  first = spied.events.index("step")
  last = len(spied.events) - spied.events[::-1].index("step")
  busy = spied.events[first:last]
  assert busy.count("step") >= 80 / worker_lib.STEPS
  for one, following in zip(busy, busy[1:], strict=False):
    assert "step" in (one, following)
  assert len(set(spied.slices()[:4])) == 2


def test_time_bounds_a_score(sampler):
  with serving.serve(sampler, timeout_seconds=1.0) as running:
    spy = Spy(running, pause=0.05)
    for path, body in LONG_CALLS:
      found = post(running, path, body)
      assert found.status_code == 504
      running.settle()
      n = spy.n_slices()
      time.sleep(0.2)
      assert spy.n_slices() == n
    spy.patch.undo()


def test_scores_in_slices_are_whole(sampler, tiny):
  text = LONG[:1000]
  found = post(tiny, "score", {"input": text}).json()
  expected = sampler.score(text)
  assert found["log_probabilities"] == pytest.approx(
    expected.log_probabilities, abs=2e-5
  )
  assert found["total"] == pytest.approx(expected.total, rel=1e-6)


def test_prompts_are_read_between_steps(sampler):
  """One each step, so that many do not hold up what runs."""
  engine, n_read = sampler.engine(4), []
  for i in range(4):
    engine.submit(Request(f"prompt {i}", max_new_tokens=30, min_tokens=30))
  for _ in range(4):
    engine.step(1, worker_lib.PREFILLS)
    n_read.append(4 - engine.n_free())
  assert n_read == [1, 2, 3, 4]


# --- connections -------------------------------------------------------------


def closed(connection, seconds=20.0):
  """Whether the server closes it in time."""
  connection.settimeout(seconds)
  try:
    while connection.recv(1000):
      pass
    return True
  except ConnectionError:
    return True
  except TimeoutError:
    return False


def connect(stack, running, text=b"", source="127.0.0.1"):
  connection = socket.create_connection(
    ("127.0.0.1", running.port), source_address=(source, 0)
  )
  stack.enter_context(connection)
  connection.sendall(text)
  return connection


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
BODY = HEAD + (
  b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
)
DONE = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize(
  "text",
  [b"", HEAD, BODY, DONE, DONE + HEAD, b"\0", BODY.replace(b"json", b"x")],
)
def test_connections_that_say_nothing_are_closed(sampler, text):
  with (
    serving.serve(sampler, idle_seconds=0.3) as running,
    contextlib.ExitStack() as stack,
  ):
    silent = [connect(stack, running, text) for _ in range(5)]
    assert all(map(closed, silent))


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_is_not_read_is_not_kept(sampler, stream):
  """Its megabytes would stay with the server, whatever `timeout_seconds` is."""
  body = {"prompt": [[5]], "n": 1 << 15, "max_tokens": 0, "echo": True}
  text = json.dumps({**body, "stream": stream}).encode()
  kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
  with (
    serving.serve(sampler, idle_seconds=0.5, timeout_seconds=5.0) as running,
    socket.socket() as deaf,
  ):
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
    deaf.connect(("127.0.0.1", running.port))
    deaf.sendall(HEAD + kind % len(text) + text)
    state = running.server.server_state
    for there in (True, False):
      deadline = time.monotonic() + 20
      while bool(state.connections) != there:
        assert time.monotonic() < deadline, "the connection is kept"
        time.sleep(0.01)
    assert post(
      running, "completions", {"prompt": "a", "max_tokens": 1}
    ).is_success


def test_a_head_in_drops_is_not_waited_for(sampler):
  head = HEAD + b"X: " + b"a" * 400  # half a minute, in drops
  with (
    serving.serve(sampler, idle_seconds=0.5) as running,
    contextlib.ExitStack() as stack,
  ):
    # The second one after a request that was answered.
    slow = [connect(stack, running), connect(stack, running, DONE)]
    n_sent = [0, 0]
    for i, connection in enumerate(slow):
      with contextlib.suppress(ConnectionError):
        for byte in head:
          connection.sendall(bytes([byte]))
          n_sent[i] += 1
          time.sleep(0.05)
    assert max(n_sent) < len(head)


def test_slow_connections_keep_nobody_out(sampler):
  with (
    serving.serve(
      sampler, max_connections=40, max_connections_per_client=30
    ) as running,
    contextlib.ExitStack() as stack,
  ):
    for i in range(100):
      text, source = (b"", HEAD)[i % 2], f"127.0.0.{2 + i % 2}"
      connect(stack, running, text, source)
      if i % 20 == 0:  # Also to one of the same address.
        for address in ("127.0.0.1", source):
          healthy = connect(stack, running, DONE, address)
          assert healthy.recv(100).startswith(b"HTTP/1.1 200")
    found = post(running, "completions", {"prompt": "a", "max_tokens": 1})
    assert found.status_code == 200
    assert len(running.server.server_state.connections) <= 40


def test_one_address_has_its_share_of_connections(sampler):
  """Those with a request under way are not closed for others."""
  with (
    serving.serve(sampler, max_connections_per_client=3) as running,
    contextlib.ExitStack() as stack,
  ):
    for _ in range(3):
      connect(stack, running, BODY)
    while len(running.server.server_state.tasks) < 3:
      time.sleep(0.01)
    refused = connect(stack, running)
    assert refused.recv(100).startswith(b"HTTP/1.1 429") and closed(refused)
    other = connect(stack, running, DONE, "127.0.0.2")
    assert other.recv(100).startswith(b"HTTP/1.1 200")


# --- two hundred at once -----------------------------------------------------


def well_formed(rng, i):
  """Path and body of a call that is to be answered, and its Request."""
  fields = {
    "seed": i,
    "temperature": rng.choice([0.0, 0.7, 1.0, 1.5]),
    "top_k": rng.choice([0, 3, 40]),
    "top_p": rng.choice([0.5, 0.9, 1.0]),
    "stop": rng.choice([[], ["e"], ["zz", "a"]]),
  }
  n_tokens = rng.choice([1, 5, 20, 40])
  body = {**fields, "max_tokens": n_tokens, "stream": rng.random() < 0.5}
  if rng.random() < 0.25:
    return "chat/completions", {**body, "messages": HELLO}
  prompt = "".join(
    rng.choice("ab (\u00e9\u4f60") for _ in range(rng.randrange(20))
  )
  return "completions", {**body, "prompt": prompt}


def expected_text(sampler, path, body):
  fields = {k: v for k, v in body.items() if k not in ("messages", "stream")}
  fields["max_new_tokens"] = fields.pop("max_tokens")
  if path != "completions":
    fields["prompt"] = chat_lib.chat_ids(sampler.tokenizer, HELLO)
    fields["stop_ids"] = chat_lib.stop_ids(sampler.tokenizer)
  (result,) = sampler.generate([Request(**fields)])
  return result.text


async def answered(client, path, body):
  """The text of an answer, whole or streamed."""
  found = await client.post(f"/v1/{path}", json=body)
  assert found.status_code == 200, found.text
  if not body["stream"]:
    (choice,) = found.json()["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]
  events = found.text.split("\n\n")
  assert events[-2:] == ["data: [DONE]", ""]
  choices = [json.loads(e[6:])["choices"][0] for e in events[:-2]]
  return "".join(
    c["text"] if "text" in c else c["delta"].get("content") or ""
    for c in choices
  )


async def left(rng, port, path, body):
  """A client that goes away at some point of its call."""
  reader, writer = await asyncio.open_connection("127.0.0.1", port)
  content = json.dumps(body).encode()
  head = (
    f"POST /v1/{path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
  )
  whole = head.encode() + b"\r\n" + content
  writer.write(whole[: rng.choice([len(whole), len(whole), len(whole) - 5])])
  await writer.drain()
  await asyncio.sleep(rng.random() * 2)
  if rng.random() < 0.5:
    writer.transport.abort()
  writer.close()


@pytest.mark.slow
def test_two_hundred_at_once(sampler, tiny):
  """120 calls to be answered, 40 clients that leave and 40 bad bodies."""
  rng = random.Random(0)
  calls = [well_formed(rng, i) for i in range(120)]
  leavers = [well_formed(rng, i) for i in range(40)]
  expected = [expected_text(sampler, *call) for call in calls]
  malformed = [rng.choice(list(MALFORMED)) for _ in range(40)]

  async def bad(client, body):
    found = await client.post("/v1/completions", content=body, headers=JSON)
    assert found.status_code == MALFORMED[body]
    assert found.json()["error"]["message"]

  async def storm():
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
      base_url=tiny.url, limits=limits, timeout=120
    ) as client:
      tasks = [answered(client, *call) for call in calls]
      tasks += [left(rng, tiny.port, *call) for call in leavers]
      tasks += [bad(client, body) for body in malformed]
      order = list(range(len(tasks)))
      rng.shuffle(order)
      shuffled = await asyncio.gather(*(tasks[i] for i in order))
    found = dict(zip(order, shuffled, strict=True))
    return [found[i] for i in range(len(calls))]

  assert asyncio.run(storm()) == expected
  tiny.settle()
  gc.collect()
  # Not isinstance: it asks other packages' objects, which may warn.
  tickets = [x for x in gc.get_objects() if type(x) is worker_lib.Ticket]
  assert not tickets


# --- the door ----------------------------------------------------------------

ROOT = pathlib.Path(__file__).parent.parent


def door(*arguments, **environment):
  """In a process of its own, as users start it."""
  return subprocess.Popen(
    [sys.executable, "-m", "lm.serve", *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "--workdir: missing"),
    (["--workdir=x", "--host=0.0.0.0"], "--host=0.0.0.0: other machines"),
    (["--workdir=x", "--host=::"], "--host=::: other machines"),
    (["--workdir=x", "--api_key_env=NONE"], "--api_key_env=NONE: the variable"),
    (["--workdir=x", "--slots=0"], "--slots=0: must be in [1, 4096]"),
    (["--workdir=x", "--slots=1000000000"], "--slots=1000000000: must be in"),
    (["--workdir=x", "--port=70000"], "--port=70000: must be in [0, 65535]"),
    (["--workdir=x", "--timeout_seconds=inf"], "--timeout_seconds=inf: must"),
    (["--workdir=x", "--idle_seconds=0"], "--idle_seconds=0.0: must be in"),
    (["--workdir=x", "--host=no.invalid"], "--host=no.invalid: does not"),
    (["--workdir=/nowhere"], "/nowhere"),
  ],
)
def test_the_door_refuses_in_one_line(arguments, message):
  ended = doors.run("lm.serve", arguments, doors.ROOT)
  assert (ended.code, ended.out) == (2, "")
  assert ended.err.count("\n") == 1 and message in ended.err


@pytest.mark.parametrize(
  "host, failure, kind, message",
  [
    ("127.0.0.1", None, schema.RunError, "the port is taken; name another"),
    ("127.0.0.1", errno.EACCES, schema.RunError, "for privileged users"),
    ("192.0.2.1", None, schema.ConfigError, "no address of this machine"),
    ("no.such.host.invalid", None, schema.ConfigError, "does not resolve"),
    ("a" * 300, None, schema.ConfigError, "does not resolve"),
  ],
)
def test_where_no_server_can_listen(monkeypatch, host, failure, kind, message):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    if failure:

      def bind(*_):
        raise OSError(failure, "no")

      monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(kind, match=rf"--host={host}.*{message}"):
      listen.bind(host, port)


def test_a_port_taken_while_the_model_was_loaded_is_said():
  (first,) = listen.bind("127.0.0.1", 0)
  (second,) = listen.bind("127.0.0.1", first.getsockname()[1])
  with first, second:
    listen.listen("127.0.0.1", [first])
    with pytest.raises(schema.RunError, match="the port is taken"):
      listen.listen("127.0.0.1", [second])


def test_a_server_listens_on_all_addresses_of_its_host():
  sockets = listen.bind("localhost", 0)
  assert len({one.getsockname()[1] for one in sockets}) == 1
  for one in sockets:
    one.close()


def test_slots_that_memory_cannot_hold_are_refused(monkeypatch):
  monkeypatch.setattr(os, "sysconf", lambda name: 1000)
  with pytest.raises(schema.ConfigError, match="slots=99: .* at most"):
    worker_lib.Worker(serving.sampler_of(), 99, 1)


def test_after_the_warm_up_nothing_compiles():
  cfg = dataclasses.replace(serving.MODEL, context_length=67)
  sampler, told = serving.sampler_of(serving.TEMPLATE, cfg), []
  worker = worker_lib.Worker(sampler, 3, 1)
  worker.warm_up(told.append)
  assert told == [f"{n} tokens" for n in (16, 32, 64, 128)]
  programs = (
    decoding.read,
    decoding.admit,
    decoding.decode,
    decoding.look,
    scoring.score,
  )
  before = [program._cache_size() for program in programs]
  for n in (1, 16, 17, 40, 66):
    engine, prompt = worker._engine, [5] * n
    engine.submit(Request(prompt, max_new_tokens=1, alternatives=2, top_k=3))
    while not engine.idle:
      engine.step(worker_lib.STEPS, worker_lib.PREFILLS)
    worker._look(Request(prompt, temperature=0.5), 3)
    sampler.score([5] * (n + 2), alternatives=n % 3)
  assert [program._cache_size() for program in programs] == before


def test_the_server_is_ready_after_its_warm_up(sampler):
  """Before, /health says so with status 503, and calls wait."""
  told, go_on = [], threading.Event()

  def tell(text):
    told.append(text)
    assert go_on.wait(60)

  with serving.serve(sampler, tell=tell) as running:
    found = httpx.get(f"{running.url}/health")
    assert found.status_code == 503
    assert found.json()["status"] == "warming up"
    with concurrent.futures.ThreadPoolExecutor() as pool:
      body = {"prompt": "a", "max_tokens": 1}
      call = pool.submit(post, running, "completions", body)
      time.sleep(0.2)
      assert not call.done()
      go_on.set()
      assert call.result().status_code == 200
    assert told == [f"{n} tokens" for n in (16, 32, 64, 128)]
    found = httpx.get(f"{running.url}/health")
    assert (found.status_code, found.json()["status"]) == (200, "ok")


def test_a_warm_up_that_fails_is_told(sampler):
  """The door then ends the server; until then calls are refused."""
  ended, go_on = threading.Event(), threading.Event()

  def tell(text):
    assert go_on.wait(60)
    raise RuntimeError(text)

  with serving.serve(sampler, tell=tell) as running:
    running.worker.on_failure = ended.set
    go_on.set()
    assert ended.wait(60)
    found = httpx.get(f"{running.url}/health")
    assert found.json()["status"] == "unavailable"
    assert post(running, "completions", {"prompt": "a"}).status_code == 503
    assert str(running.worker.failure) == "16 tokens"


def test_a_compilation_is_seen_while_it_goes_on():
  compiling.watch()
  me, seen = threading.current_thread(), []

  @jax.jit
  def program(x):
    seen.append(compiling.compiles(me))
    return x + 1

  before = compiling.compiles(me)
  program(1.0)
  assert (before, seen, compiling.compiles(me)) == (False, [True], False)
  with pytest.raises(TypeError):
    jax.jit(lambda x: x + "a")(1.0)
  assert not compiling.compiles(me)


def test_a_missing_extra_is_named():
  code = (
    "import runpy, sys\n"
    "sys.modules['uvicorn'] = None\n"
    "runpy.run_module('lm.serve', run_name='__main__')"
  )
  process = doors.Popen(code, ["--workdir=x"])
  _, error = process.communicate(timeout=60)
  assert process.returncode == 2
  assert "uvicorn is missing" in error and ".[serve]" in error


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("runs") / "tiny_run")
  config = config_lib.Config()
  config.model, config.tokenizer.kind = serving.MODEL, "bytes"
  config.train.sequence_length = 100
  make = jax.jit(functools.partial(decoder.init_params, serving.MODEL))
  checkpoints = checkpoint.Checkpoints(path, config.checkpoint)
  tokenizer = tokenizer_lib.Tokenizer().to_json()
  meta = checkpoint.Meta(1, config, tokenizer, "none", loss=1.0)
  rest = {"step": jnp.asarray(1)}
  checkpoints.save({"params": make(jax.random.key(0)), "rest": rest}, meta)
  checkpoints.close()
  return path


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_the_door_serves_and_ends_in_order(workdir, stop):
  """A signal lets a call that runs come to its end."""
  with door(
    f"--workdir={workdir}", "--port=0", "--api_key_env=KEY", KEY="k"
  ) as process:
    line = process.stdout.readline()
    url = re.fullmatch(r"tiny_run: (http://127\.0\.0\.1:\d+)/\n", line)[1]
    with openai.OpenAI(
      base_url=f"{url}/v1", api_key="k", max_retries=0
    ) as client:
      stream = client.completions.create(
        model="tiny_run",
        prompt="def f(",
        max_tokens=60,
        seed=3,
        stream=True,
        extra_body={"min_tokens": 60},
      )
      text = next(stream).choices[0].text
      process.send_signal(stop)
      text += "".join(chunk.choices[0].text for chunk in stream)
    out, error = process.communicate(timeout=60)
  assert (process.returncode, out) == (0, "")
  lines = error.splitlines()
  assert len(lines) == 4 and all("warming up" in line for line in lines)
  request = Request("def f(", max_new_tokens=60, min_tokens=60, seed=3)
  (result,) = serving.sampler_of().generate([request])
  assert text == result.text
