"""What 8 bits cost: perplexity of a run's validation text.

JAX_PLATFORMS=cpu python benchmarks/quantise.py --workdir=runs/quickstart

Texts are pieces of a context each, in the order of the validation documents,
scored token by token through the cache, as decoding would see them. "At once"
is `Sampler.score`, which reads a text without a cache and has to say the same.
"""

import dataclasses
import functools
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import rich
from absl import flags
from flax import nnx
from rich import table as table_lib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lm import checkpoint, cli, schema
from lm.data import sources
from lm.data import tokenizer as tokenizer_lib
from lm.model import inference, kv_cache
from lm.sample import sampler as sampler_lib

_WORKDIR = cli.define_path("workdir", "Run directory of lm.train.")
_TEXTS = flags.DEFINE_integer(
  "texts", 64, "Pieces of text to score.", lower_bound=1
)


def read_texts(meta, tokenizer, n: int) -> np.ndarray:
  """The first n pieces of validation text: int32 [n, context + 1] with bos."""
  context, pieces = meta.config.model.context_length, []
  for spec in meta.config.data.validation:
    source = sources.open_source(spec, meta.config.data)
    for i in range(len(source)):
      document = source[i]
      ids = [] if document is None else tokenizer.encode(document.text)
      for start in range(0, len(ids) - context + 1, context):
        pieces.append([tokenizer.bos, *ids[start : start + context]])
        if len(pieces) == n:
          return np.array(pieces, np.int32)
  raise schema.ConfigError(
    f"--texts={n}: the validation text has {len(pieces)}; write as many at most"
  )


@functools.partial(jax.jit, static_argnames=("graph", "int8"))
def score(graph, state, texts, int8):
  """Sum of the log-probabilities of all but the first ids, one at a time."""
  model = nnx.merge(graph, state)
  B, T = texts.shape

  def step(cache, ids):
    now, following = ids
    hidden, cache = inference.extend(model, now[:, None], cache)
    logs = jax.nn.log_softmax(model.logits(hidden)[:, 0])
    cache = dataclasses.replace(cache, lengths=cache.lengths + 1)
    return cache, jnp.take_along_axis(logs, following[:, None], axis=1)

  cache = kv_cache.empty(model.cfg, B, T, int8=int8)
  _, logs = jax.lax.scan(step, cache, (texts[:, :-1].T, texts[:, 1:].T))
  return jnp.sum(logs)


def main() -> None:
  meta = checkpoint.load_meta(_WORKDIR.value, None)
  tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  params = checkpoint.load_params(
    _WORKDIR.value, meta.config.model, meta.step, None
  )
  texts = read_texts(meta, tokenizer, _TEXTS.value)
  n_tokens = texts[:, 1:].size
  table = table_lib.Table(title=f"{n_tokens} tokens of validation text")
  for name in ("compute", "weights", "cache"):
    table.add_column(name)
  for name in ("MB", "perplexity", "change", "at once"):
    table.add_column(name, justify="right")
  first = None
  for dtype in ("float32", "bfloat16"):
    cfg = dataclasses.replace(meta.config.model, dtype=dtype)
    for weights in (None, "int8"):
      sampler = sampler_lib.Sampler(cfg, params, tokenizer, weights=weights)
      size = sum(x.nbytes for x in jax.tree.leaves(sampler.state))
      whole = sum(sampler.score(text.tolist()).total for text in texts)
      for int8 in (False, True):
        total = float(score(sampler.graph, sampler.state, texts, int8))
        found = math.exp(-total / n_tokens)
        first = first or found
        table.add_row(
          dtype,
          weights or dtype,
          "int8" if int8 else dtype,
          f"{size / 1e6:.2f}",
          f"{found:.4f}",
          f"{found / first - 1:+.3%}",
          "" if int8 else f"{math.exp(-whole / n_tokens):.4f}",
        )
  rich.print(table)


if __name__ == "__main__":
  flags.mark_flag_as_required("workdir")
  cli.run(main, takes_config=False)
