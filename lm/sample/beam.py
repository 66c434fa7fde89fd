"""Beam search: the likeliest continuations, by keeping the n best so far.

It draws nothing. An id's log-probability is that of the softmax over what bias,
forbidden ids, `min_tokens` and penalties leave of the logits. Each step extends
every beam by every id; of the extensions, by sum of log-probabilities
descending, then by beam and id:

- those among the first n that end (eos, a stop id, the limit) are hypotheses,
  worth their sum / tokens**length_penalty, where the end counts as a token; the
  n best hypotheses are kept;
- the first n that do not end are the next beams.

The search is over at the limit, or once n hypotheses are kept and
`early_stopping` says so: True, at once; False, when the best beam's sum over
its present length**length_penalty is not above the worst hypothesis, though a
longer one might be; "never", when no beam can be better, which for a
length_penalty above 0 counts the limit as its length.

This is what Hugging Face's `generate(num_beams=n)` does, but that it lets rules
act on log-probabilities and not on logits, and does not normalise again.

The beams are rows of the cache, which has read the prompt once; rows are
gathered by parent after each step. On a mesh each device along the batch
searches alone, all the same.

B beams on all devices, n on one; R places, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lm import schema, sharding
from lm.model import cache as cache_lib
from lm.sample import engine as engine_lib
from lm.sample import loop, rules, text
from lm.sample.request import Request, Result

# Each is a row of the cache, and every step compares all that they lead to.
MAX_BEAMS = 256
_EARLY = (False, True, "never")
# Fields that say how to draw, or ask for what a search does not follow.
_MEANINGLESS = (
  "temperature",
  "top_k",
  "top_p",
  "min_p",
  "typical_p",
  "temperature_last",
  "stop",
  "n_samples",
  "alternatives",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Hypotheses:
  """Texts that ended, best first; the score of one that there is not is -inf.

  `ids` and `logs` are by position, up to `lengths`.
  """

  ids: Int[Array, "B R"]
  logs: Float[Array, "B R"]
  lengths: Int[Array, "B"]
  scores: Float[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Beams:
  """Texts that may go on, best first: `sums` of log-probabilities, -inf for
  those that there are not. `logs` are what is reported.
  """

  slots: loop.Slots
  logs: Float[Array, "B R"]
  sums: Float[Array, "B"]
  length_penalty: Float[Array, "B"]
  # As its place in _EARLY.
  early_stopping: Int[Array, "B"]
  found: Hypotheses


def search(
  sampler: Any,
  request: Request,
  n_beams: int,
  length_penalty: float = 1.0,
  early_stopping: bool | str = False,
) -> list[Result]:
  """The best `n_beams` continuations, best first; fewer, where no more are
  possible. Raises ConfigError on what cannot be met.

  Stop ids end them, texts cannot. Log-probabilities are as in `Result`: with
  `processed`, those that the search adds up. One beam is greedy, except with
  "never" and a length penalty.
  """
  _check(request, n_beams, length_penalty, early_stopping)
  prompt, limit = sampler.resolve(request)
  if limit == 0:
    return [Result(request, request.seed, "", [], [], "length")]
  n_rows = n_beams * sampler.ways
  n_places = engine_lib.bucket(len(prompt) + limit, engine_lib.MIN_PLACES)
  engine = engine_lib.Engine(sampler, n_rows, n_places)
  engine.submit(dataclasses.replace(request, n_samples=n_rows, seed=0))
  ends = {sampler.tokenizer.eos, *request.stop_ids}
  with sampler.in_mesh():
    engine.fill()
    caches, slots = engine.state
    found = _search(
      sampler.graph,
      sampler.state,
      caches[0],
      slots,
      sampler.place(np.full(n_rows, length_penalty, np.float32)),
      sampler.place(np.full(n_rows, _EARLY.index(early_stopping), np.int32)),
      n_ids=sampler.tokenizer.size,
    )
    found = sampler.fetch(vars(found))
  results = []
  for row in range(n_beams):
    if found["scores"][row] == -math.inf:
      break
    drawn = slice(len(prompt), int(found["lengths"][row]))
    ids, logs = (found[name][row, drawn].tolist() for name in ("ids", "logs"))
    results.append(_result(sampler.tokenizer, request, ids, logs, ends))
  return results


def _check(request, n_beams, length_penalty, early_stopping) -> None:
  neutral = Request()
  for name in _MEANINGLESS:
    value = getattr(request, name)
    if value != getattr(neutral, name) and value not in ([], ()):
      raise schema.ConfigError(
        f"{name}={value!r}: means nothing to beam search, which draws nothing "
        f"and ends at ids; leave it at {getattr(neutral, name)!r}"
      )
  integer = isinstance(n_beams, int) and not isinstance(n_beams, bool)
  if not integer or not 1 <= n_beams <= MAX_BEAMS:
    raise schema.ConfigError(
      f"n_beams={n_beams!r}: must be in [1, {MAX_BEAMS}], since each is a row "
      "of the cache"
    )
  number = isinstance(length_penalty, int | float)
  if not number or not math.isfinite(length_penalty):
    raise schema.ConfigError(
      f"length_penalty={length_penalty!r}: must be a finite number; 0 compares "
      "sums, 1 means of log-probabilities"
    )
  if not isinstance(early_stopping, bool) and early_stopping != "never":
    raise schema.ConfigError(
      f"early_stopping={early_stopping!r}: must be True, False or 'never'"
    )


def _result(tokenizer, request, ids, logs, ends) -> Result:
  reason = "eos" if ids[-1] in ends else "length"
  if any(math.isnan(log) for log in logs):
    reason = "error"
  stream = text.Stream(tokenizer, ())
  for i in ids[:-1] if reason == "eos" else ids:
    stream.add(i)
  stream.end()
  return Result(request, request.seed, stream.text, ids, logs, reason)


@functools.partial(jax.jit, static_argnames=("graph", "n_ids"))
def _search(
  graph: Any,
  state: Any,
  cache: cache_lib.Cache,
  slots: loop.Slots,
  length_penalty: Float[Array, "B"],
  early_stopping: Int[Array, "B"],
  *,
  n_ids: int,
) -> Hypotheses:
  """From slots that all stand at the end of one prompt."""
  model = nnx.merge(graph, state)
  choose = functools.partial(_choose, n_ids=n_ids)

  def step(carry):
    cache, beams = carry
    hidden, cache = model.extend(beams.slots.last[:, None], cache)
    logits = model.logits(hidden)[:, 0]
    parents, beams = sharding.by_row(choose, logits, beams)
    return _follow(cache, parents, beams.slots.lengths), beams

  _, beams = jax.lax.while_loop(
    lambda carry: ~jnp.all(carry[1].slots.done),
    step,
    (cache, sharding.by_row(_start, slots, length_penalty, early_stopping)),
  )
  return beams.found


def _start(slots, length_penalty, early_stopping):
  """One beam, which is the prompt, and room for others."""
  none = jnp.full(len(slots.last), -jnp.inf)
  logs = jnp.zeros(slots.history.shape, jnp.float32)
  found = Hypotheses(slots.history, logs, slots.lengths, none)
  sums = none.at[0].set(0.0)
  return Beams(slots, logs, sums, length_penalty, early_stopping, found)


def _choose(logits, beams, *, n_ids):
  """One step of one device's beams: parents, and what becomes of them."""
  slots, (n, V) = beams.slots, logits.shape
  processed = rules.process(
    logits, loop.parameters_of(slots, V), slots.past, n_ids
  )
  own = jax.nn.log_softmax(processed)
  shown = jnp.where(
    slots.rows.processed[:, None], own, jax.nn.log_softmax(logits)
  )
  # As many as can end, and n more.
  n_kept = min((slots.rows.ends.shape[1] + 1) * n, n * V)
  sums, flat = jax.lax.top_k((beams.sums[:, None] + own).reshape(-1), n_kept)
  parents, ids = flat // V, flat % V
  place, n_drawn = slots.lengths[0] + 1, slots.n_drawn[0] + 1
  limit = slots.rows.limits[0]
  ended = jnp.any(ids[:, None] == slots.rows.ends[:1], axis=1)
  ended |= (n_drawn >= limit) | jnp.isnan(sums)
  history = slots.history[parents].at[:, place].set(ids)
  logs = beams.logs[parents].at[:, place].set(shown[parents, ids])

  def worth(sums, length):
    return sums / length.astype(jnp.float32) ** beams.length_penalty[0]

  new = Hypotheses(
    history[:n],
    logs[:n],
    jnp.full(n, place + 1),
    jnp.where(ended[:n], worth(sums[:n], n_drawn), -jnp.inf),
  )
  both = jax.tree.map(lambda *x: jnp.concatenate(x), beams.found, new)
  _, best = jax.lax.top_k(both.scores, n)
  found = jax.tree.map(lambda x: x[best], both)
  sums, kept = jax.lax.top_k(jnp.where(ended, -jnp.inf, sums), n)
  parents, ids = parents[kept], ids[kept]

  early = beams.early_stopping[0]
  at_once, never = (early == _EARLY.index(x) for x in (True, "never"))
  longest = never & (beams.length_penalty[0] > 0)
  hope = worth(sums[0], jnp.where(longest, limit, n_drawn))
  worst = found.scores[-1]
  # False too where there is no beam, and where anything is NaN.
  go_on = (n_drawn < limit) & (hope > worst) & ~(at_once & (worst > -jnp.inf))
  counts = slots.past.counts[parents].at[jnp.arange(n), ids].add(1)
  slots = dataclasses.replace(
    slots,
    past=dataclasses.replace(slots.past, counts=counts),
    last=ids,
    history=history[kept],
    lengths=slots.lengths + 1,
    n_drawn=slots.n_drawn + 1,
    done=jnp.broadcast_to(~go_on, n),
  )
  return parents, dataclasses.replace(
    beams, slots=slots, logs=logs[kept], sums=sums, found=found
  )


def _follow(cache, parents, lengths):
  """The cache whose row i is what row `parents[i]` of its device was."""
  rows = ("batch",)
  # All that the cache holds of a layer is cut along rows and kv heads.
  heads = ("batch", "kv_heads")
  take = sharding.per_shard(
    lambda tree, parents: jax.tree.map(lambda x: x[parents], tree),
    heads,
    rows,
    out_axes=heads,
  )
  keys, values = take((cache.keys, cache.values), parents)
  return cache_lib.Cache(keys, values, lengths)
