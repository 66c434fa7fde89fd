"""Checkpoints: one Orbax step directory holds all that a run is.

`params` (and `ema`, the averaged parameters, where the run keeps them) is what
evaluation and sampling read; `rest` is the remaining training state; `meta`
has the config, the tokenizer, the fingerprint of the data and a digest of each
item's bits. A step directory is complete or absent. Arrays are restored onto
whatever mesh the reader has, and compared with their digest.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from lm import config as config_lib
from lm import sharding
from lm.model import decoder


@dataclasses.dataclass
class Meta:
  """What a checkpoint says of itself.

  `tokenizer` is `Tokenizer.to_json()`; `fingerprint` names the token stores;
  `batch_hash` stands for every batch up to `step`, in order, and `digests` for
  the bits of each item; they are made when it is saved.
  """

  step: int
  config: config_lib.Config
  tokenizer: str
  fingerprint: str
  batch_hash: str = ""
  digests: dict[str, str] = dataclasses.field(default_factory=dict)


class Damaged(config_lib.RunError):
  """A checkpoint that is not what was saved."""


class Checkpoints:
  """Saves and restores the steps of one run directory.

  Saving is asynchronous: the arrays are copied off the devices before `save`
  returns, and written while training goes on.
  """

  def __init__(self, workdir: str, keep: config_lib.CheckpointConfig):
    def loss(metrics):
      return metrics["loss"]

    policies: list[managers.PreservationPolicy] = [
      managers.LatestN(n=keep.keep_last),
      managers.BestN(
        get_metric_fn=loss,
        reverse=True,  # the best, which is the lowest, comes last
        n=keep.keep_best,
        keep_checkpoints_without_metrics=False,
      ),
    ]
    if keep.keep_every is not None:
      policies.append(managers.EveryNSteps(keep.keep_every))
    self._manager = ocp.CheckpointManager(
      _directory(workdir),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        best_fn=loss,  # without it the losses would not be written
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    params: Any,
    ema: Any | None,
    rest: Any,
    meta: Meta,
    loss: float | None,
  ) -> None:
    """Starts to save; `loss` is the validation loss of this step, if known."""
    trees = {"params": params, "rest": rest}
    if ema is not None:
      trees["ema"] = ema
    items: dict[str, Any] = {
      name: ocp.args.StandardSave(tree) for name, tree in trees.items()
    }
    items["meta"] = ocp.args.JsonSave(
      {
        "config": config_lib.to_json(meta.config),
        "tokenizer": meta.tokenizer,
        "fingerprint": meta.fingerprint,
        "batch_hash": meta.batch_hash,
        "digests": {name: _digest(tree) for name, tree in trees.items()},
      }
    )
    metrics = None if loss is None else {"loss": loss}
    with self._writing():
      self._manager.save(
        step, args=ocp.args.Composite(**items), metrics=metrics, force=True
      )

  def restore(
    self, step: int, params: Any, ema: Any | None, rest: Any
  ) -> tuple[Any, Any | None, Any]:
    """The three trees of `step`, laid out as the given abstract ones.

    Raises Damaged where they are not what was saved.
    """
    trees = {"params": params, "rest": rest}
    if ema is not None:
      trees["ema"] = ema
    found = _restore(self._manager, step, trees)
    return found["params"], found.get("ema"), found["rest"]

  def set_aside(self, step: int) -> str:
    """Moves a damaged checkpoint out of the way; returns where it is now."""
    source = self._manager.directory / str(step)
    target = self._manager.directory.parent / "damaged" / str(step)
    if jax.process_index() == 0:
      target.parent.mkdir(parents=True, exist_ok=True)
      if target.exists():
        target.rmtree()
      source.rename(target)
    self._manager.reload()
    return str(target)

  def wait(self) -> None:
    """Returns once everything saved so far is on disk."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Raises RunError for what went wrong in a save, this one or the last."""
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise
    except Exception as error:
      raise config_lib.RunError(
        f"{self._manager.directory}: a checkpoint could not be written: "
        f"{_first_line(error)}. Once the cause is gone, the same command goes "
        f"on from step {self.latest_step() or 0}"
      ) from error


