"""Python interface to a trained model: sampling, beam search, scoring.

`generate` and `stream` continue prompts, `next_token` returns one next-token
distribution, `score` the log-probabilities of a text, `fill` the likeliest
tokens of its masks. Samples are drawn in the
slots of an `Engine` (lm/sample/engine.py); prompts are padded on the right to a
power of two.

Determinism: a sample's noise depends only on seed and positions, and a sample's
logits only on its own tokens. But XLA may sum in a different order for a
different number of slots or KV cache positions (`n_places`), and logits can
then differ in the last bit. An engine with fixed slots and positions gives
every request the same tokens, bit for bit, whatever else the engine serves.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm import checkpoint, schema
from lm.data import marked
from lm.data import tokenizer as tokenizer_lib
from lm.sample import beam, load, loaded_model, rules, scoring
from lm.sample import engine as engine_lib
from lm.sample import request as request_lib
from lm.sample.request import (
  Candidate,
  Masked,
  NextToken,
  Piece,
  Request,
  Result,
  Score,
)

# Most slots that `generate` uses by default, per device along the batch.
MAX_SLOTS = 32


class Sampler(loaded_model.LoadedModel):
  """A loaded model that samples, searches and scores."""

  @classmethod
  def from_checkpoint(
    cls,
    workdir: str,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    adapter: str | None = None,
    chat_template: str | None = None,
    **options: Any,
  ) -> "Sampler":
    """Loads the run's last checkpoint, or the checkpoint of `step`, and merges
    an `adapter` (LoRA): a folder in PEFT's format, or a run. The text of a
    `chat_template` replaces the checkpoint's.

    Reads parameters only, each device its own shard. `options`: as in the
    constructor.
    """
    meta = checkpoint.load_meta(workdir, step)
    cfg, params = load.model(workdir, meta, mesh, adapter)
    tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
    if chat_template is not None:
      tokenizer = tokenizer.with_template(chat_template)
    return cls(cfg, params, tokenizer, mesh, **options)

  def generate(
    self, requests: Sequence[Request], n_slots: int | None = None
  ) -> list[Result]:
    """Returns `n_samples` results per request, in order.

    Default `n_slots`: a slot per sample, up to 32 per device along the batch.
    Raises ConfigError on an invalid request, before anything compiles.
    """
    pieces = self.stream(requests, n_slots, engine_lib.MAX_STEPS)
    results = {p.job: p.result for p in pieces if p.result is not None}
    return [results[job] for job in sorted(results)]

  def stream(
    self,
    requests: Sequence[Request],
    n_slots: int | None = None,
    n_steps: int = 1,
  ) -> Iterator[Piece]:
    """Streams the output of `generate`, every `n_steps` decode steps."""
    if not requests:
      raise schema.ConfigError("requests=[]: give at least one Request")
    resolved = [self.resolve(request) for request in requests]
    n = sum(request.n_samples for request in requests)
    n = min(n, MAX_SLOTS * self.ways)
    slots = n_slots or self.ways * engine_lib.bucket(-(-n // self.ways), 1)
    n_places = max(len(prompt) + limit for prompt, limit in resolved)
    n_places = engine_lib.bucket(n_places, engine_lib.MIN_PLACES)
    engine = self.engine(slots, n_places)
    for request in requests:
      engine.submit(request)
    return self._pieces(engine, n_steps)

  def _pieces(self, engine, n_steps):
    while not engine.idle:
      yield from engine.step(n_steps)

  def engine(
    self, n_slots: int, n_places: int | None = None
  ) -> engine_lib.Engine:
    """Makes an engine: a request queue served by `n_slots` slots.

    `n_places`: tokens of prompt plus continuation; default and maximum: the
    context. Raises ConfigError if the devices along the batch do not divide
    `n_slots`.
    """
    if n_slots < 1 or n_slots % self.ways:
      raise schema.ConfigError(
        f"n_slots={n_slots}: must be a multiple of {self.ways}, the devices "
        "along the batch"
      )
    return engine_lib.Engine(self, n_slots, n_places or self.cfg.context_length)

  def next_token(
    self, request: Request, n: int = 5, engine: engine_lib.Engine | None = None
  ) -> NextToken:
    """Next-token distribution after the prompt: the `n` likeliest ids and the
    id that `generate` draws first, with probabilities after each stage of the
    rules.

    Frequent callers pass an `engine` with a free slot; None makes a new engine.
    """
    prompt, _ = self.resolve(request)
    if engine is None:
      n_places = engine_lib.bucket(len(prompt) + 1, engine_lib.MIN_PLACES)
      engine = engine_lib.Engine(self, self.ways, n_places)
    stages, drawn = engine.look(request)
    raw = stages["raw"].astype(np.float64)
    # Probability descending, then id ascending.
    order = np.lexsort((np.arange(len(raw)), -raw))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    cumulative = np.cumsum(raw[order])

    def candidate(i):
      return Candidate(
        id=int(i),
        piece=self.tokenizer.piece(int(i)),
        rank=int(rank[i]),
        probability=float(raw[i]),
        cumulative=float(cumulative[rank[i] - 1]),
        stages={name: float(stages[name][i]) for name in rules.STAGES},
      )

    some = raw[raw > 0]
    return NextToken(
      prompt_ids=prompt,
      candidates=[candidate(i) for i in order[:n]],
      entropy=float(-np.sum(some * np.log2(some))),
      chosen=candidate(drawn),
    )

  def beam(
    self,
    request: Request,
    n_beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
  ) -> list[Result]:
    """Beam search (lm/sample/beam.py): `n_beams` continuations or fewer, best
    first.
    """
    return beam.search(self, request, n_beams, length_penalty, early_stopping)

  def score(
    self,
    text: str | Sequence[int],
    alternatives: int = 0,
    *,
    stride: int | None = None,
    eos: bool = False,
  ) -> Score:
    """Log-probabilities of a text given bos, or of ids given the first id.

    `eos` scores a final eos too, as `lm.evaluate` does. A text longer than the
    context is read in windows. Each window after the first scores the next
    `stride` tokens (default: the context), with as many earlier tokens as fit.
    """
    ids = self.encode(text) + [self.tokenizer.eos] * eos
    found = self.scoring(ids, alternatives, stride)
    return scoring.collect(self, ids, found)

  def fill(self, text: str, n: int = 5) -> list[Masked]:
    """The `n` likeliest ids for each <mask> of a text, which is read in both
    directions; for a model trained with the masked objective.

    Each mask is filled as if alone: likeliest fillings need not fit each other.
    Raises ConfigError without a <mask>, and beyond the context.
    """
    return scoring.fill(self, marked.mask_ids(self.tokenizer, text), n)

  def scoring(
    self, ids: Sequence[int], alternatives: int = 0, stride: int | None = None
  ) -> Iterator[scoring.Part]:
    """Scores `ids` window by window; the caller may do work between windows."""
    request_lib.check(Request(alternatives=alternatives), self.tokenizer.size)
    return scoring.parts(self, ids, alternatives, stride)
