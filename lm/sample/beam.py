"""Beam search: finds likely continuations by keeping the n best so far.

Nothing is drawn at random. Log-probabilities are the log-softmax of the logits
after bias, forbidden ids, `min_tokens` and penalties. Each step extends every
beam by every id and sorts the extensions by sum of log-probabilities
descending, then by beam and id:

- Of the first n extensions, the finished (by eos, a stop id or the limit) are
  hypotheses, with score sum / tokens**length_penalty; the end counts as a
  token. The n best hypotheses are kept.
- The first n unfinished extensions are the next beams.

The search stops at the limit, or once n hypotheses are kept and
`early_stopping` allows the stop:

- True: at once.
- False: when the best beam's present sum / tokens**length_penalty is not above
  the worst hypothesis, even if a longer continuation might be.
- "never": when no beam can beat the worst hypothesis; a length_penalty above 0
  counts the limit as the beam's length.

The search equals Hugging Face's `generate(num_beams=n)`, except that Hugging
Face applies rules to log-probabilities, not logits, without renormalising.

Beams are rows of the KV cache after a single prefill of the prompt; rows are
gathered by parent after each step. On a mesh, each device along the batch runs
the same whole search.

B beams on all devices, n per device; R positions, V vocabulary.
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
from lm.model import inference, kv_cache
from lm.sample import decoding, loaded_model, rules, stream
from lm.sample import engine as engine_lib
from lm.sample.request import Request, Result

# Each beam is a row of the KV cache; each step ranks n * V extensions.
MAX_BEAMS = 256
_EARLY = (False, True, "never")
# Request fields about random draws, or without support in beam search.
_MEANINGLESS = (
  "temperature",
  "temperature_last",
  "stop",
  "seed",
  "n_samples",
  "alternatives",
  *(cut.field for cut in rules.CUTS),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Hypotheses:
  """Finished continuations, best first. Unused slots score -inf.

  `ids` and `logs` are by position, up to `lengths`.
  """

  ids: Int[Array, "B R"]
  logs: Float[Array, "B R"]
  lengths: Int[Array, "B"]
  scores: Float[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Beams:
  """Unfinished continuations, best first. `sums` of log-probabilities rank the
  beams, -inf in unused slots; `logs` are the log-probabilities to report.
  """

  slots: decoding.Slots
  logs: Float[Array, "B R"]
  sums: Float[Array, "B"]
  length_penalty: Float[Array, "B"]
  # Index into _EARLY.
  early_stopping: Int[Array, "B"]
  found: Hypotheses


def search(
  model: loaded_model.LoadedModel,
  request: Request,
  n_beams: int,
  length_penalty: float = 1.0,
  early_stopping: bool | str = False,
) -> list[Result]:
  """Beam search: the best `n_beams` continuations, best first; fewer if fewer
  exist. Raises ConfigError on an invalid request or option.

  Stop ids work, stop strings are refused. Log-probabilities are as in `Result`;
  with `processed`, the log-probabilities summed by the search. A single beam is
  greedy decoding, except with "never" and a length penalty.
  """
  check(request, n_beams, length_penalty, early_stopping)
  prompt, limit = model.resolve(request)
  if limit == 0:
    return [Result(request, request.seed, "", [], [], "length")]
  n_rows = n_beams * model.ways
  n_places = engine_lib.bucket(len(prompt) + limit, engine_lib.MIN_PLACES)
  engine = engine_lib.Engine(model, n_rows, n_places)
  engine.submit(dataclasses.replace(request, n_samples=n_rows, seed=0))
  ends = model.ends(request)
  with model.in_mesh():
    engine.fill()
    caches, slots = engine.state
    found = _search(
      model.graph,
      model.state,
      caches[0],
      slots,
      model.place(np.full(n_rows, length_penalty, np.float32)),
      model.place(np.full(n_rows, _EARLY.index(early_stopping), np.int32)),
      n_ids=model.tokenizer.size,
    )
    found = model.fetch(vars(found))
  results = []
  for row in range(n_beams):
    if found["scores"][row] == -math.inf:
      break
    drawn = slice(len(prompt), int(found["lengths"][row]))
    ids, logs = (found[name][row, drawn].tolist() for name in ("ids", "logs"))
    results.append(_result(model.tokenizer, request, prompt, ids, logs, ends))
  return results


def check(
  request: Request,
  n_beams: int,
  length_penalty: float = 1.0,
  early_stopping: bool | str = False,
) -> None:
  """Raises ConfigError on an option, or a field that beam search ignores."""
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


def _result(tokenizer, request, prompt, ids, logs, ends) -> Result:
  reason = "eos" if ids[-1] in ends else "length"
  if any(math.isnan(log) for log in logs):
    reason = "error"
  text = stream.Stream(tokenizer, (), prompt)
  for i in ids[:-1] if reason == "eos" else ids:
    text.add(i)
  text.end()
  return Result(request, request.seed, text.text, ids, logs, reason)


@functools.partial(jax.jit, static_argnames=("graph", "n_ids"))
def _search(
  graph: Any,
  state: Any,
  cache: kv_cache.Cache,
  slots: decoding.Slots,
  length_penalty: Float[Array, "B"],
  early_stopping: Int[Array, "B"],
  *,
  n_ids: int,
) -> Hypotheses:
  """Runs the search. All slots must hold the same prompt."""
  model = nnx.merge(graph, state)
  choose = functools.partial(_choose, n_ids=n_ids)

  def step(carry):
    cache, beams = carry
    hidden, cache = inference.extend(model, beams.slots.last[:, None], cache)
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
  """Initial state: one live beam (the prompt), other slots at -inf."""
  none = jnp.full(len(slots.last), -jnp.inf)
  logs = jnp.zeros(slots.history.shape, jnp.float32)
  found = Hypotheses(slots.history, logs, slots.lengths, none)
  sums = none.at[0].set(0.0)
  return Beams(slots, logs, sums, length_penalty, early_stopping, found)


def _choose(logits, beams, *, n_ids):
  """A search step on a device: the parent of each new beam, and the beams."""
  slots, (n, V) = beams.slots, logits.shape
  processed = rules.process(
    logits, decoding.parameters_of(slots, V), slots.past, n_ids
  )
  own = jax.nn.log_softmax(processed)
  shown = jnp.where(
    slots.rows.processed[:, None], own, jax.nn.log_softmax(logits)
  )
  # Up to n * E extensions end by a stop id; n more may go on.
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
  # Comparisons are also False without a live beam (-inf) and on NaN.
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
  """Gathers the KV cache by parent: new row i is the device's old row
  `parents[i]`.
  """
  rows = ("batch",)
  # Every array of a layer's cache is sharded by rows and kv heads.
  heads = ("batch", "kv_heads")
  take = sharding.per_shard(
    lambda tree, parents: jax.tree.map(lambda x: x[parents], tree),
    heads,
    rows,
    out_axes=heads,
  )
  keys, values = take((cache.keys, cache.values), parents)
  return kv_cache.Cache(keys, values, lengths)
