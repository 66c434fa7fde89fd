"""Runs tasks of lm-evaluation-harness (lm-eval) on a checkpoint.

Source: github.com/EleutherAI/lm-evaluation-harness. Needs the extra `eval`;
lm-eval is imported inside functions, since most commands run no tasks.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import pathlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.console

from lm import checkpoint, files, processes, schema, terminal
from lm import config as config_lib
from lm.data import overlap_report
from lm.data import tokenizer as tokenizer_lib
from lm.evaluate import corpora, provenance, task_texts
from lm.sample import load

# Tasks of this project: found without a network and without lm-eval's index.
TASKS = pathlib.Path(__file__).parent / "tasks"
# lm-eval's default seeds: of `random`, of NumPy, and of few-shot examples.
_SEEDS = (0, 1234, 1234)


def check_installed(name: str = "--tasks") -> None:
  """Raises ConfigError without lm-eval; the message begins with `name`."""
  if importlib.util.find_spec("lm_eval") is None:
    raise schema.ConfigError(
      f"{name}: lm-eval is missing; install the extra, as "
      "`pip install -e '.[eval]'`"
    )


def evaluate(
  workdir: str,
  tasks: Sequence[str],
  *,
  step: int | None = None,
  include_path: str | None = None,
  limit: int | None = None,
  num_fewshot: int | None = None,
  chats: bool = False,
  batch_size: int | None = None,
  output: str | None = None,
  adapter: str | None = None,
  chat_template: str | None = None,
  overlap: str | overlap_report.Search | None = None,
  cache_dir: str | None = None,
) -> dict[str, Any] | None:
  """Runs tasks on a checkpoint. Returns the scores, as for `show` and `write`,
  on process 0, and None on every further process.

  `limit` is the number of documents per task; with `chats`, the chat template
  lays out prompts; `cache_dir` replaces the run's. The remaining arguments are
  as in `corpora.evaluate`. Raises ConfigError on bad input before parameters
  are loaded.
  """
  check_installed()
  if output is not None:
    files.check_output(output, "--output")
  meta = checkpoint.load_meta(workdir, step)
  tokenizer = _tokenizer(meta, chats, chat_template)
  train, data = meta.config.train, meta.config.data
  if cache_dir is not None:
    data = dataclasses.replace(data, cache_dir=cache_dir)
  _check_overlap(workdir, meta, overlap)
  loaded = processes.only_first(
    lambda: find(tasks, include_path, data.cache_dir)
  )
  corpora.check_batch_size(batch_size, meta.config.model.context_length)
  shares = processes.only_first(lambda: _overlap(overlap, loaded, limit, data))
  rows = batch_size or train.batch_size // train.microbatches
  mesh, n_rows = corpora.make_mesh(meta.config, rows)
  with jax.set_mesh(mesh):
    cfg, params = load.model(workdir, meta, mesh, adapter)
  found = _answered(
    (cfg, params, tokenizer, mesh, n_rows),
    loaded,
    limit=limit,
    num_fewshot=num_fewshot,
    chats=chats,
  )
  if found is None:
    return None
  for name, known in (shares or {}).items():
    if name in found:
      found[name]["overlap"] = known.to_json()
  return {
    "workdir": workdir,
    "step": meta.step,
    "context": cfg.context_length,
    **provenance.of(meta, tokenizer, adapter),
    "lm_eval": importlib.metadata.version("lm_eval"),
    "limit": limit,
    "num_fewshot": num_fewshot,
    "apply_chat_template": chats,
    "tasks": found,
  }


def _check_overlap(
  workdir: str,
  meta: checkpoint.Meta,
  overlap: str | overlap_report.Search | None,
) -> None:
  if overlap is not None:
    corpora.check_training_known(workdir, meta)
    overlap_report.check(overlap, meta.config.data)


def _answered(
  model: tuple[Any, ...], loaded: Any, **how: Any
) -> dict[str, Any] | None:
  """Runs `loaded` with a progress bar: `run`'s scores on process 0. `model` has
  the arguments of `harness_model.Answerer`, `how` those of `run`.
  """
  from lm.evaluate import harness_model

  with corpora.progress_bar() as progress:
    bar = progress.add_task("requests", total=None)

    def tell(kind: str, n_done: int, n: int) -> None:
      progress.update(bar, description=kind, completed=n_done, total=n)

    answerer = harness_model.Answerer(*model, tell=tell)
    return answerer.lead(
      lambda: run(harness_model.HarnessModel(answerer), loaded, **how)
    )


def _tokenizer(
  meta: checkpoint.Meta, chats: bool, chat_template: str | None
) -> tokenizer_lib.Tokenizer:
  """The tokenizer for tasks. Raises ConfigError if the model is an encoder, or
  if `chats` is True and there is no chat template.
  """
  schema.require(
    meta.config.model.causal,
    "config.model.causal",
    False,
    "tasks ask for the next token, which an encoder does not predict",
  )
  tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  if chat_template is not None:
    if not chats:
      raise schema.ConfigError(
        "--chat_template: lays out chats; add --apply_chat_template, or leave "
        "it out"
      )
    tokenizer = tokenizer.with_template(chat_template)
  if chats and tokenizer.chat_template is None:
    raise schema.ConfigError(
      "--apply_chat_template: this checkpoint has no chat template; name one "
      "with --chat_template=FILE.jinja"
    )
  return tokenizer


def _overlap(
  given: str | overlap_report.Search | None,
  loaded: Any,
  limit: int | None,
  data: config_lib.DataConfig,
) -> dict[str, overlap_report.Shares]:
  """The overlap of each task and group with the run's training sources, by one
  search for all; {} if `given` is None.
  """
  if given is None:
    return {}
  held_out = {
    name: task_texts.TaskTexts(name, task, limit)
    for name, task in loaded["tasks"].items()
  }
  shares = overlap_report.shares(given, held_out, data)
  return task_texts.add_groups(shares, loaded)


# --- tasks -------------------------------------------------------------------


def find(
  names: Sequence[str],
  include_path: str | None = None,
  cache_dir: str | None = None,
  flags: tuple[str, str] = ("--tasks", "--include_path"),
) -> Any:
  """Returns lm-eval's TaskDict of tasks, groups, tags and patterns (`mmlu_*`).

  Names are looked up in `include_path` and among this project's tasks; the
  index of lm-eval, seconds to read, is added only if a name is missing. Raises
  ConfigError, with the names `flags` of the settings, on unknown tasks and on
  data impossible to load.
  """
  from lm_eval import tasks as tasks_lib

  if include_path is not None and not os.path.isdir(include_path):
    raise schema.ConfigError(
      f"{flags[1]}={include_path[:200]!r}: no such folder; name the one that "
      "has the .yaml files of the tasks"
    )
  where: list[Any] = [TASKS, *([include_path] if include_path else [])]
  # lm-eval passes `metadata` to the functions for a task's data.
  metadata: Any = {"stdlib_cache_dir": cache_dir} if cache_dir else None
  manager: Any = None
  for defaults in (False, True):
    manager = tasks_lib.TaskManager(
      include_path=where, include_defaults=defaults, metadata=metadata
    )
    if all(fnmatch.filter(manager.all_tasks, name) for name in names):
      break
  loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
  for name in names:
    matching = fnmatch.filter(manager.all_tasks, name)
    if not matching:
      known = schema.unknown(name, manager.all_tasks)
      hint = known.partition("Known:")[0]
      raise schema.ConfigError(
        f"{flags[0]}: {name!r} is {hint}`lm_eval ls tasks` lists all of them, "
        f"and {flags[1]}=FOLDER adds your own"
      )
    with _quiet():
      for part, content in _load(manager, name, matching, flags).items():
        loaded[part].update(content)
  return loaded


def _load(
  manager: Any, name: str, matching: list[str], flags: tuple[str, str]
) -> Any:
  try:
    return manager.load(matching)
  except schema.UserError:  # From a task of this project.
    raise
  except Exception as error:  # From the Hub, from YAML, from a task's code.
    raise schema.ConfigError(
      f"{flags[0]}={name}: cannot be loaded ({type(error).__name__}: "
      f"{files.first_line(error)}). Most tasks of lm-eval read a data set from "
      "the Hugging Face Hub; without a network, put a copy of it into "
      f"FOLDER, write a FOLDER/{name}.yaml of `include: PATH` (the task's own "
      f".yaml), `task: {name}`, `dataset_path: json` and `dataset_kwargs: "
      "{data_files: {test: FOLDER/test.jsonl}}`, and add "
      f"{flags[1]}=FOLDER"
    ) from error


def run(
  model: Any,
  loaded: Any,
  *,
  limit: int | None = None,
  num_fewshot: int | None = None,
  chats: bool = False,
) -> dict[str, dict[str, Any]]:
  """Returns scores of each task and group: {name: {version, n, num_fewshot,
  metrics: {metric: {value, stderr}}}}, with None for a value not finite.

  `model` is any lm_eval LM. Seeds and defaults are as in lm-eval's command,
  except for 1,000 bootstrap draws in place of 100,000.
  """
  from lm_eval import evaluator

  for task in loaded["tasks"].values():
    default = task.get_config("num_fewshot")
    if num_fewshot is not None and default != 0:  # 0 stays: the task insists.
      task.set_config(key="num_fewshot", value=num_fewshot)
    elif default is None:
      task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEEDS[2])
  with _quiet(), _seeded():
    found: Any = evaluator.evaluate(
      model,
      loaded,
      limit=limit,
      log_samples=False,
      apply_chat_template=chats,
      fewshot_as_multiturn=chats,
      bootstrap_iters=1000,
    )
  return {name: _scores(found, name) for name in found["results"]}


def _scores(found: Any, name: str) -> dict[str, Any]:
  metrics: dict[str, dict[str, float | None]] = {}
  for key, value in found["results"][name].items():
    metric, _, filtered = key.partition(",")
    if not filtered or not isinstance(value, int | float):
      continue
    kind = "stderr" if metric.endswith("_stderr") else "value"
    metric = metric.removesuffix("_stderr")
    # lm-eval calls the filter of a task without filters "none".
    label = metric if filtered == "none" else f"{metric},{filtered}"
    finite = float(value) if math.isfinite(value) else None
    metrics.setdefault(label, {"value": None, "stderr": None})[kind] = finite
  return {
    "version": found["versions"].get(name),
    "n": found.get("n-samples", {}).get(name, {}).get("effective"),
    "num_fewshot": found.get("n-shot", {}).get(name),
    "metrics": metrics,
  }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides lm-eval's messages and bars, redirects lm-eval's stdout to stderr,
  and turns off the process pool of the bootstrap: JAX's threads do not survive
  a fork.
  """
  import datasets
  import tqdm

  logger, key = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
  level, had_bars = logger.level, datasets.is_progress_bar_enabled()
  before = os.environ.get(key)
  os.environ[key] = "1"
  logger.setLevel(logging.ERROR)
  datasets.disable_progress_bars()
  # tqdm reads TQDM_DISABLE only when it is imported.
  bars: Any = tqdm.tqdm
  begin = bars.__init__
  bars.__init__ = functools.partialmethod(begin, disable=True)
  try:
    with contextlib.redirect_stdout(sys.stderr):
      yield
  finally:
    bars.__init__ = begin
    logger.setLevel(level)
    os.environ.pop(key)
    if before is not None:
      os.environ[key] = before
    if had_bars:
      datasets.enable_progress_bars()


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
  """Seeds the global generators, used by some tasks, with lm-eval's seeds, and
  restores the former states.
  """
  before, numpys = random.getstate(), np.random.get_state()
  random.seed(_SEEDS[0])
  np.random.seed(_SEEDS[1])
  try:
    yield
  finally:
    random.setstate(before)
    np.random.set_state(numpys)


