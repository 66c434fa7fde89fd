"""Converts Hugging Face checkpoints to runs, and runs to checkpoints."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator

from etils import epath

from lm import checkpoint, files, schema
from lm import config as config_lib
from lm.convert import card, recheck, vocabulary
from lm.data import chat
from lm.data import tokenizer as tokenizer_lib
from lm.huggingface import folder as folder_lib
from lm.huggingface import imported
from lm.model import decoder
from lm.sample import load


def to_run(source: str, output: str) -> None:
  """Writes a run directory with one checkpoint, at step 0, from the folder
  `source`. Raises ConfigError as `folder.find` and `imported.meta` do.
  """
  found = folder_lib.find(source)
  for note in found.notes:
    print(f"{source}: {note}")
  meta = imported.meta(found)
  params = folder_lib.load_on(found)
  with made(output) as partial:
    save_run(partial, params, meta)


def save_run(
  output: str, params: decoder.Params, meta: checkpoint.Meta
) -> None:
  """Writes a run directory with one checkpoint, without optimizer state."""
  saved = checkpoint.Checkpoints(output, meta.config.checkpoint)
  saved.save({"params": params}, meta)
  saved.close()
  path = epath.Path(os.path.join(output, "config.json"))
  files.replace(path, config_lib.to_json(meta.config))


def from_run(
  workdir: str,
  meta: checkpoint.Meta,
  output: str,
  *,
  dtype: str = "float32",
  family: str | None = None,
  check: bool = True,
) -> None:
  """Writes a Hugging Face checkpoint of a run: config.json, tensors, tokenizer,
  generation_config.json, and README.md.

  With `check`, transformers reads the checkpoint, and logits and token ids are
  compared; without transformers, a warning is printed. Raises ConfigError if
  `output` is not a local path or no family can express the model, and RunError
  on a difference; after an error nothing is left of `output`.
  """
  files.local_path(output, "--output")
  cfg, params = load.model(workdir, meta)
  tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  ids = {
    "bos_token_id": tokenizer.bos,
    "eos_token_id": tokenizer.eos,
    "pad_token_id": tokenizer.pad,
  }
  # In a conversation, the end of a turn also ends generation.
  ends = [tokenizer.eos, *chat.stop_ids(tokenizer)]
  generation = {**ids, "eos_token_id": ends}
  with made(output) as partial:
    written = folder_lib.write(
      partial, cfg, params, dtype=dtype, family=family, more=ids
    )
    _write(partial, "generation_config.json", json.dumps(generation, indent=2))
    text = card.text(workdir, meta, written.model_type, dtype)
    _write(partial, "README.md", text)
    vocabulary.write(tokenizer, partial, cfg.context_length)
    if not check:
      return
    if (missing := recheck.missing()) is not None:
      print(
        f"{output}: was not read again: {missing} is not installed; pip "
        "install torch transformers",
        file=sys.stderr,
      )
      return
    recheck.compare(partial, cfg, params, dtype)
    vocabulary.verify(tokenizer, partial)


def _write(where: str, name: str, content: str) -> None:
  files.replace(os.path.join(where, name), content)


@contextlib.contextmanager
def made(output: str) -> Iterator[str]:
  """Yields a temporary folder, renamed to `output` at the end and removed on an
  error. In an object store, yields `output`.
  """
  if not files.is_local(output):
    yield output
    return
  output = output.rstrip(os.sep)
  partial = f"{output}.{os.getpid()}.partial"
  try:
    os.makedirs(partial)
  except FileExistsError:
    raise schema.ConfigError(
      f"{partial}: exists, as an export that was killed leaves it; remove it"
    ) from None
  try:
    yield partial
    if os.path.lexists(output):
      raise schema.ConfigError(
        f"{output}: was made meanwhile; name a new folder"
      )
    os.rename(partial, output)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
