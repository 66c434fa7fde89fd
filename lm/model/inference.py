"""Weights for decoding: unrolled, gathered, and cast or quantised."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lm import config as config_lib
from lm import schema, sharding
from lm.model import decoder, weights


@functools.partial(jax.jit, static_argnames=("cfg", "int8"))
def unroll(
  cfg: config_lib.ModelConfig, params: decoder.Params, int8: bool = False
) -> tuple[Any, Any]:
  """nnx graph and arrays of the model, with separate arrays for each layer.

  Casts all weights but vectors to the compute dtype once, instead of at every
  use, and all-gathers along `embed`. Sets attention to `auto`: decoding lengths
  differ from training lengths and may not suit the kernel named for training.

  `int8` quantises the layers' matrices to 8 bits, with a float32 scale per
  output; embedding and head keep the compute dtype.
  """
  cfg = dataclasses.replace(cfg, attention="auto")
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
      "weights='int8': needs qwix; pip install 'next-token[int8]'"
    ) from error
  outputs = range(n_inputs, x.ndim)
  return qwix.quantize(x, jnp.int8, channelwise_axes=outputs)