def load_meta(workdir: str, step: int | None = None) -> Meta:
  """Reads what the last checkpoint (or that of `step`) says of itself.

  Raises ConfigError where there is none, or Damaged.
  """
  step = _find_step(workdir, step)
  with _reader(workdir) as manager, _reading(manager, step):
    found = manager.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    )["meta"]
    return Meta(
      step=step,
      config=config_lib.from_json(found["config"]),
      tokenizer=found["tokenizer"],
      fingerprint=found["fingerprint"],
      batch_hash=found["batch_hash"],
      digests=found["digests"],
    )


def load_params(
  workdir: str,
  model: config_lib.ModelConfig,
  step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> decoder.Params:
  """Parameters alone, straight into their shards on `mesh` (None: whole, on
  the first device): the averaged ones where the run keeps an average.

  Raises ConfigError where there is none, or Damaged.
  """
  step = _find_step(workdir, step)
  target = sharding.abstract(
    functools.partial(decoder.init_params, model), jax.random.key(0), mesh=mesh
  )
  averaged = (_directory(workdir) / str(step) / "ema").exists()
  name = "ema" if averaged else "params"
  with _reader(workdir) as manager:
    return _restore(manager, step, {name: target})[name]


def _restore(
  manager: ocp.CheckpointManager, step: int, trees: dict[str, Any]
) -> dict[str, Any]:
  """Items of `step`, laid out as abstract `trees`, compared with what their
  digests say. Raises Damaged.
  """
  items: dict[str, Any] = {
    name: ocp.args.StandardRestore(tree) for name, tree in trees.items()
  }
  items["meta"] = ocp.args.JsonRestore()
  with _reading(manager, step):
    found = manager.restore(step, args=ocp.args.Composite(**items))
  for name in trees:
    got, want = _digest(found[name]), found["meta"]["digests"][name]
    if got != want:
      raise Damaged(
        f"checkpoint {manager.directory / str(step)} is damaged: the digest of "
        f"`{name}` is {got}, and of what was saved {want}"
      )
  return {name: found[name] for name in trees}


@contextlib.contextmanager
def _reading(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
  """Raises Damaged for whatever goes wrong inside, but on the devices.

  Files that are torn, missing or altered come out of the libraries below as
  errors of every type.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError:
    raise
  except Exception as error:
    raise Damaged(
      f"checkpoint {manager.directory / str(step)} is damaged: "
      f"{_first_line(error)}"
    ) from error


def _first_line(error: Exception) -> str:
  """Of at most some 300 characters: libraries add whole specifications."""
  line = str(error).split("\n")[0].split(" [source", 1)[0]
  if len(line) > 300:
    line = f"{line[:150]} ... {line[-150:]}"
  return f"{type(error).__name__}: {line}"


def _digest(tree: Any) -> str:
  return "".join(f"{word:08x}" for word in np.asarray(sharding.digest(tree)))


def _directory(workdir: str) -> epath.Path:
  """Orbax wants absolute paths; those of object stores (gs://) are."""
  path = epath.Path(workdir)
  return (path if "://" in workdir else path.resolve()) / "checkpoints"


def _reader(workdir: str) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(read_only=True, create=False)
  return ocp.CheckpointManager(_directory(workdir), options=options)


def _find_step(workdir: str, step: int | None) -> int:
  steps = []
  if _directory(workdir).exists():
    with _reader(workdir) as manager:
      steps = sorted(manager.all_steps())
  if not steps:
    raise config_lib.ConfigError(
      f"--workdir={workdir}: has no checkpoint; train one there with "
      f"python -m lm.train --config=configs/NAME.py --workdir={workdir}"
    )
  if step is not None and step not in steps:
    raise config_lib.ConfigError(
      f"--step={step}: no such checkpoint in {workdir}; it has {steps}"
    )
  return steps[-1] if step is None else step
