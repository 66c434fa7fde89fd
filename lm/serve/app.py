"""HTTP endpoints behind access control (guard.py), as an ASGI application.

A call ends when the client disconnects or a timeout expires, at any stage: the
call's samples are cancelled and the slots freed.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import pathlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette import applications, exceptions, requests, responses, routing
from starlette import middleware as middleware_lib
from starlette import types as asgi

from lm.sample import colours, scoring
from lm.sample import request as request_lib
from lm.serve import answers, fields, guard, protocol, tokens
from lm.serve import worker as worker_lib

# Longer bodies (in bytes) and listed prompts (in tokens) are processed on a
# single thread: short requests then find a free thread and the GIL.
_BULK = 1 << 14

# Files of the pages, by URL path. The content security policy forbids inline
# scripts and loads from elsewhere.
_HERE = pathlib.Path(__file__).parent
_SCRIPTS = ("shared.js", "page.js", "chat.js")
_PAGE = {
  "/": "page.html",
  "/chat": "chat.html",
  **{f"/{name}": name for name in ("page.css", *_SCRIPTS)},
}
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


def make(
  worker: worker_lib.Worker,
  model: str,
  limits: guard.Limits,
  add_bos: bool = False,
) -> applications.Starlette:
  """Builds the application; `model` is the model name in the API, `add_bos` as
  in `protocol.completion`.
  """
  app = _App(worker, model, limits, add_bos)
  get, post = ["GET"], ["POST"]
  return applications.Starlette(
    routes=[
      *(routing.Route(path, app.page, methods=get) for path in _PAGE),
      routing.Route("/heat.css", app.heat, methods=get),
      routing.Route("/health", app.health, methods=get),
      routing.Route("/v1/models", app.models, methods=get),
      routing.Route("/v1/models/{name:path}", app.model, methods=get),
      routing.Route("/v1/completions", app.completions, methods=post),
      routing.Route("/v1/chat/completions", app.chat, methods=post),
      routing.Route("/v1/next_token", app.next_token, methods=post),
      routing.Route("/v1/score", app.score, methods=post),
      *(
        routing.Route(path, app.tokens, methods=post) for path in tokens.READERS
      ),
      routing.Route("/tokenizer_info", app.tokenizer, methods=get),
    ],
    middleware=[middleware_lib.Middleware(guard.Guard, limits=limits)],
    exception_handlers={
      fields.Refusal: _refused,
      exceptions.HTTPException: _no_route,
      requests.ClientDisconnect: _left,
      Exception: _failed,
    },
    lifespan=app.lifespan,
  )


class _App:
  def __init__(
    self,
    worker: worker_lib.Worker,
    model: str,
    limits: guard.Limits,
    add_bos: bool,
  ):
    self._worker, self._limits, self._add_bos = worker, limits, add_bos
    self._sampler = worker.sampler
    # Chat requests wait for the single process that renders chat templates: an
    # executor for chats alone keeps all else from waiting.
    thread = concurrent.futures.ThreadPoolExecutor
    self._short, self._bulk, self._chats = thread(4), thread(1), thread(1)
    self._card = {
      "id": model,
      "object": "model",
      "created": int(time.time()),
      "owned_by": "next-token",
      "context_length": self._sampler.cfg.context_length,
      "chat": self._sampler.tokenizer.chat_template is not None,
    }

  @contextlib.asynccontextmanager
  async def lifespan(self, app: applications.Starlette) -> AsyncIterator[None]:
    self._worker.start()
    yield
    await self._worker.stop()
    for executor in (self._short, self._bulk, self._chats):
      executor.shutdown(cancel_futures=True)

  async def page(self, request: requests.Request) -> responses.Response:
    path = _HERE / _PAGE[request.url.path]
    return responses.FileResponse(path, headers=_PAGE_HEADERS)

  async def heat(self, request: requests.Request) -> responses.Response:
    return responses.Response(
      colours.css(), headers=_PAGE_HEADERS, media_type="text/css"
    )

  async def health(self, request: requests.Request) -> responses.Response:
    """Status 200 once the warm-up has ended, 503 before and at the end."""
    worker, status = self._worker, "ok"
    if not worker.healthy:
      status = "unavailable"
    elif not worker.ready:
      status = "warming up"
    content = {
      "status": status,
      "compiling": worker.compiles,
      "live": worker.n_live,
      "slots": worker.n_slots,
    }
    return responses.JSONResponse(content, 200 if status == "ok" else 503)

  async def models(self, request: requests.Request) -> responses.Response:
    return responses.JSONResponse({"object": "list", "data": [self._card]})

  async def model(self, request: requests.Request) -> responses.Response:
    name = request.path_params["name"]
    if name != self._card["id"]:
      raise fields.unknown_model(name, self._card["id"])
    return responses.JSONResponse(self._card)

  async def completions(self, request: requests.Request) -> asgi.ASGIApp:
    read = functools.partial(protocol.completion, add_bos=self._add_bos)
    return await self._text(request, read, answers.Completion)

  async def chat(self, request: requests.Request) -> asgi.ASGIApp:
    return await self._text(request, protocol.chat, answers.Chat)

  async def next_token(self, request: requests.Request) -> asgi.ASGIApp:
    asked, n = await self._read(request, protocol.next_token)
    found = await self.attended(
      request.receive, self._worker.next_token(asked, n)
    )
    tokenizer, name = self._sampler.tokenizer, self._card["id"]
    return responses.JSONResponse(answers.next_token(found, tokenizer, name))

  async def score(self, request: requests.Request) -> asgi.ASGIApp:
    ids, n = await self._read(request, protocol.score)
    tokenizer, name = self._sampler.tokenizer, self._card["id"]

    async def work() -> bytes:
      parts = await self._worker.run(self._sampler.scoring(ids, n))

      def build() -> bytes:
        found = scoring.collect(self._sampler, ids, parts)
        return answers.dump(answers.score(found, tokenizer, name))

      return await self.apart(build, len(ids))

    return _json(await self.attended(request.receive, work()))

  async def tokens(self, request: requests.Request) -> responses.Response:
    read = tokens.READERS[request.url.path]
    return _json(answers.dump(await self._read(request, read)))

  async def tokenizer(self, request: requests.Request) -> responses.Response:
    return responses.JSONResponse(tokens.info(self._sampler))

  async def _text(self, request, read, kind) -> asgi.ASGIApp:
    """Handles completions and chats, with a whole response or a stream."""
    plan = await self._read(request, read)
    answer = kind(plan, self._sampler.tokenizer, self._card["id"])
    if plan.stream:
      return _Stream(self, plan, answer)
    work = self._whole(plan, answer)
    return _json(await self.attended(request.receive, work))

  async def _whole(self, plan: protocol.Plan, answer: answers.Answer) -> bytes:
    parts = await self.scores(plan)
    results: list[request_lib.Result | None] = [None] * answer.n_choices
    if plan.samples:
      with self._worker.running(plan.requests, watched=False) as ticket:
        async for i, piece in ticket:
          results[i] = piece.result or results[i]

    def build() -> bytes:
      return answers.dump(answer.whole(results, self.collect(plan, parts)))

    return await self.apart(build, _n_listed(plan))

  async def scores(self, plan: protocol.Plan) -> list[list[scoring.Part]]:
    """Scores each prompt if `echo` and `logprobs` are set; [] otherwise."""
    if not plan.echo or plan.logprobs is None:
      return []
    n, score = plan.logprobs, self._sampler.scoring
    return [await self._worker.run(score(ids, n)) for ids in plan.prompts]

  def collect(
    self, plan: protocol.Plan, parts: list[list[scoring.Part]]
  ) -> list[request_lib.Score]:
    each = zip(plan.prompts, parts, strict=False)  # `parts` may be empty.
    return [scoring.collect(self._sampler, *pair) for pair in each]

  async def apart(self, function: Callable[[], Any], size: int) -> Any:
    """Runs `function()` in a thread, without blocking the event loop."""
    executor = self._bulk if size > _BULK else self._short
    return await asyncio.get_running_loop().run_in_executor(executor, function)

  def running(self, plan: protocol.Plan):
    return self._worker.running(plan.requests, watched=True)

  async def _read(self, request: requests.Request, read) -> Any:
    """Parses the body by `read` in a thread, without blocking the event loop.
    Raises Refusal on a slow (408), long (413) or non-JSON (415) body.
    """
    limit = self._limits.max_body_bytes
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
      # CSRF: browsers let web pages of other origins send this type only after
      # a CORS preflight.
      raise fields.Refusal(
        415, "send the header Content-Type: application/json"
      )
    body = bytearray()
    try:
      async with asyncio.timeout(self._limits.timeout_seconds):
        async for chunk in _soon(request.stream(), self._limits.idle_seconds):
          body += chunk
          if len(body) > limit:
            raise fields.Refusal(413, f"the body exceeds {limit} bytes")
    except TimeoutError as error:
      raise fields.Refusal(408, "the body took too long to come") from error
    parse = functools.partial(
      read, self._sampler, self._card["id"], bytes(body)
    )
    if read in (protocol.chat, tokens.tokenize):  # These may render a chat.
      loop = asyncio.get_running_loop()
      work = loop.run_in_executor(self._chats, parse)
    else:
      work = self.apart(parse, len(body))
    return await self.attended(request.receive, work)

  async def attended(self, receive: asgi.Receive, work: Awaitable) -> Any:
    """Result of `work`. Cancels `work` when the client disconnects (raises
    ClientDisconnect) or after `timeout_seconds` (raises Refusal, 504).
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
      raise fields.Refusal(
        504,
        f"took longer than {self._limits.timeout_seconds:g} seconds",
        kind="server_error",
      ) from error
    finally:
      task.cancel()
      client.cancel()
      await asyncio.gather(task, client, return_exceptions=True)


