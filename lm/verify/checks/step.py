"""Checks of the training step: the numbers must be the same for all
microbatches, meshes, remat and scan modes, and every array must be sharded as
lm/sharding.py says.
"""

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import config as config_lib
from lm import sharding
from lm.train import programs
from lm.verify import result
from lm.verify.checks import harness
from lm.verify.result import Result

# A second moment is a square, and has twice the relative error of the gradient.
_MOMENTS = 2 * harness.FLOAT32_SUMS


def accumulation(config: config_lib.Config) -> Iterator[Result]:
  """Gradients of unequal microbatches must add up to those of the batch."""
  config = harness.exact(config)
  rows = config.train.batch_size
  batch = harness.random_batch(config, 0)
  parts = {config.train.microbatches, 2, rows} - {1}
  config.train.microbatches = 1
  (whole,) = harness.gradients(config, [batch])
  for n in sorted(n for n in parts if rows % n == 0):
    config.train.microbatches = n
    yield result.judge(
      "accumulation",
      f"float32 loss and gradients of {rows} rows: in {n} parts, and in one",
      harness.relative_error(harness.gradients(config, [batch])[0], whole),
      harness.FLOAT32_SUMS,
    )


def layers(config: config_lib.Config) -> Iterator[Result]:
  """All combinations of scan and remat, the config's own among them, must match
  a loop without remat.
  """
  config = harness.exact(config)
  config.train.microbatches = 1
  batch = harness.random_batch(config, 0)
  model, chosen = config.model, config.model.remat
  model.remat, model.scan_layers = "none", False
  (plain,) = harness.gradients(config, [batch])
  for scan in (True, False):
    for remat in dict.fromkeys(("none", "dots", "full", chosen)):
      if (scan, remat) == (False, "none"):
        continue
      model.remat, model.scan_layers = remat, scan
      yield result.judge(
        "layers",
        f"float32 loss and gradients: {'scan' if scan else 'loop'} with remat "
        f"{remat}, and plain",
        harness.relative_error(harness.gradients(config, [batch])[0], plain),
        harness.FLOAT32_SUMS,
      )


def meshes(config: config_lib.Config) -> Iterator[Result]:
  """Two steps of the config's optimizer on every mesh, and under pmap, must
  match a single device. The second loss shows the first update.
  """
  config = harness.exact(config)
  batches = [harness.random_batch(config, seed) for seed in (0, 1)]
  one = harness.train_steps(harness.with_mesh(config, (1, 1, 1)), batches)
  fit, rejected = harness.fitting_shapes(config)
  note = f"left out: {', '.join(rejected)}" if rejected else ""
  layouts = [(shape, "jit") for shape in fit]
  if (data_only := (jax.device_count(), 1, 1)) in fit:
    layouts.append((data_only, "pmap"))
  for shape, mode in layouts:
    found = harness.train_steps(harness.with_mesh(config, shape, mode), batches)
    where = "pmap" if mode == "pmap" else harness.shape_name(shape)
    yield result.judge(
      "meshes",
      f"{where}: float32 losses and gradient norms of two steps",
      harness.relative_error(found.numbers.T.tolist(), one.numbers.T.tolist()),
      harness.FLOAT32_SUMS,
    )
    yield result.judge(
      "meshes",
      f"{where}: {config.optimizer.name}'s state after the first",
      harness.relative_error(found.moments, one.moments),
      _MOMENTS,
      note,
    )
    note = ""
  if not layouts:
    yield Result("meshes", "no mesh fits", None, None, False, note)


# Logical axes of each weight by name, for the table in lm/sharding.py. Weights
# of layers have an axis in front; weights not named here are replicated.
_AXES: dict[str, tuple[str | None, ...]] = {
  "embed": ("vocab", "embed"),
  "position_embed": (None, "embed"),
  "head": ("embed", "vocab"),
  "q": ("embed", "heads", None),
  "k": ("embed", "kv_heads", None),
  "v": ("embed", "kv_heads", None),
  "o": ("heads", None, "embed"),
  "q_bias": ("heads", None),
  "k_bias": ("kv_heads", None),
  "v_bias": ("kv_heads", None),
  "up": ("embed", "mlp"),
  "gate": ("embed", "mlp"),
  "down": ("mlp", "embed"),
  "up_bias": ("mlp",),
  "gate_bias": ("mlp",),
  "dense": ("embed", None),
  "head_bias": ("vocab",),
}


