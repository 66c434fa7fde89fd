"""A trained model on its devices, ready to decode: weights, tokenizer, mesh.

Engine, beam search and scoring (engine.py, beam.py, scoring.py) run on a
`LoadedModel`; `sampler.Sampler` is one that has them as methods.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import config as config_lib
from lm import schema, sharding
from lm.data import tokenizer as tokenizer_lib
from lm.model import decoder, inference, lora
from lm.sample import request as request_lib
from lm.sample.request import Request

# Storage formats of the weights.
WEIGHTS = ("float32", "bfloat16", "int8")
# Most tokens proposed per step: each proposal costs a draw in every step.
MAX_AHEAD = 16


class LoadedModel:
  """A decoder, its weights on the devices, and its tokenizer.

  `params` lie on `mesh` (axes data, fsdp, tensor), or on one device without a
  mesh. Each layer is copied to separate arrays, in the compute dtype and
  all-gathered over fsdp. Do not donate `params`: other arrays may stay shared.

  `weights` is the compute dtype, if different from training, or "int8": the
  layers' matrices in 8 bits, with a scale per output. `int8_cache` stores the
  KV cache in 8 bits, with a scale per vector. Speculative decoding: each step
  proposes `ahead` tokens, from the draft model `draft` (a smaller model
  with the same tokenizer and mesh) or, without a draft model, from earlier text
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
    draft: "LoadedModel | None" = None,
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
    # `unroll` merges adapters.
    self.cfg, self.tokenizer, self.mesh = lora.base(cfg), tokenizer, mesh
    self.int8_cache, self.ahead, self.draft = int8_cache, ahead, draft
    # Devices along the batch axis.
    self.ways = 1
    if mesh is not None:
      batch_axes = sharding.mesh_axes("batch")
      self.ways = math.prod(mesh.shape[axis] for axis in batch_axes)
    with self.in_mesh():
      self.graph, self.state = inference.unroll(cfg, params, weights == "int8")

  def require_causal(self) -> None:
    """Raises ConfigError if the model is an encoder."""
    schema.require(
      self.cfg.causal,
      "config.model.causal",
      self.cfg.causal,
      "every token sees what follows, so that text can be neither generated "
      "nor scored; masks can be filled (python -m lm.explain --fill)",
    )

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
        f"min_tokens={request.min_tokens}: at most "
        f"{schema.counted(limit, 'token')} can be drawn"
      )
    ends = self.ends(request)
    if len(ends) > request_lib.MAX_ENDS:
      own = self.ends(Request(""))
      raise schema.ConfigError(
        f"stop_ids={[*request.stop_ids[:8]]}: at most "
        f"{request_lib.MAX_ENDS - len(own)} ids beside the vocabulary's own, "
        f"{own}; {len(request.stop_ids)} are given"
      )
    n_out = len({*ends, *request.forbidden})
    if request.min_tokens > 0 and n_out == self.tokenizer.size:
      raise schema.ConfigError(
        f"min_tokens={request.min_tokens}: forbidden leaves eos and stop ids "
        "alone, none of which may be drawn before; leave it at 0, or forbid "
        "fewer ids"
      )
    return prompt, limit

  def ends(self, request: Request) -> list[int]:
    """Ids that end a sample: eos, others of which generation_config.json of the
    vocabulary says so, and those of the request.
    """
    own = self.tokenizer.eos, *self.tokenizer.stops
    return [*dict.fromkeys((*own, *request.stop_ids))]

  def models(self) -> list["LoadedModel"]:
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
          f"prompt: id {schema.shown(i)} is not in "
          f"[0, {self.tokenizer.size}), the ids of the tokenizer; encode the "
          "prompt with the checkpoint's own"
        )
    return ids or [bos]

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


def _start(prompt: str | Sequence[int]) -> str:
  """Start of a prompt for error messages: 20 characters or ids."""
  return repr(prompt[:20]) + ("..." if len(prompt) > 20 else "")


def _check_draft(cfg, tokenizer, mesh, draft) -> None:
  for what, same in (
    ("causal", draft.cfg.causal == cfg.causal),
    ("tokenizer", draft.tokenizer.fingerprint == tokenizer.fingerprint),
    ("mesh", draft.mesh == mesh),
    ("vocab_size", draft.cfg.vocab_size == cfg.vocab_size),
    ("context_length", draft.cfg.context_length >= cfg.context_length),
  ):
    if not same:
      raise schema.ConfigError(
        f"draft: its {what} is not that of the model; both must be trained "
        "to read forwards, with the same tokenizer and a context at least as "
        "long"
      )
