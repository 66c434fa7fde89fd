"""Compares the bits per byte of runs on the same documents, with p-values and
confidence intervals of the differences over a sample of documents.

Bits per byte are comparable across tokenizers: each run is scored with the
run's own tokenizer and context. lm/evaluate/bootstrap.py has the statistics.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import checkpoint, files, schema
from lm import objective as objective_lib
from lm.data import overlap_report
from lm.data import sources as sources_lib
from lm.data import store as store_lib
from lm.evaluate import bootstrap, corpora

TOTAL = "total"


class Document(NamedTuple):
  name: str
  n_bytes: int


# Keys of a file of scores with results on texts, not copied to `Run.about`.
_OF_TEXTS = ("total", "sources", "samples")
# By source: the documents, and the nll of each document in nats.
Documents = dict[str, list[Document]]
Nll = dict[str, np.ndarray]


@dataclasses.dataclass
class Run:
  """A run to compare: `name` on the command line, an `identity` for finding
  duplicates, and either a `job` for scoring or the scores from a file.
  """

  name: str
  identity: tuple[Any, ...]
  about: dict[str, Any]
  job: corpora.Job | None = None
  nll: Nll = dataclasses.field(default_factory=dict)
  documents: Documents = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Row:
  """Results on a source, or on all sources: for each run the bits per byte, the
  difference to the bits per byte of the first run (None for the first run), and
  `p_holm`, the p-value after Holm's correction.
  """

  source: str
  n_documents: int
  n_bytes: int
  bits_per_byte: list[bootstrap.Estimate]
  difference: list[bootstrap.Estimate | None]
  p_holm: list[float | None]


@dataclasses.dataclass
class Comparison:
  runs: list[Run]
  documents: Documents
  rows: list[Row]
  n_resamples: int
  seed: int
  # By source: the overlap with training text; {} if unknown.
  overlap: dict[str, overlap_report.Shares] = dataclasses.field(
    default_factory=dict
  )

  @property
  def overall(self) -> Row:
    return self.rows[-1]


def compare(
  names: Sequence[str],
  *,
  specs: Sequence[str] = (),
  stride: int | None = None,
  batch_size: int | None = None,
  data: dict[str, Any] | None = None,
  overlap: str | None = None,
  seed: int = 0,
) -> Comparison:
  """Compares runs with the first run. A name is RUN, RUN@STEP or a file written
  by `lm.evaluate --documents --output`; `specs`, `stride`, `batch_size`, `data`
  and `overlap` are as in `corpora.evaluate`, `seed` is of the bootstrap.

  Raises ConfigError, before parameters are loaded, on fewer than two names, a
  missing run, a run given twice, a source with an objective, sources with
  different documents, and sources with fewer than bootstrap.MIN_DOCUMENTS
  documents; RunError if scores are not finite.
  """
  inputs = _found(names, stride)
  chosen = _specs(inputs, specs)
  _check_causal(chosen)
  how = {"overlap": overlap, "stride": stride, "batch_size": batch_size}
  for name, value in (how | (data or {})).items():
    if value is not None and all(meta is None for _, meta in inputs):
      raise schema.ConfigError(
        f"--{name}={value}: is about a run that is scored, and --compare names "
        "files alone, which have their scores; leave it out"
      )
  known: dict[str, list[Document]] = {}
  for run, meta in inputs:
    if meta is not None:
      run.job = corpora.prepare(
        checkpoint.split_name(run.name)[0],
        meta,
        specs=chosen,
        stride=stride,
        batch_size=batch_size,
        data=data or {},
        overlap=overlap,
      )
      run.documents = _read_documents(chosen, run.job, known)
  runs = [run for run, _ in inputs]
  documents = _check_documents(runs, chosen)
  for run in runs:
    if run.job is not None:
      _score(run, documents)
    _check_finite(run, documents)
  found = summarise(runs, documents, seed)
  found.overlap = next((r.job.overlap for r in runs if r.job), {})
  return found


def _found(
  names: Sequence[str], stride: int | None
) -> list[tuple[Run, checkpoint.Meta | None]]:
  """`_find` of each name. Raises ConfigError on fewer than two, and on two of
  the same scores.
  """
  if len(names) < 2:
    raise schema.ConfigError(
      f"--compare: {len(names)} run given; name two or more, as in "
      "--compare runs/a runs/b@500"
    )
  inputs = [_find(name, stride) for name in names]
  for i, (run, _) in enumerate(inputs):
    for other, _ in inputs[:i]:
      if run.identity == other.identity:
        raise schema.ConfigError(
          f"--compare: {other.name} and {run.name} are the same scores; name "
          "other runs, or other steps (RUN@STEP)"
        )
  return inputs


def summarise(runs: list[Run], documents: Documents, seed: int) -> Comparison:
  """Computes the statistics of scored runs: a row per source, and, with several
  sources, a row for the total.
  """
  parts = [(source, [source]) for source in documents]
  if len(parts) > 1:
    parts.append((TOTAL, list(documents)))
  n = bootstrap.n_resamples(sum(map(len, documents.values())))
  rows = [_row(name, part, runs, documents, n, seed) for name, part in parts]
  # Holm's correction is separate for the sources and for the total.
  n_sources = len(documents)
  for family in (rows[:n_sources], rows[n_sources:]):
    places = [(row, k) for row in family for k in range(1, len(runs))]
    p_values = [row.difference[k].p for row, k in places]  # type: ignore
    for (row, k), p in zip(places, bootstrap.holm(p_values), strict=True):
      row.p_holm[k] = p
  return Comparison(runs, documents, rows, n, seed)


def _row(
  name: str,
  part: list[str],
  runs: list[Run],
  documents: Documents,
  n: int,
  seed: int,
) -> Row:
  sizes = [len(documents[source]) for source in part]
  n_bytes = np.array([d.n_bytes for source in part for d in documents[source]])
  bits = np.stack(
    [np.concatenate([r.nll[source] for source in part]) for r in runs]
  ) / math.log(2)
  values = np.concatenate([bits, bits[1:] - bits[:1]])
  found = bootstrap.ratios(values, n_bytes, sizes, n, seed)
  k = len(runs)
  return Row(
    name,
    sum(sizes),
    int(n_bytes.sum()),
    found[:k],
    [None, *found[k:]],
    [None] * k,
  )


def verdict(comparison: Comparison, row: Row, k: int) -> str:
  """Returns a sentence comparing run `k` with the first run on the row."""
  runs, found, p = comparison.runs, row.difference[k], row.p_holm[k]
  assert found is not None and p is not None
  a, b = runs[0].name, runs[k].name
  sign = -1 if found.value < 0 else 1
  low, high = sorted((sign * found.low, sign * found.high))
  interval = f"({low:.4f} to {high:.4f}; p = {p:.2g})"
  if p > 0.05:
    return (
      f"{a} and {b} are not told apart: {b} has {abs(found.value):.4f} "
      f"{'fewer' if sign < 0 else 'more'} bits per byte {interval}"
    )
  better = "better" if sign < 0 else "worse"
  return (
    f"{b} is {better} than {a} by {abs(found.value):.4f} bits per byte "
    f"{interval}"
  )


# --- inputs ------------------------------------------------------------------


def _find(name: str, stride: int | None) -> tuple[Run, checkpoint.Meta | None]:
  """Returns the run `name` and the checkpoint's metadata, None for a file."""
  if os.path.isfile(name):
    return _from_file(name), None
  workdir, step = checkpoint.split_name(name)
  steps = checkpoint.steps(workdir)
  if not steps or step not in (None, *steps):
    raise schema.ConfigError(
      f"--compare={name}: {workdir} has no checkpoint"
      + (f" of step {step}; it has {steps}" if steps else "")
      + "; name a run directory of lm.train, RUN or RUN@STEP, or a file of "
      "lm.evaluate --documents --output=FILE"
    )
  meta = checkpoint.load_meta(workdir, step)
  stride = stride or meta.config.model.context_length
  return Run(name, (_absolute(workdir), meta.step, stride, None), {}), meta


