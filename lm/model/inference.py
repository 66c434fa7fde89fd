"""The decoder in inference: weights in inference formats, prefill, decoding.

Training needs none of this: the model of lm/model/decoder.py is unrolled, the
weights are gathered and cast or quantised, and each layer has a KV cache.

B rows, T new tokens, D model, K kv heads, H head.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lm import config as config_lib
from lm import schema, sharding
from lm.model import (
  attention,
  decoder,
  kv_cache,
  lora,
  rotary,
  stack,
  weights,
)


@functools.partial(jax.jit, static_argnames=("cfg", "int8"))
def unroll(
  cfg: config_lib.ModelConfig, params: decoder.Params, int8: bool = False
) -> tuple[Any, Any]:
  """nnx graph and arrays of the model, with separate arrays for each layer.

  Casts all weights but vectors to the compute dtype once, instead of at every
  use, and all-gathers along `embed`. Sets attention to `auto`: decoding lengths
  differ from training lengths and may not suit the kernel named for training.
  Adapters are merged into their matrices first, in float32 (lm/model/lora.py).

  `int8` quantises the layers' matrices to 8 bits, with a float32 scale per
  output; embedding and head keep the compute dtype.
  """
  params = lora.merge(cfg, params)
  cfg = dataclasses.replace(cfg, attention="auto", lora=None)
  graph, state = nnx.split(decoder.bind(cfg, params).unroll())

  def prepare(param):
    x, declared = param.get_value(), weights.declared(param)
    is_matrix = declared.role == "matrix"
    if int8 and is_matrix:
      x = _round(x, declared.n_inputs)
    elif declared.role != "vector":
      x = x.astype(cfg.dtype)
    whole = (axis if axis == "embed" else None for axis in declared.axes)
    x = sharding.gather(x, *whole)
    if is_matrix and not int8 and sharding.platform() == "cpu":
      if x.ndim == 2 and x.shape[0] > x.shape[1]:
        x = weights.Reversed(x.T)
    return param.replace(x)

  prepared = jax.tree.map(
    prepare, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
  return graph, prepared


def _round(x: Float[Array, "..."], n_inputs: int) -> Any:
  """Quantises to int8: a qwix.QArray with a scale per output (the last axes).

  Raises ConfigError if qwix is not installed.
  """
  try:
    import qwix
  except ImportError as error:
    raise schema.ConfigError(
      "weights='int8': needs qwix; pip install -e '.[int8]'"
    ) from error
  outputs = range(n_inputs, x.ndim)
  return qwix.quantize(x, jnp.int8, channelwise_axes=outputs)


def prefill(
  model: decoder.Decoder, inputs: Int[Array, "B T"], tokens: attention.Tokens
) -> list[tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
  """Keys and values of each layer of an unrolled model."""
  return _layer_by_layer(model, inputs, tokens, None)[1]


def extend(
  model: decoder.Decoder, inputs: Int[Array, "B T"], cache: kv_cache.Cache
) -> tuple[Float[Array, "B T D"], kv_cache.Cache]:
  """Decoding step of an unrolled model: T more tokens of each row.

  The caller must advance the cache's `lengths`: by T, or by less if some tokens
  are rejected (speculative decoding).
  """
  new = jnp.arange(inputs.shape[1])[None]
  # Draft tokens to be rejected may lie beyond the learned position table.
  last = model.cfg.context_length - 1
  tokens = attention.Tokens(
    jnp.minimum(cache.lengths[:, None] + new, last), jnp.ones_like(inputs), None
  )
  x, pairs = _layer_by_layer(model, inputs, tokens, cache)
  keys, values = zip(*pairs, strict=True)
  return x, kv_cache.Cache(keys, values, cache.lengths)


def _layer_by_layer(model, inputs, tokens, cache):
  cfg = model.cfg
  x = model.embedded(inputs, tokens)
  angles, kept, attend = rotary.angles(cfg, tokens.positions), [], None
  for i, layer in enumerate(model.layers):
    which = i % len(angles)
    window, _ = cfg.layer_pattern[which]
    if cache is not None:
      pair = cache.keys[i], cache.values[i]
      attend = functools.partial(kv_cache.extend, pair, cache.lengths)
    raw = stack.first_raw(cfg, i)
    x, new, _ = layer(x, tokens, angles[which], window, extend=attend, raw=raw)
    kept.append(new)
  return model.finish(x), kept
