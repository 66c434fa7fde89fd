"""Compiled programs of sampling: prefill of prompts, then decode, in slots.

A slot is a row of the batch and serves many samples, in turn. Prefill compiles
once per bucket of prompt lengths; decode compiles once for all requests. The
layers are unrolled with a KV cache each. All caches are donated, to avoid
copies in a step.

B slots, T prompt length, V vocabulary, E stop ids of a row, C columns (a column
per drawn token), A alternatives, k tokens proposed ahead, R positions of the
history, P devices along the batch.
"""

import dataclasses
import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lm import config as config_lib
from lm import sharding
from lm.model import attention, inference, kv_cache
from lm.sample import request, rules, speculative


@typing.dataclass_transform()
def _node(cls: type) -> type:
  """Registers a dataclass as a pytree; all fields must be arrays or trees."""
  return jax.tree_util.register_dataclass(dataclasses.dataclass(cls))


@_node
class Rows:
  """Settings of each row, constant while a request runs."""

  limits: Int[Array, "B"]  # Max new tokens.
  min_tokens: Int[Array, "B"]  # Min new tokens, before any stop id.
  ends: Int[Array, "B E"]  # Stop ids with eos, padded with V.
  alternatives: Bool[Array, "B"]  # Reports the likeliest ids too.
  processed: Bool[Array, "B"]  # Reports log-probabilities after the rules.
  parameters: rules.Parameters


@_node
class Slots:
  """Decoding state of each row, apart from the KV cache.

  `last`: newest token, not yet in the KV cache; its position is `lengths`.
  """

  rows: Rows
  past: rules.Past
  last: Int[Array, "B"]  # The newest drawn token, or the end of the prompt.
  history: Int[Array, "B R"]  # Token ids by position, `last` included.
  lengths: Int[Array, "B"]  # Tokens in the KV cache.
  n_drawn: Int[Array, "B"]
  done: Bool[Array, "B"]


@_node
class Drawn:
  """Tokens drawn by a call of `decode`, with log-probabilities and the
  likeliest alternatives. Only the first `n` columns of a row are valid.
  """

  ids: Int[Array, "B C"]
  logs: Float[Array, "B C"]
  other_ids: Int[Array, "B C A"]
  other_logs: Float[Array, "B C A"]
  n: Int[Array, "B"]


@functools.partial(
  jax.jit,
  static_argnames=("configs", "n_slots", "longest", "n_new", "int8"),
)
def empty(
  row: Slots,
  *,
  configs: tuple[config_lib.ModelConfig, ...],
  n_slots: int,
  longest: int,
  n_new: int,
  int8: bool,
) -> tuple[list[kv_cache.Cache], Slots]:
  """An empty KV cache per model, and idle slots with the shapes of `row`."""
  where = sharding.spec("batch")

  def zeros(x):
    return jnp.zeros((n_slots, *x.shape[1:]), x.dtype, out_sharding=where)

  done = jnp.ones(n_slots, bool, out_sharding=where)
  caches = [
    kv_cache.empty(cfg, n_slots, longest, n_new=n_new, int8=int8)
    for cfg in configs
  ]
  return caches, dataclasses.replace(jax.tree.map(zeros, row), done=done)


@functools.partial(
  jax.jit,
  static_argnames=("graph", "longest", "n_new", "int8", "bidirectional"),
)
def read(
  graph: Any,
  state: Any,
  inputs: Int[Array, "P T"],
  lengths: Int[Array, "P"],
  *,
  longest: int,
  n_new: int = 1,
  int8: bool = False,
  bidirectional: bool = False,
) -> kv_cache.Cache:
  """Prefill: the KV cache of a prompt, without the last token.

  The first step of `decode` reads the last token: the same program draws every
  token, and prefill needs no output head. P is 1, or on a mesh the number of
  devices along the batch; each device reads the same prompt.

  `lengths` are the tokens to keep. With `bidirectional`, `inputs` also holds
  the last token of the prompt, right after these: all others attend to it.
  """
  model = nnx.merge(graph, state)
  places = jnp.arange(inputs.shape[1])[None]
  real = places < lengths[:, None] + bidirectional
  tokens = attention.Tokens(
    # Padding gets position 0: a bucket may be longer than a learned table.
    positions=jnp.where(real, places, 0),
    segments=real.astype(jnp.int32),
    prefix=real if bidirectional else None,
  )
  pairs = inference.prefill(model, inputs, tokens)
  return kv_cache.of_prompts(
    model.cfg, pairs, lengths, longest, n_new=n_new, int8=int8
  )


