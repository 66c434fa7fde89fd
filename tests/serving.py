"""A tiny model behind a real server on 127.0.0.1, for the tests of it."""

import contextlib
import dataclasses
import functools
import shutil
import threading
import time

import families
import httpx
import jax
import uvicorn

from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder
from lm.sample import sampler as sampler_lib
from lm.serve import app as app_lib
from lm.serve import connections, guard
from lm.serve import worker as worker_lib

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}<user>{{ message.content }}<end_of_turn>
{%- elif message.role == 'assistant' %}<assistant>{{ message.content }}
{%- else %}{{ raise_exception('no role ' + message.role) }}{% endif %}
{%- endfor %}<assistant>"""
MODEL = dataclasses.replace(
  families.LLAMA3,
  vocab_size=tokenizer_lib.BYTES_SIZE,
  n_layers=1,
  context_length=101,
  init_scale=0.4,
)


@functools.cache
def sampler_of(template=None, cfg=MODEL):
  make = jax.jit(functools.partial(decoder.init_params, cfg))
  tokenizer = tokenizer_lib.Tokenizer(chat_template=template)
  return sampler_lib.Sampler(cfg, make(jax.random.key(0)), tokenizer)


@contextlib.contextmanager
def chromium():
  """A browser without a window, driven by Playwright."""
  from playwright import sync_api

  names = "chromium", "chromium-browser", "google-chrome"
  path = next(filter(None, map(shutil.which, names)), None)
  assert path, "Chromium is missing: apt-get install -y chromium"
  # An answer may wait for a program to compile, on a loaded machine.
  sync_api.expect.set_options(timeout=60_000)
  with sync_api.sync_playwright() as playwright:
    # Within a container, Chromium's own sandbox has no rights to start.
    browser = playwright.chromium.launch(
      executable_path=path, args=["--no-sandbox"]
    )
    yield browser
    browser.close()


@dataclasses.dataclass
class Running:
  url: str
  port: int
  worker: worker_lib.Worker
  server: uvicorn.Server

  def settle(self):
    """Waits until nothing is under way, and checks that nothing is left."""
    deadline = time.monotonic() + 20
    worker = self.worker

    def busy():
      # The drop of a sample that has just ended may still be in the inbox.
      left = worker.n_live or worker._tickets or worker._tasks
      return left or not (worker._inbox.empty() and worker._engine.idle)

    while busy():
      assert time.monotonic() < deadline, f"{worker.n_live} samples leaked"
      time.sleep(0.01)
    assert worker._engine.n_free() == worker.n_slots
    while self.server.server_state.tasks:
      assert time.monotonic() < deadline, "a call leaked"
      time.sleep(0.01)


def post(running, path, body, **options):
  # The first call of a kind waits for XLA.
  options = {"timeout": 120.0, **options}
  return httpx.post(f"{running.url}/v1/{path}", json=body, **options)


@contextlib.contextmanager
def serve(
  sampler, *, n_slots=4, max_queue=512, tell=None, add_bos=False, **limits
):
  limits = {"max_body_bytes": 1 << 16, "timeout_seconds": 60.0, **limits}
  worker = worker_lib.Worker(sampler, n_slots, max_queue, tell)
  limits = guard.Limits(**limits)
  app = app_lib.make(worker, "tiny", limits, add_bos)
  http = connections.limited(limits)
  # Not Uvicorn's own timeout closes idle connections.
  config = uvicorn.Config(
    app, port=0, http=http, log_level="error", timeout_keep_alive=600
  )
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    while not server.started:
      assert thread.is_alive(), "the server did not start"
      time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Running(f"http://127.0.0.1:{port}", port, worker, server)
    yield running
    running.settle()
  finally:
    server.should_exit = True
    thread.join()
