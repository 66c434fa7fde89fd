"""Child process that renders chat templates for lm/data/template.py.

A task is a line of JSON on stdin: a template, conversations, and how many
messages of each to render. Each rendering is answered by a line of JSON on
stdout: {"text": ...} or {"error": ...}. The kernel kills the process if one
takes too long: Python code cannot interrupt a multiplication. This file imports
nothing from lm.
"""

import functools
import json
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jinja2
from jinja2 import ext, nodes, sandbox


class _Refused(Exception):
  """Raised when a template calls raise_exception(message)."""


class _Generation(ext.Extension):
  """Renders the body of `{% generation %}`, which holds training targets,
  between two marks. As in transformers, the body has a scope of its own.
  """

  tags = {"generation"}
  marks = ("", "")

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_marked")
    return nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _marked(self, caller) -> str:
    first, last = type(self).marks
    return first + caller() + last


def _raise_exception(message: str) -> NoReturn:
  raise _Refused(message)


def _to_json(
  value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
) -> str:
  """As in transformers: plain text, where Jinja's own escapes HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


@functools.lru_cache
def _compile(text: str) -> jinja2.Template:
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, ext.loopcontrols],
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise_exception
  return environment.from_string(text)


def _answer(task: dict, values: dict | None) -> dict[str, str]:
  try:
    template = _compile(task["template"])
    if values is None:
      return {"text": ""}
    parts, n_characters = [], 0
    for part in template.generate(**values):
      parts.append(part)
      n_characters += len(part)
      if n_characters > task["most"]:
        return {"error": f"output exceeds {task['most']} characters"}
    return {"text": "".join(parts)}
  except _Refused as error:
    return {"error": str(error)}
  except MemoryError:
    return {"error": f"needs more memory than {task['megabytes']} MB"}
  except jinja2.TemplateSyntaxError as error:
    return {"line": str(error.lineno), "error": str(error.message)}
  except Exception as error:
    # A template is a program and may raise any exception.
    frames = traceback.extract_tb(error.__traceback__)
    line = [str(f.lineno) for f in frames if f.filename == "<template>"][-1:]
    return {
      "line": "".join(line),
      "error": f"{type(error).__name__}: {error}"[:1000],
    }


def _renderings(task: dict) -> Iterator[dict | None]:
  """Yields the variables of each rendering: of each conversation, the first
  `n` messages, with or without the prompt of an answer. Without conversations
  the template is only compiled: None.
  """
  if not task["items"]:
    yield None
  for messages, cuts in task["items"]:
    for n, add_generation_prompt in cuts:
      yield {
        **task["values"],
        "messages": messages[:n],
        "add_generation_prompt": add_generation_prompt,
      }


def main() -> None:
  for line in sys.stdin:
    task = json.loads(line)
    size = task["megabytes"] * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    _Generation.marks = tuple(task["marks"])
    for values in _renderings(task):
      signal.setitimer(signal.ITIMER_PROF, task["seconds"])
      answer = json.dumps(_answer(task, values))
      signal.setitimer(signal.ITIMER_PROF, 0)
      print(answer, flush=True)


if __name__ == "__main__":
  main()
