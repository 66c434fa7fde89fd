"""The Python interface: a model, and what can be asked of it.

`generate` and `stream` continue prompts, `next_token` looks at one
distribution, `score` judges a text. All samples go through the slots of an
`Engine` (lm/sample/engine.py); prompts are padded on the right to a power of
two.

A sample's noise follows from its seed and positions alone. Its logits follow
from its own tokens alone too, but XLA may sum in another order for another
number of slots or places: there they can differ in the last bit. An engine of
fixed slots and places gives every request the same tokens, bit for bit,
whatever else it serves.
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

# What weights may be kept as.
WEIGHTS = ("float32", "bfloat16", "int8")
# Slots that `generate` uses at most, for each device along the batch.
MAX_SLOTS = 32


class Sampler:
  """Continues prompts with one model.

  `params` lie on `mesh` (axes data, fsdp, tensor) or, without one, on one
  device. Layers are copied into arrays of their own, in the compute dtype, and
  gathered over fsdp; other arrays may stay shared, so do not donate `params`.

  `weights` is the compute dtype, where it is to be another than in training, or
  "int8": the layers' matrices in 8 bits, with a scale for each output.
  `int8_cache` keeps keys and values so. `ahead` tokens are proposed at
  each step, by `draft` (a smaller sampler of the same tokenizer and mesh) or
  without one by looking up what the text repeats; no token depends on it.
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
    # Devices along the batch.
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
    """Of the last step of a run, or of `step`. Reads parameters only, each
    device its own part; `options` are those of the constructor.
    """
    meta = checkpoint.load_meta(workdir, step)
    cfg = meta.config.model
    params = checkpoint.load_params(workdir, cfg, meta.step, mesh)
    tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
    return cls(cfg, params, tokenizer, mesh, **options)

  # --- what can be asked ------------------------------------------------------

  def generate(
    self, requests: Sequence[Request], n_slots: int | None = None
  ) -> list[Result]:
    """`n_samples` results for each request, in order.

    None: a slot for each sample, up to 32 per device along the batch. Raises
    ConfigError on a request that cannot be met, before anything compiles.
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
    """What `generate` gives, as it comes, every `n_steps` tokens."""
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
    """Slots to be served from a queue; `n_places`: tokens of prompt and
    continuation, at most those of the context, which is the default.
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
    """The distribution after the prompt: its `n` likeliest ids, and the one
    that `generate` draws first, with the share each stage of the rules leaves.

    `engine` is one with a free slot, for who asks often; None makes one.
    """
    prompt, _ = self.resolve(request)
    if engine is None:
      n_places = engine_lib.bucket(len(prompt) + 1, engine_lib.MIN_PLACES)
      engine = engine_lib.Engine(self, self.ways, n_places)
    stages, drawn = engine.look(request)
    raw = stages["raw"].astype(np.float64)
    # By probability descending, then by id.
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
    """The likeliest continuations that a beam search finds, best first
    (lm/sample/beam.py).
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
    """How likely a text is, given bos, or all ids but the first, given that;
    with `eos`, and that it ends there: the number of `lm.evaluate`.

    What is longer than the context is read in windows, each of which scores
    the next `stride` tokens (default: the context) and is as long as it can.
    """
    ids = self.encode(text) + [self.tokenizer.eos] * eos
    found = self.scoring(ids, alternatives, stride)
    return scoring.collect(self, ids, found)

  def scoring(
    self, ids: Sequence[int], alternatives: int = 0, stride: int | None = None
  ) -> Iterator[scoring.Part]:
    """The same, a window at a time, for one who has other work between them."""
    request_lib.check(Request(alternatives=alternatives), self.tokenizer.size)
    return scoring.parts(self, ids, alternatives, stride)

  def check(self, request: Request, shown: Any = None) -> None:
    """Raises ConfigError on a request that cannot be met."""
    self.resolve(request, shown=shown)

  # --- what they are made of --------------------------------------------------

  def resolve(
    self, request: Request, n_places: int | None = None, shown: Any = None
  ) -> tuple[list[int], int]:
    """Ids of the prompt, and how many tokens to draw at most.

    Raises ConfigError where they do not fit into the context, or `n_places`;
    it shows the prompt as `shown`, where that is what the user wrote.
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
    """This one, and what drafts for it."""
    return [self] if self.draft is None else [self, self.draft]

  def encode(self, text: str | Sequence[int]) -> list[int]:
    """Ids of a text, with bos in front; ids as they are, or bos alone where
    there are none. Raises ConfigError on ids that the tokenizer has not.
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
    """Of ids that pad the model's vocabulary too."""
    return self.tokenizer.piece(i) if i < self.tokenizer.size else f"<{i}>"

  def in_mesh(self):
    if self.mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  def place(self, rows: np.ndarray) -> jax.Array:
    """On the mesh, cut along the batch; each process has all rows."""
    if self.mesh is None:
      return jnp.asarray(rows)
    where = NamedSharding(self.mesh, sharding.partition("batch"))
    return jax.make_array_from_callback(rows.shape, where, lambda i: rows[i])

  def fetch(self, tree: Any) -> Any:
    """All rows, as NumPy arrays, on every process."""
    if self.mesh is not None:
      tree = jax.device_put(tree, NamedSharding(self.mesh, P()))
    return jax.tree.map(np.asarray, tree)


# Tokens proposed at once at most: each costs a draw in every step.
MAX_AHEAD = 16


def _start(prompt: str | Sequence[int]) -> str:
  """What is shown of a prompt: its beginning."""
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