@functools.partial(jax.jit, donate_argnames=("caches", "slots"))
def admit(
  caches: list[kv_cache.Cache],
  slots: Slots,
  prompts: list[kv_cache.Cache],
  row: Slots,
  seeds: Array,
  new: Bool[Array, "B"],
) -> tuple[list[kv_cache.Cache], Slots]:
  """Puts a prefilled prompt and the request's settings into each `new` slot.

  `prompts` (a KV cache per model) and `row` have P rows, as in `read`; `seeds`
  is by slot.
  """

  def choose(new, seeds, old, row):
    def one(old, row):
      where = new.reshape(-1, *(1,) * (old.ndim - 1))
      return jnp.where(where, row, old)

    merged = jax.tree.map(one, old, row)
    parameters = merged.rows.parameters
    seeds = jnp.where(new, seeds, parameters.seed)
    parameters = dataclasses.replace(parameters, seed=seeds)
    rows = dataclasses.replace(merged.rows, parameters=parameters)
    return dataclasses.replace(merged, rows=rows)

  filled = [
    kv_cache.insert(cache, prompt, new)
    for cache, prompt in zip(caches, prompts, strict=True)
  ]
  return filled, sharding.by_row(choose, new, seeds, slots, row)


@functools.partial(
  jax.jit,
  static_argnames=("graph", "n_ids", "n_columns", "ahead", "draft_graph"),
  donate_argnames=("caches", "slots"),
)
def decode(
  graph: Any,
  state: Any,
  caches: list[kv_cache.Cache],
  slots: Slots,
  called_off: Bool[Array, "B"],
  n_steps: Int[Array, ""],
  until_free: Bool[Array, ""],
  *,
  n_ids: int,
  n_columns: int,
  ahead: int = 0,
  draft_graph: Any = None,
  draft_state: Any = None,
) -> tuple[list[kv_cache.Cache], Slots, Drawn]:
  """Decodes up to `n_steps` steps: at least a token per step and live row, from
  the first `n_ids` ids. Stops once all rows are done or, if `until_free`, once
  a row becomes done. `called_off` rows (slots without a job) count as done.

  Speculative decoding: each step checks `ahead` = k proposed tokens, from the
  draft model or, without a draft, from prompt lookup. C must be at least
  (k + 1) * n_steps. Proposals never change the output: each token is drawn from
  the model's own logits with the noise of the token's position, and an equal
  proposal only saves a step.
  """
  model = nnx.merge(graph, state)
  draft = None if draft_graph is None else nnx.merge(draft_graph, draft_state)
  slots = dataclasses.replace(slots, done=slots.done | called_off)
  before = slots.done

  def more(carry):
    _, slots, _, n = carry
    freed = until_free & jnp.any(slots.done & ~before)
    return (n < n_steps) & ~jnp.all(slots.done) & ~freed

  def step(carry):
    (cache, *rest), slots, drawn, n = carry
    if draft is None:
      look_up = functools.partial(speculative.look_up, k=ahead)
      proposed = sharding.by_row(look_up, slots)
    else:
      go_on = functools.partial(_go_on, n_ids=n_ids)
      proposed, *rest = speculative.propose(draft, rest[0], slots, ahead, go_on)
    inputs = jnp.concatenate([slots.last[:, None], proposed], axis=1)
    hidden, cache = inference.extend(model, inputs, cache)
    accept = functools.partial(_accept, n_ids=n_ids)
    logits = model.logits(hidden)
    slots, drawn = sharding.by_row(accept, logits, proposed, slots, drawn)
    cache = dataclasses.replace(cache, lengths=slots.lengths)
    return [cache, *rest], slots, drawn, n + 1

  drawn = sharding.by_row(
    functools.partial(_nothing, n_columns=n_columns), slots
  )
  zero = jnp.zeros((), jnp.int32)
  caches, slots, drawn, _ = jax.lax.while_loop(
    more, step, (caches, slots, drawn, zero)
  )
  return caches, slots, drawn


@functools.partial(jax.jit, static_argnames=("graph", "n_ids"))
def look(
  graph: Any,
  state: Any,
  cache: kv_cache.Cache,
  slots: Slots,
  *,
  n_ids: int,
) -> tuple[dict[str, Float[Array, "B V"]], Int[Array, "B"]]:
  """The distribution of each row's next token after each stage of the rules,
  and the id drawn. Changes neither KV cache nor slots.
  """
  model = nnx.merge(graph, state)
  hidden, _ = inference.extend(model, slots.last[:, None], cache)
  logits = model.logits(hidden)[:, 0]

  def stages_of(logits, slots):
    parameters = parameters_of(slots, logits.shape[1])
    stages = rules.stages(logits, parameters, slots.past, n_ids)
    return stages, _sample(logits, slots, n_ids)[0]

  return sharding.by_row(stages_of, logits, slots)


