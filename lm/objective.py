"""The objective of a source, which is written SPEC|NAME(FIELD=VALUE).

What an objective makes of a window of tokens is in lm/data/objectives.py.
"""

import dataclasses
from typing import Annotated, Literal

from lm import schema
from lm.schema import Fraction, Share


@dataclasses.dataclass(frozen=True)
class Causal:
  """Next-token prediction."""

  # Class attributes: whether rows have positions seen in both directions
  # (Batch.prefix); whether data.packing="chop" may cut its documents anywhere.
  looks_ahead = False
  choppable = True


@dataclasses.dataclass(frozen=True)
class Prefix(Causal):
  """Prefix LM (arXiv:1910.10683): each document is split at a random token; the
  part before is seen in both directions and not scored.
  """

  looks_ahead = True


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Causal):
  """T5's denoising (arXiv:1910.10683): sentinels in place of random spans, seen
  in both directions; then sentinel-delimited spans, predicted left to right.
  UL2 (arXiv:2205.05131) mixes (0.15, 3) and (0.15, 8), its R, with (0.5, 3) and
  (0.15, 32), its X, and with `prefix`, its S.
  """

  # Share of a document's tokens that is in spans.
  rate: Fraction = 0.15
  # Mean length of a span, in tokens.
  mean_span: Annotated[float, schema.AtLeast(1)] = 3.0

  looks_ahead = True
  choppable = False


@dataclasses.dataclass(frozen=True)
class Fim(Causal):
  """Fill-in-the-middle (arXiv:2207.14255): the middle of a document comes last,
  after what is before and behind. Everything but the sentinels is scored.
  """

  # Share of documents with a middle; the others are causal.
  rate: Share = 0.5
  # Of these, the share in order suffix, prefix, middle (SPM), not PSM.
  spm: Share = 0.5
  # Where the middle may begin and end.
  cut: Literal["character", "token", "line"] = "character"

  choppable = False


@dataclasses.dataclass(frozen=True)
class Masked(Causal):
  """Masked LM (arXiv:1810.04805): all is seen in both directions; chosen tokens
  are scored, 80 % replaced by <mask>, 10 % by another token, 10 % kept.

  A rate of None is masked diffusion (arXiv:2502.09992): each document has a
  rate t, uniform in (0, 1), all chosen tokens are <mask>, and their weights are
  1 / t: the loss bounds the text's negative log-likelihood per token.
  """

  rate: Fraction | None = 0.15

  looks_ahead = True


@dataclasses.dataclass(frozen=True)
class Chat(Causal):
  """Conversations, rendered by the chat template (lm/data/chat.py): next-token
  prediction of the assistant's tokens and ends of turn alone.
  """

  # A conversation that no row holds is left out, or loses its start or end.
  long: Literal["drop", "cut_start", "cut_end"] = "drop"

  choppable = False


BY_NAME: dict[str, type[Causal]] = {
  "causal": Causal,
  "prefix": Prefix,
  "span_corruption": SpanCorruption,
  "fim": Fim,
  "masked": Masked,
  "chat": Chat,
}


def of(source: str) -> Causal:
  """The objective of a source. Raises ConfigError on an unknown one."""
  return split_source(source)[1]


def split_source(source: str) -> tuple[str, Causal]:
  """(spec, objective) of a source `SPEC|NAME(FIELD=VALUE)`; without a suffix,
  the objective is causal. Raises ConfigError on an unknown objective or field,
  or a wrong value.
  """
  spec, bar, text = source.rpartition("|")
  if not bar or schema.CALL.fullmatch(text) is None:
    return source, Causal()
  where = f"source {source!r}"
  hint = "; write '?' for a '|' that is in a path"
  return spec, schema.read_call(text, BY_NAME, where, hint)
