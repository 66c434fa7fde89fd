"""Training state and the pure train step.

`init_state(config)` and `train_step(config)(state, batch)` are pure functions
of arrays; lm/train/programs.py compiles them for the devices. Losses and
gradients are sums over tokens until a single division by the weights of the
whole batch: microbatches with unequal masks add up to the big batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import batch as batch_lib
from lm import config as config_lib
from lm import digest, sharding
from lm.model import decoder, dropout, loss, weights
from lm.train import layer_statistics, optimizer, skip

# Scalars, the batch's digest, and `layers`: arrays [L] by name.
Metrics = dict[str, Any]

# Name of the device axis in mode pmap.
PMAP_AXIS = "rows"


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["step", "params", "frozen", "ema", "opt_state", "history"],
  meta_fields=[],
)
@dataclasses.dataclass
class State:
  """Training state passed from step to step; `step` counts the steps done.

  `params` are the trainable parameters, and `frozen` the others
  (weights.split): they have no gradient, optimizer state or average.
  """

  step: Any  # int32
  params: decoder.Params
  frozen: decoder.Params
  ema: decoder.Params | None
  opt_state: Any
  history: skip.History | None

  @property
  def model(self) -> decoder.Params:
    """All parameters, as evaluation and sampling read them: the averages, if
    the state has them, in place of `params`.
    """
    trained = self.params if self.ema is None else self.ema
    return weights.join(trained, self.frozen)


def init_state(
  config: config_lib.Config, loaded: decoder.Params | None = None
) -> State:
  """Fresh state from config.seed; under jit on a mesh, created sharded.

  Parameters in the tree `loaded` take the place of initial ones, which the
  compiler then leaves out.
  """
  initial = decoder.init_params(config.model, jax.random.key(config.seed))
  params, frozen = weights.split(
    weights.join(initial, loaded or {}), decoder.declared(config.model)
  )
  opt_state = _transform(config).init(params)
  if sharding.has_mesh():
    types = jax.tree.map(jax.typeof, params)
    specs = optimizer.state_specs(types, opt_state)
    opt_state = jax.tree.map(jax.sharding.reshard, opt_state, specs)
  o = config.optimizer
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    frozen=frozen,
    ema=None if o.ema_decay is None else jax.tree.map(jnp.copy, params),
    opt_state=opt_state,
    history=None if o.skip is None else skip.fresh(o.skip),
  )


def _transform(config: config_lib.Config) -> optax.GradientTransformation:
  declared = decoder.declared(config.model)
  return optimizer.make(
    config.optimizer, config.train.steps, declared, config.model.dtype
  )


def train_step(
  config: config_lib.Config,
) -> Callable[[State, batch_lib.Batch], tuple[State, Metrics]]:
  """The pure train step for a config: (state, batch) -> (state, metrics).

  Metrics describe the batch before the update: `loss` (mean nats per scored
  token), `grad_norm` (before the clip), `lr`, `weight` (tokens scored), `batch`
  (`digest.of_tree` of the batch), `layers`, and with SkipConfig `skipped`
  (steps skipped until now, this step included).

  `layers` has arrays [L]: means over tokens of what layers report
  (decoder.Aux), and with `train.statistics_every` the root mean squares of the
  residual after each layer, of attention and of MLP (`residual_rms`,
  `attention_rms`, `mlp_rms`), and the norms of each layer's gradient before the
  clip and of its update (`grad_norm`, `update_norm`).
  """
  o = config.optimizer
  transform = _transform(config)
  rate = optimizer.schedule(o, config.train.steps, o.peak_lr)

  def step(state: State, batch: batch_lib.Batch) -> tuple[State, Metrics]:
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    sums = _over_microbatches(config, state, batch, key)
    bits = digest.of_tree(batch.present(), _rows(config, batch)[0])
    if config.mesh.mode == "pmap" and jax.lax.axis_size(PMAP_AXIS) > 1:
      sums, bits = jax.lax.psum((sums, bits), PMAP_AXIS)
    gradients, nll, weight, aux = sums
    scored = weight
    weight = jnp.maximum(weight, 1.0)  # for a batch without targets
    mean = nll / weight
    with jax.named_scope("gradient_norm"):
      norm = optax.tree.norm(gradients) / weight
    metrics = {
      "loss": mean,
      "grad_norm": norm,
      "lr": rate(state.step),
      "weight": scored,
      "batch": bits,
      "layers": layer_statistics.means(aux),
    }
    if config.train.statistics_every is not None:
      norms = layer_statistics.norms(gradients)
      metrics["layers"]["grad_norm"] = norms / weight
    # The division and the clip are one factor, and one pass over gradients.
    factor = 1 / weight
    if o.clip_norm is not None:
      factor *= jnp.minimum(1.0, o.clip_norm / jnp.maximum(norm, 1e-30))
    gradients = jax.tree.map(lambda g: g * factor, gradients)
    new, changes = _update(config, transform, state, gradients)
    if config.train.statistics_every is not None:
      metrics["layers"]["update_norm"] = layer_statistics.norms(changes)
    if o.skip is not None and state.history is not None:
      keep, history = skip.judge(o.skip, state.history, mean, norm)
      metrics["skipped"] = history.skipped
      rest = optimizer.on_schedule(state.opt_state, new.opt_state)
      old = dataclasses.replace(state, opt_state=rest)
      new = dataclasses.replace(
        jax.tree.map(lambda x, y: jnp.where(keep, x, y), new, old),
        step=new.step,
        history=history,
      )
    return new, metrics

  return step


def _over_microbatches(config, state, batch, key):
  """(gradients, nll, weight, aux): sums over the batch, microbatch by
  microbatch.
  """
  n = config.train.microbatches
  total = functools.partial(_loss_sums, config)
  differentiate = jax.value_and_grad(total, has_aux=True)

  def sums(batch, rows):
    (_, (nll, aux)), gradients = differentiate(
      state.params, state.frozen, batch, key, rows
    )
    return (gradients, nll, jnp.sum(batch.weights)), aux

  first, n_rows = _rows(config, batch)
  rows = first + jnp.arange(n_rows)
  if sharding.has_mesh():
    rows = jax.sharding.reshard(rows, sharding.partition("batch"))
  if n == 1:
    total, aux = sums(batch, rows)
    return *total, aux

  # Row r goes to microbatch r mod n: each device splits its own rows, and no
  # row moves.
  def split(a):
    axes = ("batch", None, "length")[: a.ndim + 1]
    cut = (n_rows // n, n, *a.shape[1:])
    a = jax.lax.reshape(a, cut, out_sharding=sharding.spec(*axes))
    return jnp.moveaxis(a, 1, 0)

  def add(carry, part):
    total, aux = sums(*part)
    return jax.tree.map(jnp.add, carry, total), aux

  zero = jnp.zeros((), jnp.float32)
  start = (jax.tree.map(jnp.zeros_like, state.params), zero, zero)
  parts = jax.tree.map(split, (batch, rows))
  total, aux = jax.lax.scan(add, start, parts)
  return *total, jax.tree.map(lambda a: jnp.sum(a, axis=0), aux)


def _rows(config, batch):
  """(first global row, number of rows) of `batch`, a device's part in pmap."""
  n_rows = batch.inputs.shape[0]
  if config.mesh.mode == "jit":
    return 0, n_rows
  return jax.lax.axis_index(PMAP_AXIS) * n_rows, n_rows


