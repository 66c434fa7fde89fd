"""Reports overlaps as a table and as JSON; shares for scores, from a search or
from the JSON.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import rich.console
import rich.markup
import rich.progress

from lm import config as config_lib
from lm import files, schema, terminal
from lm import objective as objective_lib
from lm.data import overlap
from lm.data import sources as sources_lib

# Number of passages shown for each source.
_N_SHOWN = 3


class Shares(NamedTuple):
  """The overlap of a held-out source with training text, as fractions: of the
  documents (with a common passage of `n` words), of the bytes (in common
  passages), and of the bytes of each overlapping document, by name. `n_short`
  of the `n_documents` documents have fewer than `n` words.
  """

  n: int
  of_documents: float
  of_bytes: float
  of_bytes_by_document: dict[str, float]
  n_documents: int
  n_bytes: int
  n_short: int

  def to_json(self) -> dict[str, Any]:
    return {
      "n": self.n,
      "n_short": self.n_short,
      "share_of_documents": self.of_documents,
      "share_of_bytes": self.of_bytes,
    }


@dataclasses.dataclass(frozen=True)
class Search:
  """A search of the training sources, in passages of `n` words; the report of
  all passages is written to the file `output` unless None.
  """

  n: int = overlap.DEFAULT_N
  output: str | None = None


def report(
  config: config_lib.Config,
  n: int,
  more: Sequence[str] = (),
  output: str | None = None,
) -> None:
  """Prints the overlap of the validation sources of `config` and the sources
  `more` with the training sources of `config`, in N-grams of `n` words, and
  writes JSON to the file `output` unless None.

  Raises ConfigError on unreadable sources, and on none to look for; RunError if
  a source changes.
  """
  if output is not None:
    files.check_output(output, "--output")
  if not (config.data.validation or more):
    raise schema.ConfigError(
      "--overlap: config.data.validation=() names nothing to look for; add "
      "--overlap_source=SPEC, or a validation source"
    )
  held_out, training = (
    [overlap.open_source(spec, config.data) for spec in _specs(names)]
    for names in ((*config.data.validation, *more), config.data.train)
  )
  found = _find(held_out, training, n)
  if output is not None:
    _write(to_json(found, training, n), output)
  show(found, n, terminal.console())


def _find(
  held_out: Sequence[sources_lib.Source],
  training: Sequence[sources_lib.Source],
  n: int,
) -> list[overlap.HeldOut]:
  """Calls `overlap.find` with a progress bar; RunError if a source changes."""
  with _watch() as watch:
    found = overlap.find(held_out, training, n, watch)
  for source in (*held_out, *training):
    if (changed := source.changed()) is not None:
      raise schema.RunError(
        f"{changed}: has changed while it was read; start again"
      )
  return found


def _write(content: dict[str, Any], path: str) -> None:
  files.replace(path, json.dumps(content, indent=2) + "\n")


def _specs(names: Iterable[str]) -> list[str]:
  """Returns the sources without objectives and without repetition. The
  objective `chat` stays, since chats are read as conversations.
  """
  found = {}
  for name in names:
    spec, objective = objective_lib.split_source(name)
    chat = isinstance(objective, objective_lib.Chat)
    found[f"{spec}|chat" if chat else spec] = None
  return list(found)


@contextlib.contextmanager
def _watch() -> Iterator[overlap.Watch]:
  """Yields a reader of sources with a progress bar in a terminal."""
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(
    console=console, transient=True, disable=not console.is_terminal
  ) as progress:

    def watch(source: sources_lib.Source) -> Iterator[overlap.Document]:
      about = f"reading {rich.markup.escape(source.spec)}"
      bar = progress.add_task(about, total=len(source))
      for document in overlap.read(source):
        yield document
        progress.advance(bar)
      progress.remove_task(bar)

    yield watch


def show(
  found: Sequence[overlap.HeldOut], n: int, console: rich.console.Console
) -> None:
  """Prints a line per source, then the longest passages of each source."""
  title = f"passages of {n} words that training text has"
  counts = ("documents", "overlap", "share", "bytes", "overlap", "share")
  table = terminal.table("held out", *counts, title=title)
  lines = []
  for part in found:
    table.add_row(
      terminal.cell(part.source),
      f"{part.n_documents:,}",
      f"{len(part.touched):,}",
      f"{_share(len(part.touched), part.n_documents):.1%}",
      f"{part.n_bytes:,}",
      f"{part.n_covered:,}",
      f"{_share(part.n_covered, part.n_bytes):.1%}",
    )
    if part.n_short:
      lines.append(
        f"{part.source}: {schema.counted(part.n_short, 'document')} of fewer "
        f"than {n} words can overlap with none"
      )
    matches = [(m, d.name) for d in part.touched for m in d.matches]
    matches.sort(key=lambda pair: -pair[0].n_words)
    for m, name in matches[:_N_SHOWN]:
      lines.append(
        f"{part.source}: {m.n_words:,} words, bytes {m.start} to {m.stop} of "
        f"{name}, are bytes {m.training_start} to {m.training_stop} of "
        f"{m.training_document} ({m.training_source})"
      )
  terminal.print_table(console, table)
  terminal.print_lines(console, lines)


def to_json(
  found: Sequence[overlap.HeldOut],
  training: Sequence[sources_lib.Source],
  n: int,
) -> dict[str, Any]:
  return {
    "n": n,
    "training": [
      {"source": overlap.spec_of(source), "fingerprint": source.fingerprint()}
      for source in training
    ],
    "sources": [
      {
        "source": part.source,
        "fingerprint": part.fingerprint,
        "n_documents": part.n_documents,
        "n_short": part.n_short,
        "n_touched": len(part.touched),
        "share_of_documents": _share(len(part.touched), part.n_documents),
        "n_bytes": part.n_bytes,
        "n_covered": part.n_covered,
        "share_of_bytes": _share(part.n_covered, part.n_bytes),
        "documents": [
          {
            "name": document.name,
            "n_bytes": document.n_bytes,
            "n_covered": document.n_covered,
            "matches": [m._asdict() for m in document.matches],
          }
          for document in part.touched
        ],
      }
      for part in found
    ],
  }


def _share(part: int | float, whole: int) -> float:
  return part / whole if whole else 0.0


def shares(
  given: str | Search,
  held_out: Mapping[str, sources_lib.Source],
  config: config_lib.DataConfig,
) -> dict[str, Shares]:
  """Returns the shares of the sources `held_out`, by the caller's names: from a
  search, one for all of them, or from the JSON file `given`, which a search
  wrote; `config` has the training sources and the options for reading.

  Raises ConfigError if the file is invalid, or if sources or their contents
  differ; RunError if a source changes during the search.
  """
  if isinstance(given, str):
    content = _load(given, held_out, config)
  else:
    check(given, config)
    training = [
      overlap.open_source(spec, config) for spec in _specs(config.train)
    ]
    unique = {overlap.spec_of(source): source for source in held_out.values()}
    found = _find([*unique.values()], training, given.n)
    content = to_json(found, training, given.n)
    if given.output is not None:
      _write(content, given.output)
  parts = {part["source"]: part for part in content["sources"]}
  return {
    name: _read(content["n"], parts[overlap.spec_of(source)])
    for name, source in held_out.items()
  }


def check(given: str | Search, config: config_lib.DataConfig) -> None:
  """Raises ConfigError where `shares` would, whatever the held-out sources, on
  a file; reads no source.
  """
  if isinstance(given, str):
    _load(given, {}, config)
  elif given.output is not None:
    files.check_output(given.output, "--overlap_output")


def open_held_out(
  names: Iterable[str], config: config_lib.DataConfig
) -> dict[str, sources_lib.Source]:
  """Opens the sources `names` as `shares` takes them."""
  return {
    name: overlap.open_source(spec, config)
    for name in names
    for spec in _specs([name])
  }


def joined(parts: Sequence[Shares]) -> Shares:
  """Shares of all `parts`, at least one, of different documents."""
  n_documents = sum(part.n_documents for part in parts)
  n_bytes = sum(part.n_bytes for part in parts)
  n_touched = sum(part.of_documents * part.n_documents for part in parts)
  n_covered = sum(part.of_bytes * part.n_bytes for part in parts)
  return Shares(
    parts[0].n,
    _share(n_touched, n_documents),
    _share(n_covered, n_bytes),
    {k: v for part in parts for k, v in part.of_bytes_by_document.items()},
    n_documents,
    n_bytes,
    sum(part.n_short for part in parts),
  )


def _load(
  path: str,
  held_out: Mapping[str, sources_lib.Source],
  config: config_lib.DataConfig,
) -> dict[str, Any]:
  """Reads and checks a file of overlaps, as `shares` says."""
  again = (
    "write it anew: python -m lm.data --config=FILE --overlap "
    "--overlap_source=SPEC --output=FILE, or, for tasks too, python -m "
    "lm.evaluate with --overlap --overlap_output=FILE"
  )
  where = f"--overlap={path}"
  try:
    with open(path, "rb") as file:
      content = json.load(file)
    training = [source["source"] for source in content["training"]]
    known = {part["source"]: part["fingerprint"] for part in content["sources"]}
    for part in content["sources"]:
      _read(content["n"], part)
  except OSError as error:
    raise schema.ConfigError(f"{where}: {error.strerror}; {again}") from error
  except files.MALFORMED as error:
    raise schema.ConfigError(
      f"{where}: not overlaps ({files.first_line(error)}); {again}"
    ) from error
  if training != _specs(config.train):
    raise schema.ConfigError(
      f"{where}: is about the training sources {training}, and the run was "
      f"trained on {_specs(config.train)}; {again}"
    )
  for source in held_out.values():
    spec = overlap.spec_of(source)
    if spec not in known:
      raise schema.ConfigError(
        f"{where}: has no source {spec!r}, only {', '.join(map(repr, known))}; "
        f"{again}"
      )
    if source.fingerprint() != known[spec]:
      raise schema.ConfigError(
        f"{where}: {spec!r} has changed since, or is read with other options "
        f"(text_unit, invalid_utf8; of tasks, limit); {again}"
      )
  return content


def _read(n: int, part: dict[str, Any]) -> Shares:
  found = Shares(
    int(n),
    part["share_of_documents"],
    part["share_of_bytes"],
    {
      d["name"]: _share(d["n_covered"], d["n_bytes"]) for d in part["documents"]
    },
    *(int(part[name]) for name in ("n_documents", "n_bytes", "n_short")),
  )
  for share in (*found[1:3], *found.of_bytes_by_document.values()):
    if not 0 <= share <= 1:
      raise ValueError(f"a share of {share}")
  return found
