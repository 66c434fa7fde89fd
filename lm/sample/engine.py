"""Continuous batching: a queue of samples, served through fixed slots.

A free slot is refilled from the queue while the rest of the slots decode. The
tokens of a sample do not depend on time, slot or neighbours: the noise follows
from seed and positions, and the logits from a program independent of the
content of all other slots.
"""

import collections
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lm import schema
from lm.model import kv_cache
from lm.sample import decoding, loaded_model, rules
from lm.sample import request as request_lib
from lm.sample import stream as stream_lib
from lm.sample.request import Alternative, Piece, Request, Result

# Smallest buckets of the prompt and of `n_places`, in tokens.
MIN_PROMPT = 16
MIN_PLACES = 64
# Most decode steps in a device call, before the host sees any token.
MAX_STEPS = 32

# dtype of each field that Request and rules.Parameters share, but the seed.
_DTYPES = {
  name: {bool: bool, int: np.int32, float: np.float32}[schema.bare(hint)[0]]
  for name, hint in schema.hints(Request).items()
  if name in rules.Parameters.__dataclass_fields__ and name != "seed"
}


@dataclasses.dataclass
class _Job:
  """A sample of a request, and the output so far."""

  number: int
  request: Request
  seed: int
  prompt: list[int]
  limit: int
  ends: list[int]
  text: stream_lib.Stream
  token_ids: list[int] = dataclasses.field(default_factory=list)
  logs: list[float] = dataclasses.field(default_factory=list)
  others: list[list[Alternative]] = dataclasses.field(default_factory=list)
  n_given: int = 0
  reason: Any = None