def _loss_sums(config, params, frozen, batch, key, rows):
  """(loss to differentiate, (sum of weight * nll, aux)), sums over tokens."""
  m = config.model
  rates = (m.embedding_dropout, m.residual_dropout)
  drops = any(rates) or (m.lora is not None and m.lora.dropout > 0)
  keys = dropout.row_keys(key, rows) if drops else None
  params = weights.join(params, frozen)
  statistics = config.train.statistics_every is not None
  hidden, aux = decoder.forward(
    m, params, batch, keys=keys, statistics=statistics
  )
  head, bias = decoder.bind(m, params).head_parts()
  total, nll = loss.cross_entropy(
    hidden,
    head,
    batch.targets,
    batch.weights,
    bias=bias,
    chunk=m.loss_chunk,
    softcap=m.logit_softcap,
    z_loss=config.train.z_loss,
  )
  if aux:
    aux["tokens"] = jnp.sum((batch.segments > 0).astype(jnp.float32))
  return total, (nll, aux)


@jax.named_scope("optimizer")
def _update(config, transform, state, gradients) -> tuple[State, Any]:
  """(the state after an optimizer step with `gradients`, change of params)."""

  update: Callable[..., Any] = transform.update
  if sharding.has_mesh():
    # Optimizers are written for whole arrays (Muon multiplies matrices): the
    # partitioner chooses layouts inside, and `specs` fixes the results' layout.
    specs = jax.tree.map(
      lambda x: jax.typeof(x).sharding.spec, (state.params, state.opt_state)
    )
    update = jax.sharding.auto_axes(update, out_sharding=specs)
  changes, opt_state = update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, changes)
  ema, decay = state.ema, config.optimizer.ema_decay
  if ema is not None:
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
  new = dataclasses.replace(
    state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state
  )
  return new, changes
