"""A model for lm-evaluation-harness (lm-eval); needs the extra `eval`.

Likelihoods come from the forward pass of `lm.evaluate`, and are equal on any
mesh; generated texts come from the decoding of `lm.sample`. A text is
conditioned on exactly one bos; a chat, on bos as the vocabulary's chats are.

With several processes, lm-eval runs on process 0 alone, since caches and hashes
may give requests a different order elsewhere. Process 0 broadcasts each list of
requests, and every process computes all answers: see `Answerer.lead`.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lm_eval.api import instance, model
from lm_eval.models import utils

from lm import config as config_lib
from lm import processes, schema, sharding
from lm.data import chat, chat_layout, windows
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import likelihood
from lm.model import decoder
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib

T = TypeVar("T")
# Private-use characters stand for the tokens of a chat template between
# `apply_chat_template` and `tok_encode`: a token's name in a text stays text.
_PRIVATE = 0x10FC00 - 0xDC00
_STANDS_FOR_TOKEN = re.compile("([\U0010fc00-\U0010fffd])")
# Most new tokens if a task sets no max_gen_toks.
_MAX_NEW_TOKENS = 256
# Of NaN, lm-eval makes a score: the first choice counts as the likeliest.
_NAN = (
  "tasks: the model's logits are NaN, and no score means anything; evaluate an "
  "earlier checkpoint"
)
# Keys of generation_kwargs with the name and meaning of a field of Request.
_RULES = (
  *("top_k", "top_p", "min_p", "typical_p", "min_tokens"),
  *("repetition_penalty", "frequency_penalty", "presence_penalty"),
)


class Answerer:
  """Answers lists of requests on the devices, the same on every process.

  `params` are placed on `mesh` (None: one device), in mode pmap replicated. A
  batch has `n_rows` rows, a multiple of the devices along the batch.
  `should_stop` is as in `likelihood.score`; `tell` gets the kind of request,
  how many of a list are answered, and how many there are.
  """

  def __init__(
    self,
    cfg: config_lib.ModelConfig,
    params: decoder.Params,
    tokenizer: tokenizer_lib.Tokenizer,
    mesh: jax.sharding.Mesh | None,
    n_rows: int,
    should_stop: Callable[[], bool] = lambda: False,
    step: likelihood.Step | None = None,
    tell: Callable[[str, int, int], None] = lambda kind, n_done, n: None,
  ):
    self.cfg, self.tokenizer = cfg, tokenizer
    self._params, self._n_rows, self._should_stop = params, n_rows, should_stop
    explicit = jax.sharding.AxisType.Explicit
    is_pmap = mesh is not None and explicit not in mesh.axis_types
    self._where, self._mesh = None, mesh
    if mesh is not None and is_pmap:
      self._where = NamedSharding(mesh, sharding.partition("batch", "length"))
      self._mesh = None
    self._step, self._tell = step or make_step(cfg, mesh), tell
    self._made: sampler_lib.Sampler | None = None
    # Whether other processes wait for a message of process 0.
    self._awaited = jax.process_count() > 1

  def likelihoods(
    self, spans: Sequence[likelihood.Span]
  ) -> list[likelihood.Likelihood]:
    return self._everywhere("likelihoods", spans)

  def texts(self, requests: Sequence[request_lib.Request]) -> list[str]:
    """Continues each prompt up to a stop string, a stop id or eos."""
    return self._everywhere("texts", [dataclasses.asdict(r) for r in requests])

  def lead(self, function: Callable[[], T]) -> T | None:
    """Collective: calls `function` on process 0 and returns the result; every
    further process computes the requests of process 0 and returns None.

    An error of `function` on process 0 raises ConfigError on the rest.
    """
    if jax.process_index() > 0:
      return self._follow()
    error = "process 0 failed; its own output says why"
    try:
      result = function()
      error = ""
      return result
    except schema.ConfigError as wrong:
      error = str(wrong)
      raise
    finally:
      if self._awaited:
        processes.broadcast(json.dumps(["end", error]))

  def _follow(self) -> None:
    while True:
      kind, asked = json.loads(processes.broadcast(None))
      if kind == "end":
        if asked:
          raise schema.ConfigError(asked)
        return
      self._answer(kind, asked)

  def _everywhere(self, kind: str, asked: Sequence[Any]) -> list[Any]:
    if not self._awaited:
      return self._answer(kind, asked)
    processes.broadcast(json.dumps([kind, asked]))
    # An error in `_answer` is raised on every process: no message follows.
    self._awaited = False
    answers = self._answer(kind, asked)
    self._awaited = True
    return answers

  def _answer(self, kind: str, asked: Sequence[Any]) -> list[Any]:
    if kind == "texts":
      return self._decode([request_lib.Request(**fields) for fields in asked])
    mesh = jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()
    with mesh:
      found = likelihood.score(
        self._step,
        self._params,
        [likelihood.Span(*span) for span in asked],
        n_rows=self._n_rows,
        context=self.cfg.context_length,
        where=self._where,
        should_stop=self._should_stop,
        tell=lambda n_done: self._tell(kind, n_done, len(asked)),
      )
    if any(math.isnan(one.total) for one in found):
      raise schema.RunError(_NAN)
    return found

  def _decode(self, requests: Sequence[request_lib.Request]) -> list[str]:
    if self._made is None:
      params = self._params
      if self._where is not None:  # Each device has a whole copy.
        params = jax.tree.map(lambda x: x.addressable_data(0), params)
      self._made = sampler_lib.Sampler(
        self.cfg, params, self.tokenizer, self._mesh
      )
    ways = self._made.ways
    n_slots = ways * min(-(-self._n_rows // ways), sampler_lib.MAX_SLOTS)
    engine = self._made.engine(n_slots)
    jobs = [job for request in requests for job in engine.submit(request)]
    texts = {}
    while not engine.idle:
      if self._should_stop():
        raise likelihood.Stopped
      for piece in engine.step():
        if piece.result is not None:
          if piece.result.finish_reason == "error":
            raise schema.RunError(_NAN)
          texts[piece.job] = piece.result.text
          self._tell("texts", len(texts), len(jobs))
    return [texts[job] for job in jobs]


def make_step(
  cfg: config_lib.ModelConfig, mesh: jax.sharding.Mesh | None
) -> likelihood.Step:
  """Returns the step for likelihoods, to share between Answerers on a mesh."""
  whole = None
  if mesh is not None and jax.sharding.AxisType.Auto in mesh.axis_types:
    whole = NamedSharding(mesh, P())
  return likelihood.make_step(cfg, whole)


class HarnessModel(model.TemplateLM):
  """An `lm_eval.api.model.LM` on top of an Answerer.

  A likelihood request keeps the last `max_length` + 1 tokens (default: the
  context length), and loses earlier tokens, as in lm-eval's own models.
  `loglikelihood_rolling` uses the windows of `lm.evaluate`, without the eos at
  the end of a document.
  """

  def __init__(self, answerer: Answerer, max_length: int | None = None):
    super().__init__()
    self._answerer, self._own = answerer, answerer.tokenizer
    self._max_length = max_length or answerer.cfg.context_length
    self._has_chats = False

  @property
  def max_length(self) -> int:
    return self._max_length

  @property
  def max_gen_toks(self) -> int:
    """Default number of new tokens: 256, or half of `max_length` if less."""
    return min(_MAX_NEW_TOKENS, max(self.max_length // 2, 1))

  @property
  def eot_token_id(self) -> int:
    return self._own.eos

  @property
  def prefix_token_id(self) -> int:
    return self._own.bos

  @property
  def tokenizer_name(self) -> str:
    return self._own.fingerprint

  # --- text and tokens ---

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the checkpoint's chat template, None if `chat_template` is False.

    Raises ConfigError on a template's name: a checkpoint has a single template.
    """
    if isinstance(chat_template, str):
      raise schema.ConfigError(
        f"apply_chat_template={chat_template!r}: a checkpoint has one chat "
        "template, without a name; write true"
      )
    return self._own.chat_template if chat_template else None

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns a conversation as text for `tok_encode`. Without
    `add_generation_prompt` the text ends with the content of the last message,
    for the model to continue.

    Raises ConfigError without a template, on messages refused by the template,
    and on messages with the characters reserved for tokens (from U+10FC00 on).
    """
    marked = chat_layout.marked_template(self._own)
    messages = [
      {"role": message["role"], "content": message["content"]}
      for message in chat_history
    ]
    for message in messages:
      if _STANDS_FOR_TOKEN.search(message["content"]):
        raise schema.ConfigError(
          f"messages: {schema.shown(message['content'])} has a private-use "
          "character (U+10FC00 and above); leave it out"
        )
    cut = (len(messages), add_generation_prompt)
    # Prompts need no marks around the targets of training.
    ((text,),) = chat_layout.render(marked, [(messages, [cut])], ("", ""))
    if isinstance(text, schema.ConfigError):
      raise text
    chat_layout.check_whole(text, messages, self._own.template_tokens)
    if not add_generation_prompt:
      last = messages[-1]["content"].strip()
      text = text[: text.rindex(last) + len(last)]
    self._has_chats = True
    known = chat_layout.names(self._own.marked_tokens)
    return text.translate({ord(mark): ord(mark) + _PRIVATE for mark in known})

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Returns token ids of a text, with a single bos first. No bos is added if
    `add_special_tokens` is False, or to a chat of a vocabulary whose templates
    write bos themselves.
    """
    del kwargs
    ids = self._encode(string)
    bos = self._own.bos
    if add_special_tokens is False or ids[:1] == [bos]:
      return ids
    is_chat = self._has_chats and _STANDS_FOR_TOKEN.search(string)
    if is_chat and not self._own.vocabulary.chats_begin_with_bos:
      return ids
    return [bos, *ids]

  def _encode(self, text: str) -> list[int]:
    if not self._has_chats:
      return self._own.encode(text)
    known = chat_layout.names(self._own.marked_tokens)
    marks = {ord(mark) + _PRIVATE: ord(mark) for mark in known}
    return chat.rendered_ids(self._own, text.translate(marks))

  # --- requests ---

  def loglikelihood(
    self, requests: list[instance.Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Returns (log-likelihood in nats, is_greedy) for each (context,
    continuation). An empty continuation, an error in lm-eval's own models,
    gives (0, True).
    """
    empty = [not _arguments(request)[1] for request in requests]
    some = [r for r, none in zip(requests, empty, strict=True) if not none]
    del disable_tqdm
    found = iter(super().loglikelihood(some, disable_tqdm=True))
    return [(0.0, True) if none else next(found) for none in empty]

  def _loglikelihood_tokens(
    self,
    requests: list[tuple[tuple[str, str], list[int], list[int]]],
    **kwargs: Any,
  ) -> list[tuple[float, bool]]:
    del kwargs
    spans = []
    for _, context, continuation in requests:
      tokens = [*context, *continuation][-(self.max_length + 1) :]
      spans.append(
        likelihood.Span(tokens, min(len(continuation), len(tokens) - 1))
      )
    answers = [(one[0], one[1]) for one in self._answerer.likelihoods(spans)]
    for (key, _, _), answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial("loglikelihood", key, answer)
    return answers

  def loglikelihood_rolling(
    self, requests: list[instance.Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-likelihood in nats of each text given bos, summed over
    windows of at most `max_length` tokens.
    """
    del disable_tqdm
    spans, n_spans = [], []
    for (text,) in (request.args for request in requests):
      tokens = [self._own.bos, *self._own.encode(text)]
      n_targets = len(tokens) - 1
      cuts = [*windows.cut(n_targets, self.max_length, self.max_length)]
      spans += [
        likelihood.Span(tokens[c.first : c.stop + 1], c.n_scored) for c in cuts
      ]
      n_spans.append(len(cuts))
    found, sums = iter(self._answerer.likelihoods(spans)), []
    for request, n in zip(requests, n_spans, strict=True):
      sums.append(math.fsum(next(found).total for _ in range(n)))
      self.cache_hook.add_partial(
        "loglikelihood_rolling", request.args, sums[-1]
      )
    return sums

  def generate_until(
    self, requests: list[instance.Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Returns the continuation of each prompt, without the stop string.

    The seed of a request comes from the task, the document and the number of
    the repetition: repetitions of a request differ, and runs are reproducible.
    """
    del disable_tqdm
    seen: Counter[int] = Counter()
    asked = []
    for request in requests:
      asked.append(self._request(request, seen[id(request)]))
      seen[id(request)] += 1
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt))
    texts = [""] * len(asked)
    found = self._answerer.texts([asked[i] for i in order])
    for i, text in zip(order, found, strict=True):
      texts[i] = text
      self.cache_hook.add_partial("generate_until", requests[i].args, text)
    return texts

  def _request(
    self, one: instance.Instance, repetition: int
  ) -> request_lib.Request:
    text, given = _arguments(one)
    fields: dict[str, Any] = dict(
      utils.normalize_gen_kwargs(given, self.max_gen_toks)
    )
    limit, stop = fields.pop("max_gen_toks"), fields.pop("until")
    temperature = fields.pop("temperature", 1.0)
    if not fields.pop("do_sample"):
      temperature = 0.0
    if not 1 <= limit < self.max_length:
      raise schema.ConfigError(
        f"{one.task_name}: generation_kwargs.max_gen_toks={limit}: must be in "
        f"[1, {self.max_length}), to leave a place of the context for a prompt"
      )
    for name in fields:
      if name not in _RULES:
        raise schema.ConfigError(
          f"{one.task_name}: generation_kwargs.{name}: "
          f"{schema.unknown(name, _RULES)}"
        )
    key = f"{one.task_name}/{one.doc_id}/{one.idx}/{repetition}"
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    ends = chat.stop_ids(self._own) if self._has_chats else []
    return request_lib.Request(
      prompt=self.tok_encode(text)[-(self.max_length - limit) :],
      max_new_tokens=limit,
      temperature=float(temperature),
      # As in lm-eval's own models, the name of eos is also a stop string.
      stop=[*(s for s in stop if s), self._own.piece(self._own.eos)],
      stop_ids=ends,
      seed=min(int.from_bytes(digest), 2**32 - 2),
      **fields,
    )


def _arguments(request: instance.Instance) -> Any:
  """Returns (context, continuation), (text,) or (prompt, generation_kwargs)."""
  return request.args
