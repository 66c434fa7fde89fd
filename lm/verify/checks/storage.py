"""Checks of what lies on disk: batches, which the data pipeline reads from
token stores, and checkpoints.
"""

import copy
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lm import batch as batch_lib
from lm import checkpoint
from lm import config as config_lib
from lm import objective as objective_lib
from lm.data import pipeline, store
from lm.data import tokenizer as tokenizer_lib
from lm.train import programs, resume
from lm.verify import result
from lm.verify.checks import harness
from lm.verify.result import Result

_STEPS = 5
# Vocabulary of a SentencePiece model trained on random words: little above the
# minimum.
_VOCABULARY = 448


def batches(config: config_lib.Config) -> Iterator[Result]:
  """Batches must not depend on the number of processes or the restart step,
  and none may repeat. The corpus is synthetic; all other data switches are the
  config's.
  """
  with tempfile.TemporaryDirectory() as folder:
    config = small_corpus(config, folder)
    whole = _first_batches(config, 0, None, _STEPS)
    rows, starts = config.train.batch_size, (0, 1, _STEPS - 1)
    for n in (1, 2, 4, 8):
      if rows % n:
        continue
      share, wrong = rows // n, 0
      for start in starts:
        parts = [
          _first_batches(
            config, start, (p * share, (p + 1) * share), _STEPS - start
          )
          for p in range(n)
        ]
        for step, pieces in enumerate(zip(*parts, strict=True), start):
          joined = jax.tree.map(lambda *x: np.concatenate(x), *pieces)
          wrong += harness.count_unequal(joined, whole[step])
      yield result.judge(
        "batches",
        f"{_STEPS} batches read by {n} process(es), restarted at steps "
        f"{starts}, and by one: elements that differ",
        wrong,
        0,
      )
    distinct = {batch.inputs.tobytes() for batch in whole}
    yield result.judge(
      "batches", "batches that repeat another", _STEPS - len(distinct), 0
    )


def _first_batches(config, start, rows, n) -> list[batch_lib.Batch]:
  """First `n` batches as a fresh process reads them: opens the token stores
  anew.
  """
  prepared = store.prepare(config)
  found = pipeline.train_batches(config, prepared, start_step=start, rows=rows)
  return list(itertools.islice(found, n))


def small_corpus(config: config_lib.Config, folder: str) -> config_lib.Config:
  """Copy of the config with a random-word text source per training source."""
  config = copy.deepcopy(config)
  data, rng = config.data, np.random.default_rng(3)
  letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
  words = ["".join(rng.choice(letters, n)) for n in rng.integers(1, 9, 500)]
  # 4 bytes a token, for _STEPS + 1 steps: a token may span several bytes.
  n_bytes = 4 * (_STEPS + 1) * config.tokens_per_step
  specs = []
  for source, name in enumerate(data.train):
    spec, objective = objective_lib.split_source(name)
    chat = isinstance(objective, objective_lib.Chat)
    ending = "jsonl" if chat else "txt"
    os.mkdir(os.path.join(folder, str(source)))
    for document in range(20):
      text = " ".join(rng.choice(words, n_bytes // 20 // 5))
      if chat:
        content = _conversations(text, config.train.sequence_length // 3)
      else:
        lines = [text[i : i + 300] for i in range(0, len(text), 300)]
        content = "\n\n".join(lines)  # also splits as text_unit line, block
      path = os.path.join(folder, str(source), f"{document}.{ending}")
      with open(path, "w") as file:
        file.write(content)
    kind = "jsonl" if chat else "text"
    suffix = name.removeprefix(spec)
    specs.append(f"{kind}:{folder}/{source}/*.{ending}{suffix}")
  data.train, data.validation = tuple(specs), ()
  data.cache_dir = os.path.join(folder, "cache")
  if config.tokenizer.kind == "huggingface":
    return config  # Its file, and the ids of its template.
  config.tokenizer.path = None
  config.model.vocab_size = tokenizer_lib.BYTES_SIZE
  if config.tokenizer.kind in ("sentencepiece", "bpe"):
    config.tokenizer.train_bytes = 50_000
    config.model.vocab_size = _VOCABULARY
  return config


def _conversations(text: str, size: int) -> str:
  """JSON lines: questions and answers of at most `size` characters each."""
  size = max(size, 1)
  lines = []
  for i in range(0, len(text) - 2 * size, 2 * size):
    parts = text[i : i + size], text[i + size : i + 2 * size]
    messages = [
      {"role": role, "content": part}
      for role, part in zip(("user", "assistant"), parts, strict=True)
    ]
    lines.append(json.dumps({"messages": messages}))
  return "\n".join(lines)


def checkpoints(config: config_lib.Config) -> Iterator[Result]:
  """A random training state, saved from one mesh and restored onto another,
  must keep all values and dtypes and be sharded as the step wants it.
  """
  fit, _ = harness.fitting_shapes(config)
  source, destination = (
    harness.with_mesh(config, shape) for shape in (fit[0], fit[-1])
  )
  like = programs.abstract_state(source, harness.make_mesh(source))
  target = programs.abstract_state(destination, harness.make_mesh(destination))
  rng = np.random.default_rng(11)

  def draw(x):
    if np.issubdtype(x.dtype, np.integer):
      return rng.integers(1, 1000, x.shape).astype(x.dtype)
    return rng.standard_normal(x.shape).astype(x.dtype)

  wanted = jax.tree.map(draw, like)
  state = harness.to_devices(wanted, like)
  meta = checkpoint.Meta(
    step=3,
    config=source,
    tokenizer=tokenizer_lib.Tokenizer().to_json(),
    fingerprint="of the data",
    batch_hash="of the batches",
    loss=1.0,
  )
  with tempfile.TemporaryDirectory() as folder:
    saved = checkpoint.Checkpoints(folder, config.checkpoint)
    try:
      saved.save(resume.to_trees(state), meta)
      saved.wait()
      loaded = checkpoint.load_meta(folder)
      found = saved.restore(loaded, resume.to_trees(target))
    finally:
      saved.close()
    params = checkpoint.load_params(folder, config.model)
  where = f"{harness.shape_name(fit[0])} to {harness.shape_name(fit[-1])}"
  everything, layout = map(resume.to_trees, (wanted, target))
  fields = ("step", "config", "tokenizer", "fingerprint")
  others = sum(getattr(loaded, name) != getattr(meta, name) for name in fields)
  for what, error in (
    (
      f"{where}: elements that differ",
      harness.count_unequal(found, everything),
    ),
    (
      f"{where}: arrays that lie otherwise than promised",
      _count_misplaced(found, layout),
    ),
    (
      "parameters read alone: elements that differ",
      harness.count_unequal(params, wanted.model),
    ),
    ("step, config, tokenizer and fingerprint: those that differ", others),
  ):
    yield result.judge("checkpoint", what, error, 0)


def _count_misplaced(found: Any, layout: Any) -> int:
  """Number of arrays not sharded like the abstract arrays of `layout`."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(layout), strict=True)
  return sum(
    not x.sharding.is_equivalent_to(to.sharding, x.ndim) for x, to in pairs
  )