def _nothing(slots, n_columns):
  B, V = slots.past.counts.shape
  A = min(request.MAX_ALTERNATIVES, V)
  return Drawn(
    ids=jnp.zeros((B, n_columns), jnp.int32),
    logs=jnp.zeros((B, n_columns), jnp.float32),
    other_ids=jnp.zeros((B, n_columns, A), jnp.int32),
    other_logs=jnp.zeros((B, n_columns, A), jnp.float32),
    n=jnp.zeros(B, jnp.int32),
  )


def _accept(logits, proposed, slots, drawn, *, n_ids):
  """Draws from logits [B, k + 1, V] up to and including the first token that
  differs from the proposal.
  """
  k = proposed.shape[1]
  agreed = jnp.ones(len(proposed), bool)
  for i in range(k + 1):
    alive = agreed & ~slots.done
    slots, drawn = _draw(logits[:, i], slots, drawn, alive, n_ids)
    if i < k:
      agreed &= slots.last == proposed[:, i]
  return slots, drawn


def parameters_of(slots, n_vocab):
  """Sampling parameters per row; stop ids get -inf before `min_tokens`."""
  rows = slots.rows
  early = slots.n_drawn < rows.min_tokens

  def without_ends():
    ids = jnp.arange(n_vocab)[None, None]
    ends = jnp.any(ids == rows.ends[:, :, None], axis=1)
    return jnp.where(early[:, None] & ends, -jnp.inf, rows.parameters.bias)

  bias = jax.lax.cond(
    jnp.any(early), without_ends, lambda: rows.parameters.bias
  )
  return dataclasses.replace(rows.parameters, bias=bias)


def _sample(logits, slots, n_ids):
  """Draws the next id of each row; also returns the scores after the rules."""
  parameters = parameters_of(slots, logits.shape[1])
  return rules.sample(logits, parameters, slots.past, slots.lengths + 1, n_ids)


def _draw(logits, slots, drawn, alive, n_ids):
  """Draws a token for each `alive` row, and updates `slots` and `drawn`."""
  rows, past = slots.rows, slots.past
  ids, processed = _sample(logits, slots, n_ids)
  total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)

  def after_rules():
    logs = jax.nn.log_softmax(processed)
    return jnp.where(rows.processed[:, None], logs, logits - total)

  scores = jax.lax.cond(
    jnp.any(rows.processed), after_rules, lambda: logits - total
  )
  row = jnp.arange(len(ids))
  log = scores[row, ids]
  A = drawn.other_ids.shape[2]
  other_logs, other_ids = jax.lax.cond(
    jnp.any(rows.alternatives),
    lambda: tuple(jax.lax.top_k(scores, A)),
    lambda: (drawn.other_logs[:, 0], drawn.other_ids[:, 0]),
  )
  # Rows not alive get a column out of range: mode="drop" skips the write.
  column = jnp.where(alive, drawn.n, drawn.ids.shape[1])

  def put(old, new):
    return old.at[row, column].set(new, mode="drop")

  drawn = Drawn(
    put(drawn.ids, ids),
    put(drawn.logs, log),
    put(drawn.other_ids, other_ids),
    put(drawn.other_logs, other_logs),
    drawn.n + alive,
  )
  n_drawn = slots.n_drawn + alive
  ended = jnp.any(ids[:, None] == rows.ends, axis=1) | jnp.isnan(log)
  lengths = slots.lengths + alive
  place = jnp.where(alive, lengths, slots.history.shape[1])
  slots = Slots(
    rows=rows,
    past=dataclasses.replace(past, counts=past.counts.at[row, ids].add(alive)),
    last=jnp.where(alive, ids, slots.last),
    history=slots.history.at[row, place].set(ids, mode="drop"),
    lengths=lengths,
    n_drawn=n_drawn,
    done=slots.done | (alive & (ended | (n_drawn >= rows.limits))),
  )
  return slots, drawn


def _go_on(logits, slots, n_ids):
  """Draws from draft `logits`, and advances `slots` as if accepted."""
  ids, _ = _sample(logits, slots, n_ids)
  counts = slots.past.counts.at[jnp.arange(len(ids)), ids].add(1)
  return dataclasses.replace(
    slots,
    past=dataclasses.replace(slots.past, counts=counts),
    last=ids,
    lengths=slots.lengths + 1,
    n_drawn=slots.n_drawn + 1,
  )
