"""Serves a checkpoint: OpenAI's API under /v1, and a page at /.

python -m lm.sample.serve --workdir=RUN [--port=8000] [--api_key_env=MY_KEY]

Needs the extra `serve`. SIGTERM lets what runs go on for a few seconds, and
exits with 0.
"""

import asyncio
import importlib.util
import ipaddress
import os
import pathlib
import signal
import sys

from absl import flags

from lm import config as config_lib
from lm import door
from lm.sample import loading

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "0: any that is free.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Samples that run at once.")
_MAX_QUEUE = flags.DEFINE_integer(
  "max_queue", 256, "Samples that wait at most; one more gets status 429."
)
_MAX_BODY_BYTES = flags.DEFINE_integer(
  "max_body_bytes", 1 << 20, "Of a request; a longer one gets status 413."
)
_TIMEOUT_SECONDS = flags.DEFINE_float(
  "timeout_seconds", 300.0, "For one call; after it, status 504."
)
_API_KEY_ENV = flags.DEFINE_string(
  "api_key_env",
  None,
  "Environment variable with the key that clients must send. Default: none.",
)
_ALLOW_PUBLIC = flags.DEFINE_bool(
  "allow_public", False, "Serve other machines without an API key."
)

# For what runs when the server is told to stop.
GRACE_SECONDS = 5.0


def main() -> int:
  workdir = loading.check()
  _check_flags()
  token = _token()
  # Late, so that the mistakes above are told at once.
  for name in ("starlette", "uvicorn"):
    if importlib.util.find_spec(name) is None:
      raise config_lib.ConfigError(
        f"{name} is missing: install the extra, as `pip install -e .[serve]`"
      )
  import uvicorn

  from lm.sample.serve import app as app_lib
  from lm.sample.serve import worker as worker_lib

  sampler = loading.sampler()
  worker = worker_lib.Worker(sampler, _SLOTS.value, _MAX_QUEUE.value)
  limits = app_lib.Limits(
    _MAX_BODY_BYTES.value,
    _TIMEOUT_SECONDS.value,
    token=token,
    loopback_only=token is None and not _ALLOW_PUBLIC.value,
  )
  name = pathlib.Path(workdir.rstrip("/")).name
  config = uvicorn.Config(
    app_lib.make(worker, name, limits),
    host=_HOST.value,
    port=_PORT.value,
    log_level="warning",
    proxy_headers=False,
    timeout_graceful_shutdown=int(GRACE_SECONDS) + 2,
  )

  class Server(uvicorn.Server):
    async def startup(self, sockets=None):
      await super().startup(sockets)
      for server in self.servers:
        host, port = server.sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"{name}: http://{host}:{port}/", flush=True)

    async def shutdown(self, sockets=None):
      worker.refusing = True
      asyncio.get_running_loop().call_later(GRACE_SECONDS, worker.interrupt)
      await super().shutdown(sockets)

  # Uvicorn raises the signal once more when all is done: that is no failure.
  for stop in (signal.SIGTERM, signal.SIGINT):
    signal.signal(stop, lambda *_: None)
  try:
    Server(config).run()
  except SystemExit as error:
    # It has logged why; a port that is taken, most often.
    print(f"error: cannot serve on port {_PORT.value}", file=sys.stderr)
    return 1 if error.code else 0
  return 0


def _check_flags() -> None:
  for name, value, least in (
    ("port", _PORT.value, 0),
    ("slots", _SLOTS.value, 1),
    ("max_queue", _MAX_QUEUE.value, 0),
    ("max_body_bytes", _MAX_BODY_BYTES.value, 1),
    ("timeout_seconds", _TIMEOUT_SECONDS.value, 1e-3),
  ):
    if not least <= value < float("inf"):
      raise config_lib.ConfigError(
        f"--{name}={value}: must be finite and at least {least:g}"
      )
  if _PORT.value > 65535:
    raise config_lib.ConfigError(f"--port={_PORT.value}: at most 65535")


def _token() -> str | None:
  """The API key; raises ConfigError where strangers could do without one."""
  name = _API_KEY_ENV.value
  if name is not None:
    token = os.environ.get(name, "")
    if not (token and token.isascii() and token.isprintable()):
      raise config_lib.ConfigError(
        f"--api_key_env={name}: the variable must hold a key of printable "
        "ASCII; set it, or leave the flag out"
      )
    return token
  try:
    loopback = ipaddress.ip_address(_HOST.value).is_loopback
  except ValueError:
    loopback = _HOST.value == "localhost"
  if not loopback and not _ALLOW_PUBLIC.value:
    raise config_lib.ConfigError(
      f"--host={_HOST.value}: other machines could use this one without a key; "
      "name one with --api_key_env, or say --allow_public"
    )
  return None


if __name__ == "__main__":
  door.run(main, takes_config=False)
