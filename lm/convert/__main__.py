"""`python -m lm.convert --workdir=RUN --to=FORMAT --output=FOLDER`.

  python -m lm.convert --workdir=runs/tuned --to=peft --output=adapter
  python -m lm.convert --workdir=runs/tuned --to=merged --output=runs/merged

`peft` writes the adapters of a LoRA run in the file format of Hugging Face's
PEFT; `merged` writes a run directory of one checkpoint, with plain weights in
which the adapters are merged in float32.
"""

import copy
import dataclasses
import os

from absl import flags
from etils import epath

from lm import checkpoint, cli, files, schema
from lm import config as config_lib
from lm.model import lora, peft
from lm.sample import load

_WORKDIR = cli.define_path("workdir", "Run of lm.train with model.lora.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default: the last.")
_TO = flags.DEFINE_enum("to", None, ["peft", "merged"], "What to write.")
_OUTPUT = cli.define_path("output", "Folder to write; it must not exist.")


def main() -> None:
  for flag in (_WORKDIR, _TO, _OUTPUT):
    if flag.value is None:
      raise schema.ConfigError(f"--{flag.name}: missing; see --help")
  files.check_directory(_OUTPUT.value, "--output")
  if epath.Path(_OUTPUT.value).exists():
    raise schema.ConfigError(
      f"--output={_OUTPUT.value}: exists already; name a new folder"
    )
  meta = checkpoint.load_meta(_WORKDIR.value, _STEP.value)
  if meta.config.model.lora is None:
    raise schema.ConfigError(
      f"--workdir={_WORKDIR.value}: has no adapters: it was trained without "
      "model.lora"
    )
  write = to_peft if _TO.value == "peft" else to_merged
  write(_WORKDIR.value, meta, _OUTPUT.value)
  print(f"{_WORKDIR.value} at step {meta.step}: written to {_OUTPUT.value}")


def to_peft(workdir: str, meta: checkpoint.Meta, output: str) -> None:
  """Writes the adapters (their averages if the run keeps an average) in PEFT's
  format. Raises ConfigError as `peft.save`, or if `output` is no local path.
  """
  files.local_path(output, "--output")
  model = meta.config.model
  params = checkpoint.load_params(workdir, model, meta.step)
  base = meta.config.init_from
  peft.save(output, model, params["layers"][lora.NAME], base)


def to_merged(workdir: str, meta: checkpoint.Meta, output: str) -> None:
  """Writes a run directory of one checkpoint, of merged parameters alone, for
  lm.sample, lm.serve, lm.evaluate and `config.init_from`.
  """
  _, params = load.model(workdir, meta)
  config = copy.deepcopy(meta.config)
  config.model.lora = config.init_from = None
  saved = checkpoint.Checkpoints(output, config.checkpoint)
  saved.save({"params": params}, dataclasses.replace(meta, config=config))
  saved.close()
  path = epath.Path(os.path.join(output, "config.json"))
  files.replace(path, config_lib.to_json(config))


if __name__ == "__main__":
  cli.run(main, takes_config=False)