def _json(content: bytes) -> responses.Response:
  return responses.Response(content, media_type="application/json")


def _n_listed(plan: protocol.Plan) -> int:
  """Number of prompt tokens listed in the response."""
  return plan.n * sum(map(len, plan.prompts)) if plan.echo else 0


async def _soon(chunks: AsyncIterator[bytes], seconds: float):
  """Yields `chunks`; raises TimeoutError if a chunk takes over `seconds`."""
  while True:
    async with asyncio.timeout(seconds):
      chunk = await anext(chunks, None)
    if chunk is None:
      return
    yield chunk


class _Stream:
  """Server-sent events (SSE); a Refusal after the first event is an SSE."""

  def __init__(self, app: _App, plan: protocol.Plan, answer: answers.Answer):
    self._app, self._plan, self._answer = app, plan, answer
    self._started = False

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    try:
      await self._app.attended(receive, self._run(send))
    except fields.Refusal as refusal:
      if not self._started:
        raise
      await self._emit(send, [refusal.body()])
    except requests.ClientDisconnect:
      return
    await send({"type": "http.response.body", "body": b""})

  async def _run(self, send: asgi.Send) -> None:
    plan, answer = self._plan, self._answer
    parts = await self._app.scores(plan)

    def build() -> list[str]:
      chunks = answer.opening(self._app.collect(plan, parts))
      return [answers.dump(chunk).decode() for chunk in chunks]

    async def open_() -> None:
      await self._emit(send, await self._app.apart(build, _n_listed(plan)))

    if plan.samples:
      with self._app.running(plan) as ticket:
        await open_()
        async for i, piece in ticket:
          await self._emit(send, answer.chunks(i, piece))
    else:
      await open_()
    await self._emit(send, [*answer.closing(), "[DONE]"])

  async def _emit(self, send: asgi.Send, events: Sequence[Any]) -> None:
    if not self._started:
      self._started = True
      headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        # Some proxies would buffer the events.
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


async def _refused(
  request: requests.Request, error: Exception
) -> responses.Response:
  assert isinstance(error, fields.Refusal)
  return guard.error_of(error)


async def _no_route(
  request: requests.Request, error: Exception
) -> responses.Response:
  assert isinstance(error, exceptions.HTTPException)
  text = f"{request.method} {request.url.path[:100]}: {error.detail}"
  return guard.error_of(fields.Refusal(error.status_code, text))


async def _left(
  request: requests.Request, error: Exception
) -> responses.Response:
  # The client has disconnected: nobody reads this response.
  return responses.Response(status_code=400)


async def _failed(
  request: requests.Request, error: Exception
) -> responses.Response:
  """Status 500 for an unexpected exception (a bug); the log has a traceback."""
  return guard.error_of(
    fields.Refusal(
      500, "an error of the server; its log says more", kind="server_error"
    )
  )


async def _until_gone(receive: asgi.Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass
