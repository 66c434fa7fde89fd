"""Chat templates: programs that somebody else wrote, and so run apart.

A template may loop for ever, or ask for 'a' * 10**9 or 10**(10**8), whose sizes
no check in Python sees in time. So lm/data/renderer.py runs it, in a process
whose memory and processor time the kernel bounds.
"""

import atexit
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from lm import schema

# Of a text; of processor time; of the whole process, address space included.
MAX_CHARACTERS = 1 << 21
MAX_SECONDS = 2
MAX_MEGABYTES = 500

_lock = threading.Lock()
# The process, and the one that started it: a fork needs a process of its own.
_child: tuple[subprocess.Popen[str], int] | None = None


def check(template: str) -> None:
  """Raises ConfigError, with the line, on what is not Jinja."""
  _ask(template, None)


def render(template: str, values: Mapping[str, Any]) -> str:
  """The text of a chat template, in the dialect of the Hugging Face hub.

  It may change nothing but its own variables. Raises ConfigError where it
  fails, calls `raise_exception(message)`, or exceeds a bound.
  """
  return _ask(template, values)


def _ask(template: str, values: Mapping[str, Any] | None) -> str:
  task = json.dumps(
    {
      "template": template,
      "values": values,
      "most": MAX_CHARACTERS,
      "seconds": MAX_SECONDS,
      "megabytes": MAX_MEGABYTES,
    }
  )
  with _lock:
    child = _start()
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(task + "\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
      _stop()
      raise schema.ConfigError(
        f"chat template: takes more than {MAX_SECONDS} seconds of processor "
        "time; write one that ends sooner"
      )
  answer = json.loads(line)
  if "error" in answer:
    where = f", line {answer['line']}" if answer.get("line") else ""
    raise schema.ConfigError(f"chat template{where}: {answer['error']}")
  return answer["text"]


def _start() -> subprocess.Popen[str]:
  """The process that renders; a new one where it has ended."""
  global _child
  if _child is None or _child[1] != os.getpid() or _child[0].poll() is not None:
    _child = None
    path = pathlib.Path(__file__).with_name("renderer.py")
    child = subprocess.Popen(
      # -P: the modules beside it do not stand in for others of their names.
      [sys.executable, "-P", str(path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      start_new_session=True,  # A signal to this program's group is not for it.
    )
    _child = child, os.getpid()
  return _child[0]


@atexit.register
def _stop() -> None:
  """Ends the process, if it is this one's."""
  global _child
  if _child is not None and _child[1] == os.getpid():
    _child[0].kill()
    _child[0].communicate()
  _child = None
