"""Chat templates: untrusted programs, run in a sandboxed child process.

A template may loop forever, or compute 'a' * 10**9 or 10**(10**8); no check in
Python sees these sizes in time. The kernel limits the memory and processor time
of the child process, lm/data/renderer.py.
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

# Limits: a rendered text; processor time per task; address space.
MAX_CHARACTERS = 1 << 21
MAX_SECONDS = 2
MAX_MEGABYTES = 500

_lock = threading.Lock()
# Child process, and pid of the parent: a forked parent needs a new child.
_child: tuple[subprocess.Popen[str], int] | None = None


def check(template: str) -> None:
  """Compiles a template; raises ConfigError with the line on invalid Jinja."""
  _ask(template, None)


def render(template: str, values: Mapping[str, Any]) -> str:
  """Renders a chat template, in the dialect of the Hugging Face hub.

  The template can change only its own variables. Raises ConfigError if the
  template fails, calls `raise_exception(message)` or exceeds a limit.
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
  """Returns the child process; starts a child if none is alive."""
  global _child
  if _child is None or _child[1] != os.getpid() or _child[0].poll() is not None:
    _child = None
    path = pathlib.Path(__file__).with_name("renderer.py")
    child = subprocess.Popen(
      # -P: modules beside renderer.py must not shadow modules of equal name.
      [sys.executable, "-P", str(path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      start_new_session=True,  # Signals to the parent's group miss the child.
    )
    _child = child, os.getpid()
  return _child[0]


@atexit.register
def _stop() -> None:
  """Kills the child process, if started by this process."""
  global _child
  if _child is not None and _child[1] == os.getpid():
    _child[0].kill()
    _child[0].communicate()
  _child = None
