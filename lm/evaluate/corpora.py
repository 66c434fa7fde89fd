"""Evaluation of a checkpoint on corpora: results per source, tables, JSON."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.markup
import rich.progress
import rich.table

from lm import checkpoint, files, schema, sharding
from lm import config as config_lib
from lm import objective as objective_lib
from lm.data import pipeline
from lm.data import sources as sources_lib
from lm.data import store as store_lib
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import perplexity
from lm.model import decoder
from lm.sample import load

# Documents listed at each end of a ranking.
_N_RANKED = 3
# Most tokens of a batch: the host holds two batches, about 20 bytes a token.
_MAX_TOKENS = 1 << 26


@dataclasses.dataclass
class Result:
  """Scores of a source's documents; `n_skipped` more were not UTF-8. A source
  of another objective than `causal` has one score: of its rows.
  """

  source: str
  documents: list[perplexity.DocumentScore]
  n_skipped: int

  @property
  def is_causal(self) -> bool:
    return objective_lib.of(self.source) == objective_lib.Causal()

  @property
  def totals(self) -> perplexity.Totals:
    return sum((d.totals for d in self.documents), perplexity.Totals())

  @property
  def ranked(self) -> list[perplexity.DocumentScore]:
    """Documents that have text, lowest bits per byte first."""
    with_text = [d for d in self.documents if d.totals.n_bytes]
    return sorted(with_text, key=lambda d: d.totals.bits_per_byte)


@dataclasses.dataclass
class Evaluation:
  """All results that `python -m lm.evaluate` shows or writes."""

  workdir: str
  step: int
  context: int
  stride: int
  results: list[Result]

  @property
  def totals(self) -> perplexity.Totals:
    """Sums over the causal sources; over all, if none is causal."""
    return perplexity.overall([(r.source, r.totals) for r in self.results])


def evaluate(
  workdir: str,
  *,
  specs: Sequence[str],
  step: int | None,
  stride: int | None,
  batch_size: int | None,
  data: dict[str, Any],
  output: str | None,
  adapter: str | None = None,
  chat_template: str | None = None,
) -> Evaluation:
  """Scores every document of the sources `specs` with a checkpoint; where a
  source names another objective than `causal`, the rows that training has as
  validation.

  Defaults for None or empty: the last step; a `stride` of the context length
  (only a document's last window overlaps); the rows of a training microbatch;
  the run's validation sources. `data` changes fields of the run's DataConfig;
  `adapter` is that of `load.model`; the text `chat_template` replaces the
  checkpoint's.
  Raises ConfigError on bad input before parameters are loaded.
  """
  if output is not None:
    files.check_output(output, "--output")
  meta = checkpoint.load_meta(workdir, step)
  config = meta.config
  context = config.model.context_length
  stride = context if stride is None else stride
  if not 1 <= stride <= context:
    raise schema.ConfigError(
      f"--stride={stride}: must be from 1 to model.context_length={context}"
    )
  if batch_size is not None and batch_size * context > _MAX_TOKENS:
    raise schema.ConfigError(
      f"--batch_size={batch_size}: with a context of {context} tokens it must "
      f"be at most {_MAX_TOKENS // context}, so that the host can hold a batch"
    )
  data_config = dataclasses.replace(config.data, **data)
  for name in specs or config.data.validation:
    schema.require(
      config.model.causal
      or isinstance(objective_lib.of(name), objective_lib.Masked),
      "--source",
      name,
      "the model is an encoder (model.causal=False), in which every token sees "
      "what it should predict; write SOURCE|masked",
    )
  tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  if chat_template is not None:
    tokenizer = tokenizer.with_template(chat_template)
  sources = [
    _open(name, tokenizer, data_config)
    for name in specs or config.data.validation
  ]
  rows = config.train.batch_size // config.train.microbatches
  rows = rows if batch_size is None else batch_size
  mesh, n_rows = _make_mesh(config, rows)
  with jax.set_mesh(mesh), _progress() as progress:
    model, params = load.model(workdir, meta, mesh, adapter)
    score_step = perplexity.eval_step(model)
    results = []
    for source in sources:
      if isinstance(source, store_lib.TokenStore):
        results.append(
          _score_rows(config, n_rows, score_step, params, source, tokenizer)
        )
        continue
      scores = perplexity.evaluate_source(
        score_step,
        params,
        source,
        tokenizer,
        n_rows=n_rows,
        context=context,
        stride=stride,
      )
      results.append(_collect(source, scores, progress))
  return Evaluation(workdir, meta.step, context, stride, results)


def _open(
  name: str,
  tokenizer: tokenizer_lib.Tokenizer,
  data: config_lib.DataConfig,
) -> sources_lib.Source | store_lib.TokenStore:
  """A source, of which documents are read; or the token store of a source with
  an objective, of which rows are read.
  """
  spec, objective = objective_lib.split_source(name)
  if objective != objective_lib.Causal():
    return store_lib.prepare_sources([name], tokenizer, data)[0]
  source = sources_lib.open_source(spec, data)
  _check_text(source)
  return source


def _score_rows(
  config: config_lib.Config,
  n_rows: int,
  step: perplexity.Step,
  params: decoder.Params,
  source: store_lib.TokenStore,
  tokenizer: tokenizer_lib.Tokenizer,
) -> Result:
  """Scores the rows of a source with an objective, as in training."""
  train = dataclasses.replace(
    config.train, batch_size=n_rows, eval_batches=None
  )
  prepared = store_lib.Prepared(tokenizer, [], [source])
  batches = pipeline.validation_batches(
    dataclasses.replace(config, train=train), prepared
  )
  totals = perplexity.evaluate_batches(
    step,
    params,
    (perplexity.place_rows(batch) for _, batch in batches),
    tokenizer.target_bytes,
  )
  assert totals is not None, "nothing stops it"
  rows = f"rows of {config.train.sequence_length} tokens"
  return Result(source.spec, [perplexity.DocumentScore(rows, totals)], 0)


def _collect(
  source: sources_lib.Source,
  scores: Iterator[perplexity.DocumentScore],
  progress: rich.progress.Progress,
) -> Result:
  n = len(source)
  bar = progress.add_task(source.spec, total=n)
  documents = []
  for document in scores:
    documents.append(document)
    progress.advance(bar)
  progress.update(bar, completed=n)
  return Result(source.spec, documents, n - len(documents))


def _check_text(source: sources_lib.Source) -> None:
  """Raises ConfigError if no document has text; reads up to the first text."""
  documents = (source[i] for i in range(len(source)))
  if not any(document and document.text for document in documents):
    raise schema.ConfigError(
      f"source {source.spec!r}: none of its {len(source)} documents has text "
      "that is UTF-8; correct them, or set invalid_utf8 to 'replace'"
    )


def _make_mesh(
  config: config_lib.Config, n_rows: int
) -> tuple[jax.sharding.Mesh, int]:
  """(mesh over the present devices, `n_rows` rounded up to a multiple of the
  devices); the mesh of the training run does not matter.

  All devices share the rows; gcd(d_model, devices) of them shard parameters.
  """
  n_devices = jax.device_count()
  n_rows = -(-n_rows // n_devices) * n_devices
  fsdp = math.gcd(config.model.d_model, n_devices)
  here = dataclasses.replace(
    config,
    mesh=config_lib.MeshConfig(data=None, fsdp=fsdp, tensor=1),
    train=dataclasses.replace(config.train, batch_size=n_rows, microbatches=1),
  )
  return sharding.make_mesh(here), n_rows


@contextlib.contextmanager
def _progress() -> Iterator[rich.progress.Progress]:
  """Progress bar of process 0, only in a terminal. The bar vanishes at the end:
  an error stays a single line.
  """
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(
    rich.progress.TextColumn("{task.description}", markup=False),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
    console=console,
    transient=True,
    disable=jax.process_index() != 0 or not console.is_terminal,
  ) as progress:
    yield progress


# --- output ------------------------------------------------------------------


def show(
  evaluation: Evaluation, console: rich.console.Console, documents: bool
) -> None:
  """Prints a table of the sources, and per source a table of the best and worst
  documents, or of all documents if `documents` is True.
  """
  title = f"{evaluation.workdir}, step {evaluation.step}"
  table = _table(title, "source", "docs")
  rows = [(r.source, r.totals, len(r.documents)) for r in evaluation.results]
  if len(rows) > 1 and all(r.is_causal for r in evaluation.results):
    n = sum(count for _, _, count in rows)
    rows.append(("total", evaluation.totals, n))
  for name, totals, count in rows:
    table.add_row(rich.markup.escape(name), *_cells(totals), f"{count:,}")
  console.print(table)
  for result in evaluation.results:
    title, ranked = "best and worst documents", result.ranked
    if documents:
      title, ranked = "documents", result.documents
    elif len(ranked) > 2 * _N_RANKED:
      ranked = ranked[:_N_RANKED] + ranked[-_N_RANKED:]
    table = _table(f"{rich.markup.escape(result.source)}: {title}", "document")
    for document in ranked:
      name = rich.markup.escape(document.name)
      table.add_row(name, *_cells(document.totals))
    console.print(table)


def _table(title: str, first: str, *last: str) -> rich.table.Table:
  table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=0)
  table.add_column(first, overflow="fold")
  measures = ("bits/byte", "loss", "ppl", "word ppl", "tokens", "bytes")
  for name in (*measures, *last):
    table.add_column(name, justify="right", no_wrap=True)
  return table


def _cells(totals: perplexity.Totals) -> tuple[str, ...]:
  return (
    f"{totals.bits_per_byte:.4f}",
    f"{totals.loss:.4f}",
    f"{totals.perplexity:.4g}",
    f"{totals.word_perplexity:.4g}",
    f"{totals.n_tokens:,}",
    f"{totals.n_bytes:,}",
  )


def write(evaluation: Evaluation, path: str, documents: bool) -> None:
  """Writes JSON atomically: a reader finds the old file or the new file."""
  content = {
    "workdir": evaluation.workdir,
    "step": evaluation.step,
    "context": evaluation.context,
    "stride": evaluation.stride,
    "total": _object(evaluation.totals),
    "sources": [_source(r, documents) for r in evaluation.results],
  }
  files.replace(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _source(result: Result, documents: bool) -> dict[str, Any]:
  def named(scores: Sequence[perplexity.DocumentScore]):
    return [{"name": s.name} | _object(s.totals) for s in scores]

  ranked = result.ranked
  return {
    "source": result.source,
    "n_documents": len(result.documents),
    "n_skipped": result.n_skipped,
    **_object(result.totals),
    "best": named(ranked[:_N_RANKED]),
    "worst": named(ranked[: -_N_RANKED - 1 : -1]),
  } | ({"documents": named(result.documents)} if documents else {})


def _object(totals: perplexity.Totals) -> dict[str, float | int | None]:
  """Rates and sums for JSON; nonfinite numbers are null."""
  rates = (
    "bits_per_byte",
    "loss",
    "perplexity",
    "perplexity_without_eos",
    "word_perplexity",
  )
  values = {name: getattr(totals, name) for name in rates}
  values |= dataclasses.asdict(totals)
  return {k: v if math.isfinite(v) else None for k, v in values.items()}