def _absolute(path: str) -> str:
  return os.path.realpath(path) if files.is_local(path) else path


def _from_file(path: str) -> Run:
  """Reads a file of scores written by `lm.evaluate --documents --output`."""
  remedy = "write it by lm.evaluate --documents --output=FILE"
  try:
    with open(path, "rb") as file:
      content = json.load(file)
    about = {k: v for k, v in content.items() if k not in _OF_TEXTS}
    identity = (
      _absolute(content["workdir"]),
      *(content.get(name) for name in ("step", "stride", "adapter")),
    )
    run = Run(path, identity, about)
    for source in content["sources"]:
      name, rows = source["source"], source["documents"]
      run.documents[name] = [Document(d["name"], d["n_bytes"]) for d in rows]
      nll = [math.nan if d["nll"] is None else d["nll"] for d in rows]
      run.nll[name] = np.array(nll, np.float64)
    return run
  except OSError as error:
    raise schema.ConfigError(
      f"--compare={path}: {error.strerror}; {remedy}"
    ) from error
  except files.MALFORMED as error:
    raise schema.ConfigError(
      f"--compare={path}: not scores of documents "
      f"({files.first_line(error)}); {remedy}"
    ) from error


def _specs(
  found: Sequence[tuple[Run, checkpoint.Meta | None]], specs: Sequence[str]
) -> list[str]:
  """Returns the sources to compare on: `specs`, else the sources of the first
  file, else the validation sources, required to be equal for all runs.
  """
  by_file = [list(run.documents) for run, meta in found if meta is None]
  by_run = [
    list(dict.fromkeys(m.config.data.validation)) for _, m in found if m
  ]
  chosen = list(dict.fromkeys(specs)) or (by_file or by_run)[0]
  for run, meta in found:
    missing = [s for s in chosen if s not in run.documents]
    if meta is None and missing:
      raise schema.ConfigError(
        f"--compare={run.name}: has no scores of {missing[0]!r}; it has "
        f"{', '.join(map(repr, run.documents))}"
      )
  if not specs and not by_file:
    for (run, _), theirs in zip(found, by_run, strict=True):
      if theirs != chosen:
        raise schema.ConfigError(
          f"--compare: {found[0][0].name} was validated on {chosen}, and "
          f"{run.name} on {theirs}; name the sources by --source=SPEC"
        )
  return chosen


