"""Requests in, continuations out: batches of them, padded to buckets.

All rows of a call run together: prompts are padded on the right to a power of
two and read at once, then one `lax.while_loop` draws a token for every row at
a time until the last row is done.

A row's noise follows from its seed and position alone. Its logits follow from
its own tokens alone too, but XLA may sum in another order for another bucket:
with different neighbours they can differ in the last bit.
"""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from lm import checkpoint, sharding
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder
from lm.sample import loop, rules

# Smallest buckets, in tokens.
MIN_PROMPT = 16
MIN_SLOTS = 64
DEFAULT_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and the rules by which it is continued (lm/sample/rules.py).

  The defaults draw from the model's own distribution.
  """

  # Text or ids; the tokenizer's bos is put in front unless it stands there.
  prompt: str | Sequence[int] = ""
  # 0 is greedy.
  temperature: float = 1.0
  # 0 keeps every id.
  top_k: int = 0
  top_p: float = 1.0
  # None: 256, or what the context leaves if that is less.
  max_new_tokens: int | None = None
  seed: int = 0
  # Sample i is what a request of one sample with `seed + i` gets.
  n_samples: int = 1


@dataclasses.dataclass(frozen=True)
class Result:
  """One continuation.

  `token_ids` ends with eos where that ended it; `text` has no trace of it.
  `log_probabilities` are natural, one per token, of the raw logits.
  `error` is a row whose logits became NaN: its last token means nothing.
  """

  request: Request
  seed: int
  text: str
  token_ids: list[int]
  log_probabilities: list[float]
  finish_reason: Literal["eos", "length", "error"]


class _Row(NamedTuple):
  """One sample: its prompt's ids with bos, and how many to draw at most."""

  request: Request
  seed: int
  prompt: list[int]
  limit: int


