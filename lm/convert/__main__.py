"""Converts checkpoints from and to Hugging Face's layout, and LoRA adapters.

  python -m lm.convert --from=FOLDER --to=runs/a
  python -m lm.convert --from=runs/a --to=FOLDER
  python -m lm.convert --workdir=runs/tuned --to=peft --output=adapter
  python -m lm.convert --workdir=runs/tuned --to=merged --output=runs/merged

The first command reads a folder with a Hugging Face checkpoint and writes a run
directory of one checkpoint, for lm.sample, lm.serve, lm.evaluate and
`config.init_from`. The second command writes a Hugging Face checkpoint of a
run, with adapters merged (the long form is --workdir=runs/a --to=huggingface
--output=FOLDER). `peft` writes the adapters of a LoRA run in the file format of
Hugging Face's PEFT; `merged` writes a run directory of one checkpoint, with the
adapters merged into the parameters in float32.
"""

import copy
import dataclasses
import os

from absl import flags
from etils import epath

from lm import checkpoint, cli, files, processes, schema
from lm.convert import huggingface
from lm.huggingface import config_json, families, peft, tensors
from lm.sample import load

_FORMATS = ("huggingface", "merged", "peft")
_FROM = cli.define_path(
  "from", "Folder of a Hugging Face checkpoint, or a run.", run=True
)
_WORKDIR = cli.define_path(
  "workdir", "Run of lm.train, where --from is not set.", run=True
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default: the last.")
_TO = flags.DEFINE_string(
  "to",
  None,
  "With --from, the folder or run to write; else what to write of --workdir: "
  f"{' | '.join(_FORMATS)}.",
)
_OUTPUT = cli.define_path(
  "output", "Folder to write; it must not exist.", run=True
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "float32",
  [dtype.name for dtype in tensors.DTYPES.values()],
  "Type of the tensors of a Hugging Face checkpoint that is written.",
)
_FAMILY = flags.DEFINE_enum(
  "family",
  None,
  sorted(families.BY_NAME),
  "Family of the Hugging Face checkpoint that is written; default: the first "
  "that can express the model.",
)
_CHECK = flags.DEFINE_bool(
  "check",
  True,
  "Read a written Hugging Face checkpoint with transformers, and compare its "
  "logits with ours.",
)


# Flags for writing a Hugging Face checkpoint.
_OF_EXPORT = (_DTYPE, _FAMILY, _CHECK)


def main() -> None:
  processes.refuse_several(
    "lm.convert is one process, which writes files; start it once, on a host "
    "that sees both folders and has memory for the parameters in float32. A "
    "run of several processes reads a Hugging Face folder by itself: "
    "--config.init_from=FOLDER"
  )
  source, to, output = _asked()
  unread = () if to == "huggingface" else _OF_EXPORT
  for flag in (*unread, *((_STEP,) if to == "run" else ())):
    if flag.present:
      raise schema.ConfigError(
        f"--{flag.name}={flag.value}: has no meaning for what is written here; "
        "leave it out"
      )
  name = "--output" if _FROM.value is None else "--to"
  is_run = to in ("run", "merged")
  check = files.check_run_directory if is_run else files.check_directory
  check(output, name)
  if epath.Path(output).exists():
    raise schema.ConfigError(
      f"{name}={output}: exists already; name a new folder"
    )
  if to == "run":
    huggingface.to_run(source, output)
    print(f"{source}: written to {output}")
    return
  meta = checkpoint.load_meta(source, _STEP.value)
  if to == "huggingface":
    huggingface.from_run(
      source,
      meta,
      output,
      dtype=_DTYPE.value,
      family=_FAMILY.value,
      check=_CHECK.value,
    )
  elif meta.config.model.lora is None:
    raise schema.ConfigError(
      f"--workdir={source}: has no adapters: it was trained without model.lora"
    )
  else:
    (to_peft if to == "peft" else to_merged)(source, meta, output)
  print(f"{source} at step {meta.step}: written to {output}")


def _asked() -> tuple[str, str, str]:
  """Returns (source, "run" or a format, output) from the flags; raises
  ConfigError on missing and on contradictory flags.
  """
  if _FROM.value is None:
    for flag in (_WORKDIR, _TO, _OUTPUT):
      if flag.value is None:
        raise schema.ConfigError(f"--{flag.name}: missing; see --help")
    if _TO.value not in _FORMATS:
      raise schema.ConfigError(
        f"--to={schema.shown(_TO.value)}: {schema.unknown(_TO.value, _FORMATS)}"
      )
    return _WORKDIR.value, _TO.value, _OUTPUT.value
  for flag in (_WORKDIR, _OUTPUT):
    if flag.value is not None:
      raise schema.ConfigError(
        f"--{flag.name}={flag.value}: --from and --to name what is read and "
        f"written; leave --{flag.name} out"
      )
  if _TO.value is None:
    raise schema.ConfigError("--to: missing; name the folder to write")
  output = files.user_path(_TO.value, "--to")
  if checkpoint.steps(_FROM.value):
    return _FROM.value, "huggingface", output
  files.local_path(_FROM.value, "--from")
  if not os.path.isdir(_FROM.value) or not os.path.lexists(
    os.path.join(_FROM.value, config_json.NAME)
  ):
    raise schema.ConfigError(
      f"--from={_FROM.value}: neither a run with a checkpoint nor a folder "
      f"with {config_json.NAME}; download a checkpoint, as by hf download NAME "
      "--local-dir FOLDER"
    )
  return _FROM.value, "run", output


def to_peft(workdir: str, meta: checkpoint.Meta, output: str) -> None:
  """Writes the adapters in PEFT's format, averaged if the run keeps an average.
  Raises ConfigError as `peft.save` does, and if `output` is not a local path.
  """
  files.local_path(output, "--output")
  model = meta.config.model
  params = checkpoint.load_params(workdir, model, meta.step)
  base = meta.config.init_from
  with huggingface.made(output) as partial:
    peft.save(partial, model, params, base)


def to_merged(workdir: str, meta: checkpoint.Meta, output: str) -> None:
  """Writes a run directory with one checkpoint of the merged parameters, for
  lm.sample, lm.serve, lm.evaluate and `config.init_from`.
  """
  _, params = load.model(workdir, meta)
  config = copy.deepcopy(meta.config)
  config.model.lora = config.init_from = None
  with huggingface.made(output) as partial:
    merged = dataclasses.replace(meta, config=config)
    huggingface.save_run(partial, params, merged)


if __name__ == "__main__":
  cli.run(main, takes_config=False)
