"""Serves a checkpoint: OpenAI's API under /v1, and two pages.

The page at / shows the distribution of the next token, the page at /chat holds
a conversation, if the checkpoint has a chat template.

python -m lm.serve --workdir=RUN [--port=8000] [--api_key_env=MY_KEY]

Needs the extra `serve`. SIGTERM lets what runs go on for a few seconds, and
exits with 0; SIGHUP and Ctrl-C are the same.
"""

import asyncio
import contextlib
import importlib.util
import ipaddress
import os
import pathlib
import signal
import socket
import sys

from absl import flags

from lm import cli, schema
from lm.sample import flags as sample_flags
from lm.serve import listen

sample_flags.define_chat_template()
flags.adopt_module_key_flags(sample_flags)  # for --help
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer(
  "port", 8000, "Port to listen on; 0: any that is free."
)
_SLOTS = flags.DEFINE_integer("slots", 8, "Samples that run at once.")
_MAX_QUEUE = flags.DEFINE_integer(
  "max_queue", 256, "Most samples that wait; one more gets status 429."
)
_MAX_BODY_BYTES = flags.DEFINE_integer(
  "max_body_bytes",
  1 << 20,
  "Most bytes of a request; a longer one gets status 413.",
)
_TIMEOUT_SECONDS = flags.DEFINE_float(
  "timeout_seconds", 300.0, "Longest time of a call; after it, status 504."
)
_IDLE_SECONDS = flags.DEFINE_float(
  "idle_seconds", 30.0, "Time after which a silent connection is closed."
)
_MAX_CONNECTIONS = flags.DEFINE_integer(
  "max_connections", 512, "Most connections open at once; 0: no limit."
)
_MAX_CONNECTIONS_PER_CLIENT = flags.DEFINE_integer(
  "max_connections_per_client",
  256,
  "Most connections of one address; 0, as behind a proxy: no limit.",
)
_WARMUP = flags.DEFINE_bool(
  "warmup",
  True,
  "Compile for all lengths of prompts before the first request is served; "
  "/health says 503 until then.",
)
_API_KEY_ENV = flags.DEFINE_string(
  "api_key_env",
  None,
  "Environment variable with the key that clients must send. Default: none.",
)
_ALLOW_PUBLIC = flags.DEFINE_bool(
  "allow_public", False, "Serve other machines without an API key."
)
_ADD_BOS = flags.DEFINE_bool(
  "add_bos",
  False,
  "Prompts of ids without a bos get one, where the context has room: for "
  "clients that cannot, as lm-eval's local-completions with its "
  "tokenizer_backend=remote. Prompts of text always get one.",
)

# Time for running calls to finish after a stop signal.
GRACE_SECONDS = 5.0
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Inclusive bounds of the numeric flags.
_BOUNDS = {
  "port": (0, 65535),
  "slots": (1, 4096),
  "max_queue": (0, 1 << 20),
  "max_body_bytes": (1, 1 << 30),
  "timeout_seconds": (1e-3, 1e7),
  "idle_seconds": (1e-3, 1e7),
  "max_connections": (0, 1 << 20),
  "max_connections_per_client": (0, 1 << 20),
}


def main() -> int:
  workdir = sample_flags.check()
  _check_flags()
  token = _token()
  # Optional packages come after the flag checks: flag errors appear at once.
  for name in ("starlette", "uvicorn"):
    if importlib.util.find_spec(name) is None:
      raise schema.ConfigError(
        f"{name} is missing: install the extra, as `pip install -e '.[serve]'`"
      )
  from lm.serve import guard

  limits = guard.Limits(
    _MAX_BODY_BYTES.value,
    _TIMEOUT_SECONDS.value,
    _IDLE_SECONDS.value,
    _MAX_CONNECTIONS.value,
    _MAX_CONNECTIONS_PER_CLIENT.value,
    token=token,
    loopback_only=token is None and not _ALLOW_PUBLIC.value,
  )
  name = pathlib.Path(workdir.rstrip("/")).name
  with contextlib.ExitStack() as stack:
    stack.callback(_restore, {stop: signal.getsignal(stop) for stop in _STOPS})
    for stop in _STOPS:
      signal.signal(stop, lambda *_: sys.exit(0))
    # Bind before the slow model load: a taken port is reported at once.
    sockets = [
      stack.enter_context(s) for s in listen.bind(_HOST.value, _PORT.value)
    ]
    _serve(name, sockets, limits)
  return 0


def _restore(handlers: dict) -> None:
  for stop, handler in handlers.items():
    signal.signal(stop, handler)


def _serve(name: str, sockets: list[socket.socket], limits) -> None:
  import uvicorn

  from lm.serve import app, connections
  from lm.serve import worker as worker_lib

  sampler = sample_flags.sampler()
  worker = worker_lib.Worker(
    sampler,
    _SLOTS.value,
    _MAX_QUEUE.value,
    _tell_warm_up if _WARMUP.value else None,
  )
  config = uvicorn.Config(
    app.make(worker, name, limits, _ADD_BOS.value),
    http=connections.limited(limits),
    ws="none",
    log_level="warning",
    proxy_headers=False,
    timeout_graceful_shutdown=int(GRACE_SECONDS) + 2,
  )

  class Server(uvicorn.Server):
    async def startup(self, sockets=None):
      await super().startup(sockets)
      for each in sockets or ():
        host, port = each.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"{name}: http://{host}:{port}/", flush=True)

    async def shutdown(self, sockets=None):
      worker.refusing = True
      asyncio.get_running_loop().call_later(GRACE_SECONDS, worker.interrupt)
      await super().shutdown(sockets)

  server = Server(config)
  # 1 ms, not 5: threads that parse or write long texts must yield the GIL.
  sys.setswitchinterval(1e-3)
  # Uvicorn re-raises captured signals after shutdown; handle_exit absorbs the
  # signals, and the exit code stays 0.
  for stop in _STOPS:
    signal.signal(stop, server.handle_exit)
  worker.on_failure = lambda: setattr(server, "should_exit", True)
  listen.listen(_HOST.value, sockets)
  server.run(sockets)
  if worker.failure is not None:
    raise worker.failure


def _tell_warm_up(text: str) -> None:
  print(f"warming up: {text}", file=sys.stderr, flush=True)


def _check_flags() -> None:
  for name, (least, most) in _BOUNDS.items():
    value = flags.FLAGS[name].value
    if not least <= value <= most:
      raise schema.ConfigError(
        f"--{name}={value}: must be in [{least:g}, {most}]"
      )


def _token() -> str | None:
  """The API key, or None. Raises ConfigError unless the key is printable ASCII,
  and on a public --host with neither --api_key_env nor --allow_public.
  """
  name = _API_KEY_ENV.value
  if name is not None:
    token = os.environ.get(name, "")
    if not (token and token.isascii() and token.isprintable()):
      raise schema.ConfigError(
        f"--api_key_env={name}: the variable must hold a key of printable "
        "ASCII; set it, or leave the flag out"
      )
    return token
  found = listen.resolve(_HOST.value, _PORT.value)
  loopback = all(
    ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    for _, address in found
  )
  if not loopback and not _ALLOW_PUBLIC.value:
    raise schema.ConfigError(
      f"--host={_HOST.value}: other machines could use this one without a key; "
      "name one with --api_key_env, or say --allow_public"
    )
  return None


if __name__ == "__main__":
  cli.run(main, takes_config=False)
