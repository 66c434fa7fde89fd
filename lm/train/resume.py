"""Resuming a run: the config changes allowed, and the checkpoint to restore.

A restart is the same run as long as its steps would be the same. The restart is
compared with the config of the last checkpoint (before the first checkpoint:
config.json) and with the fingerprint of the data.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from lm import checkpoint, files, items, processes, schema, validation
from lm import config as config_lib
from lm import objective as objective_lib
from lm.data import pipeline, store
from lm.data import tokenizer as tokenizer_lib
from lm.huggingface import config_json
from lm.train import init_from, metrics, optimizer, programs
from lm.train import step as step_lib

# Fields that a restart may change: how a run is computed, watched and stored,
# and how long the run is, but not the content of its steps.
_FREE = (
  "config.mesh.",
  "config.checkpoint.",
  "config.data.cache_dir",
  "config.data.workers",
  "config.data.processes",
  "config.data.prefetch_rows",
  "config.model.attention",
  "config.model.remat",
  "config.model.remat_offload",
  "config.model.scan_layers",
  "config.model.loss_chunk",
  "config.train.steps",
  "config.train.microbatches",
  "config.train.log_every",
  "config.train.statistics_every",
  "config.train.profile",
  "config.train.eval_every",
  "config.train.eval_batches",
  "config.train.slow_step_factor",
  *("config.tasks", "config.tasks."),
  # Fingerprints decide whether these fields name the same data as before.
  "config.data.train",
  "config.data.validation",
  "config.data.text_unit",
  "config.data.invalid_utf8",
  "config.data.invalid_documents",
  "config.tokenizer.",
)


def earlier_config(
  workdir: str, last: checkpoint.Meta | None
) -> config_lib.Config | None:
  """The config of the run in `workdir`, from its `last` checkpoint, or else
  from config.json; None if config.json is absent or damaged, too. Raises
  ConfigError if it is not that of a run.
  """
  if last is not None:
    return last.config
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    return None
  try:
    return validation.from_json(files.attempt(path, path.read_bytes))
  except schema.ConfigError:
    if config_json.is_there(workdir, damaged=False):
      raise schema.ConfigError(
        f"--workdir={workdir}: its config.json is that of a Hugging Face "
        "model; name another directory, and start from this one by "
        f"--config.init_from={workdir}"
      ) from None
    return None


def refuse_other_config(
  config: config_lib.Config, before: config_lib.Config | None, workdir: str
) -> None:
  """Raises ConfigError if the config differs from `before`, the earlier config
  of the run in `workdir`, in a field that a restart may not change.
  """
  if before is None:
    return
  free = _FREE
  if config.checkpoint.on_mismatch == "fresh_optimizer":
    free += ("config.optimizer.",)
  changed = [
    f"{name} was {old!r} and is {new!r}"
    for name, (old, new) in validation.differences(before, config).items()
    # Only names with a final dot are prefixes: `config.data.train` must not
    # free `config.data.train_weights`.
    if not any(name == f or (f[-1] == "." and name.startswith(f)) for f in free)
  ]
  if changed:
    raise schema.ConfigError(
      f"--workdir={workdir}: holds a run of another config: "
      f"{'; '.join(changed)}. Name another workdir, or restore these fields"
    )


def write_config(
  workdir: str, config: config_lib.Config, start: int
) -> str | None:
  """Writes `config` to config.json. The previous config goes to
  config_history.jsonl, with `until_step` = `start`. Returns a message if the
  previous file was damaged, else None.
  """
  path = epath.Path(workdir) / "config.json"
  content = config_lib.to_json(config)
  before = path.read_bytes() if path.exists() else None
  if before == content.encode():
    return None
  said = None
  if before is not None:
    try:
      entry = {"until_step": start, "config": json.loads(before)}
      history = path.with_name("config_history.jsonl")
      lines = history.read_bytes() if history.exists() else b""
      files.replace(history, lines + f"{json.dumps(entry)}\n".encode())
    except (ValueError, RecursionError):
      where = metrics.set_aside(path, before)
      said = f"{path} is damaged: moved to {where}, and written again"
  files.replace(path, content)
  return said


# --- several processes --------------------------------------------------------


def check_processes_start_alike(config: config_lib.Config) -> None:
  """Collective: raises ConfigError if the processes have different configs."""
  tree = json.loads(config_lib.to_json(config))
  data = tree["data"]
  for name in ("cache_dir", "workers", "processes", "prefetch_rows"):
    del data[name]  # may differ between hosts
  for name in ("train", "validation"):  # paths may differ, counts may not
    data[name] = len(data[name])
  processes.check_agreement(
    {f"config.{name}": json.dumps(value) for name, value in tree.items()}
  )


def check_processes_read_alike(
  config: config_lib.Config, prepared: store.Prepared, workdir: str
) -> None:
  """Collective: raises ConfigError if the processes have different tokenizers,
  data, checkpoints or sources of parameters.
  """
  steps = checkpoint.steps(workdir)
  facts: dict[str, str] = {
    "tokenizer": prepared.tokenizer.fingerprint,
    f"checkpoints in --workdir={workdir}": str(steps),
  }
  if config.init_from is not None:
    source = "not read" if steps else init_from.find(config.init_from).identity
    facts[f"config.init_from={config.init_from}"] = source
  windows = {
    "train": pipeline.training_windows(config, prepared),
    "validation": pipeline.validation_windows(config, prepared),
  }
  for kind, of_sources in windows.items():
    stores = getattr(prepared, kind)
    for i, (tokens, some) in enumerate(zip(stores, of_sources, strict=True)):
      facts[f"config.data.{kind}[{i}]={tokens.spec!r}"] = (
        f"fingerprint {tokens.fingerprint}, {tokens.n_tokens} tokens, "
        f"{len(some)} windows, {tokens.objective}"
      )
  processes.check_agreement(facts)


def fingerprint(
  stores: Sequence[store.TokenStore], tokenizer: tokenizer_lib.Tokenizer
) -> str:
  """Hash of token stores, of their objectives and of their tokenizer, 16
  hexadecimal digits.
  """
  causal = objective_lib.Causal()
  parts = [
    s.fingerprint + (f"|{s.objective}" if s.objective != causal else "")
    for s in stores
  ]
  parts.append(tokenizer.fingerprint)
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# --- the state as a checkpoint ---


def to_trees(state: step_lib.State) -> dict[str, Any]:
  """The state as items of a checkpoint; `frozen` and `ema` only if the state
  has some.
  """
  rest = (state.step, state.opt_state, state.history)
  trees = {"params": state.params, "rest": rest}
  if state.frozen:
    trees["frozen"] = state.frozen
  return trees if state.ema is None else {**trees, "ema": state.ema}


def from_trees(trees: dict[str, Any]) -> step_lib.State:
  """Inverse of `to_trees`."""
  step, opt_state, history = trees["rest"]
  return step_lib.State(
    step=step,
    params=trees["params"],
    frozen=trees.get("frozen", {}),
    ema=trees.get("ema"),
    opt_state=opt_state,
    history=history,
  )


# --- the checkpoint to go on from ---------------------------------------------


def check_from_step(workdir: str, from_step: int | None) -> None:
  if from_step is None:
    return
  if from_step not in (found := checkpoint.steps(workdir)):
    raise schema.ConfigError(
      f"--from_step={from_step}: no such checkpoint in {workdir}; it has "
      f"{found}"
    )


def abandon_later(checkpoints: checkpoint.Checkpoints, step: int) -> None:
  """Moves the checkpoints after `step` to abandoned/."""
  for later in checkpoints.steps():
    if later > step and jax.process_index() == 0:
      checkpoints.set_aside(later, "abandoned")
  if jax.process_count() > 1:
    processes.wait_for_all("checkpoints abandoned")
    checkpoints.reload()


def first_state(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  workdir: str,
  checkpoints: checkpoint.Checkpoints,
  now: checkpoint.Meta,
  say: Callable[[str], None],
) -> tuple[step_lib.State, checkpoint.Meta | None]:
  """(state, meta) of the last undamaged checkpoint, on this run's mesh; without
  a checkpoint, (fresh state, None), which starts from `config.init_from`.

  `now` has the fingerprints of this start. Damaged checkpoints are moved to
  damaged/, up to `config.checkpoint.set_aside`; the next raises Damaged, and
  with several processes every move does. Raises ConfigError if the checkpoint
  does not fit the config or the data.
  """
  like = to_trees(programs.abstract_state(config, mesh))
  n_damaged = 0
  while step := checkpoints.latest_step():
    try:
      meta = checkpoint.load_meta(workdir, step)
      refuse_other_config(config, meta.config, workdir)
      for line in _changes(meta, now):
        say(line)
      return _restored(
        config, mesh, workdir, checkpoints, meta, like, say
      ), meta
    except files.Damaged as error:
      n_damaged += 1
      if n_damaged > config.checkpoint.set_aside:
        raise files.Damaged(
          f"{error}. This start has moved "
          f"{schema.counted(n_damaged - 1, 'damaged checkpoint')} already, and "
          "moves no more: look at the disk, then "
          f"allow it by --config.checkpoint.set_aside={n_damaged}"
        ) from error
      where = checkpoints.set_aside(step, "damaged")
      before = checkpoints.latest_step() or 0
      said = f"{error}. Moved to {where}; going back to step {before}"
      if jax.process_count() > 1:  # other processes may see no damage
        raise files.Damaged(f"{said}: start the run again") from error
      say(said)
  loaded = None
  if config.init_from is not None:
    loaded = init_from.load(config, mesh, say)
  elif config.model.lora is not None:
    say("model.lora without init_from: the frozen weights are random")
  return programs.create_state(config, mesh, loaded), None


def refuse_other_data(
  workdir: str, last: checkpoint.Meta | None, prepared: store.Prepared
) -> None:
  """Raises ConfigError if the `last` checkpoint was trained on other data than
  those of this start.
  """
  now = fingerprint(prepared.train, prepared.tokenizer)
  if last is not None and last.fingerprint != now:
    raise schema.ConfigError(
      f"--workdir={workdir}: its checkpoint was trained on other data "
      f"(fingerprint {last.fingerprint}, now {now}): the "
      "sources have changed since. Restore them, or name another workdir"
    )


def _changes(before: checkpoint.Meta, now: checkpoint.Meta) -> list[str]:
  """Messages: changes of validation, optimizer fields and learning rate."""
  lines = []
  old, new, step = before.config, now.config, before.step
  if before.validation not in (None, now.validation):
    lines.append(
      f"from step {step} on the validation set is another one (fingerprint "
      f"{before.validation}, now {now.validation}): losses before and after do "
      "not compare"
    )
  for name, (was, now_is) in validation.differences(old, new).items():
    if name.startswith(("config.optimizer.", "config.train.eval_batches")):
      lines.append(f"from step {step} on {name} is {now_is!r}; was {was!r}")
  if (old.optimizer, old.train.steps) == (new.optimizer, new.train.steps):
    return lines  # a rate is a dozen programs to compile
  rates = [
    optimizer.rate_at(c.optimizer, c.train.steps, step) for c in (old, new)
  ]
  if not math.isclose(*rates, rel_tol=1e-6):
    lines.append(
      f"at step {step} the learning rate goes from {rates[0]:.3g} to "
      f"{rates[1]:.3g}: schedule {new.optimizer.schedule!r} over "
      f"train.steps={new.train.steps}, was {old.train.steps}"
    )
  return lines


def _restored(config, mesh, workdir, checkpoints, meta, like, say):
  """The state of a checkpoint. With `on_mismatch` = fresh_optimizer, arrays of
  `rest` or `ema` that differ from the config's start fresh. Raises ConfigError
  on different parameters, and otherwise on any difference.
  """
  different = checkpoint.compare(workdir, meta, like)
  if not different:
    return from_trees(checkpoints.restore(meta, like))
  where = f"checkpoint {meta.step} of {workdir}"
  said = items.describe(different)
  model = {name: like[name] for name in ("params", "frozen") if name in like}
  if model.keys() & different.keys():
    raise schema.ConfigError(
      f"{where}: holds another model than the config says: {said}. Restore the "
      "config or the code that wrote it, or name another workdir"
    )
  if config.checkpoint.on_mismatch == "refuse":
    raise schema.ConfigError(
      f"{where}: its optimizer state or average is not what this program "
      f"makes of the config: {said}. Restore the config, code or optax that "
      "wrote it, or take what differs afresh with "
      "--config.checkpoint.on_mismatch=fresh_optimizer"
    )
  say(f"{where}: afresh from step {meta.step} on: {said}")
  fresh = programs.create_state(config, mesh)
  state = dataclasses.replace(fresh, **checkpoints.restore(meta, model))
  ema = like.get("ema")
  if ema is not None:
    average = jax.tree.map(jnp.copy, state.params)
    if "ema" not in different:
      average = checkpoints.restore(meta, {"ema": ema})["ema"]
    state = dataclasses.replace(state, ema=average)
  return _with_rest(state, meta, like, different, checkpoints)


def _with_rest(state, meta, like, different, checkpoints):
  """`state` with the matching parts of the checkpoint's `rest`: (step,
  optimizer state, history). A fresh schedule resumes at the checkpoint's step.
  """
  if "rest" not in different:
    rest = checkpoints.restore(meta, {"rest": like["rest"]})["rest"]
  else:
    wrong = {line.split("/", 1)[0] for line in different["rest"]}
    parts = tuple(
      None if str(i) in wrong else part for i, part in enumerate(like["rest"])
    )
    rest = checkpoints.restore_parts(meta, "rest", parts)
  step, opt_state, history = rest
  if opt_state is None:
    opt_state = optimizer.starting_at(state.opt_state, meta.step)
  return dataclasses.replace(
    state,
    step=step,
    opt_state=opt_state,
    history=state.history if history is None else history,
  )
