"""Who may use the server, and how much of it."""

import dataclasses
import hmac
import re

from starlette import responses
from starlette import types as asgi

from lm.sample.serve import fields

_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.I)


@dataclasses.dataclass(frozen=True)
class Limits:
  """`token` is what a client must bear, if any. `loopback_only` refuses other
  names for this machine: a web page elsewhere could give itself one of them.
  """

  max_body_bytes: int
  # For one call.
  timeout_seconds: float
  # In which the head of a request, and more of its body, has to come, and some
  # of an answer to be taken.
  idle_seconds: float = 30.0
  # At once, of all clients and of one address; 0 is no limit.
  max_connections: int = 512
  max_connections_per_client: int = 256
  token: str | None = dataclasses.field(default=None, repr=False)
  loopback_only: bool = True


class Guard:
  """Refuses strangers, before anything of their call is read."""

  def __init__(self, app: asgi.ASGIApp, limits: Limits):
    self._app, self._limits = app, limits

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    refusal = self._refusal(scope) if scope["type"] == "http" else None
    if refusal is None:
      return await self._app(scope, receive, send)
    await error_of(refusal)(scope, receive, send)

  def _refusal(self, scope: asgi.Scope) -> fields.Refusal | None:
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    if self._limits.loopback_only and not _LOOPBACK.fullmatch(host):
      return fields.Refusal(
        403, f"Host {host[:100]!r}: address this server as 127.0.0.1"
      )
    if self._limits.token is None or not scope["path"].startswith("/v1/"):
      return None
    given = headers.get(b"authorization", b"")
    expected = f"Bearer {self._limits.token}".encode()
    if hmac.compare_digest(given, expected):
      return None
    return fields.Refusal(
      401,
      "a wrong API key, or none: send Authorization: Bearer KEY",
      kind="authentication_error",
    )


def error_of(refusal: fields.Refusal) -> responses.Response:
  headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else None
  return responses.JSONResponse(refusal.body(), refusal.status, headers)
