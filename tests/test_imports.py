"""Imports run one way, and what must be light is light."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from lm import config as config_lib
from lm.model import rotary

LM = pathlib.Path(__file__).parent.parent / "lm"

# Each room of lm/ imports itself and rooms of earlier rows only.
ORDER = (
  ("schema",),
  ("objective",),
  ("config_optional",),
  ("config",),
  ("effects",),
  ("validation",),
  ("files",),
  ("locks",),
  ("batch", "chips", "digest", "processes", "sharding", "terminal"),
  ("cli", "mesh"),
  ("items", "model", "data"),
  ("checkpoint",),
  ("huggingface",),
  ("sample",),
  ("evaluate",),
  ("train",),
)
# Tools, `python -m lm.TOOL`: each imports the library, and no other tool.
TOOLS = ("chat", "convert", "explain", "plan", "report", "serve", "verify")
ORDER = (*ORDER, TOOLS)
ROW = {room: row for row, rooms in enumerate(ORDER) for room in rooms}


def imported_rooms(tree: ast.Module, package: list[str]) -> set[str]:
  """First names under `lm` that a module inside `package` imports, anywhere."""
  names = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
      above = package[: len(package) - node.level + 1] if node.level else []
      base = ".".join([*above, node.module] if node.module else above)
      names += [f"{base}.{alias.name}" for alias in node.names]
  paths = [name.split(".") for name in names]
  return {path[1] for path in paths if path[0] == "lm" and len(path) > 1}


def violations(path: pathlib.Path) -> list[str]:
  package = ["lm", *path.relative_to(LM).parts[:-1]]
  own = path.relative_to(LM).parts[0].removesuffix(".py")
  rooms = imported_rooms(ast.parse(path.read_text()), package) - {own}
  # A command stands on all of the library, wherever its room is.
  row = len(ORDER) - 1 if path.name == "__main__.py" else ROW.get(own, 0)
  return [
    f"{path.relative_to(LM.parent)} imports lm.{room}"
    for room in sorted(rooms)
    if own == "__init__" or ROW[room] >= row
  ]


def test_imports_run_one_way():
  assert [
    v for path in sorted(LM.rglob("*.py")) for v in violations(path)
  ] == []


def test_every_form_of_import_is_seen():
  source = """
import lm.one
from lm import two
from lm.three.inner import name
from . import sibling
from .. import four
def function():
  from ..five import name
"""
  rooms = imported_rooms(ast.parse(source), ["lm", "own"])
  assert rooms == {"one", "two", "three", "own", "four", "five"}


@pytest.mark.parametrize(
  "module", ["lm", "lm.schema", "lm.config", "lm.files", "lm.cli"]
)
def test_light_modules_import_neither_jax_nor_numpy(module):
  """So a mistake on the command line is reported in a blink."""
  heavy = subprocess.run(
    [
      sys.executable,
      "-c",
      f"import sys, {module}; print({{'jax', 'numpy'}} & set(sys.modules))",
    ],
    cwd=LM.parent,
    capture_output=True,
    text=True,
    check=True,
  )
  assert heavy.stdout == "set()\n"


def test_shape_annotations_are_executed():
  """conftest.py hooks beartype over lm/."""
  assert importlib.util.find_spec("beartype"), "needs the extra `test`"
  positions = jnp.zeros((2, 3, 5), jnp.int32)
  with pytest.raises(jaxtyping.TypeCheckError, match="positions"):
    rotary.angles(config_lib.ModelConfig(), positions)


def test_the_readme_counts_lines_as_they_are():
  """To 10 lines: the files that it says to read."""
  rows = re.findall(
    r"^\| `(lm/.*?)` \| (\d+) \|", (LM.parent / "README.md").read_text(), re.M
  )
  assert len(rows) == 14
  for name, stated in rows:
    n = (LM.parent / name).read_text().count("\n")
    assert abs(n - int(stated)) <= 10, f"{name} has {n} lines"


def test_the_path_from_text_to_gradient_is_short():
  """The README's files up to the loop: each says first what is found there."""
  named = re.findall(
    r"^\| `(lm/.*?)` \|", (LM.parent / "README.md").read_text(), re.M
  )
  path = named[: named.index("lm/train/loop.py") + 1]
  texts = [(LM.parent / name).read_text() for name in path]
  lengths = {n: t.count("\n") for n, t in zip(path, texts, strict=True)}
  assert len(path) == 11 and max(lengths.values()) < 450
  assert sum(lengths.values()) <= 2400, lengths
  assert all(ast.get_docstring(ast.parse(text)) for text in texts)


def test_each_benchmark_reads_its_command_line():
  """One that does not would start on `--help`, and on any misspelt flag."""
  paths = (LM.parent / "benchmarks").glob("*.py")
  texts = {path.name: path.read_text() for path in paths}
  scripts = {name for name, text in texts.items() if "__main__" in text}
  readers = (".parse_args(", "cli.run(main")
  read = {n for n in scripts if any(r in texts[n] for r in readers)}
  assert len(scripts) > 15 and scripts == read


def test_no_script_or_helper_hides_another_module():
  """A benchmark named as a package, before which Python finds it; a helper of
  tests named as a folder of results, for which ruff takes its imports.
  """
  packages = {*importlib.metadata.packages_distributions()}
  scripts = {path.stem for path in (LM.parent / "benchmarks").glob("*.py")}
  assert not scripts & (packages | sys.stdlib_module_names)
  ignored = (LM.parent / ".gitignore").read_text().split()
  folders = {line.strip("/") for line in ignored if line.startswith("/")}
  helpers = {path.stem for path in (LM.parent / "tests").glob("*.py")}
  assert {"runs", "data"} <= folders and not folders & helpers
