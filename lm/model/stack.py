"""The layers of a model one after another: as a scan over stacked arrays, whose
compile time does not grow with depth, or as a loop over a list.

B batch, T length, D model, L layers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from lm import config as config_lib
from lm.model import attention, dropout, remat


def run(
  layers: Any,
  x: Float[Array, "B T D"],
  keys: Key[Array, "B"] | None,
  *,
  cfg: config_lib.ModelConfig,
  tokens: attention.Tokens,
  angles: Sequence[tuple[Array, Array] | None],
  statistics: bool,
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
  """(residual after all layers, aux with a leading axis L).

  `layers` is a decoder.Block of stacked arrays, or a list of L of them.
  `angles` has an entry for each of cfg.layer_pattern.
  """
  one = functools.partial(
    _run_layer, cfg=cfg, tokens=tokens, angles=angles, statistics=statistics
  )
  if not isinstance(layers, nnx.List):
    return _scan(one, layers, x, keys, cfg)
  said = []
  for i, layer in enumerate(layers):
    graph, state = nnx.split(layer)
    own = dropout.fold_rows(keys, i)
    x, aux = one(graph, x, state, i % len(angles), i, own)
    said.append(aux)
  return x, _stacked(said)


def first_raw(
  cfg: config_lib.ModelConfig, index: int | Int[Array, ""]
) -> Bool[Array, ""] | None:
  """Whether attention in layer `index` reads the residual without a norm; None
  if no layer does.
  """
  return None if cfg.first_attention_norm else jnp.equal(index, 0)


def _run_layer(
  graph, x, state, which, index, keys, *, cfg, tokens, angles, statistics
):
  """(residual, aux) of layer `index` under cfg.remat, with the window and the
  angles of cfg.layer_pattern[which].
  """

  def layer(x, state, keys, tokens, angles):
    (window, _), block = cfg.layer_pattern[which], nnx.merge(graph, state)
    raw = first_raw(cfg, index)
    y, _, aux = block(
      x, tokens, angles, window, keys, statistics=statistics, raw=raw
    )
    return y, aux

  layer = remat.checkpointed(layer, cfg)
  return layer(x, state, keys, tokens, angles[which])


def _scan(one, stacked, x, keys, cfg):
  """Scans over groups of len(cfg.layer_pattern) layers, then runs leftover
  layers.

  Grouping makes each layer's window a compile-time constant. Returns (residual,
  aux with a leading axis L).
  """
  graph, state = nnx.split(stacked)
  period = len(cfg.layer_pattern)
  whole = cfg.n_layers - cfg.n_layers % period

  def group(x, group_and_states):
    first, states = group_and_states
    said = []
    for which in range(period):
      layer = jax.tree.map(lambda s, w=which: s[w], states)
      i = first + which
      x, aux = one(graph, x, layer, which, i, dropout.fold_rows(keys, i))
      said.append(aux)
    return x, _stacked(said)

  if period == 1:
    states = jax.tree.map(lambda s: s[:, None], state)
  else:
    states = jax.tree.map(
      lambda s: s[:whole].reshape(whole // period, period, *s.shape[1:]), state
    )
  x, scanned = jax.lax.scan(group, x, (jnp.arange(0, whole, period), states))
  said = [jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), scanned)]
  for i in range(whole, cfg.n_layers):
    layer = jax.tree.map(lambda s, i=i: s[i], state)
    x, aux = one(graph, x, layer, i - whole, i, dropout.fold_rows(keys, i))
    said.append(_stacked([aux]))
  return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *said)


def _stacked(said):
  """Aux of layers, stacked along a leading axis."""
  return jax.tree.map(lambda *parts: jnp.stack(parts), *said)
