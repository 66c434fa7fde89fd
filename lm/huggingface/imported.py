"""Presents a Hugging Face folder as the checkpoint of a run, at step 0."""

import os

from lm import checkpoint, schema
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.huggingface import folder as folder_lib


def meta(found: folder_lib.Folder) -> checkpoint.Meta:
  """Returns metadata with the default config and the folder's model and
  tokenizer; train.sequence_length is at most the context length. Raises
  ConfigError without a readable tokenizer.
  """
  config = config_lib.Config(model=found.model)
  config.train.sequence_length = min(
    config.train.sequence_length, found.model.context_length
  )
  config.tokenizer = _tokenizer(found.path)
  tokenizer = tokenizer_lib.load(config)
  return checkpoint.Meta(0, config, tokenizer.to_json(), checkpoint.CONVERTED)


def _tokenizer(path: str) -> config_lib.TokenizerConfig:
  path = os.path.abspath(path)
  if os.path.exists(os.path.join(path, "tokenizer.json")):
    return config_lib.TokenizerConfig("huggingface", path)
  if os.path.exists(file := os.path.join(path, "tokenizer.model")):
    return config_lib.TokenizerConfig("sentencepiece", file)
  raise schema.ConfigError(
    f"{path}: has neither tokenizer.json nor tokenizer.model; let transformers "
    "write the first: AutoTokenizer.from_pretrained(NAME).save_pretrained("
    "FOLDER)"
  )