class Engine:
  """Slots of a model. Not thread-safe: a single thread owns an Engine.

  `n_places` bounds prompt and continuation together, in tokens. `state` is the
  list of KV caches (model, then draft model) and `decoding.Slots`.
  """

  def __init__(
    self, model: loaded_model.LoadedModel, n_slots: int, n_places: int
  ):
    model.require_causal()
    self.model, self.n_slots, self.n_places = model, n_slots, n_places
    self._queue: collections.deque[_Job] = collections.deque()
    self._slots: list[_Job | None] = [None] * n_slots
    self._ended: list[_Job] = []
    self._n_jobs = 0
    # Last prefill (ids, bidirectional, KV caches), reused for equal prompts.
    self._prompt: tuple[list[int], bool, Any] | None = None
    # Rejected proposals of speculative decoding may lie beyond n_places.
    self._longest = n_places + model.ahead
    with model.in_mesh():
      self.state = self._empty()

  @property
  def idle(self) -> bool:
    """True if no job is queued, running, or still owed a last piece."""
    return not (self._queue or self._ended or any(self._slots))

  def n_free(self) -> int:
    return self._slots.count(None)

  def n_queued(self) -> int:
    return len(self._queue)

  def submit(self, request: Request) -> list[int]:
    """Queues each sample and returns the job numbers. Raises ConfigError."""
    prompt, limit = self.model.resolve(request, self.n_places)
    ends, jobs = self.model.ends(request), []
    for i in range(request.n_samples):
      stream = stream_lib.Stream(self.model.tokenizer, request.stop, prompt)
      seed = request.seed + i
      job = _Job(self._n_jobs, request, seed, prompt, limit, ends, stream)
      self._n_jobs += 1
      jobs.append(job.number)
      if limit > 0:
        self._queue.append(job)
      else:
        self._end(job, "length")
    return jobs

  def cancel(self, number: int) -> None:
    """Cancels a job; the next `step` returns the last piece. Ignores a job
    already ended, and an unknown number.
    """
    for job in [*self._queue, *self._slots]:
      if job is not None and job.number == number and job.reason is None:
        self._end(job, "cancelled")
        if job in self._queue:
          self._queue.remove(job)
        else:
          self._slots[self._slots.index(job)] = None

  def step(
    self, n_steps: int = MAX_STEPS, max_prefills: int | None = None
  ) -> list[Piece]:
    """Fills free slots, decodes up to `n_steps` steps, and returns new pieces.

    Stops early if a slot becomes free and the queue is not empty.
    `max_prefills` bounds the requests admitted before decoding: many new
    prompts must not delay the running samples.
    """
    with self.model.in_mesh():
      self.fill(max_prefills)
      if any(self._slots):
        self._decode(min(n_steps, MAX_STEPS))
    self._slots = [
      None if job is None or job.reason else job for job in self._slots
    ]
    pieces = [self._piece(job, None) for job in self._slots if job is not None]
    for job in self._ended:
      job.text.end()
      pieces.append(self._piece(job, self._result(job)))
    self._ended = []
    return [p for p in pieces if p.token_ids or p.text or p.result]

  def look(self, request: Request) -> tuple[dict[str, np.ndarray], int]:
    """The next token's distribution after each stage of the rules, each [V],
    and the id drawn. Needs a free slot; leaves neither job nor piece.
    """
    early = min(request.min_tokens, 1)
    one = dataclasses.replace(
      request, n_samples=1, max_new_tokens=1, min_tokens=early
    )
    (job,) = self.submit(one)
    s = self.model
    with s.in_mesh():
      self.fill()
      caches, slots = self.state
      found = decoding.look(
        s.graph, s.state, caches[0], slots, n_ids=s.tokenizer.size
      )
      slot = [j.number if j else None for j in self._slots].index(job)
      stages, drawn = jax.tree.map(lambda x: x[slot], s.fetch(found))
    self.cancel(job)
    self._ended = [ended for ended in self._ended if ended.number != job]
    return stages, int(drawn)

  def fill(self, max_prefills: int | None = None) -> None:
    """Admits queued samples to the free slots. All samples of a request enter
    together, as far as slots allow, with a single prefill of the prompt.
    """
    n_read = 0
    while self._queue and None in self._slots and n_read != max_prefills:
      n_read += 1
      job = self._queue[0]
      new = np.zeros(self.n_slots, bool)
      seeds = np.zeros(self.n_slots, np.uint32)
      while (
        self._queue
        and self._queue[0].request is job.request
        and None in self._slots
      ):
        slot = self._slots.index(None)
        self._slots[slot] = sample = self._queue.popleft()
        new[slot], seeds[slot] = True, sample.seed
      self._admit(job, new, seeds)

  def _admit(self, job: _Job, new: np.ndarray, seeds: np.ndarray) -> None:
    """Puts the job's prompt and rules into the `new` slots."""
    both_ways = job.request.bidirectional_prompt
    if self._prompt is None or self._prompt[:2] != (job.prompt, both_ways):
      self._prompt = (job.prompt, both_ways, self._read(job.prompt, both_ways))
    place, (caches, slots) = self.model.place, self.state
    row = self._row(job)
    self.state = decoding.admit(
      caches, slots, self._prompt[2], row, place(seeds), place(new)
    )

  def _empty(self) -> tuple[list[kv_cache.Cache], decoding.Slots]:
    """Empty KV caches and idle slots."""
    s = self.model
    text = stream_lib.Stream(s.tokenizer, ())
    filler = _Job(0, Request(), 0, [0], 0, [s.tokenizer.eos], text)
    return decoding.empty(
      self._row(filler),
      configs=tuple(each.cfg for each in s.models()),
      n_slots=self.n_slots,
      longest=self._longest,
      n_new=s.ahead + 1,
      int8=s.int8_cache,
    )

  def _read(self, prompt: list[int], both_ways: bool) -> list[kv_cache.Cache]:
    n_kept = len(prompt) - 1
    # Read in both directions, the last token is seen by all others.
    n_read = n_kept + both_ways
    inputs = np.full(
      (self.model.ways, min(bucket(n_read, MIN_PROMPT), self._longest)),
      self.model.tokenizer.pad,
      np.int32,
    )
    inputs[:, :n_read] = prompt[:n_read]
    lengths = np.full(self.model.ways, n_kept, np.int32)
    place = self.model.place
    return [
      decoding.read(
        each.graph,
        each.state,
        place(inputs),
        place(lengths),
        longest=self._longest,
        n_new=self.model.ahead + 1,
        int8=self.model.int8_cache,
        bidirectional=both_ways,
      )
      for each in self.model.models()
    ]

  def _row(self, job: _Job) -> decoding.Slots:
    """Initial slot content of a job, a row per device along the batch."""
    r, V = job.request, self.model.cfg.vocab_size
    ways, place = self.model.ways, self.model.place

    def column(value, dtype):
      return place(np.full(ways, value, dtype))

    def rows(row):
      return place(np.broadcast_to(row, (ways, len(row))))

    ends = np.full(request_lib.MAX_ENDS, V, np.int32)
    ends[: len(job.ends)] = job.ends
    in_prompt = np.zeros(V, bool)
    in_prompt[job.prompt] = True
    history = np.zeros(self._longest, np.int32)
    history[: len(job.prompt)] = job.prompt
    return decoding.Slots(
      rows=decoding.Rows(
        limits=column(job.limit, np.int32),
        min_tokens=column(r.min_tokens, np.int32),
        ends=rows(ends),
        alternatives=column(r.alternatives > 0, bool),
        processed=column(r.processed, bool),
        parameters=rules.Parameters(
          seed=column(0, np.uint32),
          bias=rows(_bias(r, V)),
          **{name: column(getattr(r, name), t) for name, t in _DTYPES.items()},
        ),
      ),
      past=rules.Past(
        prompt=rows(in_prompt), counts=rows(np.zeros(V, np.int32))
      ),
      last=column(job.prompt[-1], np.int32),
      history=rows(history),
      lengths=column(len(job.prompt) - 1, np.int32),
      n_drawn=column(0, np.int32),
      done=column(False, bool),
    )

  def _decode(self, n_steps: int) -> None:
    """Decodes on the device and gives each job the tokens of the job's slot."""
    s, (caches, slots) = self.model, self.state
    called_off = np.array([job is None for job in self._slots])
    *self.state, drawn = decoding.decode(
      s.graph,
      s.state,
      caches,
      slots,
      s.place(called_off),
      np.int32(n_steps),
      np.bool_(bool(self._queue)),
      n_ids=s.tokenizer.size,
      n_columns=MAX_STEPS * (s.ahead + 1),
      ahead=s.ahead,
      draft_graph=None if s.draft is None else s.draft.graph,
      draft_state=None if s.draft is None else s.draft.state,
    )
    drawn = s.fetch(vars(drawn))
    for slot, job in enumerate(self._slots):
      if job is not None:
        self._take(job, drawn, slot)

  def _take(self, job: _Job, drawn: dict[str, np.ndarray], slot: int) -> None:
    """Adds the tokens drawn in a slot to the job, up to the end of the job."""
    n_others = job.request.alternatives
    for column in range(int(drawn["n"][slot])):
      at = slot, column
      token, log = int(drawn["ids"][at]), float(drawn["logs"][at])
      job.token_ids.append(token)
      job.logs.append(log)
      if n_others:
        others = zip(
          drawn["other_ids"][at].tolist(),
          drawn["other_logs"][at].tolist(),
          strict=True,
        )
        job.others.append([Alternative(*pair) for pair in others][:n_others])
      if math.isnan(log):
        return self._end(job, "error")
      if token in job.ends:
        return self._end(job, "eos")
      if job.text.add(token):
        return self._end(job, "stop")
      if len(job.token_ids) == job.limit:
        return self._end(job, "length")

  def _end(self, job: _Job, reason: str) -> None:
    job.reason = reason
    self._ended.append(job)

  def _piece(self, job: _Job, result: Result | None) -> Piece:
    given, job.n_given = job.n_given, len(job.token_ids)
    return Piece(
      job=job.number,
      text=job.text.take(),
      token_ids=job.token_ids[given:],
      log_probabilities=job.logs[given:],
      alternatives=job.others[given:],
      result=result,
    )

  def _result(self, job: _Job) -> Result:
    return Result(
      request=job.request,
      seed=job.seed,
      text=job.text.text,
      token_ids=job.token_ids,
      log_probabilities=job.logs,
      finish_reason=job.reason,
      alternatives=job.others,
    )


def _bias(request: Request, n_vocab: int) -> np.ndarray:
  bias = np.zeros(n_vocab, np.float32)
  for i, value in request.logit_bias.items():
    bias[i] = value
  bias[list(request.forbidden)] = -np.inf
  return bias


def bucket(n: int, least: int) -> int:
  """The smallest power of two not below `n` and `least`."""
  return 2 ** math.ceil(math.log2(max(n, least)))
