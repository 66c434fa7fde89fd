"""The result of a check, as a table row and as JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.markup
import rich.table

from lm import files, terminal


@dataclasses.dataclass(frozen=True)
class Result:
  """A single comparison of a check.

  The measured `error` passes up to `limit`; both are None where there is
  nothing to measure. `note` holds further facts for the reader.
  """

  check: str
  compared: str
  error: float | None
  limit: float | None
  passed: bool
  note: str = ""


def judge(
  check: str,
  compared: str,
  error: float | int,
  limit: float | int,
  note: str = "",
) -> Result:
  """A Result that passes where `error` <= `limit`; NaN fails."""
  return Result(
    check, compared, float(error), float(limit), bool(error <= limit), note
  )


def show(results: Sequence[Result], title: str) -> None:
  """Prints the results as a table on stdout."""
  table = rich.table.Table(
    title=rich.markup.escape(title),
    title_justify="left",
    box=rich.box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
  )
  table.add_column("check", no_wrap=True)
  table.add_column("compared", overflow="fold", ratio=1)
  table.add_column("error", justify="right", no_wrap=True)
  table.add_column("limit", justify="right", no_wrap=True)
  table.add_column("", no_wrap=True)
  for result in results:
    compared = result.compared + (f"\n{result.note}" if result.note else "")
    table.add_row(
      result.check,
      rich.markup.escape(compared),
      _number(result.error),
      _number(result.limit),
      "[green]pass[/]" if result.passed else "[bold red]FAIL[/]",
    )
  terminal.print_table(terminal.console(), table)


def write(results: Sequence[Result], path: str, about: dict[str, Any]) -> None:
  """Writes JSON atomically; a non-finite error becomes null."""
  content = {
    **about,
    "passed": all(result.passed for result in results),
    "results": [
      dataclasses.asdict(result) | {"error": _finite(result.error)}
      for result in results
    ],
  }
  files.replace(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _finite(value: float | None) -> float | None:
  return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:.3g}"