class Sampler:
  """Continues prompts with one model.

  `params` lie on `mesh` (axes data, fsdp, tensor) or, without one, on one
  device. Layers are copied into arrays of their own, in the compute dtype;
  other arrays may stay shared, so do not donate `params`.
  """

  def __init__(
    self,
    cfg: config_lib.ModelConfig,
    params: decoder.Params,
    tokenizer: tokenizer_lib.Tokenizer,
    mesh: jax.sharding.Mesh | None = None,
  ):
    if tokenizer.size > cfg.vocab_size:
      raise config_lib.ConfigError(
        f"vocabulary mismatch: the tokenizer has {tokenizer.size} ids, the "
        f"model {cfg.vocab_size}; give the tokenizer that it was trained with"
      )
    self.cfg, self.tokenizer, self.mesh = cfg, tokenizer, mesh
    with self._in_mesh():
      self._graph, self._state = loop.unroll(cfg, params)

  @classmethod
  def from_checkpoint(
    cls,
    workdir: str,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ) -> "Sampler":
    """Of the last step of a run, or of `step`. Reads parameters only."""
    meta = checkpoint.load_meta(workdir, step)
    cfg = meta.config.model
    params = checkpoint.load_params(workdir, cfg, meta.step, mesh)
    tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
    return cls(cfg, params, tokenizer, mesh)

  def generate(self, requests: Sequence[Request]) -> list[Result]:
    """`n_samples` results for each request, in order.

    Raises ConfigError on a request that cannot be met, before it compiles.
    """
    rows = self._rows(requests)
    n_tokens, tokens, log_probabilities = self._run(rows)
    return [
      self._result(row, tokens[i, :n].tolist(), log_probabilities[i, :n])
      for i, (row, n) in enumerate(zip(rows, n_tokens, strict=False))
    ]

  def _result(
    self, row: _Row, token_ids: list[int], logs: np.ndarray
  ) -> Result:
    reason = "length"
    if token_ids[-1] == self.tokenizer.eos:
      reason = "eos"
    if np.isnan(logs[-1]):
      reason = "error"
    text = self.tokenizer.decode(token_ids)
    return Result(row.request, row.seed, text, token_ids, logs.tolist(), reason)

  def _rows(self, requests: Sequence[Request]) -> list[_Row]:
    if not requests:
      raise config_lib.ConfigError("requests=[]: give at least one Request")
    rows = []
    for request in requests:
      _check(request)
      prompt = self._encode(request.prompt)
      limit = self._limit(request, len(prompt))
      rows += [
        _Row(request, request.seed + i, prompt, limit)
        for i in range(request.n_samples)
      ]
    return rows

  def _encode(self, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
      ids = self.tokenizer.encode(prompt)
    else:
      ids = [int(i) for i in prompt]
      for i in ids:
        if not 0 <= i < self.tokenizer.size:
          raise config_lib.ConfigError(
            f"prompt: id {i} is not in [0, {self.tokenizer.size}), the ids of "
            "the tokenizer; encode the prompt with the checkpoint's own"
          )
    bos = self.tokenizer.bos
    return ids if ids[:1] == [bos] else [bos, *ids]

  def _limit(self, request: Request, length: int) -> int:
    """Tokens to draw after a prompt of `length` ids."""
    context = self.cfg.context_length
    start = repr(request.prompt[:20])
    if length >= context:
      raise config_lib.ConfigError(
        f"prompt={start}...: has {length} tokens with bos; it must leave room "
        f"for one more in the context of {context}: shorten it"
      )
    if request.max_new_tokens is None:
      return min(DEFAULT_NEW_TOKENS, context - length)
    if length + request.max_new_tokens > context:
      raise config_lib.ConfigError(
        f"max_new_tokens={request.max_new_tokens}: with the {length} tokens of "
        f"prompt={start}... it must not exceed the context of {context}; at "
        f"most {context - length} fit"
      )
    return request.max_new_tokens

  def _run(self, rows: list[_Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens drawn [B], their ids [B, S] and log-probabilities [B, S]."""
    n_read = max(len(row.prompt) for row in rows) - 1
    n_prompt = _bucket(n_read, MIN_PROMPT)
    # The prompt's last token needs a slot, the last one drawn does not.
    n_slots = _bucket(n_prompt + max(row.limit for row in rows), MIN_SLOTS)
    ways = 1
    if self.mesh is not None:
      ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    n_rows = ways * _bucket(math.ceil(len(rows) / ways), 1)
    filler = _Row(Request(temperature=0.0), 0, [self.tokenizer.bos], 0)
    rows = rows + [filler] * (n_rows - len(rows))
    inputs = np.full((n_rows, n_prompt), self.tokenizer.pad, np.int32)
    for i, row in enumerate(rows):
      inputs[i, : len(row.prompt) - 1] = row.prompt[:-1]
    last = np.array([row.prompt[-1] for row in rows], np.int32)
    with self._in_mesh():
      batch = self._batch(rows)
      inputs, last = self._place(inputs), self._place(last)
      progress = loop.prefill(
        self._graph, self._state, inputs, last, batch, n_slots
      )
      progress = loop.decode(
        self._graph, self._state, batch, progress, self.tokenizer.size
      )
      return (
        self._fetch(progress.n_tokens),
        self._fetch(progress.tokens)[:, 1:],
        self._fetch(progress.log_probabilities)[:, 1:],
      )

  def _batch(self, rows: list[_Row]) -> loop.Rows:
    def column(values, dtype):
      return self._place(np.array(values, dtype))

    requests = [row.request for row in rows]
    # All k beyond the vocabulary are one, and int32 has an end.
    k = [min(r.top_k, self.cfg.vocab_size) for r in requests]
    return loop.Rows(
      column([len(row.prompt) for row in rows], np.int32),
      column([row.limit for row in rows], np.int32),
      column([self.tokenizer.eos] * len(rows), np.int32),
      rules.Parameters(
        temperature=column([r.temperature for r in requests], np.float32),
        top_k=column(k, np.int32),
        top_p=column([r.top_p for r in requests], np.float32),
        seed=column([row.seed for row in rows], np.uint32),
      ),
    )

  def _in_mesh(self):
    if self.mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  def _place(self, rows: np.ndarray) -> Array:
    """On the mesh, cut along the batch; each process has all rows."""
    if self.mesh is None:
      return jnp.asarray(rows)
    where = NamedSharding(self.mesh, sharding.partition("batch"))
    return jax.make_array_from_callback(rows.shape, where, lambda i: rows[i])

  def _fetch(self, x: Array) -> np.ndarray:
    """All rows, on every process."""
    if self.mesh is not None:
      x = jax.device_put(x, NamedSharding(self.mesh, P()))
    return np.asarray(x)


def _check(request: Request) -> None:
  """Raises ConfigError on the first parameter that breaks its rule."""
  hints = typing.get_type_hints(Request)
  hints.pop("prompt")
  for name, hint in hints.items():
    config_lib.check_types(getattr(request, name), hint, f"request.{name}")
  largest = float(np.finfo(np.float32).max)
  r = request
  for name, holds, rule in (
    (
      "temperature",
      0 <= r.temperature <= largest,
      "must be at least 0, a float32; 0 is greedy",
    ),
    ("top_k", r.top_k >= 0, "must be at least 0; 0 keeps all ids"),
    ("top_p", 0 < r.top_p <= 1, "must be in (0, 1]; 1 keeps all ids"),
    (
      "max_new_tokens",
      r.max_new_tokens is None or r.max_new_tokens >= 1,
      "must be at least 1, or None for what the context leaves",
    ),
    ("n_samples", r.n_samples >= 1, "must be at least 1"),
    (
      "seed",
      0 <= r.seed <= 2**32 - max(r.n_samples, 1),
      "must be at least 0, and seed + n_samples at most 2**32",
    ),
  ):
    if not holds:
      raise config_lib.ConfigError(f"{name}={getattr(r, name)!r}: {rule}")


def _bucket(n: int, least: int) -> int:
  """The smallest power of two that is at least `n` and `least`."""
  return 2 ** math.ceil(math.log2(max(n, least)))
