"""A folder with a checkpoint in Hugging Face's layout: config.json, tensors.

`find` reads config.json and the tensors' headers, and raises on a mismatch;
`load` then reads the parameters. No code of a checkpoint is run.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax

from lm import config as config_lib
from lm import files, schema, sharding
from lm.huggingface import (
  config_json,
  expressible,
  multimodal,
  table,
  tensors,
)
from lm.huggingface import family as family_lib
from lm.model import decoder

# Names of norm parameters in the first files of BERT -> names today.
_FORMER = {".gamma": ".weight", ".beta": ".bias"}


@dataclasses.dataclass(frozen=True)
class Folder:
  """A checkpoint with tensors checked against config.json.

  `places` and `stored` have the same tensor names. `notes` are sentences about
  tensors left out.
  """

  path: str
  family: family_lib.Family
  model: config_lib.ModelConfig
  places: Mapping[str, table.Place]
  stored: Mapping[str, list[tensors.Stored]]
  notes: tuple[str, ...] = ()

  @property
  def dtype(self) -> str:
    """Dtype of the first tensor, such as bfloat16."""
    return tensors.DTYPES[next(iter(self.stored.values()))[0].dtype].name


def find(path: str) -> Folder:
  """Returns the checkpoint in the folder `path`, without reading parameters.

  Raises ConfigError as `config_json.read` does, if a file is corrupt or
  missing, and if tensors do not fit config.json, with a list of them.
  """
  family, model = config_json.read(path)
  stored, notes = tensors.find(path), ()
  around = multimodal.of(config_json.read_json(path, config_json.NAME))
  if around is not None:
    stored, n = around.split(stored)
    if n:
      notes = (f"vision tower left out: {schema.counted(n, 'tensor')}",)
  for former, today in _FORMER.items():
    for name in [name for name in stored if name.endswith(former)]:
      renamed = name.removesuffix(former) + today
      stored[renamed] = stored.get(renamed, []) + stored.pop(name)
  if not any(name.startswith(family.prefix) for name in stored):
    # Files of a model without its output head have names without the prefix.
    stored = {
      name if name == family.head else family.prefix + name: x
      for name, x in stored.items()
    }
  wanted = table.places(family.rows, model)
  stored = {
    name: value
    for name, value in stored.items()
    if name in wanted or not family.is_extra(name)
  }
  head = family.head
  spare = None if head in wanted else stored.pop(head, None)
  table.require_none(path, list(table.compare(wanted, stored)))
  if spare is not None:
    _check_tied(path, wanted, stored, head, spare)
  return Folder(path, family, model, wanted, stored, notes)


def _check_tied(path, wanted, stored, name, spare) -> None:
  """Raises ConfigError unless the head `name` equals the embedding."""
  (tied,) = (name for name, p in wanted.items() if p.row.ours == ("embed",))
  embed, head = stored[tied][0], spare[0]
  if (
    len(spare) > 1
    or (embed.dtype, embed.shape) != (head.dtype, head.shape)
    or not tensors.equal(embed, head)
  ):
    raise schema.ConfigError(
      f"{path}: {name} is not {tied}, and tie_word_embeddings=True says that "
      "it is: set it to false if the head is one of its own"
    )


def fingerprint(folder: Folder) -> str:
  """Returns a hash that differs between checkpoints, 16 hexadecimal digits: of
  config.json, of the tensors' headers, and of the middle row of each tensor.
  """
  content = config_json.read_json(folder.path, config_json.NAME)
  found = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
  for name, (stored, *_) in sorted(folder.stored.items()):
    found.update(f"{name} {stored.dtype} {stored.shape}".encode())
    middle = stored.shape[0] // 2
    found.update(stored.read(middle, middle + 1)[middle].tobytes())
  return found.hexdigest()[:16]


def load(folder: Folder, like: decoder.Params) -> decoder.Params:
  """Returns the parameters in float32, with the shardings of the tree `like`
  of jax.ShapeDtypeStruct.
  """
  return table.load(folder.places, folder.stored, like)


def load_on(
  folder: Folder, mesh: jax.sharding.Mesh | None = None
) -> decoder.Params:
  """Returns the parameters in float32, sharded over `mesh`; with None, whole
  on the first device.
  """
  make = functools.partial(decoder.init_params, folder.model)
  return load(folder, sharding.abstract(make, jax.random.key(0), mesh=mesh))


# --- writing -----------------------------------------------------------------


def write(
  path: str,
  model: config_lib.ModelConfig,
  params: decoder.Params,
  *,
  dtype: str = "float32",
  family: str | None = None,
  more: Mapping[str, Any] | None = None,
  shard_bytes: int = tensors.SHARD_BYTES,
) -> family_lib.Family:
  """Writes config.json and the tensors in `dtype` into the existing folder
  `path`, and returns the family. `more` are further keys of config.json.

  `params` are without adapters. Raises ConfigError if `family`, or with None
  every family, cannot express the model.
  """
  found = expressible.of(model, family)
  wanted = table.places(found.rows, model)
  content = found.write(model)
  # Without these keys transformers would take the defaults of its config class,
  # token ids which may lie beyond the vocabulary.
  ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  content |= {"dtype": dtype, "torch_dtype": dtype, **ids, **(more or {})}
  files.replace(
    os.path.join(path, config_json.NAME), json.dumps(content, indent=2)
  )
  planned = table.planned(wanted, params)
  tensors.write(path, planned, dtype, shard_bytes)
  return found
