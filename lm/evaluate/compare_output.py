"""Output of `python -m lm.evaluate --compare`: tables, JSON, a picture."""

import io
import json
from typing import Any

import rich.console

from lm import files, terminal
from lm.evaluate import bootstrap, compare, provenance

# The colours of Okabe and Ito (2008) are distinct for colour-blind readers.
_COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()


def show(comparison: compare.Comparison, console: rich.console.Console) -> None:
  """Prints a table for each source, then the verdicts over all sources."""
  for row in comparison.rows:
    about = [
      f"{row.n_documents:,} documents",
      *_overlap(comparison, row.source),
    ]
    title = f"{terminal.cell(row.source)}: {', '.join(about)}"
    columns = ("run", "bits/byte", "95 %", "difference", "95 %", "p")
    table = terminal.table(*columns, title=title)
    for k, run in enumerate(comparison.runs):
      bits, found, p = row.bits_per_byte[k], row.difference[k], row.p_holm[k]
      cells = [f"{bits.value:.4f}", f"{bits.low:.4f} to {bits.high:.4f}"]
      if found is not None:
        interval = f"{found.low:+.4f} to {found.high:+.4f}"
        cells += [f"{found.value:+.4f}", interval, f"{p:.2g}"]
      table.add_row(terminal.cell(run.name), *cells)
    terminal.print_table(console, table)
  lines = [
    compare.verdict(comparison, comparison.overall, k) + "."
    for k in range(1, len(comparison.runs))
  ]
  terminal.print_lines(console, [*lines, method(comparison)])


def _overlap(comparison: compare.Comparison, source: str) -> list[str]:
  """Describes the source's overlap with training text; [] if unknown."""
  if (shares := comparison.overlap.get(source)) is None:
    return []
  return [f"{shares.of_bytes:.1%} overlap with training text"]


def method(comparison: compare.Comparison) -> str:
  """Describes the computation of the intervals and p-values in a sentence."""
  said = (
    f"95 % intervals: bootstrap-t, {comparison.n_resamples:,} paired resamples "
    "of the documents within each source; p-values are two-sided"
  )
  n_pairs, n_sources = len(comparison.runs) - 1, len(comparison.documents)
  families = []
  if n_pairs * n_sources > 1:
    families.append(f"the {n_pairs * n_sources} differences by source")
  if n_pairs > 1 and n_sources > 1:
    families.append(f"the {n_pairs} in total")
  if families:
    said += (
      f", corrected (Holm) for {' and for '.join(families)}; each interval is "
      "for itself"
    )
  return said + "."


