"""Evaluation of a checkpoint on corpora: results per source."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import rich.console
import rich.progress

from lm import checkpoint, files, processes, schema
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm import objective as objective_lib
from lm.data import overlap_report, pipeline
from lm.data import sources as sources_lib
from lm.data import store as store_lib
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import chat_samples, perplexity, provenance
from lm.model import decoder
from lm.sample import load
from lm.sample import sampler as sampler_lib

# Most tokens of a batch: the host holds two batches, about 20 bytes a token.
_MAX_TOKENS = 1 << 26


@dataclasses.dataclass
class Result:
  """Scores of a source's documents; `n_skipped` more were invalid. A source
  of another objective than `causal` has one score: of its rows.
  """

  source: str
  documents: list[perplexity.DocumentScore]
  n_skipped: int
  # What training text has of the source, if it is known.
  overlap: overlap_report.Shares | None = None

  @property
  def is_causal(self) -> bool:
    return objective_lib.of(self.source) == objective_lib.Causal()

  @property
  def totals(self) -> perplexity.Totals:
    return sum((d.totals for d in self.documents), perplexity.Totals())

  @property
  def clean(self) -> perplexity.Totals | None:
    """Sums over the documents that overlap with no training text; None where
    that is unknown.
    """
    if self.overlap is None or not self.is_causal:
      return None
    touched = self.overlap.of_bytes_by_document
    clean = [d.totals for d in self.documents if d.name not in touched]
    return sum(clean, perplexity.Totals())

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
  # See provenance.of.
  about: dict[str, Any] = dataclasses.field(default_factory=dict)
  # Of the sources of chats; None if none were asked for.
  samples: list[chat_samples.Sample] | None = None

  @property
  def totals(self) -> perplexity.Totals:
    """Sums over the causal sources; over all, if none is causal."""
    return perplexity.overall([(r.source, r.totals) for r in self.results])


@dataclasses.dataclass
class Job:
  """An evaluation, checked; no parameters are loaded yet."""

  workdir: str
  meta: checkpoint.Meta
  tokenizer: tokenizer_lib.Tokenizer
  # Of each source, its name as it was asked for, and what is read.
  names: Sequence[str]
  sources: list[sources_lib.Source | store_lib.TokenStore]
  n_rows: int
  stride: int
  adapter: str | None
  # By name; {} if unknown.
  overlap: dict[str, overlap_report.Shares]
  # Still without answers, which have at most max_new_tokens.
  asked: list[chat_samples.Sample] | None = None
  max_new_tokens: int | None = None

  @property
  def context(self) -> int:
    return self.meta.config.model.context_length


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
  overlap: str | overlap_report.Search | None = None,
  samples: int | None = None,
  max_new_tokens: int | None = None,
) -> Evaluation:
  """Scores every document of the sources `specs` with a checkpoint; where a
  source names another objective than `causal`, the rows that training has as
  validation. A source named twice is scored once.

  Defaults for None or empty: the last step; a `stride` of the context length
  (only a document's last window overlaps); the rows of a training microbatch;
  the run's validation sources. `data` changes fields of the run's DataConfig;
  `adapter` is that of `load.model`; the text `chat_template` replaces the
  checkpoint's; `overlap` is that of `overlap_report.shares`. `samples` of each
  source of chats are answered, as by `chat_samples.answer`.
  Raises ConfigError on bad input before parameters are loaded.
  """
  if output is not None:
    files.check_output(output, "--output")
  job = prepare(
    workdir,
    checkpoint.load_meta(workdir, step),
    specs=specs,
    stride=stride,
    batch_size=batch_size,
    data=data,
    adapter=adapter,
    chat_template=chat_template,
    overlap=overlap,
    samples=samples,
    max_new_tokens=max_new_tokens,
  )
  return score(job)


def prepare(
  workdir: str,
  meta: checkpoint.Meta,
  *,
  specs: Sequence[str],
  stride: int | None,
  batch_size: int | None,
  data: dict[str, Any],
  adapter: str | None = None,
  chat_template: str | None = None,
  overlap: str | overlap_report.Search | None = None,
  samples: int | None = None,
  max_new_tokens: int | None = None,
) -> Job:
  """Checks the arguments of `evaluate`, and opens the sources."""
  config = meta.config
  context = config.model.context_length
  stride = context if stride is None else stride
  if not 1 <= stride <= context:
    raise schema.ConfigError(
      f"--stride={stride}: must be from 1 to model.context_length={context}"
    )
  check_batch_size(batch_size, context)
  data_config = dataclasses.replace(config.data, **data)
  names = list(dict.fromkeys(specs or config.data.validation))
  schema.require(
    len(names) > 0,
    "--source",
    "",
    f"{workdir} has no validation sources (config.data.validation=()); name a "
    "source",
  )
  _check_objectives(config.model, names)
  tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  if chat_template is not None:
    if not chat_samples.of_chats(names):
      raise schema.ConfigError(
        "--chat_template: none of the sources "
        f"{', '.join(map(repr, names))} is of chats; leave it out"
      )
    tokenizer = tokenizer.with_template(chat_template)
  asked = None
  if samples is not None:
    asked = chat_samples.find(names, samples, tokenizer, data_config)
  schema.require(
    asked is not None or max_new_tokens is None,
    "--max_new_tokens",
    max_new_tokens,
    "has a meaning for --samples only; leave it out",
  )
  sources = [_open(name, tokenizer, data_config) for name in names]
  shares = _shares(workdir, meta, overlap, names, data_config)
  rows = config.train.batch_size // config.train.microbatches
  rows = rows if batch_size is None else batch_size
  return Job(
    workdir,
    meta,
    tokenizer,
    names,
    sources,
    rows,
    stride,
    adapter,
    shares,
    asked,
    max_new_tokens,
  )


def _shares(
  workdir: str,
  meta: checkpoint.Meta,
  overlap: str | overlap_report.Search | None,
  names: Sequence[str],
  data: config_lib.DataConfig,
) -> dict[str, overlap_report.Shares]:
  """By source, what it shares with training text; {} on processes other than
  the first, and without `overlap`.
  """
  if overlap is None:
    return {}
  check_training_known(workdir, meta)
  found = processes.only_first(
    lambda: overlap_report.shares(
      overlap, overlap_report.open_held_out(names, data), data
    )
  )
  return found or {}


def check_training_known(workdir: str, meta: checkpoint.Meta) -> None:
  """Raises ConfigError on a converted run, with which nothing can overlap."""
  if not meta.trained_on:
    raise schema.ConfigError(
      f"--overlap: {workdir} was converted, and what it was trained on is "
      "unknown; leave --overlap out"
    )


def _check_objectives(
  model: config_lib.ModelConfig, names: Sequence[str]
) -> None:
  """Raises ConfigError on a source of which an encoder predicts nothing."""
  for name in names:
    schema.require(
      model.causal or isinstance(objective_lib.of(name), objective_lib.Masked),
      "--source",
      name,
      "the model is an encoder (model.causal=False), in which every token sees "
      "what it should predict; write SOURCE|masked",
    )


def score(job: Job) -> Evaluation:
  """Loads the parameters and scores the sources."""
  config, results = job.meta.config, []
  about = provenance.of(job.meta, job.tokenizer, job.adapter)
  mesh, n_rows = make_mesh(config, job.n_rows)
  with jax.set_mesh(mesh), progress_bar() as progress:
    model, params = load.model(job.workdir, job.meta, mesh, job.adapter)
    score_step = perplexity.eval_step(model)
    for source in job.sources:
      if isinstance(source, store_lib.TokenStore):
        results.append(
          _score_rows(config, n_rows, score_step, params, source, job.tokenizer)
        )
        continue
      scores = perplexity.evaluate_source(
        score_step,
        params,
        source,
        job.tokenizer,
        n_rows=n_rows,
        context=job.context,
        stride=job.stride,
        usual=config.train.sequence_length,
      )
      results.append(_collect(source, scores, progress))
    samples = None
    if job.asked is not None:
      sampler = sampler_lib.Sampler(model, params, job.tokenizer, mesh)
      samples = chat_samples.answer(sampler, job.asked, job.max_new_tokens)
  for name, result in zip(job.names, results, strict=True):
    result.overlap = job.overlap.get(name)
  return Evaluation(
    job.workdir,
    job.meta.step,
    job.context,
    job.stride,
    results,
    about,
    samples,
  )


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
      f"source {source.spec!r}: has "
      f"{schema.counted(len(source), 'document')}, and none has valid text; "
      "correct them, or, if they are not UTF-8, set invalid_utf8 to 'replace'"
    )


def check_batch_size(batch_size: int | None, context: int) -> None:
  """Raises ConfigError if the host could not hold such a batch."""
  if batch_size is not None and batch_size * context > _MAX_TOKENS:
    raise schema.ConfigError(
      f"--batch_size={batch_size}: with a context of {context} tokens it must "
      f"be at most {_MAX_TOKENS // context}, so that the host can hold a batch"
    )


def make_mesh(
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
  return mesh_lib.make(here), n_rows


@contextlib.contextmanager
def progress_bar() -> Iterator[rich.progress.Progress]:
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
