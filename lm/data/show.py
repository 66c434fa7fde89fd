"""Rows of batches for people: as coloured text, and as attention masks."""

import io
import textwrap

import numpy as np
import rich.text

from lm import batch as batch_lib
from lm import files
from lm import objective as objective_lib
from lm.data import store as store_lib
from lm.data import tokenizer as tokenizer_lib

# Styles of a token: of what is predicted from it or of it, and of the others.
_PREDICTED, _CONTEXT, _AHEAD = "bold green", "dim", "cyan"
_COLOURS = {"predicted": "#2a9d4a", "context": "#555555", "ahead": "#1f77b4"}


def legend() -> rich.text.Text:
  return rich.text.Text.assemble(
    ("predicted (scored)", _PREDICTED),
    "  ",
    ("seen ahead, not scored", _AHEAD),
    "  ",
    ("not scored", _CONTEXT),
    "  shown→predicted at the same position",
  )


def _scored(
  row: batch_lib.Batch, objective: objective_lib.Causal
) -> np.ndarray:
  """Whether the token at each position is itself scored: bool [T]."""
  if isinstance(objective, objective_lib.Masked):
    return row.weights > 0
  before = np.concatenate([[0], row.weights[:-1]])
  return before > 0


def _pieces(
  row: batch_lib.Batch,
  objective: objective_lib.Causal,
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[str]:
  """Text of each token of a row; where it is masked, also its target's."""
  pieces = [tokenizer.piece(int(i)) for i in row.inputs]
  if isinstance(objective, objective_lib.Masked):
    for i in np.flatnonzero(row.weights > 0):
      pieces[i] += f"→{tokenizer.piece(int(row.targets[i]))}"
  return pieces


def text(
  row: batch_lib.Batch,
  store: store_lib.TokenStore,
  tokenizer: tokenizer_lib.Tokenizer,
) -> rich.text.Text:
  """A row as coloured text, a line for each document, padding left out."""
  shown = rich.text.Text()
  scored = _scored(row, store.objective)
  for i, piece in enumerate(_pieces(row, store.objective, tokenizer)):
    if row.segments[i] == 0:
      continue
    if i and row.segments[i] != row.segments[i - 1]:
      shown.append("\n")
    ahead = row.prefix is not None and row.prefix[i]
    style = _PREDICTED if scored[i] else _AHEAD if ahead else _CONTEXT
    shown.append(piece, style)
  return shown


def visible(row: batch_lib.Batch) -> np.ndarray:
  """Which position (first axis) sees which (second): bool [T, T]."""
  place, segments = np.arange(len(row.inputs)), row.segments
  seen = place[:, None] >= place[None]
  if row.prefix is not None:
    seen = seen | row.prefix[None]
  return seen & (segments[:, None] == segments[None]) & (segments[None] > 0)


def draw(
  path: str,
  rows: list[tuple[store_lib.TokenStore, batch_lib.Batch]],
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  """Writes a picture (PNG) of rows: for each, which token sees which, and which
  are scored.
  """
  from matplotlib import figure as figure_lib  # takes half a second

  n_columns = min(3, len(rows))
  n_lines = -(-len(rows) // n_columns)
  size = (5.2 * n_columns, 5.4 * n_lines)
  figure = figure_lib.Figure(figsize=size, layout="constrained")
  axes = figure.subplots(n_lines, n_columns, squeeze=False).ravel()
  for ax, (store, row) in zip(axes, rows, strict=False):
    _draw_row(ax, row, store, tokenizer)
  for ax in axes[len(rows) :]:
    ax.set_axis_off()
  said = (
    "A line is a position: its token on the left (blue: seen ahead), what it "
    "predicts on the right (green). A filled cell is a token that it sees."
  )
  figure.supxlabel("\n".join(textwrap.wrap(said, 50 * n_columns)))
  content = io.BytesIO()
  figure.savefig(content, dpi=110, format="png")
  files.replace(path, content.getvalue())


def _draw_row(ax, row, store, tokenizer) -> None:
  n = int((row.segments > 0).sum())
  ahead = np.zeros(n, bool) if row.prefix is None else row.prefix[:n]
  seen = visible(row)[:n, :n].astype(float)
  ax.imshow(
    np.where(seen, 0.35 + 0.3 * ahead[None], 0), cmap="Blues", vmin=0, vmax=1
  )

  def name(i: int | np.integer) -> str:
    # Matplotlib takes what stands between two bare $ for a formula.
    return tokenizer.piece(int(i)).replace(" ", "\u2423").replace("$", r"\$")

  names = [name(i) for i in row.inputs[:n]]
  ax.set_yticks(range(n), names, fontsize=8, family="monospace")
  ax.set_xticks(range(n), names, fontsize=8, family="monospace", rotation=90)
  for labels in (ax.get_yticklabels(), ax.get_xticklabels()):
    for label, is_ahead in zip(labels, ahead, strict=True):
      label.set_color(_COLOURS["ahead" if is_ahead else "context"])
  for i in np.flatnonzero(row.weights[:n] > 0):
    said = name(row.targets[i])
    style = {"fontsize": 8, "family": "monospace", "va": "center"}
    ax.text(n - 0.3, i, said, color=_COLOURS["predicted"], **style)
  ax.set_title(store.spec.rpartition("|")[2] if "|" in store.spec else "causal")
  ax.tick_params(length=0)
