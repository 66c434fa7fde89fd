"""Per-token surprisal of a scored text: heat map, table and HTML page."""

import codecs
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import rich.console
from rich import text as text_lib

from lm.data import tokenizer as tokenizer_lib
from lm.explain import tables
from lm.sample import colours, output
from lm.sample import request as request_lib

# Most rows of a token table.
_ROWS = 100


def figures(score: request_lib.Score) -> dict[str, int | float]:
  """Totals of a text; the log-probability is the sum of conditionals."""
  bits = -score.total / math.log(2)
  n_tokens = len(score.token_ids)
  return {
    "n_tokens": n_tokens,
    "n_bytes": score.n_bytes,
    "log_probability": score.total,
    "bits": bits,
    "bits_per_byte": bits / score.n_bytes,
    "bits_per_token": bits / n_tokens,
    "perplexity_per_token": 2 ** (bits / n_tokens),
  }


def summary(score: request_lib.Score) -> str:
  f = figures(score)
  return (
    f"log P(text) = {f['log_probability']:.3f}, the sum of {f['n_tokens']} "
    f"conditionals; {f['bits']:.1f} bits for {f['n_bytes']} bytes: "
    f"{f['bits_per_byte']:.3f} bits per byte, {f['bits_per_token']:.3f} per "
    f"token, perplexity {f['perplexity_per_token']:.2f} per token"
  )


def token_table(rows: Sequence[dict[str, Any]]) -> rich.console.Group:
  """Table of all tokens in order; above 100, the 100 most surprising."""
  title = "every token"
  if len(rows) > _ROWS:
    title = (
      f"the {_ROWS} most surprising of {len(rows)} tokens "
      "(--json and --html have all)"
    )
  table = tables.new_table(
    "place", "token ", "probability", "bits", "rank", "running log P"
  )
  places = sorted(range(len(rows)), key=lambda i: -rows[i]["bits"])[:_ROWS]
  for i in places if len(rows) > _ROWS else sorted(places):
    row = rows[i]
    table.add_row(
      str(i + 1),
      text_lib.Text(tables.visible(row["piece"])),
      tables.percent(row["probability"]),
      f"{row['bits']:.2f}",
      str(row["rank"]),
      f"{row['running']:.3f}",
    )
  return rich.console.Group(text_lib.Text(title), table)


def spans(
  score: request_lib.Score, tokenizer: tokenizer_lib.Tokenizer
) -> list[tuple[str, int, int, float]]:
  """Shortest runs of tokens that decode to whole characters.

  Returns (text, first, end, bits) of the tokens [first, end). U+21B5 marks the
  end of a line; a reserved token has no text and shows by name.
  """
  ids, logs = score.token_ids, score.log_probabilities
  reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
  found, first, text = [], 0, ""
  for end, token in enumerate(ids, 1):
    last = end == len(ids)
    text += reader.decode(tokenizer.decode_bytes([token]), final=last)
    if last or not reader.getstate()[0]:
      text = output.printable(text or tokenizer.piece(token))
      bits = -math.fsum(logs[first:end]) / math.log(2)
      found.append((text.replace("\n", "\u21b5\n"), first, end, bits))
      first, text = end, ""
  return found


def heat_map(
  score: request_lib.Score, tokenizer: tokenizer_lib.Tokenizer
) -> text_lib.Text:
  """The text for a terminal, coloured by surprisal, above a legend."""
  shown = text_lib.Text()
  for text, _, _, bits in spans(score, tokenizer):
    shown.append(text, colours.on_terminal(bits))
  shown.append("\n")
  for bits in range(0, int(colours.HOT_BITS) + 1, 2):
    shown.append(f" {bits} ", colours.on_terminal(float(bits)))
  return shown.append(" bits and more")


def page(
  score: request_lib.Score, tokenizer: tokenizer_lib.Tokenizer, name: str
) -> str:
  """Self-contained HTML page: heat map, totals and numbers per token."""
  path = pathlib.Path(__file__).with_name("score.html")
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined
  )
  rows = [
    [
      row["piece"],
      row["probability"],
      row["bits"],
      row["rank"],
      row["running"],
      [(other.piece, other.probability) for other in row["alternatives"]],
    ]
    for row in output.tokens(score, tokenizer)
  ]
  return environment.from_string(path.read_text(encoding="utf-8")).render(
    name=name,
    heat_css=colours.css(),
    figures=figures(score),
    spans=[
      (text, first, end, f"{colours.share(bits):.3f}")
      for text, first, end, bits in spans(score, tokenizer)
    ],
    rows=rows,
    hot_bits=int(colours.HOT_BITS),
  )
