"""The train step and its state on devices: shardings, creation, compilation.

Mode jit compiles the pure step of lm/train/step.py ahead of time for a mesh;
mode pmap runs the same step with whole parameters on each device.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import batch as batch_lib
from lm import chips, sharding
from lm import config as config_lib
from lm.model import decoder
from lm.train import step as step_lib

Step = Callable[
  [step_lib.State, batch_lib.Batch], tuple[step_lib.State, step_lib.Metrics]
]


def batch_sharding(
  config: config_lib.Config, mesh: jax.sharding.Mesh
) -> NamedSharding:
  """Sharding of the arrays of a batch."""
  where = sharding.partition("batch", "length")
  return NamedSharding(mesh, where)


def abstract_state(
  config: config_lib.Config, mesh: jax.sharding.Mesh
) -> step_lib.State:
  """Shapes and shardings of the state, for restore and AOT compilation."""
  make = functools.partial(step_lib.init_state, config)
  if config.mesh.mode == "jit":
    return sharding.abstract(make, mesh=mesh)
  whole = NamedSharding(mesh, P())
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    jax.eval_shape(make),
  )


def create_state(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  loaded: decoder.Params | None = None,
) -> step_lib.State:
  """Fresh state on the devices, each array created in its shards.

  Parameters in the tree `loaded`, which lie as in `abstract_state`, are taken
  over and donated; the others are initial.
  """
  make = functools.partial(step_lib.init_state, config)
  options = chips.compiler_options(sharding.platform(), runs_once=True)
  if config.mesh.mode == "jit":
    with jax.set_mesh(mesh):
      create = jax.jit(make, compiler_options=options, donate_argnums=0)
      return create(loaded or {})
  whole = NamedSharding(mesh, P())
  create = jax.jit(
    make, out_shardings=whole, compiler_options=options, donate_argnums=0
  )
  return create(loaded or {})


def compile_step(
  config: config_lib.Config, mesh: jax.sharding.Mesh
) -> Callable[
  [step_lib.State, batch_lib.Batch], tuple[step_lib.State, step_lib.Metrics]
]:
  """The train step with donation of the state; mode jit uses AOT compilation.

  Batches have a `prefix` array if a training source looks ahead; else the mask
  is static. Mode pmap compiles at the first call; every device holds the whole
  state and computes its own rows of the batch, and a psum adds the sums.
  """
  if config.mesh.mode == "jit":
    state = abstract_state(config, mesh)
    rows = batch_sharding(config, mesh)
    batch = batch_lib.abstract(config, rows)
    with jax.set_mesh(mesh):
      step = jax.jit(step_lib.train_step(config), donate_argnums=0)
      options = chips.compiler_options(sharding.platform(), config.model.dtype)
      return step.lower(state, batch).compile(compiler_options=options)
  n = mesh.size
  pmapped = jax.pmap(
    step_lib.train_step(config),
    axis_name=step_lib.PMAP_AXIS,
    in_axes=(None, 0),
    out_axes=None,
    devices=list(mesh.devices.flat),
    donate_argnums=0,
  )

  def split(a):
    return a.reshape(n, a.shape[0] // n, *a.shape[1:])

  whole = NamedSharding(mesh, P())

  def joined(x):
    """Global replicated array from the copies that pmap left on the devices of
    this process: saving and evaluating expect global arrays.
    """
    copies = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, whole, copies)

  def step(
    state: step_lib.State, batch: batch_lib.Batch
  ) -> tuple[step_lib.State, step_lib.Metrics]:
    new, metrics = pmapped(state, jax.tree.map(split, batch))
    several = jax.process_count() > 1
    return jax.tree.map(joined, new) if several else new, metrics

  return step