def shardings(config: config_lib.Config) -> Iterator[Result]:
  """Each array of a fresh state, and of the state after a step, must be sharded
  by the table of axes, on the mesh that cuts the most axes, fsdp preferred.
  """
  config = harness.exact(config)
  fit, _ = harness.fitting_shapes(config)
  # Meshes with fsdp come first, since fsdp cuts every matrix.
  shape = max(fit, key=lambda s: (s[1] > 1, sum(n > 1 for n in s), s[1]))
  config = harness.with_mesh(config, shape)
  model, where = config.model, harness.shape_name(shape)

  def after():
    return harness.train_steps(config, [harness.random_batch(config, 0)]).state

  def fresh():
    return programs.create_state(config, harness.make_mesh(config))

  # Only vectors, one for each layer, may be replicated, and factors of
  # adapters, which are as long and a few columns wide.
  longest = max(model.d_model, model.d_mlp, model.n_heads * model.d_head)
  vectors = model.n_layers * longest * (model.lora.rank if model.lora else 1)
  for what, make in (("fresh", fresh), ("after a step", after)):
    state = make()
    weights = {"params": state.params, "frozen": state.frozen, "ema": state.ema}
    slots = {"opt_state": state.opt_state}
    for kind, tree in (
      ("weights and averages not", weights),
      ("optimizer slots not as their weights", slots),
    ):
      wrong = _misplaced(tree, state.model)
      yield result.judge(
        "shardings",
        f"{where}, {what}: {kind} where the table of axes says",
        len(wrong),
        0,
        ", ".join(wrong),
      )
    whole = [
      jax.tree_util.keystr(path, simple=True, separator=".")
      for path, leaf in jax.tree_util.tree_leaves_with_path(weights | slots)
      if leaf.size > vectors and leaf.sharding.is_fully_replicated
    ]
    yield result.judge(
      "shardings",
      f"{where}, {what}: arrays of more than {vectors} elements whole on every "
      "device",
      len(whole) if shape[1] > 1 else 0,
      0,
      ", ".join(whole) if shape[1] > 1 else "no fsdp axis: nothing is promised",
    )


def _misplaced(tree: Any, params: Any) -> list[str]:
  """Paths of arrays not sharded like the weight named at the end of the path.
  An array whose path ends with no weight must be replicated.
  """
  weights = dict(jax.tree_util.tree_leaves_with_path(params))
  wrong = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    ends = [path[i:] for i in range(len(path)) if path[i:] in weights]
    specs = _allowed(ends[0], weights[ends[0]].shape, leaf) if ends else [P()]
    mesh = leaf.sharding.mesh
    if not any(
      leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
      for spec in specs
    ):
      wrong.append(jax.tree_util.keystr(path, simple=True, separator="."))
  return wrong


def _axes_of(path: Any, otherwise: tuple[None, ...]) -> tuple[str | None, ...]:
  """Logical axes of the weight at `path` by `_AXES`; an adapter's factors A and
  B have those of the matrix's inputs and outputs.
  """
  name = path[-1].key
  if name in ("a", "b") and path[-3].key == "lora":
    matrix = path[-2].key
    n_inputs = 2 if matrix == "o" else 1
    inputs, outputs = _AXES[matrix][:n_inputs], _AXES[matrix][n_inputs:]
    return (*inputs, None) if name == "a" else (None, *outputs)
  if name == "scale" and len(otherwise) == 2:  # QK norm of all heads
    return _AXES[path[-2].key.replace("norm", "bias")]
  return _AXES.get(name, otherwise)


def _allowed(path: Any, shape: tuple[int, ...], leaf: jax.Array) -> list[P]:
  """Allowed layouts of `leaf`, an array of the weight at `path`: the weight's
  layout, or for a factored moment the weight's layout less the missing axis.
  """
  lead = (None,) if path[0].key == "layers" else ()
  axes = lead + _axes_of(path, (None,) * (len(shape) - len(lead)))
  if leaf.shape == shape:
    return [sharding.partition(*axes)]
  less = [
    sharding.partition(*axes[:i], *axes[i + 1 :])
    for i in range(len(shape))
    if leaf.shape == shape[:i] + shape[i + 1 :]
  ]
  return less or [P()]
