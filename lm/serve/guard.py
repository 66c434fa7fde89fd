"""Access control (Host header, API key) and request limits."""

import dataclasses
import hmac
import re

from starlette import responses
from starlette import types as asgi

from lm.serve import fields

_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.I)


@dataclasses.dataclass(frozen=True)
class Limits:
  """`token`: API key required from clients, or None.

  `loopback_only`: reject Host headers except localhost, 127.x.x.x and [::1]
  (DNS rebinding: a web page's own host name may resolve to this machine).
  """

  max_body_bytes: int
  # For reading the body, for parsing, and for the work: each has the full time.
  timeout_seconds: float
  # Longest wait for a request head, for the next chunk of a body, and for the
  # client to read more of a response.
  idle_seconds: float = 30.0
  # Open connections, in total and per client address; 0 is no limit.
  max_connections: int = 512
  max_connections_per_client: int = 256
  token: str | None = dataclasses.field(default=None, repr=False)
  loopback_only: bool = True


class Guard:
  """Middleware: before the body is read, rejects a foreign Host header (403)
  and, under /v1/, a missing or wrong API key (401).
  """

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
