"""Which threads compile a program at this moment, by JAX's own events.

JAX announces each stage of a compilation (tracing, lowering, compiling) by a
scalar at its start and a duration at its end, in the thread that does it. A
version of JAX without the scalars never shows a compilation.
"""

import collections
import functools
import threading
from typing import Any

import jax

_STAGES = "/jax/core/compile/"
# Stages under way, by the identity of their thread.
_UNDER_WAY: collections.Counter[int | None] = collections.Counter()


@functools.cache
def watch() -> None:
  """Registers the listeners, once per process."""
  jax.monitoring.register_scalar_listener(_begin)
  jax.monitoring.register_event_duration_secs_listener(_end)


def compiles(thread: threading.Thread) -> bool:
  """Whether `thread` compiles now. False unless `watch` was called before."""
  return _UNDER_WAY[thread.ident] > 0


def _begin(event: str, value: float | int, **labels: Any) -> None:
  if event.startswith(_STAGES):
    _UNDER_WAY[threading.get_ident()] += 1


def _end(event: str, duration_secs: float | int, **labels: Any) -> None:
  mine = threading.get_ident()
  if event.startswith(_STAGES) and _UNDER_WAY[mine]:
    _UNDER_WAY[mine] -= 1
