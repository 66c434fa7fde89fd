"""Instruction pairs out of source code: a function's head, then the function.

The user gives the signature and the docstring of a Python function, and the
assistant answers with the function. The pairs are made of the documents of a
TFDS dataset, so that a chat can be tuned without a download.
"""

import ast
import functools
import hashlib
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from lm import config as config_lib
from lm import schema
from lm.data import conversations, sources, tfds_source

# Changes with the pairs that are made of a document.
_VERSION = 1
# Most characters of a pair, and fewest of the function's code.
_MOST = 800
_FEWEST = 20
_SPLITS = ("train", "validation")


class Pair(NamedTuple):
  """`head` is signature and docstring, `function` signature and code, both
  without indentation of their own. `digest` is of the code alone.
  """

  line: int
  head: str
  function: str
  digest: bytes


class InstructionSource:
  """Conversations of the functions in a split of a TFDS dataset.

  No code is in both splits, or twice in one: `train` leaves out what
  `validation` has.
  """

  chat = True

  def __init__(
    self, spec: str, name: str, split: str, data: config_lib.DataConfig
  ):
    if split not in _SPLITS or name != "python_stdlib":
      raise schema.ConfigError(
        f"source {spec!r}: unknown; write instruct:python_stdlib:train or "
        "instruct:python_stdlib:validation"
      )
    self.spec = spec
    wanted = _SPLITS[_SPLITS.index(split) :]
    # The source itself, and after it those whose code it must not have.
    self._sources = [
      tfds_source.TfdsSource(f"tfds:{name}:{s}", name, s, "text", data)
      for s in wanted
    ]

  def fingerprint(self) -> str:
    parts = [source.fingerprint() for source in self._sources]
    text = " ".join(["instruct", str(_VERSION), self.spec, *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def changed(self) -> str | None:
    return next(filter(None, (s.changed() for s in self._sources)), None)

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, i: int) -> sources.Conversation:
    name, pair = self._pairs[i]
    messages: list[conversations.Message] = [
      {"role": "user", "content": pair.head},
      {"role": "assistant", "content": pair.function},
    ]
    return sources.Conversation(f"{name}:{pair.line}", messages)

  @functools.cached_property
  def _pairs(self) -> list[tuple[str, Pair]]:
    own, *others = self._sources
    seen = {pair.digest for other in others for _, pair in _read(other)}
    found = []
    for name, pair in _read(own):
      if pair.digest not in seen:
        seen.add(pair.digest)
        found.append((name, pair))
    return found


def _read(source: tfds_source.TfdsSource) -> Iterator[tuple[str, Pair]]:
  for i in range(len(source)):
    if (document := source[i]) is not None:
      for pair in pairs(document.text):
        yield document.name, pair


def pairs(text: str) -> Iterator[Pair]:
  """Yields the pair of each documented function or method of Python source
  code, in order; none of a text that is not Python.

  Leaves out functions inside functions, functions without code, and pairs of
  more than 800 characters.
  """
  try:
    with warnings.catch_warnings(action="ignore"):  # Such as invalid escapes.
      tree = ast.parse(text)
  except (SyntaxError, ValueError, RecursionError):
    return
  # Python ends lines at these only, and str.splitlines also at form feeds.
  lines = re.findall(r".*?(?:\r\n|\r|\n)|.+$", text, re.DOTALL)
  for function in _functions(tree):
    pair = _pair(function, lines)
    if pair and len(pair.head) + len(pair.function) <= _MOST:
      yield pair


def _functions(
  node: ast.Module | ast.ClassDef,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
  for child in node.body:
    if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
      yield child
    elif isinstance(child, ast.ClassDef):
      yield from _functions(child)


def _pair(
  function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> Pair | None:
  docstring, *code = function.body
  if not ast.get_docstring(function) or not code:
    return None
  start = min([function.lineno, *(d.lineno for d in function.decorator_list)])
  end = function.end_lineno or start
  first, last = docstring.lineno, docstring.end_lineno or docstring.lineno
  # A docstring must stand on lines of its own.
  if first <= function.lineno or code[0].lineno <= last:
    return None
  indent = lines[start - 1][: function.col_offset]
  if indent.strip():
    return None
  head = _dedented(lines[start - 1 : last], indent)
  below = lines[last:end]
  while below and not below[0].strip():
    below = below[1:]
  answer = _dedented([*lines[start - 1 : first - 1], *below], indent)
  body = "".join(below).strip()
  if head is None or answer is None or len(body) < _FEWEST:
    return None
  parts = [ast.dump(statement) for statement in code]
  digest = hashlib.sha256("\n".join(parts).encode(errors="replace")).digest()
  return Pair(start, head, answer, digest)


def _dedented(lines: list[str], indent: str) -> str | None:
  """`lines` without `indent`; None if a line is indented less."""
  if not all(line.startswith(indent) or not line.strip() for line in lines):
    return None
  return "".join(
    line.removeprefix(indent).rstrip("\r\n") + "\n" if line.strip() else "\n"
    for line in lines
  ).rstrip()
