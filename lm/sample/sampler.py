"""Python interface to a trained model: sampling, beam search, scoring.

`generate` and `stream` continue prompts, `next_token` returns one next-token
distribution, `score` the log-probabilities of a text. Samples are drawn in the
slots of an `Engine` (lm/sample/engine.py); prompts are padded on the right to a
power of two.

Determinism: a sample's noise depends only on seed and positions, and a sample's
logits only on its own tokens. But XLA may sum in a different order for a
different number of slots or KV cache positions (`n_places`), and logits can
then differ in the last bit. An engine with fixed slots and positions gives
every request the same tokens, bit for bit, whatever else the engine serves.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import checkpoint, schema, sharding
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder, inference
from lm.sample import beam, rules, scoring
from lm.sample import engine as engine_lib
from lm.sample import request as request_lib
from lm.sample.request import (
  Candidate,
  NextToken,
  Piece,
  Request,
  Result,
  Score,
)

# Storage formats of the weights.
WEIGHTS = ("float32", "bfloat16", "int8")
# Most slots that `generate` uses by default, per device along the batch.
MAX_SLOTS = 32


class Sampler:
  """Samples from one model.

  `params` lie on `mesh` (axes data, fsdp, tensor), or on one device without a
  mesh. Each layer is copied to separate arrays, in the compute dtype and
  all-gathered over fsdp. Do not donate `params`: other arrays may stay shared.

  `weights` is the compute dtype, if different from training, or "int8": the
  layers' matrices in 8 bits, with a scale per output. `int8_cache` stores the
  KV cache in 8 bits, with a scale per vector. Speculative decoding: each step
  proposes `ahead` tokens, from the draft model `draft` (a smaller sampler with
  the same tokenizer and mesh) or, without a draft model, from earlier text
  (prompt lookup). No token drawn depends on `ahead` or `draft`.
  """

  def __init__(
    self,
    cfg: config_lib.ModelConfig,
    params: decoder.Params,
    tokenizer: tokenizer_lib.Tokenizer,
    mesh: jax.sharding.Mesh | None = None,
    *,
    weights: str | None = None,
    int8_cache: bool = False,
    ahead: int = 0,
    draft: "Sampler | None" = None,
  ):
    if tokenizer.size > cfg.vocab_size:
      raise schema.ConfigError(
        f"vocabulary mismatch: the tokenizer has {tokenizer.size} ids, the "
        f"model {cfg.vocab_size}; give the tokenizer that it was trained with"
      )
    if not 0 <= ahead <= MAX_AHEAD or (draft is not None and ahead == 0):
      raise schema.ConfigError(
        f"ahead={ahead}: must be in [0, {MAX_AHEAD}], and at least 1 with a "
        "draft"
      )
    if weights not in (None, *WEIGHTS):
      raise schema.ConfigError(
        f"weights={weights!r}: must be one of {', '.join(WEIGHTS)}, or None "
        "for the model's own dtype"
      )
    if weights in ("float32", "bfloat16"):
      cfg = dataclasses.replace(cfg, dtype=weights)
    if draft is not None:
      _check_draft(cfg, tokenizer, mesh, draft)
    self.cfg, self.tokenizer, self.mesh = cfg, tokenizer, mesh
    self.int8_cache, self.ahead, self.draft = int8_cache, ahead, draft
    # Devices along the batch axis.
    self.ways = 1
    if mesh is not None:
      batch_axes = sharding.mesh_axes("batch")
      self.ways = math.prod(mesh.shape[axis] for axis in batch_axes)
    with self.in_mesh():
      self.graph, self.state = inference.unroll(cfg, params, weights == "int8")

  @classmethod
  def from_checkpoint(
    cls,
    workdir: str,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **options: Any,
  ) -> "Sampler":
    """Loads the run's last checkpoint, or the checkpoint of `step`.

    Reads parameters only, each device its own shard. `options`: as in the
    constructor.
    """
    meta = checkpoint.load_meta(workdir, step)
    cfg = meta.config.model
    params = checkpoint.load_params(workdir, cfg, meta.step, mesh)
    tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
    return cls(cfg, params, tokenizer, mesh, **options)

  # --- generation and scoring -------------------------------------------------

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
        piece=self.piece(int(i)),
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

  def scoring(
    self, ids: Sequence[int], alternatives: int = 0, stride: int | None = None
  ) -> Iterator[scoring.Part]:
    """Scores `ids` window by window; the caller may do work between windows."""
    request_lib.check(Request(alternatives=alternatives), self.tokenizer.size)
    return scoring.parts(self, ids, alternatives, stride)

  def check(self, request: Request, shown: Any = None) -> None:
    """Raises ConfigError on an invalid request, as `resolve` does."""
    self.resolve(request, shown=shown)

  # --- requests, token ids, devices -------------------------------------------

  def resolve(
    self, request: Request, n_places: int | None = None, shown: Any = None
  ) -> tuple[list[int], int]:
    """Token ids of the prompt, and the maximum number of tokens to draw.

    Raises ConfigError on an invalid request, or if prompt and new tokens do not
    fit the context or `n_places`; the message quotes `shown`, the user's own
    text, in place of the prompt.
    """
    request_lib.check(request, self.tokenizer.size)
    prompt = self.encode(request.prompt)
    context = min(n_places or math.inf, self.cfg.context_length)
    start, length = _start(shown or request.prompt), len(prompt)
    if length >= context:
      raise schema.ConfigError(
        f"prompt={start}: has {length} tokens; it must leave room for one more "
        f"in the context of {context}: shorten it"
      )
    limit = request.max_new_tokens
    if limit is None:
      limit = min(request_lib.DEFAULT_NEW_TOKENS, int(context - length))
    if length + limit > context:
      raise schema.ConfigError(
        f"max_new_tokens={limit}: with the {length} tokens of prompt={start} "
        f"it must not exceed the context of {context}; at most "
        f"{context - length} fit"
      )
    if request.min_tokens > limit:
      raise schema.ConfigError(
        f"min_tokens={request.min_tokens}: at most {limit} tokens are drawn"
      )
    return prompt, limit

  def models(self) -> list["Sampler"]:
    """This model and, if set, the draft model."""
    return [self] if self.draft is None else [self, self.draft]

  def encode(self, text: str | Sequence[int]) -> list[int]:
    """Token ids of a text, bos first; a sequence of ids is kept unchanged, or
    becomes bos if empty. Raises ConfigError on ids unknown to the tokenizer.
    """
    bos = self.tokenizer.bos
    if isinstance(text, str):
      return [bos, *self.tokenizer.encode(text)]
    ids = [int(i) for i in text]
    for i in ids:
      if not 0 <= i < self.tokenizer.size:
        raise schema.ConfigError(
          f"prompt: id {i} is not in [0, {self.tokenizer.size}), the ids of "
          "the tokenizer; encode the prompt with the checkpoint's own"
        )
    return ids or [bos]

  def piece(self, i: int) -> str:
    """Printable form of id `i`; padding ids of the vocabulary become `<i>`."""
    return self.tokenizer.piece(i) if i < self.tokenizer.size else f"<{i}>"

  def in_mesh(self):
    if self.mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  def place(self, rows: np.ndarray) -> jax.Array:
    """Shards rows along the batch axis; each process passes all rows."""
    if self.mesh is None:
      return jnp.asarray(rows)
    where = NamedSharding(self.mesh, sharding.partition("batch"))
    return jax.make_array_from_callback(rows.shape, where, lambda i: rows[i])

  def fetch(self, tree: Any) -> Any:
    """All-gathers arrays to NumPy: every process gets all rows."""
    if self.mesh is not None:
      tree = jax.device_put(tree, NamedSharding(self.mesh, P()))
    return jax.tree.map(np.asarray, tree)


# Most tokens proposed per step: each proposal costs a draw in every step.
MAX_AHEAD = 16


def _start(prompt: str | Sequence[int]) -> str:
  """Start of a prompt for error messages: 20 characters or ids."""
  return repr(prompt[:20]) + ("..." if len(prompt) > 20 else "")


def _check_draft(cfg, tokenizer, mesh, draft) -> None:
  for what, same in (
    ("tokenizer", draft.tokenizer.fingerprint == tokenizer.fingerprint),
    ("mesh", draft.mesh == mesh),
    ("vocab_size", draft.cfg.vocab_size == cfg.vocab_size),
    ("context_length", draft.cfg.context_length >= cfg.context_length),
  ):
    if not same:
      raise schema.ConfigError(
        f"draft: its {what} is not that of the model; both must be trained "
        "with the same tokenizer and a context at least as long"
      )
