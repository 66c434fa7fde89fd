"""Config schema: typed dataclass trees with bounds, JSON and CLI overrides.

A field's annotation gives the type and, by `Annotated`, the bounds. A wrong
value raises ConfigError with the field's path, the value and the rule. This
module works on any tree of dataclasses; lm/config.py defines the config.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import re
import struct
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal


class UserError(Exception):
  """An error printed as one line without a traceback: value, rule, remedy.
  The program exits with `exit_code`.
  """

  exit_code = 1


class ConfigError(UserError):
  """Invalid input: a config, a flag, a file or a request cannot work."""

  exit_code = 2


class RunError(UserError):
  """A failure outside the program: a disk, a network, another process. A
  retry with the same input may succeed.
  """

  exit_code = 1


# --- bounds ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AtLeast:
  """Lower bound in an annotation: `Annotated[int, AtLeast(1)]`. The bounds
  below are used in the same way.
  """

  least: float

  def check(self, path: str, value: Any) -> None:
    rule = f"must be at least {self.least}"
    if self.least == 0:
      rule = "must not be negative"
    require(value >= self.least, path, value, rule)


@dataclasses.dataclass(frozen=True)
class AtMost:
  """Upper bound of an int, in place of the default: the largest int32."""

  most: int
  why: str

  def check(self, path: str, value: Any) -> None:
    rule = f"must be at most {self.most}, {self.why}"
    require(value <= self.most, path, value, rule)


@dataclasses.dataclass(frozen=True)
class Within:
  """Interval [least, most], or (least, most] if `open_below`; `why` says what
  the neutral value does.
  """

  least: float
  most: float
  why: str
  open_below: bool = False

  def check(self, path: str, value: Any) -> None:
    above = value > self.least if self.open_below else value >= self.least
    interval = f"{'(' if self.open_below else '['}{self.least}, {self.most}]"
    require(
      above and value <= self.most,
      path,
      value,
      f"must be in {interval}; {self.why}",
    )


@dataclasses.dataclass(frozen=True)
class IsPositive:
  def check(self, path: str, value: Any) -> None:
    require(value > 0, path, value, "must be positive")


@dataclasses.dataclass(frozen=True)
class IsBelowOne:
  """In [0, 1), also in float32."""

  def check(self, path: str, value: Any) -> None:
    require(0 <= value < 1, path, value, "must be in [0, 1)")
    require(_float32(value) < 1, path, value, "is 1 in float32; lower it")


@dataclasses.dataclass(frozen=True)
class IsFraction:
  """In (0, 1), also in float32."""

  def check(self, path: str, value: Any) -> None:
    require(0 < value < 1, path, value, "must be in (0, 1)")
    require(_float32(value) < 1, path, value, "is 1 in float32; lower it")


_INT32 = AtMost(2**31 - 1, "the largest int32")

Count = Annotated[int, AtLeast(1)]
Natural = Annotated[int, AtLeast(0)]
Positive = Annotated[float, IsPositive()]
NotNegative = Annotated[float, AtLeast(0)]
BelowOne = Annotated[float, IsBelowOne()]
Fraction = Annotated[float, IsFraction()]
Share = Annotated[float, Within(0, 1, "0 is none and 1 is all")]
# Seed of a random key: 32 bits.
Seed = Annotated[
  int,
  AtLeast(0),
  AtMost(2**32 - 1, "what 32 bits hold, of which random keys are made"),
]


def hints(node_or_type: Any) -> dict[str, Any]:
  """Field name -> annotation of a dataclass, bounds included."""
  kind = node_or_type if isinstance(node_or_type, type) else type(node_or_type)
  return typing.get_type_hints(kind, include_extras=True)


def bare(hint: Any) -> tuple[Any, bool]:
  """(type without bounds and None, whether None is allowed) of a field."""
  optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
  if optional:
    (hint,) = (a for a in typing.get_args(hint) if a is not types.NoneType)
  if typing.get_origin(hint) is Annotated:
    hint = typing.get_args(hint)[0]
  return hint, optional


def check_text(name: str, text: str) -> None:
  """Raises ConfigError if `text` holds a surrogate, invalid in UTF-8: half a
  character, or a byte of a command line that is not UTF-8.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    shown = text[max(0, error.start - 20) : error.start + 1]
    raise ConfigError(
      f"{name}={shown!r}: holds half a character (a surrogate), which UTF-8 "
      "cannot spell; give text that is UTF-8"
    ) from error


def require(holds: bool, path: str, value: Any, rule: str) -> None:
  if not holds:
    raise ConfigError(f"{path}={shown(value)}: {rule}")


