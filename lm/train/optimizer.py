"""Optimizers and schedules: optax's, told which weights are what.

Layers are stacked on a leading axis L, which no optimizer here may mistake for
a dimension of the matrix.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import config as config_lib
from lm.model import weights


def schedule(
  cfg: config_lib.OptimizerConfig, steps: int, peak: float
) -> optax.Schedule:
  """Learning rate of step 0 .. steps - 1: linear warm-up, then the shape.

  `rsqrt` is peak * sqrt(warmup / step), which never ends; `wsd` (warm-up,
  stable, decay: arXiv:2404.06395) decays linearly over the last
  `decay_fraction` of all steps, warm-up included.
  """
  warmup = float(cfg.warmup_steps)  # int32 has no room for one more

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
  """Learning rate of one step of a run of `steps`, as reports call it `lr`."""
  return np.asarray(schedule(cfg, steps, cfg.peak_lr)(step)).item()


def make(
  cfg: config_lib.OptimizerConfig, steps: int, declared: Any
) -> optax.GradientTransformation:
  """The transformation, without the clip, which train/step.py does.

  `declared` is a tree like the parameters (`decoder.declared`). Weight decay
  takes lr * weight_decay of every parameter but vectors, whichever the
  optimizer, at the learning rate of that parameter.
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
        # Optax does not multiply this one by the learning rate.
        weight_decay_rate=(lambda step: cfg.weight_decay * rate(step))
        if cfg.weight_decay
        else None,
        weight_decay_mask=decayed,
      )
    )
  muon = optax.contrib.muon(
    rate,
    beta=cfg.momentum,
    eps=cfg.epsilon,
    weight_decay=cfg.weight_decay,
    weight_decay_mask=decayed,
    adam_b1=cfg.b1,
    adam_b2=cfg.b2,
    adam_weight_decay=cfg.weight_decay,
    adam_learning_rate=schedule(cfg, steps, cfg.adam_peak_lr),
    muon_weight_dimension_numbers=functools.partial(_muon_dimensions, declared),
  )

  def update(updates, state, params=None):
    # Optax keeps that mask from what it gives to Adam: vectors would decay.
    # Neither Muon nor Adam reads parameters but to decay them.
    shown = jax.tree.map(
      lambda kept, p: p if kept else jnp.zeros_like(p), decayed(params), params
    )
    return muon.update(updates, state, shown)

  return optax.GradientTransformation(muon.init, update)


def _muon_dimensions(declared: Any, params: Any) -> Any:
  """Which axes of each matrix are its inputs and which its outputs (heads and
  their width are one dimension); None goes to AdamW.
  """

  def dimensions(path, _):
    weight = weights.of(declared, path)
    if weight.role != "matrix":
      return None
    return optax.contrib.MuonDimensionNumbers(
      reduction_axis=weight.input_axes, output_axis=weight.output_axes
    )

  return jax.tree_util.tree_map_with_path(dimensions, params)


def _layerwise(make_transformation) -> optax.GradientTransformation:
  """Treats each layer of the stack as a tensor of its own: Adafactor's clip
  and scale are by tensor.
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
  """PartitionSpec of every array of the optimizer's state: that of the weight
  whose name ends its path, less the axis that a factored moment lacks.

  Both trees hold abstract arrays; the parameters' carry their shardings.
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


def starting_at(opt_state: Any, step: int) -> Any:
  """A fresh state whose schedules go on at `step`; moments count from 0."""

  def is_schedule(node: Any) -> bool:
    return getattr(node, "_fields", None) == ("count",)

  def move(node: Any) -> Any:
    return node._replace(count=node.count + step) if is_schedule(node) else node

  return jax.tree.map(move, opt_state, is_leaf=is_schedule)
