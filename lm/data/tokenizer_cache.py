"""The config's tokenizer: loaded, or trained once and cached."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
import rich.console

from lm import config as config_lib
from lm import files, locks, schema
from lm import objective as objective_lib
from lm.data import sources as sources_lib
from lm.data import tokenizer as tokenizer_lib
from lm.data import tokenizer_training, vocabulary

_VERSION = 2
# Most documents of a sweep of `_sample`, as a multiple of those before it.
_GROWTH = 16


def make(
  config: config_lib.Config, sources: Sequence[sources_lib.Source]
) -> tokenizer_lib.Tokenizer:
  """Loads the config's tokenizer, or trains and caches a tokenizer once."""
  if config.tokenizer.kind == "bytes" or config.tokenizer.path is not None:
    return tokenizer_lib.load(config)
  if config.init_from is not None:
    raise schema.ConfigError(
      f"config.init_from={config.init_from}: the tokenizer is that of this "
      "run, which lm.train reads and then prepares the data; use that, or name "
      "a tokenizer.path"
    )
  made_of = [
    _VERSION,
    tokenizer_training.TRAINER,
    config.model.vocab_size,
    config.tokenizer.train_bytes,
    [source.fingerprint() for source in sources],
  ]
  special = config.tokenizer.special_tokens
  if special:  # Absent in the names of earlier versions.
    made_of.append(special)
  if config.tokenizer.kind == "bpe":
    made_of.append(["bpe", tokenizer_training.BPE_VERSION])
  template = tokenizer_lib.config_template(config)
  directory = sources_lib.cache_directory(config.data)
  key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
  path = os.path.join(directory, f"tokenizer-{key}.json")
  if not os.path.exists(path):
    files.check_directory(directory, "config.data.cache_dir")
    with locks.exclusive(directory):
      if not os.path.exists(path):
        texts = list(_sample(sources, config.tokenizer.train_bytes))
        _require_text(texts, sources)
        with rich.console.Console(stderr=True).status("training tokenizer"):
          tokenizer = tokenizer_training.train(config, texts)
        sealed = files.seal(json.loads(tokenizer.to_json()))
        files.replace(path, json.dumps(sealed, indent=2))
  model = _read_tokenizer(path).model
  return tokenizer_lib.Tokenizer(model, template, special)


def _read_tokenizer(path: str) -> tokenizer_lib.Tokenizer:
  try:
    with open(path, "rb") as file:
      content = files.unseal(file.read(), without=("kind", "model"))
    return tokenizer_lib.Tokenizer.from_json(json.dumps(content))
  except (ValueError, schema.ConfigError) as error:
    raise schema.RunError(
      f"tokenizer {path} is damaged: {error}. Remove it, and the next start "
      "trains it again, the same to the id"
    ) from error


def _sample(
  sources: Sequence[sources_lib.Source], n_bytes: int
) -> Iterator[str]:
  """Yields documents spread evenly over sources, at most `n_bytes` in total.

  Reads them in sweeps, each in the order of the sources: to find a place in a
  compressed file, or another part of a table, takes long.
  """
  ends = np.cumsum([len(source) for source in sources])
  n = int(ends[-1])
  # A step near the golden section of n, and coprime to n, visits every document
  # once; the documents visited are evenly spread at any stopping point.
  step = max(1, round(n * 0.6180339887))
  while math.gcd(step, n) > 1:
    step += 1
  done, left = 0, n_bytes

  def read(i: int) -> str | None:
    s = int(np.searchsorted(ends, i, side="right"))
    document = sources[s][i - (int(ends[s - 1]) if s else 0)]
    # Cut, of a huge document, but not to where it would seem to fit.
    return None if document is None else document.text[: left + 1]

  while done < n:
    # As many as seem to be needed and an eighth, since all are held in memory.
    needed = 1 + done * left * 9 // (8 * max(1, n_bytes - left))
    size = max(1, min(needed, _GROWTH * done))
    chosen = [k * step % n for k in range(done, min(n, done + size))]
    found = {i: read(i) for i in sorted(chosen)}
    for text in map(found.pop, chosen):
      if text is None:
        continue
      raw = text.encode()
      if len(raw) > left:
        yield raw[:left].decode(errors="ignore")
        return
      left -= len(raw)
      yield text
    done += len(chosen)


def _require_text(
  texts: Sequence[str], sources: Sequence[sources_lib.Source]
) -> None:
  if not any(texts):
    specs = ", ".join(repr(source.spec) for source in sources)
    raise schema.ConfigError(f"sources {specs}: empty, hold no text")


def for_sources(
  config: config_lib.Config,
  names: Sequence[str],
  tokenizer: tokenizer_lib.Tokenizer,
) -> tokenizer_lib.Tokenizer:
  """The tokenizer with the reserved tokens that the sources `names` need, of
  their objectives and, for chats, of the chat template.

  Raises ConfigError where the vocabulary and `model.vocab_size` have no room.
  """
  needed = needs(names, tokenizer)
  return tokenizer.with_reserved(needed, config.model.vocab_size)


def needs(
  names: Sequence[str], tokenizer: tokenizer_lib.Tokenizer
) -> list[str]:
  """Reserved tokens that the sources `names` need, in the order of RESERVED."""
  objectives = [objective_lib.of(name) for name in names]
  found = {token for o in objectives for token in _needed_by(o)}
  if any(isinstance(o, objective_lib.Chat) for o in objectives):
    found |= set(tokenizer.marked_tokens)
  return [name for name in vocabulary.RESERVED if name in found]


def _needed_by(objective: objective_lib.Causal) -> Sequence[str]:
  match objective:
    case objective_lib.SpanCorruption():
      return vocabulary.SENTINELS
    case objective_lib.Fim():
      return vocabulary.FIM
    case objective_lib.Masked():
      return ("<mask>",)
    case _:
      return ()
