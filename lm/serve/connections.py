"""Connection limits, in total and per client address, and an idle timeout.

Uvicorn's keep-alive timeout covers only the time between two requests. The
timeout here also closes a connection if a request head does not arrive, or if
the client does not read the response, in the midst of a stream, too.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http import h11_impl

from lm.serve import guard

_FULL = (
  b"HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n"
  b"Connection: close\r\n\r\n%s"
)


def limited(limits: guard.Limits) -> type[h11_impl.H11Protocol]:
  """Protocol class for a Uvicorn server; all connections share `limits`."""

  class Limited(_Limited):
    _limits = limits
    _open: set["_Limited"] = set()
    _waiting: dict["_Limited", None] = {}

  return Limited


class _Limited(h11_impl.H11Protocol):
  _limits: guard.Limits
  _open: "set[_Limited]"
  # Idle connections (no request under way, or a response that is not read), the
  # longest idle first.
  _waiting: "dict[_Limited, None]"
  _timer: asyncio.TimerHandle | None = None
  # Unsent bytes of a response when the timer was set.
  _n_left = 0

  # Any: uvloop's transports are no asyncio.Transport.
  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self._open.add(self)
    limits, own = self._limits, self.client and self.client[0]
    same = {c for c in self._open if c.client and c.client[0] == own}
    for found, most, status in (
      (self._open, limits.max_connections, b"503 Service Unavailable"),
      (same, limits.max_connections_per_client, b"429 Too Many Requests"),
    ):
      if most and len(found) > most and not self._make_room(found):
        text = b"too many connections are open; close some"
        transport.write(_FULL % (status, len(text), text))
        return transport.close()
    self._wait()

  def connection_lost(self, exc: Exception | None) -> None:
    super().connection_lost(exc)
    self._open.discard(self)
    self._go_on()

  def data_received(self, data: bytes) -> None:
    before = self.cycle
    super().data_received(data)
    if self.cycle is not before and self._answers():
      self._go_on()  # The head is complete; the application times the rest.

  def pause_writing(self) -> None:
    super().pause_writing()
    # The application's own timeout cannot end what waits for the client.
    self._wait()

  def resume_writing(self) -> None:
    super().resume_writing()
    if self._answers():
      self._go_on()

  def _answers(self) -> bool:
    """Whether a request is under way, and its client reads the response."""
    ended = self.cycle is None or self.cycle.response_complete
    return not (ended or self.flow.write_paused)

  def on_response_complete(self) -> None:
    before = self.cycle
    super().on_response_complete()
    if self.cycle is before and not self.transport.is_closing():
      self._wait()

  def _make_room(self, found: "set[_Limited]") -> bool:
    """Closes the longest-idle connection of `found`; False if none is idle."""
    for connection in self._waiting:
      if connection in found:
        connection._go_on()
        self._open.discard(connection)
        connection.transport.abort()
        return True
    return False

  def _wait(self) -> None:
    self._go_on()
    self._waiting[self] = None
    self._n_left = self.transport.get_write_buffer_size()
    self._timer = self.loop.call_later(self._limits.idle_seconds, self._expire)

  def _go_on(self) -> None:
    self._waiting.pop(self, None)
    if self._timer is not None:
      self._timer.cancel()

  def _expire(self) -> None:
    if 0 < self.transport.get_write_buffer_size() < self._n_left:
      return self._wait()  # The client still reads.
    self._go_on()
    self.transport.abort()
