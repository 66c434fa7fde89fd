"""Scores a text of any length, window by window, and fills masks
(lm/model/scoring.py).

N tokens of a window, A alternatives.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lm import schema
from lm.data import windows
from lm.model import scoring
from lm.sample import engine as engine_lib
from lm.sample import loaded_model
from lm.sample import request as request_lib


class Part(NamedTuple):
  """Scores of the next N tokens of a text, in NumPy."""

  logs: Float[np.ndarray, "N"]
  ranks: Int[np.ndarray, "N"]
  other_ids: Int[np.ndarray, "N A"]
  other_logs: Float[np.ndarray, "N A"]


def parts(
  loaded: loaded_model.LoadedModel,
  ids: Sequence[int],
  n_alternatives: int,
  stride: int | None,
) -> Iterator[Part]:
  """Yields the scores of `ids[1:]`, a Part per window.

  The windows are the same as in `lm.evaluate` (lm/data/windows.py); each window
  is a device call. Raises ConfigError on a stride outside [1, context], and if
  the model is an encoder.
  """
  loaded.require_causal()
  context = loaded.cfg.context_length
  stride = context if stride is None else stride
  if not 1 <= stride <= context:
    raise schema.ConfigError(
      f"stride={stride}: must be from 1 to the context of {context}"
    )
  tokens, ways = np.asarray(ids, np.int32), loaded.ways
  cuts = windows.cut(len(ids) - 1, context, stride) if len(ids) > 1 else ()
  for window in cuts:
    length = window.stop - window.first
    shape = ways, engine_lib.bucket(length, scoring.CHUNK)
    inputs, targets = np.full((2, *shape), loaded.tokenizer.pad, np.int32)
    inputs[:, :length] = tokens[window.first : window.stop]
    targets[:, :length] = tokens[window.first + 1 : window.stop + 1]
    lengths = np.full(ways, length, np.int32)
    wanted = np.full(ways, n_alternatives > 0)
    rows = map(loaded.place, (inputs, targets, lengths, wanted))
    with loaded.in_mesh():
      found = scoring.score(
        loaded.graph,
        loaded.state,
        *rows,
        n_alternatives=request_lib.MAX_ALTERNATIVES,
      )
      found = loaded.fetch(found if n_alternatives else found[:2])
    logs, ranks, *others = (
      x[0, length - window.n_scored : length] for x in found
    )
    none = np.empty((len(logs), 0), np.int32)
    others = [x[:, :n_alternatives] for x in others] or [none, none]
    yield Part(logs, ranks, *others)


def collect(
  loaded: loaded_model.LoadedModel, ids: Sequence[int], found: Iterable[Part]
) -> request_lib.Score:
  """Joins the output of `parts(ids)` into a Score."""
  logs, ranks, others = [], [], []
  for part in found:
    logs += part.logs.tolist()
    ranks += part.ranks.tolist()
    columns = part.other_ids.tolist(), part.other_logs.tolist()
    others += [
      [request_lib.Alternative(*one) for one in zip(*pair, strict=True)]
      for pair in zip(*columns, strict=True)
    ]
  scored = np.asarray(ids, np.int32)[1:].tolist()
  return request_lib.Score(
    token_ids=scored,
    pieces=[loaded.tokenizer.piece(i) for i in scored],
    log_probabilities=logs,
    ranks=ranks,
    alternatives=others,
    # The first id is not scored; where it has text, it has the dummy prefix.
    n_bytes=loaded.tokenizer.n_bytes(ids) - loaded.tokenizer.n_bytes(ids[:1]),
  )


def fill(
  loaded: loaded_model.LoadedModel, ids: Sequence[int], n_candidates: int
) -> list[request_lib.Masked]:
  """The `n_candidates` likeliest ids for each mask of `ids`, in order.

  `ids` is a whole document, bos and eos included, and is read in both
  directions in one device call. Raises ConfigError without a mask, on more
  tokens than the context, and on more candidates than ids.
  """
  tokenizer, context = loaded.tokenizer, loaded.cfg.context_length
  places = [i for i, token in enumerate(ids) if token == tokenizer.mask]
  for name, value, holds, rule in (
    ("masks", 0, places, "the text must have one at least"),
    (
      "tokens",
      len(ids),
      len(ids) <= context,
      f"the text must fit the context of {context}; shorten it",
    ),
    (
      "candidates",
      n_candidates,
      1 <= n_candidates <= tokenizer.size,
      f"must be in [1, {tokenizer.size}]",
    ),
  ):
    schema.require(bool(holds), name, value, rule)
  inputs = np.full(
    (loaded.ways, engine_lib.bucket(len(ids), scoring.CHUNK)),
    tokenizer.pad,
    np.int32,
  )
  inputs[:, : len(ids)] = ids
  n_masked = engine_lib.bucket(len(places), scoring.CHUNK)
  masked = np.zeros((loaded.ways, n_masked), np.int32)
  masked[:, : len(places)] = places
  lengths = np.full(loaded.ways, len(ids), np.int32)
  with loaded.in_mesh():
    found = scoring.fill(
      loaded.graph,
      loaded.state,
      *map(loaded.place, (inputs, lengths, masked)),
      n_ids=tokenizer.size,
      n_alternatives=n_candidates,
    )
    found = loaded.fetch(found)
  rows = zip(places, *(x[0].tolist() for x in found), strict=False)
  return [
    request_lib.Masked(
      place,
      [request_lib.Alternative(*one) for one in zip(ids, logs, strict=True)],
      entropy,
    )
    for place, ids, logs, entropy in rows
  ]
