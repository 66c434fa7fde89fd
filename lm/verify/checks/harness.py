"""Test harness of the checks: config variants in which errors show, meshes,
batches, real training steps, and measures of error.
"""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import batch as batch_lib
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm import schema, sharding
from lm.data import objectives
from lm.model import decoder, lora, weights
from lm.train import programs
from lm.train import step as step_lib

# Limit of `relative_error` where only the order of float32 sums differs.
# Float32 has 24 bits, 6e-8. Sums of up to a few thousand terms in a different
# order, through several layers, were seen to differ by up to 2e-6 of the
# largest element; the smallest bug that the tests inject makes 1e-3.
FLOAT32_SUMS = 1e-5

# --- configs ------------------------------------------------------------------


def sensitive(config: config_lib.Config) -> config_lib.Config:
  """A copy in which errors show: weights large enough for uneven attention, and
  a warm-up of at most one step, so that the first step changes the weights.
  """
  config = copy.deepcopy(config)
  config.model.init_scale = config.model.d_model**-0.5
  config.optimizer.warmup_steps = min(1, config.optimizer.warmup_steps)
  return config


def exact(config: config_lib.Config) -> config_lib.Config:
  """`sensitive` in float32, since bfloat16 rounding would hide errors."""
  config = sensitive(config)
  if config.model.attention in ("cudnn", "mosaic"):
    config.model.attention = "reference"  # these have no float32
  config.model.dtype = "float32"
  return config


def without_dropout(config: config_lib.Config) -> config_lib.Config:
  """A copy without dropout: masks would change with the batch shape."""
  config = copy.deepcopy(config)
  config.model.embedding_dropout = config.model.residual_dropout = 0.0
  if config.model.lora is not None:
    config.model.lora.dropout = 0.0
  return config


def with_mesh(
  config: config_lib.Config, shape: tuple[int, ...], mode: str = "jit"
) -> config_lib.Config:
  """A copy with a mesh of `shape`, sizes in the order of MESH_AXES."""
  config = copy.deepcopy(config)
  config.mesh = config_lib.MeshConfig(
    mode=mode,  # type: ignore[arg-type]
    **dict(zip(sharding.MESH_AXES, shape, strict=True)),
  )
  return config


# --- meshes -------------------------------------------------------------------


