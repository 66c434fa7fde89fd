"""The endpoints, and who may use them: an ASGI application.

A call is over when its client leaves or its time is up, whatever it waits for:
its samples are cancelled and their slots free again.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import pathlib
import re
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from starlette import applications, exceptions, requests, responses, routing
from starlette import middleware as middleware_lib
from starlette import types as asgi

from lm.sample import request as request_lib
from lm.sample.serve import answers, protocol
from lm.sample.serve import worker as worker_lib

# The page's files, by path. Nothing from elsewhere is loaded, nor run inline.
_HERE = pathlib.Path(__file__).parent
_PAGE = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_PAGE_HEADERS = {
  "content-security-policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
  ),
  "cache-control": "no-cache",
  "referrer-policy": "no-referrer",
  "x-content-type-options": "nosniff",
}
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.I)


@dataclasses.dataclass(frozen=True)
class Limits:
  """`token` is what a client must bear, if any. `loopback_only` refuses other
  names for this machine: a web page elsewhere could give itself one of them.
  """

  max_body_bytes: int
  timeout_seconds: float
  token: str | None = dataclasses.field(default=None, repr=False)
  loopback_only: bool = True


def make(
  worker: worker_lib.Worker, model: str, limits: Limits
) -> applications.Starlette:
  """`model` is the name by which clients see it."""
  app = _App(worker, model, limits)
  get, post = ["GET"], ["POST"]
  return applications.Starlette(
    routes=[
      *(routing.Route(path, app.page, methods=get) for path in _PAGE),
      routing.Route("/health", app.health, methods=get),
      routing.Route("/v1/models", app.models, methods=get),
      routing.Route("/v1/models/{name:path}", app.model, methods=get),
      routing.Route("/v1/completions", app.completions, methods=post),
      routing.Route("/v1/chat/completions", app.chat, methods=post),
      routing.Route("/v1/next_token", app.next_token, methods=post),
      routing.Route("/v1/score", app.score, methods=post),
    ],
    middleware=[middleware_lib.Middleware(_Guard, limits=limits)],
    exception_handlers={
      protocol.Refusal: _refused,
      exceptions.HTTPException: _no_route,
      requests.ClientDisconnect: _left,
      Exception: _failed,
    },
    lifespan=app.lifespan,
  )


class _App:
  def __init__(self, worker: worker_lib.Worker, model: str, limits: Limits):
    self._worker, self._limits = worker, limits
    self._sampler = worker.sampler
    self._card = {
      "id": model,
      "object": "model",
      "created": int(time.time()),
      "owned_by": "next-token",
      "context_length": self._sampler.cfg.context_length,
    }

  @contextlib.asynccontextmanager
  async def lifespan(self, app: applications.Starlette) -> AsyncIterator[None]:
    self._worker.start()
    yield
    await self._worker.stop()

  async def page(self, request: requests.Request) -> responses.Response:
    path = _HERE / _PAGE[request.url.path]
    return responses.FileResponse(path, headers=_PAGE_HEADERS)

  async def health(self, request: requests.Request) -> responses.Response:
    healthy = self._worker.healthy
    content = {
      "status": "ok" if healthy else "unavailable",
      "live": self._worker.n_live,
      "slots": self._worker.n_slots,
    }
    return responses.JSONResponse(content, 200 if healthy else 503)

  async def models(self, request: requests.Request) -> responses.Response:
    return responses.JSONResponse({"object": "list", "data": [self._card]})

  async def model(self, request: requests.Request) -> responses.Response:
    name = request.path_params["name"]
    if name != self._card["id"]:
      raise protocol.Refusal(
        404, f"no model {name!r}: this is {self._card['id']!r}", "model"
      )
    return responses.JSONResponse(self._card)

  async def completions(self, request: requests.Request) -> asgi.ASGIApp:
    return await self._text(request, protocol.completion, answers.Completion)

  async def chat(self, request: requests.Request) -> asgi.ASGIApp:
    return await self._text(request, protocol.chat, answers.Chat)

  async def next_token(self, request: requests.Request) -> asgi.ASGIApp:
    asked, n = await self._read(request, protocol.next_token)
    found = await self.attended(
      request.receive, self._worker.call(self._sampler.next_token, asked, n)
    )
    tokenizer, name = self._sampler.tokenizer, self._card["id"]
    return responses.JSONResponse(answers.next_token(found, tokenizer, name))

  async def score(self, request: requests.Request) -> asgi.ASGIApp:
    ids, n = await self._read(request, protocol.score)
    found = await self.attended(request.receive, self._score(ids, n))
    tokenizer, name = self._sampler.tokenizer, self._card["id"]
    return responses.JSONResponse(answers.score(found, tokenizer, name))

  async def _text(self, request, read, kind) -> asgi.ASGIApp:
    """Completions and chats, at once or as a stream."""
    plan = await self._read(request, read)
    answer = kind(plan, self._sampler.tokenizer, self._card["id"])
    if plan.stream:
      return _Stream(self, plan, answer)
    content = await self.attended(request.receive, self._whole(plan, answer))
    return responses.JSONResponse(content)

  async def _whole(
    self, plan: protocol.Plan, answer: answers.Answer
  ) -> dict[str, Any]:
    scores = await self.scores(plan)
    results: list[request_lib.Result | None] = [None] * answer.n_choices
    if plan.samples:
      with self._worker.running(plan.requests, watched=False) as ticket:
        async for i, piece in ticket:
          results[i] = piece.result or results[i]
    return answer.whole(results, scores)

  async def scores(self, plan: protocol.Plan) -> list[request_lib.Score]:
    """Of each prompt, where they are to be shown."""
    if not plan.echo or plan.logprobs is None:
      return []
    return [await self._score(prompt, plan.logprobs) for prompt in plan.prompts]

  def _score(self, ids: Sequence[int], n: int) -> Coroutine:
    """Of ids with bos, which is not itself scored."""
    return self._worker.call(self._sampler.score, ids[1:], n)

  def running(self, plan: protocol.Plan):
    return self._worker.running(plan.requests, watched=True)

  async def _read(self, request: requests.Request, read) -> Any:
    """What `read` makes of the body; the event loop goes on meanwhile."""
    limit = self._limits.max_body_bytes
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
      # Web pages of other origins cannot send this type unasked.
      raise protocol.Refusal(
        415, "send the header Content-Type: application/json"
      )
    body = bytearray()
    try:
      async with asyncio.timeout(self._limits.timeout_seconds):
        async for chunk in request.stream():
          body += chunk
          if len(body) > limit:
            raise protocol.Refusal(413, f"the body exceeds {limit} bytes")
    except TimeoutError as error:
      raise protocol.Refusal(408, "the body took too long to come") from error
    return await asyncio.to_thread(read, self._sampler, bytes(body))

  async def attended(self, receive: asgi.Receive, work: Coroutine) -> Any:
    """Result of `work`, which is cancelled when the client leaves (raises
    ClientDisconnect) or the time is up (Refusal).
    """
    task = asyncio.ensure_future(work)
    client = asyncio.ensure_future(_until_gone(receive))
    try:
      async with asyncio.timeout(self._limits.timeout_seconds):
        await asyncio.wait((task, client), return_when="FIRST_COMPLETED")
      if not task.done():
        raise requests.ClientDisconnect
      return task.result()
    except TimeoutError as error:
      raise protocol.Refusal(
        504,
        f"took longer than {self._limits.timeout_seconds:g} seconds",
        kind="server_error",
      ) from error
    finally:
      task.cancel()
      client.cancel()
      await asyncio.gather(task, client, return_exceptions=True)


class _Stream:
  """Server-sent events; a refusal after the first of them is one itself."""

  def __init__(self, app: _App, plan: protocol.Plan, answer: answers.Answer):
    self._app, self._plan, self._answer = app, plan, answer
    self._started = False

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    try:
      await self._app.attended(receive, self._run(send))
    except protocol.Refusal as refusal:
      if not self._started:
        raise
      await self._emit(send, [refusal.body()])
    except requests.ClientDisconnect:
      return
    await send({"type": "http.response.body", "body": b""})

  async def _run(self, send: asgi.Send) -> None:
    plan, answer = self._plan, self._answer
    scores = await self._app.scores(plan)
    if plan.samples:
      with self._app.running(plan) as ticket:
        await self._emit(send, answer.opening(scores))
        async for i, piece in ticket:
          await self._emit(send, answer.chunks(i, piece))
    else:
      await self._emit(send, answer.opening(scores))
    await self._emit(send, [*answer.closing(), "[DONE]"])

  async def _emit(self, send: asgi.Send, events: Sequence[Any]) -> None:
    if not self._started:
      self._started = True
      headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        # Some proxies would collect the events.
        (b"x-accel-buffering", b"no"),
      ]
      await send(
        {"type": "http.response.start", "status": 200, "headers": headers}
      )
    texts = [
      e if isinstance(e, str) else json.dumps(e, allow_nan=False)
      for e in events
    ]
    body = "".join(f"data: {text}\n\n" for text in texts).encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


class _Guard:
  """Refuses strangers, before anything of their call is read."""

  def __init__(self, app: asgi.ASGIApp, limits: Limits):
    self._app, self._limits = app, limits

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    refusal = self._refusal(scope) if scope["type"] == "http" else None
    if refusal is None:
      return await self._app(scope, receive, send)
    await _error(refusal)(scope, receive, send)

  def _refusal(self, scope: asgi.Scope) -> protocol.Refusal | None:
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    if self._limits.loopback_only and not _LOOPBACK.fullmatch(host):
      return protocol.Refusal(
        403, f"Host {host[:100]!r}: address this server as 127.0.0.1"
      )
    if self._limits.token is None or not scope["path"].startswith("/v1/"):
      return None
    given = headers.get(b"authorization", b"")
    expected = f"Bearer {self._limits.token}".encode()
    if hmac.compare_digest(given, expected):
      return None
    return protocol.Refusal(
      401,
      "a wrong API key, or none: send Authorization: Bearer KEY",
      kind="authentication_error",
    )


def _error(refusal: protocol.Refusal) -> responses.Response:
  headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else None
  return responses.JSONResponse(refusal.body(), refusal.status, headers)


async def _refused(
  request: requests.Request, error: Exception
) -> responses.Response:
  assert isinstance(error, protocol.Refusal)
  return _error(error)


async def _no_route(
  request: requests.Request, error: Exception
) -> responses.Response:
  assert isinstance(error, exceptions.HTTPException)
  text = f"{request.method} {request.url.path[:100]}: {error.detail}"
  return _error(protocol.Refusal(error.status_code, text))


async def _left(
  request: requests.Request, error: Exception
) -> responses.Response:
  # Nobody is there to read it.
  return responses.Response(status_code=400)


async def _failed(
  request: requests.Request, error: Exception
) -> responses.Response:
  """For what is a bug: its traceback goes to the server's log."""
  return _error(
    protocol.Refusal(
      500, "an error of the server; its log says more", kind="server_error"
    )
  )


async def _until_gone(receive: asgi.Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass
