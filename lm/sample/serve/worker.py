"""The thread that owns the device, and the event loop's way to it.

All methods without underscore belong to the event loop. What they ask goes
through one queue to the thread, which answers by `call_soon_threadsafe`; no
state has two writers.
"""

import asyncio
import contextlib
import functools
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib
from lm.sample.serve import protocol

# Tokens of each slot per turn of the thread: few where somebody watches them
# come, or waits for a score.
STEPS = 16
STEPS_WATCHED = 2


class Ticket:
  """The samples of one caller: iterate over (index, Piece) as they come.

  Raises what the thread failed with.
  """

  def __init__(self, n: int, watched: bool):
    self.n_left = n
    self.watched = watched
    self.news: asyncio.Queue[tuple[int, request_lib.Piece] | Exception] = (
      asyncio.Queue()
    )
    # The thread's: the jobs in the order of their samples.
    self.jobs: list[int] = []

  async def __aiter__(self) -> AsyncIterator[tuple[int, request_lib.Piece]]:
    n_left = self.n_left
    while n_left:
      item = await self.news.get()
      if isinstance(item, Exception):
        raise item
      n_left -= item[1].result is not None
      yield item


class Worker:
  """Runs `sampler` for many callers; `max_queue` samples may wait for a slot.

  `n_live` samples and calls are admitted and not ended.
  """

  def __init__(
    self, sampler: sampler_lib.Sampler, n_slots: int, max_queue: int
  ):
    self.sampler = sampler
    self.n_slots, self.capacity = n_slots, n_slots + max_queue
    self.n_live = 0
    self.refusing = False
    self._inbox: queue.SimpleQueue[Callable[[], bool] | None] = (
      queue.SimpleQueue()
    )
    self._engine = sampler.engine(n_slots)
    self._tickets: dict[int, tuple[Ticket, int]] = {}
    self._thread = threading.Thread(
      target=self._run, name="sampler", daemon=True
    )

  # --- For the event loop ----------------------------------------------------

  def start(self) -> None:
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  @property
  def healthy(self) -> bool:
    return self._thread.is_alive() and not self.refusing

  def interrupt(self) -> None:
    """Ends what runs: each caller is told that the server stops."""
    self.refusing = True
    self._inbox.put(functools.partial(self._drop_all, _stopping()))

  async def stop(self) -> None:
    """Ends the thread after what it is doing."""
    self.interrupt()
    self._inbox.put(None)
    await asyncio.to_thread(self._thread.join)

  @contextlib.contextmanager
  def running(
    self, requests: Sequence[request_lib.Request], watched: bool
  ) -> Iterator[Ticket]:
    """Admits the requests or raises Refusal; to leave the block cancels what
    still runs. Samples are numbered as `Sampler.generate` orders them.
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
    """`function(*args)` on the thread, between two of the engine's turns."""
    self._admit(1)
    future = self._loop.create_future()
    self._inbox.put(functools.partial(self._call, future, function, args))
    return await future

  def _admit(self, n: int) -> None:
    if not self.healthy:
      raise _stopping()
    if n > self.capacity:
      raise protocol.Refusal(
        400, f"{n} samples in one request: at most {self.capacity} are taken"
      )
    if self.n_live + n > self.capacity:
      raise protocol.Refusal(
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

  def _answer(self, future: asyncio.Future, result: Any, error: Any) -> None:
    self.n_live -= 1
    if future.cancelled():
      return
    if error is None:
      future.set_result(result)
    else:
      future.set_exception(error)

  # --- The thread ------------------------------------------------------------

  def _run(self) -> None:
    while self._turn():
      pass

  def _turn(self) -> bool:
    """Obeys a command or takes a step; whether there is to be another turn."""
    try:
      command = self._inbox.get(block=self._engine.idle)
    except queue.Empty:
      self._step()
      return True
    if command is None:
      return False
    # A call took the device's time: the samples have theirs before the next.
    if command() and not self._engine.idle:
      self._step()
    return True

  def _step(self) -> None:
    watched = any(ticket.watched for ticket, _ in self._tickets.values())
    try:
      pieces = self._engine.step(STEPS_WATCHED if watched else STEPS)
    except Exception as error:
      # What the device holds is not to be trusted: everybody starts afresh.
      traceback.print_exc()
      tickets = {ticket for ticket, _ in self._tickets.values()}
      self._tickets.clear()
      for ticket in tickets:
        self._post(self._end, ticket, _broken(error))
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

  def _submit(
    self, ticket: Ticket, requests: Sequence[request_lib.Request]
  ) -> bool:
    try:
      for request in requests:
        for job in self._engine.submit(request):
          self._tickets[job] = ticket, len(ticket.jobs)
          ticket.jobs.append(job)
    except Exception as error:
      # The requests were checked before.
      traceback.print_exc()
      self._drop(ticket, _broken(error))
    return False

  def _drop(self, ticket: Ticket, error: Exception | None) -> bool:
    for job in ticket.jobs:
      if self._tickets.pop(job, None) is not None:
        self._engine.cancel(job)
    self._post(self._end, ticket, error)
    return False

  def _drop_all(self, error: Exception) -> bool:
    for ticket in {ticket for ticket, _ in self._tickets.values()}:
      self._drop(ticket, error)
    return False

  def _call(
    self, future: asyncio.Future, function: Callable, args: tuple
  ) -> bool:
    result = error = None
    if not future.cancelled():
      try:
        result = function(*args)
      except Exception as raised:
        error = raised
    self._post(self._answer, future, result, error)
    return True

  def _post(self, function: Callable, *args: Any) -> None:
    # After the event loop has closed, nobody is left to be told.
    with contextlib.suppress(RuntimeError):
      self._loop.call_soon_threadsafe(function, *args)


def _stopping() -> protocol.Refusal:
  return protocol.Refusal(
    503, "the server is shutting down", kind="server_error"
  )


def _broken(error: Exception) -> protocol.Refusal:
  return protocol.Refusal(
    500,
    f"the sampler failed ({type(error).__name__}); the server's log says more",
    kind="server_error",
  )
