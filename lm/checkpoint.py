"""Checkpoints: an Orbax step directory holds the whole state of a run.

Evaluation and sampling read `params` (the trainable parameters), or `ema` (the
averages) if the run keeps an average, and `frozen` (parameters that are not
trained) if the run has some; `rest` is the remaining training state; `meta` has
the config, the tokenizer, the fingerprints of the data, the names, shapes and
dtypes of all arrays, a digest of each item's bits and a digest of `meta`. A
step directory is complete or absent.

Reading distinguishes three failures. Arrays that differ from the wanted arrays
raise ConfigError. Corruption, found by a digest or by the array library, raises
`files.Damaged`. Any other failure raises RunError, after retries if a disk, a
network or memory failed, and moves no file.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from lm import config as config_lib
from lm import files, items, schema, sharding, validation
from lm.model import decoder, weights

FORMAT = 2
# Fingerprint of the data of what was not trained here.
CONVERTED = "converted"
# Keys of `meta` in format 1: no format number, no `trees`, no digest of `meta`.
_FORMAT_1 = ("config", "tokenizer", "fingerprint", "batch_hash", "digests")


@dataclasses.dataclass
class Meta:
  """Metadata of a checkpoint.

  `tokenizer` is `Tokenizer.to_json()`; `fingerprint` and `validation` identify
  the token stores of training and of validation; `batch_hash` covers every
  batch up to `step`, in order; `loss` is the validation loss at `step`, if
  measured; `unreported` is (sum of nats, tokens scored) of the steps since the
  last report. By item, `digests` has the digest of all bits, and `trees` has
  `dtype[shape]` of each array by name; `save` fills in both, and `trees` is {}
  in format 1.
  """

  step: int
  config: config_lib.Config
  tokenizer: str
  fingerprint: str
  validation: str | None = None
  batch_hash: str = ""
  loss: float | None = None
  unreported: tuple[float, float] = (0.0, 0.0)
  digests: dict[str, str] = dataclasses.field(default_factory=dict)
  trees: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

  @property
  def trained_on(self) -> tuple[str, ...]:
    """Training sources; () of what was converted: they are unknown."""
    known = self.fingerprint != CONVERTED
    return self.config.data.train if known else ()


class Checkpoints:
  """Saves and restores the checkpoints of a run directory.

  Saving is asynchronous: the arrays are copied off the devices before `save`
  returns, and written to disk during the following training steps.
  """

  def __init__(self, workdir: str, keep: config_lib.CheckpointConfig):
    files.check_run_directory(workdir, "workdir")

    def loss(metrics):
      return metrics["loss"]

    policies: list[managers.PreservationPolicy] = [
      managers.LatestN(n=keep.keep_last),
      managers.BestN(
        get_metric_fn=loss,
        reverse=True,  # the best, of lowest loss, comes last
        n=keep.keep_best,
        keep_checkpoints_without_metrics=False,
      ),
    ]
    if keep.keep_every is not None:
      policies.append(managers.EveryNSteps(keep.keep_every))
    if jax.process_index() == 0:
      _mend_losses(workdir)
    self._manager = ocp.CheckpointManager(
      _directory(workdir),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        best_fn=loss,  # Orbax writes the losses only if best_fn is set
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
      handler_registry=items.handlers(),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, trees: items.Trees, meta: Meta) -> None:
    """Starts an asynchronous save of the items `trees` (`params`, `rest`, maybe
    `ema` and `frozen`) as the checkpoint of `meta.step`.
    """
    saved: dict[str, Any] = {
      name: items.saving(tree) for name, tree in trees.items()
    }
    digests = {name: items.digest_of(tree) for name, tree in trees.items()}
    content: dict[str, Any] = {
      "format": FORMAT,
      "config": config_lib.to_json(meta.config),
      "tokenizer": meta.tokenizer,
      "fingerprint": meta.fingerprint,
      "validation": meta.validation,
      "batch_hash": meta.batch_hash,
      "loss": meta.loss,
      "unreported": meta.unreported,
      "digests": digests,
      "trees": {name: items.names(tree) for name, tree in trees.items()},
    }
    saved["meta"] = ocp.args.JsonSave(files.seal(content))
    metrics = None if meta.loss is None else {"loss": meta.loss}
    with self._writing():
      self._manager.save(
        meta.step, args=ocp.args.Composite(**saved), metrics=metrics, force=True
      )

  def restore(self, meta: Meta, like: items.Trees) -> items.Trees:
    """Restores the items of `meta.step`, sharded as the abstract trees `like`.

    Raises ConfigError if `compare` finds differences, Damaged on corruption.
    """
    return _restore(self._manager.directory, meta, like)

  def restore_parts(
    self, meta: Meta, name: str, like: tuple[Any, ...]
  ) -> tuple[Any, ...]:
    """Restores the parts of an item that are not None in `like`, without
    checking any digest.
    """
    path = self._manager.directory / str(meta.step)
    return items.read_parts(path, name, like)

  def reload(self) -> None:
    """Rereads the list of steps, after another process has moved a step."""
    self._manager.reload()

  def set_aside(self, step: int, where: str) -> str:
    """Moves the checkpoint of `step` into the directory `where` of the run,
    beside those moved earlier; returns the new path.
    """
    source = self._manager.directory / str(step)
    aside = self._manager.directory.parent / where
    target, n = aside / str(step), 1
    while target.exists() and source.exists():
      n += 1
      target = aside / f"{step}.{n}"
    # Several processes may find the damage, and move the checkpoint at once.
    with contextlib.suppress(FileNotFoundError):
      aside.mkdir(parents=True, exist_ok=True)
      source.rename(target)
    self._manager.reload()
    return str(target)

  def wait(self) -> None:
    """Returns after every save started so far is on disk."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns an error of this save, or of the last asynchronous save, into
    RunError. Device errors and errors of unknown cause pass through.
    """
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise
    except Exception as error:
      if files.reason(error) is None:
        raise
      raise schema.RunError(
        f"{self._manager.directory}: a checkpoint could not be written: "
        f"{files.first_line(error)}. Once the cause is gone, the same command "
        f"goes on from step {self.latest_step() or 0}"
      ) from error


def steps(workdir: str) -> list[int]:
  """Steps of the complete checkpoints of a run, ascending."""
  directory = _directory(workdir)

  def read():
    found = directory.exists()
    return sorted(ocp.utils.checkpoint_steps(directory)) if found else []

  return files.attempt(directory, read)


def split_name(name: str) -> tuple[str, int | None]:
  """(run directory, step) of `RUN@STEP`, and (run directory, None) of `RUN`."""
  if found := re.fullmatch(r"(.*)@([0-9]{1,18})", name, re.DOTALL):
    return found[1], int(found[2])
  return name, None


def load_meta(workdir: str, step: int | None = None) -> Meta:
  """Reads the metadata of the last checkpoint, or of the checkpoint of `step`.

  Raises ConfigError if the checkpoint is missing or has a later format, Damaged
  if `meta` is corrupt.
  """
  step = _find_step(workdir, step)
  path = _directory(workdir) / str(step) / "meta" / "metadata"
  with _removed_or_damaged(path.parent.parent):
    content = files.attempt(
      path,
      lambda: files.unseal(path.read_bytes(), without=_FORMAT_1),
      corrupt=(ValueError,),
    )
  try:
    version = content.pop("format", 1)
    if version > FORMAT:
      raise schema.ConfigError(
        f"checkpoint {path.parent.parent}: has format {version}, and this "
        f"program reads formats 1 to {FORMAT}: use the version that wrote it"
      )
    fields = {f.name for f in dataclasses.fields(Meta)} & content.keys()
    kept = {name: content[name] for name in fields - {"config"}}
    kept["unreported"] = tuple(kept.get("unreported", (0.0, 0.0)))
    return Meta(
      step=step, config=validation.from_json(content["config"]), **kept
    )
  except (KeyError, TypeError, AttributeError) as error:
    raise files.Damaged(
      f"checkpoint file {path} is damaged: {files.first_line(error)}"
    ) from error
  except schema.ConfigError as error:
    raise schema.ConfigError(f"checkpoint file {path}: {error}") from error


def last_undamaged(workdir: str, most: int | None = None) -> Meta | None:
  """Metadata of the last checkpoint, up to step `most`, of which it can be
  read; None without one. The restore reports the damage of later ones.
  """
  found = [s for s in steps(workdir) if most is None or s <= most]
  for step in reversed(found):
    try:
      return load_meta(workdir, step)
    except files.Damaged:
      continue
  return None


def load_params(
  workdir: str,
  model: config_lib.ModelConfig,
  step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> decoder.Params:
  """Restores only the parameters, directly into shards on `mesh` (None: whole,
  on the first device): the averaged parameters if the run keeps an average.

  Raises ConfigError if the checkpoint is missing or of another model, or
  Damaged.
  """
  meta = load_meta(workdir, step)
  like = sharding.abstract(
    functools.partial(decoder.init_params, model), jax.random.key(0), mesh=mesh
  )
  return restore_params(workdir, meta, model, like)


def restore_params(
  workdir: str,
  meta: Meta,
  model: config_lib.ModelConfig,
  like: decoder.Params,
  *,
  with_frozen: bool = True,
) -> decoder.Params:
  """`load_params` of the checkpoint of `meta`, sharded as the abstract
  parameters `like` of `model`; without the frozen ones if not `with_frozen`.
  """
  trained, frozen = weights.split(like, decoder.declared(model))
  name = "ema" if "ema" in meta.digests else "params"
  wanted = {name: trained}
  if frozen and with_frozen:
    wanted["frozen"] = frozen
  found = _restore(_directory(workdir), meta, wanted)
  return weights.join(found[name], found.get("frozen", {}))


def compare(
  workdir: str, meta: Meta, like: items.Trees
) -> dict[str, list[str]]:
  """Differences between the stored arrays and the arrays of `like`: item ->
  messages; {} if all arrays match. Reads no array.
  """
  path = _directory(workdir) / str(meta.step)
  return items.compare(path, meta.trees, meta.digests, like)


def _restore(
  directory: epath.Path, meta: Meta, like: items.Trees
) -> items.Trees:
  """Restores items sharded as `like` and checks the digests. Raises ConfigError
  if the stored arrays differ from `like`, Damaged if a digest differs.
  """
  path = directory / str(meta.step)
  if different := items.compare(path, meta.trees, meta.digests, like):
    raise schema.ConfigError(
      f"checkpoint {path}: holds other arrays than this program wants: "
      f"{items.describe(different)}. Use the code and config that wrote it"
    )
  with _removed_or_damaged(path):
    found = items.read(path, like)
  for name, tree in found.items():
    got, want = items.digest_of(tree), meta.digests[name]
    if got != want:
      raise files.Damaged(
        f"checkpoint {path / name} is damaged: the "
        f"digest of `{name}` is {got}, and of what was saved {want}"
      )
  return found


@contextlib.contextmanager
def _removed_or_damaged(path: epath.Path) -> Iterator[None]:
  """Where what is read inside is Damaged and the checkpoint at `path` is gone,
  raises Damaged that says so.
  """
  try:
    yield
  except files.Damaged as error:
    if path.exists():
      raise
    raise files.Damaged(
      f"checkpoint {path}: was removed while it was read, as a training does "
      "with those that config.checkpoint does not keep: run the command again, "
      "or name a step that is kept"
    ) from error


def _mend_losses(workdir: str) -> None:
  """Rewrites damaged validation-loss files, or sets aside files with unknown
  loss: a single flipped bit would keep Orbax from opening any checkpoint.
  """
  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(functools.partial(_mend_loss, workdir), steps(workdir)))


def _mend_loss(workdir: str, step: int) -> None:
  path = _directory(workdir) / str(step) / "metrics" / "metrics"
  if not path.exists():
    return
  known = loss = None
  with contextlib.suppress(schema.UserError):  # reported on restore
    known = load_meta(workdir, step).loss
  with contextlib.suppress(ValueError, KeyError, TypeError):
    loss = float(json.loads(path.read_bytes())["loss"])
  if loss is not None and known in (None, loss):
    return
  if known is None:
    path.parent.rename(path.parent.with_name("metrics.damaged"))
    done = "set aside; the step no longer counts as one of the best"
  else:
    files.replace(path, json.dumps({"loss": known}))
    done = "written again"
  print(f"{path} is damaged: {done}", file=sys.stderr)


def _directory(workdir: str) -> epath.Path:
  """Checkpoint directory of a run as an absolute path, for Orbax. Paths of
  object stores (gs://) are absolute already.
  """
  path = epath.Path(workdir)
  return (path.resolve() if files.is_local(workdir) else path) / "checkpoints"


def _find_step(workdir: str, step: int | None) -> int:
  files.check_name(workdir, "workdir")
  found = steps(workdir)
  if not found:
    raise schema.ConfigError(
      f"--workdir={workdir}: has no checkpoint; train one there with "
      f"python -m lm.train --config=configs/NAME.py --workdir={workdir}, or "
      "make a run of a Hugging Face checkpoint with python -m lm.convert "
      "--from=FOLDER --to=RUN"
    )
  if step is not None and step not in found:
    raise schema.ConfigError(
      f"--step={step}: no such checkpoint in {workdir}; it has {found}"
    )
  return found[-1] if step is None else step