def _check_causal(specs: Sequence[str]) -> None:
  for spec in specs:
    if objective_lib.of(spec) != objective_lib.Causal():
      raise schema.ConfigError(
        f"source {spec!r}: runs are compared by the probability of documents, "
        "which a source with an objective does not have; write it without "
        "what follows '|'"
      )


def _read_documents(
  specs: Sequence[str],
  job: corpora.Job,
  known: dict[str, list[Document]],
) -> Documents:
  """Returns documents by source; `known` caches documents by fingerprint."""
  found = {}
  for spec, source in zip(specs, job.sources, strict=True):
    assert not isinstance(source, store_lib.TokenStore)
    key = source.fingerprint()
    if key not in known:
      known[key] = _listed(source)
    found[spec] = known[key]
  return found


def _listed(source: sources_lib.Source) -> list[Document]:
  documents = (source[i] for i in range(len(source)))
  return [Document(d.name, len(d.text.encode())) for d in documents if d]


def _check_documents(runs: Sequence[Run], specs: Sequence[str]) -> Documents:
  """Returns the documents by source; raises ConfigError unless all runs have
  the same documents, and enough of them for intervals.
  """
  documents = {spec: runs[0].documents[spec] for spec in specs}
  for spec, listed in documents.items():
    for run in runs[1:]:
      if difference := _difference(listed, run.documents[spec]):
        raise schema.ConfigError(
          f"source {spec!r}: {runs[0].name} and {run.name} have other "
          f"documents, {difference}; set --text_unit and --invalid_utf8 for "
          "both, and score the same files"
        )
    n = sum(d.n_bytes > 0 for d in listed)
    if n < bootstrap.MIN_DOCUMENTS:
      raise schema.ConfigError(
        f"source {spec!r}: has {schema.counted(n, 'document')} with text; an "
        f"interval needs {bootstrap.MIN_DOCUMENTS}, since it comes "
        "from how documents differ: name more files, or cut them by "
        "--text_unit=block or line"
      )
  return documents


def _difference(a: list[Document], b: list[Document]) -> str | None:
  """Describes the first difference of two lists of documents; None if equal."""
  for one, other in zip(a, b, strict=False):
    if one != other:
      return (
        f"{one.name!r} of {one.n_bytes} bytes and {other.name!r} of "
        f"{other.n_bytes}"
      )
  return f"{len(a)} and {len(b)}" if len(a) != len(b) else None


# --- scores ------------------------------------------------------------------


def _score(run: Run, documents: Documents) -> None:
  """Scores a run and sets `nll` and `about`."""
  assert run.job is not None
  evaluation = corpora.score(run.job)
  run.about = {
    "workdir": evaluation.workdir,
    "step": evaluation.step,
    "context": evaluation.context,
    "stride": evaluation.stride,
    **evaluation.about,
  }
  for (spec, listed), result in zip(
    documents.items(), evaluation.results, strict=True
  ):
    scored = [Document(d.name, int(d.totals.n_bytes)) for d in result.documents]
    if difference := _difference(listed, scored):
      raise schema.RunError(
        f"source {spec!r}: has changed while it was read, {difference}; start "
        "again"
      )
    nll = [d.totals.nll for d in result.documents]
    run.nll[spec] = np.array(nll, np.float64)


def _check_finite(run: Run, documents: Documents) -> None:
  for spec, listed in documents.items():
    bad = np.flatnonzero(~np.isfinite(run.nll[spec]))
    if len(bad):
      raise schema.RunError(
        f"{run.name}: the loss of {listed[bad[0]].name!r} ({spec}) is not "
        "finite; evaluate an earlier checkpoint"
      )
