"""Steps: commands as argument lists, printed as shell or run without one."""

import dataclasses
import pathlib
import re
import shlex
import subprocess
from collections.abc import Sequence

import yaml

from lm import schema


def _function(name: str) -> str:
  """A shell function of this directory, without its comments."""
  lines = (pathlib.Path(__file__).parent / name).read_text().splitlines()
  code = [x for x in lines if x and not x.lstrip().startswith("#")]
  return "\n".join(code) + "\n"


SUPERVISE = _function("supervise.sh")
RETRY = SUPERVISE + _function("retry.sh")

# Makes a Python that the project runs on, of which TPU VMs have none (3.10).
_INSTALL = """\
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv '.[{extras}]'
"""
# Extra of setup.py for each object store.
_STORES = {"gs": "gcs", "s3": "s3"}


def install(accelerator: str, bucket: str | None) -> str:
  """Shell that installs the project with what `accelerator`, an extra of
  setup.py, and the object store of `bucket` need.
  """
  scheme = (bucket or "").partition("://")[0]
  extras = [accelerator, *filter(None, [_STORES.get(scheme)])]
  return _INSTALL.format(extras=",".join(extras))


# Installing may have made one.
ACTIVATE = "[ ! -f .venv/bin/activate ] || . .venv/bin/activate\n"


@dataclasses.dataclass(frozen=True)
class Step:
  """One command; `stdin` is the text that it reads. The next command does not
  wait for the end of one that is `beside`.
  """

  argv: tuple[str, ...]
  stdin: str | None = None
  about: str = ""
  beside: bool = False

  def __str__(self) -> str:
    """The same as shell, in which every word is quoted."""
    about = f"# {self.about}\n" if self.about else ""
    command = _wrap(self.argv) + " &" * self.beside
    return f"{about}{_heredoc(command, self.stdin)}\n"

  def run(self, **options) -> subprocess.CompletedProcess:
    """Runs it; raises ConfigError where the program is not installed."""
    try:
      return subprocess.run(
        self.argv,
        input=self.stdin,
        # The bytes of the arguments, whatever the locale.
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
        **options,
      )
    except FileNotFoundError as error:
      raise schema.ConfigError(
        f"{self.argv[0]}: not on the PATH; install it, or see the commands "
        "with --dry_run"
      ) from error


def run_all(steps: Sequence[Step]) -> int:
  """Runs steps in order up to the first that fails; its exit code, or 0."""
  for step in steps:
    code = step.run().returncode
    if code:
      return code
  return 0


def bash(script: str, *words: str) -> tuple[str, ...]:
  """Arguments that run `script` with `words` as its parameters."""
  return "bash", "-c", script, "launch", *words


def _wrap(argv: Sequence[str]) -> str:
  """The words, quoted, in lines of 80 columns where that can be."""
  lines = [""]
  for word in map(shlex.quote, argv):
    if lines[-1] and len(lines[-1]) + len(word) > 76:
      lines.append("")
    lines[-1] += f" {word}" if lines[-1] else word
  return " \\\n  ".join(lines)


def _heredoc(command: str, text: str | None) -> str:
  if text is None:
    return command
  mark = "EOF"
  while mark in text.split("\n"):
    mark += "_"
  end = "" if text.endswith("\n") else "\n"
  return f"{command} <<'{mark}'\n{text}{end}{mark}"


class _Dumper(yaml.SafeDumper):
  """YAML that shows a script as a script, and keeps as text what kubectl would
  read otherwise, such as 1e-3 and y.
  """

  def represent_str(self, text: str) -> yaml.Node:
    schema.check_text("text for --to=gke or --to=sky", text)
    style = "|" if "\n" in text else None
    if re.fullmatch(r"[yYnN]|[-+._]*[0-9].*", text):
      style = "'"
    return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(tree: dict) -> str:
  return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
