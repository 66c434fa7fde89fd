"""Output of `python -m lm.evaluate`: tables and JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from lm import files, schema, terminal
from lm.evaluate import chat_samples, corpora, perplexity
from lm.sample import output as sample_output

# Documents listed at each end of a ranking.
_N_RANKED = 3
# Style of each speaker in a sample.
_STYLES = {"user": "cyan", "reference": "green", "answer": "bold yellow"}


def show(
  evaluation: corpora.Evaluation, console: rich.console.Console, documents: bool
) -> None:
  """Prints a table of the sources, and per source a table of the best and worst
  documents, or of all documents if `documents` is True. A known overlap with
  training text is a column of the tables. Samples, if any, follow the tables.
  """
  results = evaluation.results
  title = f"{terminal.cell(evaluation.workdir)}, step {evaluation.step}"
  known = any(r.overlap is not None for r in results)
  table = _table(title, "source", "docs", *(["overlap"] if known else []))
  for r in results:
    cells = [*_cells(r.totals), f"{len(r.documents):,}"]
    if known:
      cells.append(f"{r.overlap.of_bytes:.1%}" if r.overlap else "unknown")
    table.add_row(terminal.cell(r.source), *cells)
  if len(results) > 1 and all(r.is_causal for r in results):
    n = sum(len(r.documents) for r in results)
    table.add_row("total", *_cells(evaluation.totals), f"{n:,}")
  terminal.print_table(console, table)
  lines = [
    f"{r.source}: {schema.counted(r.n_skipped, 'more document')} skipped, as "
    "invalid."
    for r in results
    if r.n_skipped
  ]
  lines += [_overlap(r) for r in results if r.overlap is not None]
  if any(r.is_causal for r in results):
    totals = evaluation.totals
    lines.append(
      "eos is scored, and stands for 0 bytes. Without it: "
      f"{totals.bits_per_byte_without_eos:.4f} bits/byte, ppl "
      f"{totals.perplexity_without_eos:.4g}."
    )
  terminal.print_lines(console, lines)
  for result in results:
    title, ranked = "best and worst documents", result.ranked
    if documents:
      title, ranked = "documents", result.documents
    elif len(ranked) > 2 * _N_RANKED:
      ranked = ranked[:_N_RANKED] + ranked[-_N_RANKED:]
    title = f"{terminal.cell(result.source)}: {title}"
    shown = result.overlap if result.is_causal else None
    table = _table(title, "document", *(["overlap"] if shown else []))
    for document in ranked:
      name = terminal.cell(document.name)
      cells = _cells(document.totals)
      if shown:
        share = shown.of_bytes_by_document.get(document.name, 0.0)
        cells = (*cells, f"{share:.1%}")
      table.add_row(name, *cells)
    terminal.print_table(console, table)
  for sample in evaluation.samples or ():
    _show_sample(sample, evaluation.context, console)


def _show_sample(
  sample: chat_samples.Sample, context: int, console: rich.console.Console
) -> None:
  """Prints the messages of the prompt, the reference, and the model's answer,
  each after the speaker.
  """
  name = sample_output.printable(sample.document)
  console.print(rich.text.Text(f"\n{name}", "underline"), soft_wrap=True)
  grid = rich.table.Table.grid(padding=(0, 2))
  grid.add_column(no_wrap=True)
  grid.add_column(overflow="fold")

  def add(who: str, text: str, note: str = "") -> None:
    said = rich.text.Text(sample_output.printable(text))
    if note:
      said.append(f"{' ' * bool(text)}[{note}]", "dim")
    grid.add_row(rich.text.Text(who, _STYLES.get(who, "dim")), said)

  for message in sample.prompt:
    add(message["role"], message["content"])
  add("reference", sample.reference)
  if sample.answer is None:
    n = len(sample.prompt_ids)
    add("answer", "", f"none: the prompt has {n} tokens, the context {context}")
  else:
    note = "" if sample.answer else "empty: it ended at once"
    note = note if sample.ended else "cut off: it did not end by itself"
    add("answer", sample.answer, note)
  console.print(grid)


def _overlap(result: corpora.Result) -> str:
  """Describes a source's overlap with training text, and the bits per byte of
  documents without overlap.
  """
  shares, clean = result.overlap, result.clean
  assert shares is not None
  said = (
    f"{result.source}: training text has {shares.of_bytes:.1%} of its bytes, "
    f"in passages of {shares.n} words in {shares.of_documents:.1%} of its "
    "documents"
  )
  if clean is not None and clean.n_tokens:
    said += f"; the other documents: {clean.bits_per_byte:.4f} bits/byte"
  elif clean is not None:
    said += "; there are no other documents"
  return f"{said}."


def _table(title: str, first: str, *last: str) -> rich.table.Table:
  measures = ("bits/byte", "loss", "ppl", "word ppl", "tokens", "bytes")
  return terminal.table(first, *measures, *last, title=title)


def _cells(totals: perplexity.Totals) -> tuple[str, ...]:
  return (
    f"{totals.bits_per_byte:.4f}",
    f"{totals.loss:.4f}",
    f"{totals.perplexity:.4g}",
    f"{totals.word_perplexity:.4g}" if totals.n_words else "-",
    f"{totals.n_tokens:,}",
    f"{totals.n_bytes:,}",
  )


def write(evaluation: corpora.Evaluation, path: str, documents: bool) -> None:
  """Writes JSON atomically: a reader finds the old or the new file, whole."""
  content = {
    "workdir": evaluation.workdir,
    "step": evaluation.step,
    "context": evaluation.context,
    "stride": evaluation.stride,
    **evaluation.about,
    "total": _object(evaluation.totals),
    "sources": [_source(r, documents) for r in evaluation.results],
  }
  if evaluation.samples is not None:
    content["samples"] = [_sample(sample) for sample in evaluation.samples]
  files.replace(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _source(result: corpora.Result, documents: bool) -> dict[str, Any]:
  def named(scores: Sequence[perplexity.DocumentScore]):
    return [{"name": s.name} | _object(s.totals) for s in scores]

  ranked = result.ranked
  return {
    "source": result.source,
    "n_documents": len(result.documents),
    "n_skipped": result.n_skipped,
    **_object(result.totals),
    **_overlap_object(result),
    "best": named(ranked[:_N_RANKED]),
    "worst": named(ranked[: -_N_RANKED - 1 : -1]),
  } | ({"documents": named(result.documents)} if documents else {})


def _sample(sample: chat_samples.Sample) -> dict[str, Any]:
  content = dataclasses.asdict(sample)
  del content["prompt_ids"]
  return content


def _overlap_object(result: corpora.Result) -> dict[str, Any]:
  """Returns the overlap with training text for JSON; {} if unknown."""
  if (shares := result.overlap) is None:
    return {}
  found = shares.to_json()
  if (clean := result.clean) is not None:
    found["without_them"] = _object(clean)
  return {"overlap": found}


def _object(totals: perplexity.Totals) -> dict[str, float | int | None]:
  """Returns rates and sums for JSON; numbers not finite become null."""
  rates = (
    "bits_per_byte",
    "bits_per_byte_without_eos",
    "loss",
    "perplexity",
    "perplexity_without_eos",
    "word_perplexity",
  )
  values = {name: getattr(totals, name) for name in rates}
  values |= dataclasses.asdict(totals)
  return {k: v if math.isfinite(v) else None for k, v in values.items()}
