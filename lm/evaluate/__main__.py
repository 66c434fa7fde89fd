"""`python -m lm.evaluate --workdir=RUN`: how well a checkpoint predicts text.

  python -m lm.evaluate --workdir=runs/a --source='text:docs/*.txt' \\
    --output=eval.json
  python -m lm.evaluate --workdir=runs/a --samples=3 \\
    --source='jsonl:held_out.jsonl|chat'
  python -m lm.evaluate --compare runs/a runs/b@500 --draw=compare.png
  python -m lm.evaluate --workdir=runs/a --tasks=docstring_bodies

With --samples, also what it answers in conversations; with --tasks, how well it
does tasks of lm-evaluation-harness (extra `eval`).
"""

from typing import Any

import jax
from absl import flags
from etils import epath

from lm import checkpoint, cli, files, processes, schema, terminal, validation
from lm import config as config_lib
from lm.data import overlap as overlap_lib
from lm.data import overlap_report, sources
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import compare, compare_output, corpora, harness, output
from lm.sample import request as request_lib

_WORKDIR = cli.define_path("workdir", "Run to evaluate.", run=True)
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
_INVALID_DOCUMENTS = flags.DEFINE_enum(
  "invalid_documents",
  None,
  ["error", "skip"],
  "What to do with a line or a chat that is none; default: the run's.",
)
_CACHE_DIR = cli.define_path(
  "cache_dir", "Directory of what is made of data; default: the run's."
)
_ADAPTER = cli.define_path(
  "adapter",
  "Adapter (LoRA) to evaluate: a folder in PEFT's format, or a run.",
  run=True,
)
_OUTPUT = cli.define_path("output", "JSON file to write.")
_CHAT_TEMPLATE = cli.define_path(
  "chat_template",
  "Jinja file that lays out the conversations of a source SPEC|chat; default: "
  "the checkpoint's.",
)
_OVERLAP = cli.define_optional_path(
  "overlap",
  "Contamination: what overlaps with training text stands beside each score. "
  "--overlap searches the run's training sources; --overlap=FILE reads what "
  "lm.data --overlap --output or --overlap_output wrote.",
)
_OVERLAP_WORDS = flags.DEFINE_integer(
  "overlap_words",
  None,
  "With --overlap, without a file: words of a common passage; default: "
  f"{overlap_lib.DEFAULT_N}.",
  lower_bound=2,
  upper_bound=1000,
)
_OVERLAP_OUTPUT = cli.define_path(
  "overlap_output",
  "With --overlap, without a file: JSON file to write, of every passage.",
)
_DOCUMENTS = flags.DEFINE_bool(
  "documents", False, "Show and write every document; --compare only writes."
)
_SAMPLES = flags.DEFINE_integer(
  "samples",
  None,
  "Conversations of each source SPEC|chat, the first ones, of which to show "
  "the prompt, the last answer, and the model's own (greedy).",
  lower_bound=1,
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens",
  None,
  "With --samples: most tokens of an answer, where they fit the context; "
  f"default: {request_lib.DEFAULT_NEW_TOKENS}.",
  lower_bound=1,
)
_TASKS = flags.DEFINE_list(
  "tasks",
  None,
  "Tasks of lm-evaluation-harness, in place of sources: names, groups or "
  "patterns, as docstring_bodies,arc_*.",
)
_INCLUDE_PATH = cli.define_path(
  "include_path", "Folder with the .yaml files of your own tasks."
)
_LIMIT = flags.DEFINE_integer(
  "limit", None, "Documents of each task; default: all.", lower_bound=1
)
_NUM_FEWSHOT = flags.DEFINE_integer(
  "num_fewshot",
  None,
  "Examples before each question; default: the task's.",
  lower_bound=0,
)
_APPLY_CHAT_TEMPLATE = flags.DEFINE_bool(
  "apply_chat_template", False, "Lay the prompts of tasks out as chats."
)
_COMPARE = cli.define_paths(
  "compare",
  "Two or more of RUN, RUN@STEP and files of --documents --output: compares "
  "each with the first on the same documents.",
  run=True,
)
_DRAW = cli.define_path("draw", "With --compare: PNG file to write.")
# Flags of one kind of evaluation, refused beside the other.
_OF_SOURCES = (
  "source",
  "stride",
  "text_unit",
  "invalid_utf8",
  "invalid_documents",
  "documents",
  "samples",
  "max_new_tokens",
)
_OF_TASKS = ("include_path", "limit", "num_fewshot", "apply_chat_template")
# Flags that are about one run.
_OF_ONE_RUN = (
  *("workdir", "step", "adapter", "chat_template", "tasks"),
  *("samples", "max_new_tokens", "overlap_words", "overlap_output"),
)


