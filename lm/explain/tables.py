"""Tables for a terminal: the next token, and how each token was drawn."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import rich.console
from rich import box
from rich import table as table_lib
from rich import text as text_lib

from lm.data import tokenizer as tokenizer_lib
from lm.sample import output, rules
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib

# Shown for probability 0: removed by the rules.
_NOTHING = "\u2013"
_DRAWN = "\u25b8"


def visible(piece: str) -> str:
  """A token for a table, with U+2423 in place of blanks."""
  return piece.replace(" ", "\u2423")


def put(value: Any, shown: Sequence[Any], as_json: bool) -> None:
  """Prints `value` as JSON, or else the tables and texts in `shown`."""
  if as_json:
    print(output.dumps(value))
    return
  console = rich.console.Console(markup=False, highlight=False, emoji=False)
  # A table is as wide as its numbers: rich would cut them to fit a terminal.
  console.width = 10_000
  for i, item in enumerate(shown):
    if i:
      console.print()
    # soft_wrap: the terminal wraps text, without loss of blanks.
    console.print(item, soft_wrap=isinstance(item, text_lib.Text))


def new_table(*columns: str) -> table_lib.Table:
  """Right-aligned columns; left-aligned if the name ends in a blank."""
  table = table_lib.Table(box=box.SIMPLE_HEAD)
  for name in columns:
    justify = "left" if name.endswith(" ") else "right"
    table.add_column(name.strip(), justify=justify)
  return table


def _candidate_table(*more: str) -> table_lib.Table:
  return new_table(" ", "rank", "candidate ", "raw", "cumulative", *more)


def percent(probability: float) -> str:
  if probability == 0:
    return _NOTHING
  return f"{probability:.2%}" if probability >= 1e-4 else f"{probability:.0e}"


def _tail(tokenizer: tokenizer_lib.Tokenizer, ids: Sequence[int]) -> str:
  """End of the text read so far, on one line of at most 48 characters."""
  text = visible("".join(tokenizer.piece(i) for i in ids[-48:]))
  whole = len(ids) <= 48 and len(text) <= 48
  return text if whole else f"\u2026{text[-47:]}"


# --- the next token ----------------------------------------------------------


def stages(request: request_lib.Request, n_ids: int) -> set[str]:
  """Names of the stages at which the request's rules can have an effect."""
  r = request
  changes = {
    "penalties": r.repetition_penalty != 1
    or r.frequency_penalty != 0
    or r.presence_penalty != 0
    or bool(r.logit_bias or r.forbidden)
    or r.min_tokens > 0,
    "temperature": r.temperature != 1,
  }
  if r.temperature > 0:
    for cut in rules.CUTS:
      changes[cut.field] = bool(cut.acts(getattr(r, cut.field), n_ids))
  return {name for name, changed in changes.items() if changed}


def candidates(
  found: request_lib.NextToken,
  request: request_lib.Request,
  tokenizer: tokenizer_lib.Tokenizer,
) -> rich.console.Group:
  """Table with a row per candidate and a column per stage in use.

  The drawn candidate is marked, and added as the last row if not in the list.
  """
  used = stages(request, tokenizer.size)
  shown = [name for name in found.chosen.stages if name in used]
  table = _candidate_table(*shown)
  rows = list(found.candidates)
  if found.chosen.id not in {row.id for row in rows}:
    rows.append(found.chosen)
  for row in rows:
    drawn = row.id == found.chosen.id
    table.add_row(
      _DRAWN if drawn else "",
      str(row.rank),
      text_lib.Text(visible(row.piece)),
      percent(row.probability),
      f"{row.cumulative:.2%}",
      *(percent(row.stages[name]) for name in shown),
      style="bold" if drawn else None,
    )
  return rich.console.Group(
    text_lib.Text(f"after {_tail(tokenizer, found.prompt_ids)}"),
    table,
    text_lib.Text(
      f"seed {request.seed} draws {visible(found.chosen.piece)}; the model's "
      f"entropy is {found.entropy:.2f} bits"
    ),
  )


# --- masks -------------------------------------------------------------------


