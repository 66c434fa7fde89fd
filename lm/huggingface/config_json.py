"""Reads config.json of a Hugging Face checkpoint as a ModelConfig.

A config file may set `config.model = config_json.read(FOLDER)[1]`, or, without
a local folder, `config.model = published.model("gpt2")`.
"""

import json
import os
from typing import Any

from lm import config as config_lib
from lm import files, schema
from lm.huggingface import families, multimodal
from lm.huggingface import family as family_lib

NAME = "config.json"
_MOST = 10_000_000  # bytes


def is_there(path: str, damaged: bool = True) -> bool:
  """Whether `path` is a local folder with Hugging Face's config.json.

  The config.json of a run of lm.train has the key "model" and is not meant; one
  that is no JSON counts as `damaged` says.
  """
  where = os.path.join(path, NAME)
  if not files.is_local(path) or not os.path.lexists(where):
    return False
  try:
    return "model" not in read_json(path, NAME)
  except schema.ConfigError:
    return damaged  # `read` then raises the error of an invalid config.json


def read_json(path: str, name: str) -> dict[str, Any]:
  """Returns the object in the JSON file `name` of the folder `path`.

  Raises ConfigError if the file is missing or holds no JSON object.
  """
  where = os.path.join(path, name)
  try:
    with open(where, encoding="utf-8") as file:
      content = json.loads(file.read(_MOST))
    if not isinstance(content, dict):
      raise ValueError("not an object")
  except OSError as error:
    raise schema.ConfigError(f"{where}: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise schema.ConfigError(
      f"{where}: not a config ({files.first_line(error)})"
    ) from error
  return content


def read(
  path: str,
) -> tuple[family_lib.Family, config_lib.ModelConfig]:
  """Returns (family, model) for config.json in the folder `path`.

  For a multimodal checkpoint both describe the text part. Raises ConfigError
  if config.json is missing, its model_type is unknown, or a key or value is not
  supported.
  """
  content = read_json(path, NAME)
  try:
    if (around := multimodal.of(content)) is not None:
      content = around.text_of(content)
    family = families.find(content.get("model_type"))
    return family, family.read(content)
  except schema.ConfigError as error:
    raise schema.ConfigError(f"{path}: {error}") from error
