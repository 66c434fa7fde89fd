"""Optax optimizers and learning-rate schedules, by the role of each weight.

The weights of layers are stacked on a leading axis L. No optimizer here may
treat L as a dimension of the matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import config as config_lib
from lm.model import weights
from lm.train import muon


def schedule(
  cfg: config_lib.OptimizerConfig, steps: int, peak: float
) -> optax.Schedule:
  """Learning rate of step 0 .. steps - 1: linear warm-up, then `cfg.schedule`.

  `rsqrt` is peak * sqrt(warmup / step) and never ends; `wsd` (warm-up, stable,
  decay: arXiv:2404.06395) decays linearly over the last `decay_fraction` of
  all steps, warm-up included.
  """
  warmup = float(cfg.warmup_steps)  # warmup + 1 could overflow int32

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum(1.0, (step + 1) / (warmup + 1))
    done = jnp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
    if cfg.schedule == "constant":
      return peak * rise
    if cfg.schedule == "rsqrt":
      start = max(1, warmup)
      return peak * rise * jnp.sqrt(start / jnp.maximum(step, start))
    shape = {
      "linear": 1 - done,
      "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)),
      "wsd": jnp.clip((steps - step) / (cfg.decay_fraction * steps), 0, 1),
    }[cfg.schedule]
    floor = cfg.final_lr_fraction
    return peak * rise * (floor + (1 - floor) * shape)

  return rate


def rate_at(cfg: config_lib.OptimizerConfig, steps: int, step: int) -> float:
  """Learning rate at `step` of a run of `steps`; `lr` in reports."""
  return np.asarray(schedule(cfg, steps, cfg.peak_lr)(step)).item()


def make(
  cfg: config_lib.OptimizerConfig,
  steps: int,
  declared: Any,
  dtype: str,
) -> optax.GradientTransformation:
  """Optax transformation, without gradient clipping: train/step.py clips.

  `declared` is a tree like the parameters (`decoder.declared`); Muon multiplies
  matrices in `dtype`. With every optimizer, weight decay takes lr *
  weight_decay of every parameter but vectors, at the parameter's own rate.
  """

  def decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: weights.of(declared, path).role != "vector", params
    )

  rate = schedule(cfg, steps, cfg.peak_lr)
  if cfg.name == "adamw":
    return optax.adamw(
      rate,
      b1=cfg.b1,
      b2=cfg.b2,
      eps=cfg.epsilon,
      weight_decay=cfg.weight_decay,
      mask=decayed,
    )
  if cfg.name == "lion":
    return optax.lion(
      rate,
      b1=cfg.b1,
      b2=cfg.b2,
      weight_decay=cfg.weight_decay,
      mask=decayed,
    )
  if cfg.name == "adafactor":
    return _layerwise(
      lambda: optax.adafactor(
        rate,
        # Optax does not multiply this rate by the learning rate.
        weight_decay_rate=(lambda step: cfg.weight_decay * rate(step))
        if cfg.weight_decay
        else None,
        weight_decay_mask=decayed,
      )
    )
  return _muon(cfg, steps, declared, dtype, decayed)


def _muon(
  cfg: config_lib.OptimizerConfig,
  steps: int,
  declared: Any,
  dtype: str,
  decayed: Callable[[Any], Any],
) -> optax.GradientTransformation:
  """Muon for matrices, NAdamW for all else."""

  def labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: (
        "muon" if weights.of(declared, path).role == "matrix" else "adam"
      ),
      params,
    )

  def decay(updates: Any, params: Any) -> Any:
    return jax.tree.map(
      lambda kept, u, p: u + cfg.weight_decay * p if kept else u,
      decayed(params),
      updates,
      params,
    )

  # Each state is where optax.contrib.muon has it: checkpoints store the tree,
  # its empty nodes included.
  matrices = optax.chain(
    muon.scale_by_muon(
      declared, momentum=cfg.momentum, epsilon=cfg.epsilon, dtype=dtype
    ),
    muon.scale_by_shape(declared),
    optax.add_decayed_weights(cfg.weight_decay, decayed),
    optax.scale_by_learning_rate(schedule(cfg, steps, cfg.peak_lr)),
  )
  others = optax.chain(
    optax.scale_by_adam(cfg.b1, cfg.b2, cfg.epsilon, nesterov=True),
    optax.stateless(decay),
    optax.scale_by_learning_rate(schedule(cfg, steps, cfg.adam_peak_lr)),
  )
  return optax.partition({"muon": matrices, "adam": others}, labels)


def _layerwise(make_transformation) -> optax.GradientTransformation:
  """Updates each layer of the stack as a separate tensor: Adafactor clips and
  scales per tensor.
  """
  whole, layer = make_transformation(), make_transformation()
  stacked = optax.GradientTransformation(
    jax.vmap(layer.init), jax.vmap(layer.update)
  )

  def labels(params):
    return {
      name: jax.tree.map(lambda _, n=name: n == "layers", part)
      for name, part in params.items()
    }

  return optax.partition({True: stacked, False: whole}, labels)


def state_specs(params: Any, opt_state: Any) -> Any:
  """PartitionSpec of every array of the optimizer state.

  An array whose path ends in the name of a weight gets the weight's spec, less
  the axis missing in a factored moment; all remaining arrays get P(). Both
  trees hold abstract arrays; `params` has the shardings.
  """
  P = jax.sharding.PartitionSpec
  by_path = {
    tuple(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }

  def spec(path, leaf):
    for start in range(len(path)):
      found = by_path.get(tuple(path[start:]))
      if found is None:
        continue
      full = tuple(found.sharding.spec)
      full += (None,) * (found.ndim - len(full))
      if leaf.shape == found.shape:
        return P(*full)
      for axis in reversed(range(found.ndim)):
        if leaf.shape == tuple(np.delete(found.shape, axis)):
          return P(*full[:axis], *full[axis + 1 :])
    return P()

  return jax.tree_util.tree_map_with_path(spec, opt_state)


def _is_schedule(node: Any) -> bool:
  return getattr(node, "_fields", None) == ("count",)


def starting_at(opt_state: Any, step: int) -> Any:
  """A fresh state with schedules set to `step`; moments count from 0."""

  def move(node: Any) -> Any:
    return (
      node._replace(count=node.count + step) if _is_schedule(node) else node
    )

  return jax.tree.map(move, opt_state, is_leaf=_is_schedule)


def on_schedule(opt_state: Any, later: Any) -> Any:
  """`opt_state`, as of before a step that is skipped, with the schedules of
  `later`, the state after it: the rate follows the steps of the run.
  """
  return jax.tree.map(
    lambda before, after: after if _is_schedule(before) else before,
    opt_state,
    later,
    is_leaf=_is_schedule,
  )