# --- output ------------------------------------------------------------------


def show(content: dict[str, Any], console: rich.console.Console) -> None:
  """Prints a row for each metric of each task; a known overlap with training
  text has columns of its own.
  """
  tasks = content["tasks"].items()
  known = any("overlap" in task for _, task in tasks)
  title = f"{terminal.cell(content['workdir'])}, step {content['step']}"
  columns = ["task", "version ", "docs", "shots", "metric ", "value", "stderr"]
  columns += ["overlap", "bytes"] if known else []
  table = terminal.table(*columns, title=title)

  def cell(value: Any) -> str:
    if value is None:
      return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)

  for name, task in tasks:
    first = [str(task["version"]), task["n"], task["num_fewshot"]]
    label = terminal.cell(name)
    shares = ()
    if overlap := task.get("overlap"):
      parts = ("share_of_documents", "share_of_bytes")
      shares = [f"{overlap[part]:.1%}" for part in parts]
    for metric, score in task["metrics"].items():
      row = [*map(cell, first), metric, *map(cell, score.values()), *shares]
      table.add_row(label, *row)
      label, first = "", ["", "", ""]
  terminal.print_table(console, table)
  terminal.print_lines(console, _overlap_lines(content["tasks"]))


def _overlap_lines(tasks: dict[str, dict[str, Any]]) -> Iterator[str]:
  """Says what the shares of an overlap count, where one is known."""
  known = {k: task["overlap"] for k, task in tasks.items() if "overlap" in task}
  for overlap in [*known.values()][:1]:
    yield (
      f"overlap: documents with a passage of {overlap['n']} words that "
      "training text has, and bytes in such passages."
    )
  for name, overlap in known.items():
    if n_short := overlap["n_short"]:
      some = schema.counted(n_short, "document")
      yield (
        f"{name}: {some} of fewer than {overlap['n']} words can overlap with "
        "none."
      )


def write(content: dict[str, Any], path: str) -> None:
  """Writes `content` as JSON, atomically."""
  files.replace(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
