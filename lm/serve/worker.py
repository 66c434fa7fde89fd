"""The sampler thread owns the device; the event loop sends requests to it.

Methods without underscore are called by the event loop (`warm_up` by the
thread, before the first command). Commands reach the thread through a queue;
the thread answers by `call_soon_threadsafe`. No state has two writers.

The thread alternates between decode steps of running samples and slices of
tasks, e.g. scoring. A slice is a single device call. While samples run, tasks
get no more device time than the samples.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import os
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import jax

from lm import schema
from lm.sample import engine as engine_lib
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib
from lm.serve import compiling, fields

# Decode steps per turn of the thread: few while a client streams, or while
# free slots wait for prefill.
STEPS = 16
STEPS_WATCHED = 2
# Prompts prefilled per turn.
PREFILLS = 1


class Ticket:
  """Samples of a single caller: an async iterable of (index, Piece).

  Raises Refusal if the sampler fails or the server stops.
  """

  def __init__(self, n: int, watched: bool):
    self.n = self.n_left = n
    self.watched = watched
    self.news: asyncio.Queue[tuple[int, request_lib.Piece] | Exception] = (
      asyncio.Queue()
    )
    # Written by the thread only: job numbers in sample order.
    self.jobs: list[int] = []

  async def __aiter__(self) -> AsyncIterator[tuple[int, request_lib.Piece]]:
    # Not `n_left`: samples may end before the caller begins to read.
    n_left = self.n
    while n_left:
      item = await self.news.get()
      if isinstance(item, Exception):
        raise item
      n_left -= item[1].result is not None
      yield item


@dataclasses.dataclass(eq=False)
class _Task:
  """Work done in slices, with the results up to now."""

  slices: Iterator[Any]
  future: asyncio.Future
  found: list[Any] = dataclasses.field(default_factory=list)


class Worker:
  """Runs `sampler` for many callers; `max_queue` samples may wait for a slot.

  With `tell`, the thread begins with `warm_up(tell)`; what callers send
  meanwhile waits. `ready` is True after that, `failure` what ended the warm-up,
  or None; `on_failure` is then called by the event loop. `n_live` counts the
  samples and tasks admitted and not yet ended.
  """

  def __init__(
    self,
    sampler: sampler_lib.Sampler,
    n_slots: int,
    max_queue: int,
    tell: Callable[[str], None] | None = None,
  ):
    self.sampler = sampler
    self.ready = tell is None
    self.failure: Exception | None = None
    self.on_failure: Callable[[], Any] = lambda: None
    self._tell = tell
    self.n_slots, self.capacity = n_slots, n_slots + max_queue
    self.n_live = 0
    self.refusing = False
    self._inbox: queue.SimpleQueue[Callable[[], Any] | None] = (
      queue.SimpleQueue()
    )
    # A separate engine, to look at the next token of a prompt.
    self._looker = sampler.engine(sampler.ways)
    _check_memory(self._looker, n_slots)
    self._engine = sampler.engine(n_slots)
    self._tasks: collections.deque[_Task] = collections.deque()
    # Seconds of the last slice, less the seconds of decode steps since.
    self._owed = 0.0
    self._tickets: dict[int, tuple[Ticket, int]] = {}
    self._thread = threading.Thread(
      target=self._run, name="sampler", daemon=True
    )

  def warm_up(self, tell: Callable[[str], None]) -> None:
    """Compiles scoring, prefill and decode for each bucket of prompt lengths.
    Calls `tell` with each bucket. Ends early once the worker is interrupted.
    """
    context, bos = self.sampler.cfg.context_length, self.sampler.tokenizer.bos
    n = engine_lib.MIN_PROMPT
    while not self.refusing:
      tell(f"{n} tokens")
      list(self.sampler.scoring([bos] * (min(n, context) + 1)))
      # Prefill omits the last token of a prompt; decode starts from that token.
      prompt = [bos] * (min(n, context - 2) + 1)
      request = request_lib.Request(prompt, max_new_tokens=1)
      if context > 1:
        self._look(request, 1)
        self._engine.submit(request)
      while not self._engine.idle:
        self._engine.step()
      if n >= context:
        break
      n *= 2

  # --- For the event loop ----------------------------------------------------

  def start(self) -> None:
    compiling.watch()
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  @property
  def healthy(self) -> bool:
    return self._thread.is_alive() and not self.refusing

  @property
  def compiles(self) -> bool:
    """Whether the thread compiles a program at this moment."""
    return compiling.compiles(self._thread)

  def interrupt(self) -> None:
    """Cancels all samples and tasks; every caller gets Refusal (503)."""
    self.refusing = True
    self._inbox.put(functools.partial(self._drop_all, _stopping()))

  async def stop(self) -> None:
    """Interrupts all work and joins the thread after the current turn."""
    self.interrupt()
    self._inbox.put(None)
    await asyncio.to_thread(self._thread.join)

  @contextlib.contextmanager
  def running(
    self, requests: Sequence[request_lib.Request], watched: bool
  ) -> Iterator[Ticket]:
    """Admits the requests or raises Refusal; leaving the block cancels samples
    still running. Sample numbers follow the order of `Sampler.generate`.
    """
    n = sum(request.n_samples for request in requests)
    self._admit(n)
    ticket = Ticket(n, watched)
    self._inbox.put(functools.partial(self._submit, ticket, requests))
    try:
      yield ticket
    finally:
      if ticket.n_left:
        self._inbox.put(functools.partial(self._drop, ticket, None))

  async def call(self, function: Callable, *args: Any) -> Any:
    """Runs `function(*args)` on the thread, between two engine turns."""
    (result,) = await self.run(function(*args) for _ in range(1))
    return result

  async def run(self, slices: Iterator[Any]) -> list[Any]:
    """Iterates over `slices` on the thread and returns all items as a list. If
    the caller is cancelled, the thread stops after the current slice.
    """
    self._admit(1)
    task = _Task(slices, self._loop.create_future())
    self._inbox.put(functools.partial(self._tasks.append, task))
    return await task.future

  async def next_token(
    self, request: request_lib.Request, n: int
  ) -> request_lib.NextToken:
    return await self.call(self._look, request, n)

  def _admit(self, n: int) -> None:
    if not self.healthy:
      raise _stopping()
    if n > self.capacity:
      raise fields.Refusal(
        400, f"{n} samples in one request: at most {self.capacity} are taken"
      )
    if self.n_live + n > self.capacity:
      raise fields.Refusal(
        429,
        f"the queue is full: {self.n_live} samples of {self.capacity} are "
        "under way; try again later",
        kind="rate_limit_error",
      )
    self.n_live += n

  def _deliver(self, news: list[tuple[Ticket, int, request_lib.Piece]]) -> None:
    for ticket, index, piece in news:
      if piece.result is not None and ticket.n_left:
        ticket.n_left -= 1
        self.n_live -= 1
      ticket.news.put_nowait((index, piece))

  def _end(self, ticket: Ticket, error: Exception | None) -> None:
    self.n_live -= ticket.n_left
    ticket.n_left = 0
    if error is not None:
      ticket.news.put_nowait(error)

  def _answer(self, task: _Task, error: Exception | None) -> None:
    self.n_live -= 1
    if task.future.cancelled():
      return
    if error is None:
      task.future.set_result(task.found)
    else:
      task.future.set_exception(error)

  # --- The thread ------------------------------------------------------------

  def _run(self) -> None:
    if self._tell is not None:
      try:
        self.warm_up(self._tell)
      except Exception as error:
        self.failure, self.refusing = error, True
        self._post(self.on_failure)
        # Callers who wait get their Refusal by the commands of `stop`.
      self.ready = not self.refusing
    while self._turn():
      pass

  def _turn(self) -> bool:
    """Runs commands, decode steps, a slice if due; returns False to stop."""
    while True:
      idle = self._engine.idle and not self._tasks
      try:
        command = self._inbox.get(block=idle)
      except queue.Empty:
        break
      if command is None:
        return False
      command()
      del command  # and what it holds, while the next one is waited for
    start = time.monotonic()
    if not self._engine.idle:
      self._step()
    between = time.monotonic()
    self._owed -= between - start
    if self._engine.idle or self._owed <= 0:
      self._slice()
      self._owed = time.monotonic() - between
    return True

  def _step(self) -> None:
    engine, pieces = self._engine, None
    watched = any(ticket.watched for ticket, _ in self._tickets.values())
    waiting = engine.n_queued() > 0 and engine.n_free() > 0
    try:
      n_steps = STEPS_WATCHED if watched or waiting else STEPS
      pieces = engine.step(n_steps, PREFILLS)
    except Exception as error:
      # The device state is not to be trusted: end all samples, new engine.
      traceback.print_exc()
      tickets = {ticket for ticket, _ in self._tickets.values()}
      self._tickets.clear()
      for ticket in tickets:
        self._post(self._end, ticket, _broken(error))
    if pieces is None:
      # Freed first (the error's traceback, above, holds it too): device memory
      # may have no room for two.
      del engine, self._engine
      self._engine = self.sampler.engine(self.n_slots)
      return
    news = []
    for piece in pieces:
      if piece.job not in self._tickets:
        continue
      news.append((*self._tickets[piece.job], piece))
      if piece.result is not None:
        del self._tickets[piece.job]
    self._post(self._deliver, news)

  def _slice(self) -> None:
    """Runs a slice of the longest-waiting task; drops tasks with a cancelled
    caller.
    """
    while self._tasks:
      task, error = self._tasks.popleft(), None
      if not task.future.cancelled():
        try:
          for part in task.slices:
            task.found.append(part)
            self._tasks.append(task)
            return
        except Exception as raised:
          error = raised
      self._post(self._answer, task, error)

  def _look(
    self, request: request_lib.Request, n: int
  ) -> request_lib.NextToken:
    try:
      return self.sampler.next_token(request, n, self._looker)
    except Exception:
      self._looker = self.sampler.engine(self.sampler.ways)
      raise

  def _submit(
    self, ticket: Ticket, requests: Sequence[request_lib.Request]
  ) -> None:
    try:
      for request in requests:
        for job in self._engine.submit(request):
          self._tickets[job] = ticket, len(ticket.jobs)
          ticket.jobs.append(job)
    except Exception as error:
      # A bug: protocol.py has checked the requests already.
      traceback.print_exc()
      self._drop(ticket, _broken(error))

  def _drop(self, ticket: Ticket, error: Exception | None) -> None:
    for job in ticket.jobs:
      if self._tickets.pop(job, None) is not None:
        self._engine.cancel(job)
    self._post(self._end, ticket, error)

  def _drop_all(self, error: Exception) -> None:
    for ticket in {ticket for ticket, _ in self._tickets.values()}:
      self._drop(ticket, error)
    while self._tasks:
      self._post(self._answer, self._tasks.popleft(), error)

  def _post(self, function: Callable, *args: Any) -> None:
    # RuntimeError: the event loop has closed, and no caller is left.
    with contextlib.suppress(RuntimeError):
      self._loop.call_soon_threadsafe(function, *args)


def _check_memory(one: engine_lib.Engine, n_slots: int) -> None:
  """Raises ConfigError if `n_slots` slots as large as those of engine `one` do
  not fit into device memory (host memory if the device reports no limit).
  """
  each = sum(x.nbytes for x in jax.tree.leaves(one.state)) // one.n_slots
  stats = jax.local_devices()[0].memory_stats() or {}
  n_devices = one.model.mesh.size if one.model.mesh else 1
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  room = stats["bytes_limit"] * n_devices if "bytes_limit" in stats else host
  if each * n_slots > room:
    raise schema.ConfigError(
      f"slots={n_slots}: the KV cache of each has {each / 1e6:.1f} MB, and the "
      f"device {room / 1e6:.0f}; at most {room // each} fit"
    )


def _stopping() -> fields.Refusal:
  return fields.Refusal(503, "the server is shutting down", kind="server_error")


def _broken(error: Exception) -> fields.Refusal:
  return fields.Refusal(
    500,
    f"the sampler failed ({type(error).__name__}); the server's log says more",
    kind="server_error",
  )