def shown(value: Any) -> str:
  """`repr(value)`, cut after 300 characters."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # an int of 5000 digits, a deep list
    text = f"<{type(value).__name__} beyond what can be shown>"
  return text if len(text) <= 300 else f"{text[:300]}..."


def counted(n: int, noun: str) -> str:
  """`1 document`, `1,234 documents`: a count before a noun, for messages."""
  return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _float32(value: float) -> float:
  """`value` rounded to float32; inf on overflow."""
  try:
    return struct.unpack("<f", struct.pack("<f", float(value)))[0]
  except OverflowError:
    return math.inf


def leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
  """Yields (path, value) of each leaf: each field that holds no dataclass."""
  for field in dataclasses.fields(node):
    value = getattr(node, field.name)
    if dataclasses.is_dataclass(value):
      yield from leaves(value, f"{path}.{field.name}")
    else:
      yield f"{path}.{field.name}", value


def check_types(value: Any, kind: Any, path: str) -> None:
  """Raises ConfigError unless `value` has the type and bounds of `kind`, an
  annotation or a dataclass.
  """
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, kind):  # type: ignore[arg-type]
      name = kind.__name__  # type: ignore[attr-defined]
      raise ConfigError(f"{path}={shown(value)}: must be a {name}")
    known = hints(kind)
    for name in vars(value):
      if name not in known:
        raise ConfigError(f"{path}.{name}: {unknown(name, known)}")
    for name, hint in known.items():
      check_types(getattr(value, name), hint, f"{path}.{name}")
    return
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in args:
      return
    (kind,) = (a for a in args if a is not type(None))
    return check_types(value, kind, path)
  if origin is Literal:
    if value not in args:
      raise ConfigError(f"{path}={shown(value)}: {unknown(value, args)}")
    return
  if origin is tuple:
    if not isinstance(value, tuple):
      raise ConfigError(f"{path}={shown(value)}: must be a tuple")
    for i, item in enumerate(value):
      check_types(item, args[0], f"{path}[{i}]")
    return
  kind, *bounds = args if origin is Annotated else (kind,)
  accepted = (int, float) if kind is float else kind
  if not isinstance(value, accepted) or (
    isinstance(value, bool) and kind is not bool
  ):
    raise ConfigError(
      f"{path}={shown(value)}: must be of type {kind.__name__}, not "
      f"{type(value).__name__}"
    )
  if kind is float:
    single = _float32(value)
    require(
      math.isfinite(single), path, value, "must be finite, also in float32"
    )
    require(
      value == 0 or abs(single) >= 2**-126,
      path,
      value,
      "counts as 0 in float32; write 0 or a number further from it",
    )
  if isinstance(value, str):
    require("\0" not in value, path, value, "must not hold a NUL")
  if kind is int and not any(isinstance(bound, AtMost) for bound in bounds):
    bounds = (_INT32, *bounds)
  for bound in bounds:
    bound.check(path, value)


def unknown(name: Any, known: Any) -> str:
  known = [str(k) for k in known]
  text = name if isinstance(name, str) else shown(name)
  near = difflib.get_close_matches(text[:100], known, n=1, cutoff=0.5)
  hint = f"did you mean {near[0]!r}? " if near else ""
  return f"unknown; {hint}Known: {', '.join(known)}"


# --- JSON and the command line -----------------------------------------------


def from_dict(kind: Any, value: Any, path: str) -> Any:
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if value is None:
    return None
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, dict):
      raise ConfigError(f"{path}={shown(value)}: must be an object of fields")
    known = hints(kind)
    for name in value:
      if name not in known:
        raise ConfigError(f"{path}.{name}: {unknown(name, known)}")
    return kind(  # type: ignore[operator]
      **{
        name: from_dict(known[name], item, f"{path}.{name}")
        for name, item in value.items()
      }
    )
  if origin is tuple and isinstance(value, list):
    return tuple(from_dict(args[0], item, path) for item in value)
  if origin in (types.UnionType, typing.Union):
    kinds = [a for a in args if a is not type(None)]
    return from_dict(kinds[0], value, path)
  return value


def split_arguments(
  arguments: Sequence[str], root: str
) -> tuple[list[str], list[str]]:
  """(overrides `--ROOT.FIELD=VALUE`, the other arguments), both in order.

  VALUE may be the argument after `--ROOT.FIELD`, unless it starts with `--`.
  """
  overrides, rest, queue = [], [], list(arguments)
  while queue:
    argument = queue.pop(0)
    if not argument.startswith(f"--{root}."):
      rest.append(argument)
      continue
    if "=" not in argument and queue and not queue[0].startswith("--"):
      argument += f"={queue.pop(0)}"
    overrides.append(argument)
  return overrides, rest


# NAME or NAME(FIELD=VALUE, ...)
CALL = re.compile(r"(?P<name>\w+)\s*(\((?P<fields>.*)\))?", re.DOTALL)


def read_call(
  text: str, kinds: Mapping[str, Any], path: str, hint: str = ""
) -> Any:
  """The dataclass that `text` writes as NAME or NAME(FIELD=VALUE, ...), with a
  name of `kinds`. Raises ConfigError on an unknown name or field, or a wrong
  value; `hint` ends the error of an unknown name.
  """
  match = CALL.fullmatch(text)
  if match is None or match["name"] not in kinds:
    raise ConfigError(f"{path}: {unknown(text, kinds)}{hint}")
  kind = kinds[match["name"]]
  try:
    (call,) = ast.parse(f"f({match['fields'] or ''})").body
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    if call.value.args:
      raise ValueError("a value without a name")
    given = {str(k.arg): ast.literal_eval(k.value) for k in call.value.keywords}
  except (SyntaxError, ValueError, AssertionError, RecursionError) as error:
    raise ConfigError(
      f"{path}: {text!r} is not NAME(FIELD=VALUE, ...) ({error})"
    ) from error
  known = hints(kind)
  for name, value in given.items():
    if name not in known:
      raise ConfigError(f"{path}: {name}: {unknown(name, known)}")
    inner, _ = bare(known[name])
    if inner is float and type(value) is int:
      with contextlib.suppress(OverflowError):  # check_types refuses the int
        given[name] = float(value)
  found = kind(**given)
  check_types(found, kind, path)
  return found


def comments(kind: type) -> dict[str, list[str]]:
  """Field name -> lines of the comment above the field in the source."""
  lines = inspect.getsource(kind).splitlines()
  (tree,) = ast.parse("\n".join(lines)).body
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      first = last = node.lineno - 1
      while lines[first - 1].strip().startswith("#"):
        first -= 1
      found[node.target.id] = [
        line.strip().removeprefix("# ") for line in lines[first:last]
      ]
  return found


def described(kind: Any, path: str) -> Iterator[str]:
  """Lines of help: each field of the dataclass `kind` as `--PATH=DEFAULT`, its
  choices, and the field's comment.
  """
  about, default = comments(kind), kind()
  for name, hint in hints(kind).items():
    inner, optional = bare(hint)
    nested = dataclasses.is_dataclass(inner)
    if not nested or optional:
      value = getattr(default, name)
      text = value if isinstance(value, str) else repr(value)
      choices = ""
      if typing.get_origin(inner) is Literal:
        choices = f"  ({' | '.join(map(str, typing.get_args(inner)))})"
      yield f"  --{path}.{name}={text}{choices}"
      for line in about[name]:
        yield f"      {line}"
    if nested:
      yield from described(inner, f"{path}.{name}")


def override(node: Any, path: str, names: list[str], text: str) -> None:
  """CLI override: sets the field `names` below the dataclass `node` at `path`.

  A sub-config of None first becomes the default sub-config: to set one field
  of a sub-config turns the sub-config on.
  """
  known = hints(node)
  name, *rest = names
  if name not in known:
    raise ConfigError(f"{path}.{name}={text}: {unknown(name, known)}")
  path = f"{path}.{name}"
  kind, optional = bare(known[name])
  if rest:
    if not dataclasses.is_dataclass(kind):
      raise ConfigError(f"{path}: has no field {rest[0]!r}")
    if getattr(node, name) is None:
      setattr(node, name, kind())  # type: ignore[operator]
    return override(getattr(node, name), path, rest, text)
  if dataclasses.is_dataclass(kind) and not (optional and text == "None"):
    fields = ", ".join(hints(kind))
    or_none = " or None" if optional else ""
    raise ConfigError(
      f"{path}={text!r}: set one of its fields{or_none}: {fields}"
    )
  value = None if optional and text == "None" else _read(text, kind)
  check_types(value, known[name], path)
  setattr(node, name, value)


def _read(text: str, kind: Any) -> Any:
  """Parses `text` as `kind`; returns `text` unchanged if parsing fails."""
  origin = typing.get_origin(kind)
  if kind is str or origin is Literal:
    return text
  if kind is bool:
    return {"true": True, "false": False}.get(text.lower(), text)
  try:
    value = ast.literal_eval(text)
  except (SyntaxError, ValueError, MemoryError, RecursionError):
    value = text  # MemoryError, RecursionError: nested too deep for Python
  if origin is tuple:
    # A bare item, as in one source without brackets, becomes a 1-tuple.
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
  if kind is float and type(value) is int:
    with contextlib.suppress(OverflowError):  # check_types refuses the int
      return float(value)
  return value