def mesh_shapes(n: int) -> list[tuple[int, int, int]]:
  """All mesh shapes (data, fsdp, tensor) of n devices."""
  return [
    (data, fsdp, n // data // fsdp)
    for data in range(n, 0, -1)
    for fsdp in range(n, 0, -1)
    if n % (data * fsdp) == 0
  ]


def fitting_shapes(
  config: config_lib.Config,
) -> tuple[list[tuple[int, int, int]], list[str]]:
  """Mesh shapes of all devices that fit the config, and the rejected shapes,
  each with the config field that fails.
  """
  fit, rejected = [], []
  for shape in mesh_shapes(jax.device_count()):
    try:
      mesh_lib.shape_of(with_mesh(config, shape), math.prod(shape))
      fit.append(shape)
    except schema.ConfigError as error:
      field = str(error).removeprefix("config.").partition(":")[0]
      rejected.append(f"{shape_name(shape)} ({field})")
  return fit, rejected


def shape_name(shape: Sequence[int]) -> str:
  return "x".join(map(str, shape))


def make_mesh(config: config_lib.Config) -> jax.sharding.Mesh:
  """The config's mesh on the first devices, as many as needed."""
  n_devices = math.prod(config.mesh.sizes().values())  # type: ignore[arg-type]
  return mesh_lib.make(config, jax.devices()[:n_devices])


# --- batches ------------------------------------------------------------------


def packed_batch(
  config: config_lib.Config,
  lengths: Sequence[Sequence[int]],
  length: int,
  seed: int = 0,
) -> batch_lib.Batch:
  """A batch with documents of the given lengths per row; each has a prefix that
  is seen in both directions, if a training source looks ahead. Padding holds
  random ids: reading padding then changes results. A row has `length` + 1
  tokens; the last token is only a target.
  """
  rng = np.random.default_rng(seed)
  rows = []
  for row in lengths:
    size = config.model.vocab_size
    tokens = rng.integers(size, size=length + 1, dtype=np.int32)
    documents = np.repeat(np.arange(1, len(row) + 1), row)[: length + 1]
    documents = np.pad(documents, (0, length + 1 - len(documents)))
    window = tokens, documents.astype(np.int32)
    rows.append(
      objectives.prefix(*window, rng)
      if config.data.looks_ahead
      else objectives.causal(*window)
    )
  return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def random_batch(config: config_lib.Config, seed: int) -> batch_lib.Batch:
  """Random documents in rows of very unequal weight, the last row empty."""
  rng = np.random.default_rng(seed)
  n, length = config.train.batch_size, config.train.sequence_length
  lengths = [
    np.diff(np.unique(rng.integers(0, length + 2, 5))).tolist()
    for _ in range(n)
  ]
  if n > 1:
    lengths[-1] = []
  lengths[0] = [length + 1]
  return packed_batch(config, lengths, length, seed)


# --- the model ----------------------------------------------------------------


def random_params(model: config_lib.ModelConfig) -> decoder.Params:
  """Random host arrays at the scale of fresh parameters, with no bias of 0 and
  no norm scale of 1. NumPy draws them, since initialisers compile for seconds.
  """
  make = functools.partial(decoder.init_params, model)
  rng, declared = np.random.default_rng(7), decoder.declared(model)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape, np.float32)
    if model.lora is not None and lora.is_adapter(path):
      # Updates smaller than their matrices, as after training.
      noise *= np.float32(0.5 * min(1.0, model.lora.scale**-0.5))
    if weights.of(declared, path).role != "vector":
      return np.float32(model.init_scale) * noise
    neutral = path[-1].key == "scale" and not model.norm_unit_offset
    return np.float32(neutral) + np.float32(0.05) * noise

  shapes = jax.eval_shape(make, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def logits(
  model: config_lib.ModelConfig, params: decoder.Params, batch: batch_lib.Batch
) -> np.ndarray:
  """Logits of a whole batch, [B, T, V]."""

  @jax.jit
  def run(params, batch):
    hidden, _ = decoder.forward(model, params, batch)
    return decoder.bind(model, params).logits(hidden)

  return np.asarray(run(params, jax.tree.map(jnp.asarray, batch)))


# --- steps --------------------------------------------------------------------


class Steps(NamedTuple):
  """Results of a few training steps."""

  # Loss and gradient norm of each step: [n, 2].
  numbers: np.ndarray
  # Optimizer state after the first step: moments are sums of gradients.
  moments: Any
  state: step_lib.State


def train_steps(
  config: config_lib.Config,
  batches: Sequence[batch_lib.Batch],
  *,
  fresh: bool = False,
) -> Steps:
  """Trains on `batches` on the config's mesh, from `random_params` and an
  all-zero optimizer state; with `fresh`, from the run's own initial state.
  """
  mesh = make_mesh(config)
  state = (programs.create_state if fresh else _state)(config, mesh)
  step = programs.compile_step(config, mesh)
  layout = programs.batch_sharding(config, mesh)
  numbers, moments = [], None
  for i, batch in enumerate(batches):
    placed = sharding.place(batch, layout, config.train.batch_size)
    state, metrics = step(state, placed)
    numbers.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    if i == 0:
      moments = jax.tree.map(np.asarray, state.opt_state)
  return Steps(np.array(numbers), moments, state)


def _state(config, mesh) -> step_lib.State:
  like = programs.abstract_state(config, mesh)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
  params, declared = random_params(config.model), decoder.declared(config.model)
  state.params, state.frozen = weights.split(params, declared)
  if state.ema is not None:
    state.ema = state.params
  return to_devices(state, like)


def to_devices(tree: Any, like: Any) -> Any:
  """Puts host arrays on the devices, sharded like the abstract arrays `like`.
  The arrays are copied, since the step donates its state.
  """
  return jax.tree.map(
    lambda x, to: jax.device_put(x, to.sharding, may_alias=False), tree, like
  )


def gradients(
  config: config_lib.Config, batches: Sequence[batch_lib.Batch]
) -> list[dict[str, Any]]:
  """Loss and gradient of the real step on a single device, for each batch. All
  batches share a shape. The gradient is AdamW's first moment with b1 = 0.
  """
  config = with_mesh(config, (1, 1, 1))
  config.optimizer = config_lib.OptimizerConfig(
    name="adamw", b1=0.0, clip_norm=None
  )
  shape = batches[0].inputs.shape
  config.train.batch_size, config.train.sequence_length = shape
  mesh = make_mesh(config)
  step = programs.compile_step(config, mesh)
  layout = programs.batch_sharding(config, mesh)
  found = []
  for batch in batches:
    placed = sharding.place(batch, layout, shape[0])
    state, metrics = step(_state(config, mesh), placed)
    moments = optax.tree.get(state.opt_state, "mu")
    found.append({"loss": metrics["loss"], "gradient": moments})
  return found


# --- errors -------------------------------------------------------------------


def relative_error(found: Any, wanted: Any) -> float:
  """Largest difference, relative to the largest element of the array.

  An array with true value 0, like the gradient of a key bias, holds only
  rounding: 2e-8 of the largest gradient was seen. The scale of an array is
  therefore at least a hundredth of the largest element of its kind (all first
  moments, all losses).
  """
  leaves, top = [], {}
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(found),
    jax.tree.leaves(wanted),
    strict=True,
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    kind, size = _kind(path), np.abs(b).max(initial=0)
    top[kind] = max(top.get(kind, 0.0), size)
    leaves.append((kind, size, np.abs(a - b).max(initial=0)))
  errors = [
    gap / max(size, 0.01 * top[kind], np.finfo(np.float64).tiny)
    for kind, size, gap in leaves
  ]
  return float(np.max(errors))  # NaN if any error is NaN


def _kind(path: tuple[Any, ...]) -> str:
  """Last class field on the tree path of an array, or the first key."""
  fields = [
    key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)
  ]
  return fields[-1] if fields else str(path[:1])


def count_unequal(found: Any, wanted: Any) -> int:
  """Number of unequal elements, NaN equal to NaN; all elements count where the
  dtype or shape differs.
  """

  def count(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
      return b.size
    return int(np.sum((a != b) & ~((a != a) & (b != b))))

  return sum(jax.tree.leaves(jax.tree.map(count, found, wanted)))
