"""`python -m lm.evaluate --workdir=RUN`: how well a checkpoint predicts text.

  python -m lm.evaluate --workdir=runs/a --source='text:docs/*.txt' \\
    --output=eval.json
"""

import jax
import rich.console
from absl import flags
from etils import epath

from lm import cli, processes, schema, validation
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import corpora

_WORKDIR = cli.define_path("workdir", "Run to evaluate.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default: the last.")
_SOURCE = flags.DEFINE_multi_string(
  "source", [], "Source spec, repeatable; default: the run's validation."
)
_STRIDE = flags.DEFINE_integer(
  "stride",
  None,
  "Tokens that each window of a document scores after its first; fewer give "
  "each more context and take longer. Default: the context length.",
  lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Rows of a batch; default: training's.", lower_bound=1
)
_TEXT_UNIT = flags.DEFINE_enum(
  "text_unit",
  None,
  ["file", "line", "block"],
  "What a document of a text: source is; default: the run's.",
)
_INVALID_UTF8 = flags.DEFINE_enum(
  "invalid_utf8",
  None,
  ["error", "replace", "skip"],
  "What to do with bytes that are not UTF-8; default: the run's.",
)
_ADAPTER = cli.define_path(
  "adapter", "Adapter (LoRA) to evaluate: a folder in PEFT's format, or a run."
)
_OUTPUT = cli.define_path("output", "JSON file to write.")
_CHAT_TEMPLATE = cli.define_path(
  "chat_template",
  "Jinja file that lays out the conversations of a source SPEC|chat; default: "
  "the checkpoint's.",
)
_DOCUMENTS = flags.DEFINE_bool(
  "documents", False, "Show and write every document."
)


def main() -> None:
  if _WORKDIR.value is None:
    raise schema.ConfigError("--workdir: missing; write --workdir=RUN")
  processes.join(_heartbeat_seconds(_WORKDIR.value))
  data = {"text_unit": _TEXT_UNIT.value, "invalid_utf8": _INVALID_UTF8.value}
  evaluation = corpora.evaluate(
    _WORKDIR.value,
    specs=_SOURCE.value,
    step=_STEP.value,
    stride=_STRIDE.value,
    batch_size=_BATCH_SIZE.value,
    data={name: value for name, value in data.items() if value is not None},
    output=_OUTPUT.value,
    adapter=_ADAPTER.value,
    chat_template=tokenizer_lib.read_template(
      _CHAT_TEMPLATE.value, "--chat_template"
    ),
  )
  if jax.process_index() == 0:
    corpora.show(evaluation, rich.console.Console(), _DOCUMENTS.value)
    if _OUTPUT.value is not None:
      corpora.write(evaluation, _OUTPUT.value, _DOCUMENTS.value)


def _heartbeat_seconds(workdir: str) -> int:
  """mesh.heartbeat_seconds from the run's config.json: processes must join
  before reading a checkpoint. Default if config.json is absent or unreadable.
  """
  try:
    text = (epath.Path(workdir) / "config.json").read_text()
    return validation.from_json(text).mesh.heartbeat_seconds
  except (OSError, ValueError, schema.ConfigError):
    return config_lib.MeshConfig().heartbeat_seconds


if __name__ == "__main__":
  cli.run(main, takes_config=False)