def main() -> None:
  if _OUTPUT.value is not None:
    files.check_output(_OUTPUT.value, "--output")
  read = [("--compare", name) for name in _COMPARE.value]
  read += [(f"--{f.name}", f.value) for f in (_OVERLAP, _CHAT_TEMPLATE)]
  written = (_OUTPUT, _OVERLAP_OUTPUT, _DRAW)
  files.check_apart([*read, *((f"--{f.name}", f.value) for f in written)])
  for flag in written:
    if flag.value is not None:
      sources.check_unread(flag.value, f"--{flag.name}", _SOURCE.value)
  of_data = _TEXT_UNIT, _INVALID_UTF8, _INVALID_DOCUMENTS, _CACHE_DIR
  data = {f.name: f.value for f in of_data if f.value is not None}
  if _COMPARE.value:
    _compare(data)
  elif _DRAW.value is not None:
    raise schema.ConfigError(
      f"--draw={_DRAW.value}: draws a comparison; add --compare RUN_A RUN_B"
    )
  else:
    _evaluate(data)


def _evaluate(data: dict[str, Any]) -> None:
  if _WORKDIR.value is None:
    raise schema.ConfigError("--workdir: missing; write --workdir=RUN")
  for name in _OF_SOURCES if _TASKS.value else _OF_TASKS:
    if flags.FLAGS[name].present:
      needed = "sources, not --tasks" if _TASKS.value else "--tasks"
      raise schema.ConfigError(
        f"--{name}: has a meaning for {needed} only; leave it out"
      )
  if _TASKS.value is not None and "" in (_TASKS.value or [""]):
    raise schema.ConfigError(
      f"--tasks={','.join(_TASKS.value)}: has an empty name; write "
      "--tasks=docstring_bodies, or see `lm_eval ls tasks`"
    )
  if _TASKS.value:
    harness.check_installed()
  processes.join(_heartbeat_seconds(_WORKDIR.value))
  template = tokenizer_lib.read_template(
    _CHAT_TEMPLATE.value, "--chat_template"
  )
  if _TASKS.value:
    return _run_tasks(_WORKDIR.value, _TASKS.value, template)
  evaluation = corpora.evaluate(
    _WORKDIR.value,
    specs=_SOURCE.value,
    step=_STEP.value,
    stride=_STRIDE.value,
    batch_size=_BATCH_SIZE.value,
    data=data,
    output=_OUTPUT.value,
    adapter=_ADAPTER.value,
    chat_template=template,
    overlap=_overlap(),
    samples=_SAMPLES.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
  )
  if jax.process_index() == 0:
    if _OUTPUT.value is not None:
      output.write(evaluation, _OUTPUT.value, _DOCUMENTS.value)
    output.show(evaluation, terminal.console(), _DOCUMENTS.value)


def _compare(data: dict[str, Any]) -> None:
  for name in (*_OF_ONE_RUN, *_OF_TASKS):
    if flags.FLAGS[name].present:
      value = flags.FLAGS[name].value
      raise schema.ConfigError(
        f"--{name}={value}: is about one run, and --compare about several; "
        "leave it out (a step is named by RUN@STEP)"
      )
  if _OVERLAP.value is True:
    raise schema.ConfigError(
      "--overlap: with --compare, name a file of lm.data --overlap --output"
    )
  if _DOCUMENTS.value and _OUTPUT.value is None:
    raise schema.ConfigError(
      "--documents: with --compare, documents are written only; add --output"
    )
  if _DRAW.value is not None:
    files.check_output(_DRAW.value, "--draw")
  processes.join(
    _heartbeat_seconds(checkpoint.split_name(_COMPARE.value[0])[0])
  )
  comparison = compare.compare(
    _COMPARE.value,
    specs=_SOURCE.value,
    stride=_STRIDE.value,
    batch_size=_BATCH_SIZE.value,
    data=data,
    overlap=_OVERLAP.value,
  )
  if jax.process_index() == 0:
    if _OUTPUT.value is not None:
      compare_output.write(comparison, _OUTPUT.value, _DOCUMENTS.value)
    if _DRAW.value is not None:
      compare_output.draw(comparison, _DRAW.value)
    compare_output.show(comparison, terminal.console())


def _run_tasks(
  workdir: str, tasks: list[str], chat_template: str | None
) -> None:
  content = harness.evaluate(
    workdir,
    tasks,
    step=_STEP.value,
    include_path=_INCLUDE_PATH.value,
    limit=_LIMIT.value,
    num_fewshot=_NUM_FEWSHOT.value,
    chats=_APPLY_CHAT_TEMPLATE.value,
    batch_size=_BATCH_SIZE.value,
    output=_OUTPUT.value,
    adapter=_ADAPTER.value,
    chat_template=chat_template,
    overlap=_overlap(),
    cache_dir=_CACHE_DIR.value,
  )
  if content is not None:
    if _OUTPUT.value is not None:
      harness.write(content, _OUTPUT.value)
    harness.show(content, terminal.console())


def _overlap() -> str | overlap_report.Search | None:
  """What --overlap asks for. Raises ConfigError on a flag without meaning."""
  if _OVERLAP.value is True:
    n = _OVERLAP_WORDS.value or overlap_lib.DEFAULT_N
    return overlap_report.Search(n, _OVERLAP_OUTPUT.value)
  for flag in (_OVERLAP_WORDS, _OVERLAP_OUTPUT):
    if flag.value is not None:
      raise schema.ConfigError(
        f"--{flag.name}={flag.value}: is about a search; add --overlap, "
        "without a file"
      )
  return _OVERLAP.value


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
  cli.run(main, takes_config=False, lists=["compare"])
