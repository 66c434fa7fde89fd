"""Chat templates: untrusted programs, run in a sandboxed child process.

A template may loop forever, or compute 'a' * 10**9 or 10**(10**8); no check in
Python sees these sizes in time. The kernel limits the memory and processor time
of the child process, lm/data/renderer.py.
"""

import atexit
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm import schema

# Limits: a rendered text; processor time per task; address space.
MAX_CHARACTERS = 1 << 21
MAX_SECONDS = 2
MAX_MEGABYTES = 500

# A rendering: the number of messages, and whether the prompt of an answer
# follows (the template's variable `add_generation_prompt`).
Cut = tuple[int, bool]

_lock = threading.Lock()
# Child process, and pid of the parent: a forked parent needs a new child.
_child: tuple[subprocess.Popen[str], int] | None = None


def check(template: str) -> None:
  """Compiles a template; raises ConfigError with the line on invalid Jinja."""
  (answer,) = _ask(template, {}, [], ("", ""), 1)
  if isinstance(answer, schema.ConfigError):
    raise answer


def render(
  template: str,
  values: Mapping[str, Any],
  conversations: Sequence[tuple[Sequence[Any], Sequence[Cut]]],
  marks: tuple[str, str] = ("", ""),
) -> list[list[str | schema.ConfigError]]:
  """Renders conversations by a chat template, in the dialect of the Hugging
  Face hub: of each (messages, cuts), one text per cut.

  `values` are the template's other variables, and `marks` surround the body of
  each `{% generation %}` block. The template can change only its own variables.
  In place of a text stands a ConfigError if the template fails, calls
  `raise_exception(message)` or exceeds a limit.
  """
  sizes = [len(cuts) for _, cuts in conversations]
  flat = [(messages, cut) for messages, cuts in conversations for cut in cuts]
  answers: list[str | schema.ConfigError] = []
  while len(answers) < len(flat):  # Once more for each limit of time.
    rest = [
      ([*messages], [cut for _, cut in group])
      for messages, group in _grouped(flat[len(answers) :])
    ]
    answers += _ask(template, values, rest, marks, len(flat) - len(answers))
  found = iter(answers)
  return [list(itertools.islice(found, n)) for n in sizes]


def _grouped(flat: Sequence[tuple[Any, Cut]]) -> Iterator[tuple[Any, Any]]:
  """Yields (messages, items) of each run of items with the same messages."""
  for _, group in itertools.groupby(flat, key=lambda item: id(item[0])):
    items = list(group)
    yield items[0][0], items


def _ask(
  template: str,
  values: Mapping[str, Any],
  items: Sequence[Any],
  marks: tuple[str, str],
  n: int,
) -> list[str | schema.ConfigError]:
  """The first of `n` answers: all, or those up to a limit of time."""
  task = json.dumps(
    {
      "template": template,
      "values": values,
      "items": items,
      "marks": marks,
      "most": MAX_CHARACTERS,
      "seconds": MAX_SECONDS,
      "megabytes": MAX_MEGABYTES,
    }
  )
  with _lock:
    try:
      return _answers(task, n)
    except BaseException:  # Answers left unread would answer the next task.
      _stop()
      raise


def _answers(task: str, n: int) -> list[str | schema.ConfigError]:
  child = _start()
  assert child.stdin is not None and child.stdout is not None
  child.stdin.write(task + "\n")
  child.stdin.flush()
  answers: list[str | schema.ConfigError] = []
  while len(answers) < n:
    if not (line := child.stdout.readline()):
      _stop()
      answers.append(
        schema.ConfigError(
          f"chat template: takes more than {MAX_SECONDS} seconds of processor "
          "time; write one that ends sooner"
        )
      )
      break
    answer = json.loads(line)
    if "error" not in answer:
      answers.append(answer["text"])
      continue
    where = f", line {answer['line']}" if answer.get("line") else ""
    error = schema.ConfigError(f"chat template{where}: {answer['error']}")
    answers.append(error)
  return answers


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
