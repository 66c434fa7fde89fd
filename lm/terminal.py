"""What commands print on stdout: names and numbers, whole in any width."""

import os
from collections.abc import Iterable

import rich.box
import rich.console
import rich.markup
import rich.table

# Columns that a folded name has, even in a terminal too narrow for them.
_NAME_WIDTH = 16


def table(*columns: str, title: str | None = None) -> rich.table.Table:
  """A table for `console.print`. The first column folds long names; the others
  are right-aligned, or left-aligned if the name ends in a blank.
  """
  found = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=0)
  first, *others = columns
  found.add_column(first, overflow="fold")
  for name in others:
    justify = "left" if name.endswith(" ") else "right"
    found.add_column(name.strip(), justify=justify, no_wrap=True)
  return found


def console() -> rich.console.Console:
  """A console on stdout; a file or a pipe, which have no width of their own,
  has 100 columns, or as many as COLUMNS says.
  """
  found = rich.console.Console(emoji=False)  # a path may hold ":cat:"
  if not (found.is_terminal or "COLUMNS" in os.environ):
    found.width = 100
  return found


def cell(name: str) -> str:
  """A name for a table or its title, which take no markup and no control
  character from it.
  """
  return rich.markup.escape(_printable(name))


def _printable(text: str) -> str:
  """`text` with escapes for what a terminal would obey: names of files may
  hold it.
  """
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_table(console: rich.console.Console, table: rich.table.Table) -> None:
  """Prints a table with every name and number whole. In a console too narrow
  for its numbers it is wider: rich would cut them.
  """
  width, names = console.width, [c for c in table.columns if not c.no_wrap]
  for column in names:
    column.max_width = _NAME_WIDTH
  anywhere = console.options.update(width=10_000)
  console.width = max(width, console.measure(table, options=anywhere).maximum)
  for column in names:
    column.max_width = None
  console.print(table)
  console.width = width


def print_lines(console: rich.console.Console, lines: Iterable[str]) -> None:
  """Prints text as it is, but for control characters, each line whole."""
  for line in lines:
    console.print(
      _printable(line), markup=False, highlight=False, soft_wrap=True
    )