def masked(
  number: int,
  found: request_lib.Masked,
  ids: Sequence[int],
  tokenizer: tokenizer_lib.Tokenizer,
) -> rich.console.Group:
  """Table of the candidates for mask `number` of the document `ids`."""
  table = _candidate_table()
  rows = output.choices(tokenizer, found.candidates)
  cumulative = itertools.accumulate(row.probability for row in rows)
  for rank, (row, total) in enumerate(zip(rows, cumulative, strict=True), 1):
    table.add_row(
      "",
      str(rank),
      text_lib.Text(visible(row.piece)),
      percent(row.probability),
      f"{total:.2%}",
      style="bold" if rank == 1 else None,
    )
  after = visible("".join(map(tokenizer.piece, ids[found.place + 1 :][:48])))
  after = after if len(after) <= 48 else f"{after[:47]}\u2026"
  before = _tail(tokenizer, ids[: found.place])
  return rich.console.Group(
    text_lib.Text(f"mask {number}, between {before} and {after}"),
    table,
    text_lib.Text(f"the model's entropy is {found.entropy:.2f} bits"),
  )


# --- step by step ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
  """One decode step: context, token drawn, and candidates.

  `probability` is the drawn token's before the rules, `running` the natural
  log-probability of all tokens drawn so far. `candidates` are the likeliest ids
  before the rules, `kept` the likeliest after the rules: if the last of `kept`
  has probability 0, the rules removed every id not listed.
  """

  number: int
  context: str
  id: int
  piece: str
  probability: float
  log_probability: float
  running: float
  candidates: list[output.Choice]
  kept: list[output.Choice]


@dataclasses.dataclass(frozen=True)
class Trace:
  """The continuation by `generate`, with every decode step."""

  request: request_lib.Request
  text: str
  finish_reason: str
  steps: list[Step]


def trace(
  sampler: sampler_lib.Sampler, request: request_lib.Request, n: int
) -> Trace:
  """Draws the same tokens twice: once to report the model's probabilities, once
  to report the probabilities after the rules.
  """
  tokenizer = sampler.tokenizer
  wide = min(request_lib.MAX_ALTERNATIVES, tokenizer.size)
  raw = dataclasses.replace(request, alternatives=n, processed=False)
  ruled = dataclasses.replace(request, alternatives=wide, processed=True)
  (result,), (after,) = sampler.generate([raw]), sampler.generate([ruled])
  ids = [*sampler.encode(request.prompt), *result.token_ids]
  n_read = len(ids) - len(result.token_ids)
  logs = result.log_probabilities
  steps = [
    Step(
      number=i + 1,
      context=_tail(tokenizer, ids[: n_read + i]),
      id=token,
      piece=tokenizer.piece(token),
      probability=math.exp(logs[i]),
      log_probability=logs[i],
      running=math.fsum(logs[: i + 1]),
      candidates=output.choices(tokenizer, result.alternatives[i]),
      kept=output.choices(tokenizer, after.alternatives[i]),
    )
    for i, token in enumerate(result.token_ids)
  ]
  return Trace(request, result.text, result.finish_reason, steps)


def step_table(step: Step) -> rich.console.Group:
  """Table of a step's candidates; a drawn token below all of them is last."""
  table = _candidate_table("after the rules")
  kept = {choice.id: percent(choice.probability) for choice in step.kept}
  # Upper bound for ids outside `kept`: the smallest probability in `kept`.
  least = percent(step.kept[-1].probability)
  rest = least if least == _NOTHING else f"\u2264 {least}"
  cumulative = itertools.accumulate(c.probability for c in step.candidates)
  rows = [
    (str(rank), choice, f"{total:.2%}")
    for rank, (choice, total) in enumerate(
      zip(step.candidates, cumulative, strict=True), 1
    )
  ]
  if step.id not in {choice.id for choice in step.candidates}:
    drawn = output.Choice(step.id, step.piece, step.probability)
    rows.append((f"> {len(rows)}", drawn, ""))
  for rank, choice, total in rows:
    table.add_row(
      _DRAWN if choice.id == step.id else "",
      rank,
      text_lib.Text(visible(choice.piece)),
      percent(choice.probability),
      total,
      kept.get(choice.id, rest),
      style="bold" if choice.id == step.id else None,
    )
  return rich.console.Group(
    text_lib.Text(f"{step.number}. after {step.context}"),
    table,
    text_lib.Text(
      f"draws {visible(step.piece)}, log P {step.log_probability:.3f}; log P "
      f"of all that was drawn {step.running:.3f}"
    ),
  )