def write(comparison: compare.Comparison, path: str, documents: bool) -> None:
  """Writes JSON atomically; with `documents`, also each document's nll."""
  content: dict[str, Any] = {
    "date": provenance.now(),
    "code": provenance.code(),
    "method": method(comparison),
    "n_resamples": comparison.n_resamples,
    "seed": comparison.seed,
    "min_documents": bootstrap.MIN_DOCUMENTS,
    "runs": [{"name": run.name} | run.about for run in comparison.runs],
    "verdicts": [
      compare.verdict(comparison, comparison.overall, k)
      for k in range(1, len(comparison.runs))
    ],
    "rows": [_row(comparison, row) for row in comparison.rows],
  }
  if documents:
    content["documents"] = {
      source: [
        {"name": d.name, "n_bytes": d.n_bytes, "nll": nll}
        for d, *nll in zip(
          listed,
          *(run.nll[source].tolist() for run in comparison.runs),
          strict=True,
        )
      ]
      for source, listed in comparison.documents.items()
    }
  files.replace(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _row(comparison: compare.Comparison, row: compare.Row) -> dict[str, Any]:
  scores, shares = [], comparison.overlap.get(row.source)
  for k, run in enumerate(comparison.runs):
    bits, found = row.bits_per_byte[k], row.difference[k]
    score = {"name": run.name, "bits_per_byte": _interval(bits)}
    if found is not None:
      score["difference"] = _interval(found) | {
        "p": found.p,
        "p_holm": row.p_holm[k],
        "verdict": compare.verdict(comparison, row, k),
      }
    scores.append(score)
  return {
    "source": row.source,
    "n_documents": row.n_documents,
    "n_bytes": row.n_bytes,
    "runs": scores,
  } | (
    {} if shares is None else {"share_of_bytes_in_training": shares.of_bytes}
  )


def _interval(estimate: bootstrap.Estimate) -> dict[str, float]:
  return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


# --- picture -----------------------------------------------------------------


def draw(comparison: compare.Comparison, path: str) -> None:
  """Writes a picture (PNG) with a row per source: on the left the bits per byte
  of each run with intervals, on the right the differences to the first run.
  """
  from matplotlib import figure as figure_lib  # The import takes 0.5 s.

  rows, runs = comparison.rows, comparison.runs
  height = 1.5 + (0.25 + 0.3 * len(runs)) * len(rows)
  figure = figure_lib.Figure(figsize=(10, height), layout="constrained")
  left, right = figure.subplots(1, 2, sharey=True)
  handles = []
  for k in range(len(runs)):
    colour = _COLOURS[k % len(_COLOURS)]
    handles += left.plot([], [], "o-", color=colour)
    # Rows from top to bottom; runs apart within a row.
    shift = (k - (len(runs) - 1) / 2) * 0.7 / len(runs)
    for i, row in enumerate(rows):
      _interval_line(left, i + shift, row.bits_per_byte[k], colour, ".3f")
      if (found := row.difference[k]) is not None:
        p = row.p_holm[k]
        told = p is not None and p <= 0.05
        _interval_line(right, i + shift, found, colour, "+.3f", told)
  right.axvline(0, color=_COLOURS[0], linewidth=1.2, zorder=0)
  labels = [
    "\n".join(
      [
        _short(row.source, 34),
        f"{row.n_documents:,} documents",
        *_overlap(comparison, row.source),
      ]
    )
    for row in rows
  ]
  left.set_yticks(range(len(rows)), labels)
  left.set_ylim(len(rows) - 0.5, -0.5)
  left.set_xlabel("bits per byte, with 95 % intervals")
  right.set_xlabel(
    f"\u2190 better than {_short(runs[0].name, 40)}    worse \u2192\n"
    "hollow: not told apart (p > 0.05)"
  )
  for ax in (left, right):
    ax.locator_params(axis="x", nbins=6)
    ax.grid(axis="x", alpha=0.3)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    for i in range(1, len(rows)):
      ax.axhline(i - 0.5, color="0.85", linewidth=0.8)
  figure.legend(
    handles,  # As plot's labels, names with a leading _ would be left out.
    [_short(run.name, 60) for run in runs],
    loc="outside upper center",
    ncols=min(3, len(runs)),
    frameon=False,
  )
  content = io.BytesIO()
  figure.savefig(content, dpi=130, format="png")
  files.replace(path, content.getvalue())


def _interval_line(ax, y, estimate, colour, form, filled=True) -> None:
  """Draws an interval with the value above."""
  value, low, high, _ = estimate
  ax.plot([low, high], [y, y], color=colour, linewidth=2)
  inside = colour if filled else "white"
  ax.plot(value, y, "o", color=colour, markerfacecolor=inside, markersize=6)
  ax.annotate(
    format(value, form).replace("-", "\u2212"),
    (value, y),
    (0, 5),
    textcoords="offset points",
    ha="center",
    fontsize=8,
    color=colour,
  )


def _short(name: str, most: int) -> str:
  """Shortens `name` in the middle to at most `most` characters; in it, no $
  begins a formula of Matplotlib.
  """
  half = (most - 3) // 2
  found = name if len(name) <= most else f"{name[:half]}...{name[-half:]}"
  return found.replace("$", r"\$")
