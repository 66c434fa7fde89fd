"""The batch: the contract between data, model, loss and evaluation.

Every objective (next-token prediction, prefix LM, span corruption, masked LM,
fine-tuning) makes rows of this table. B rows, T positions:

| field       | shape, dtype    | meaning                                      |
|-------------|-----------------|----------------------------------------------|
| `inputs`    | [B, T] int32    | tokens read by the decoder                   |
| `targets`   | [B, T] int32    | token to predict at each position            |
| `weights`   | [B, T] float32  | loss weight; 0 where a target is not scored: |
|             |                 | padding, prompts, unmasked tokens            |
| `segments`  | [B, T] int32    | document in a packed row, from 1; 0 is       |
|             |                 | padding. Attention never crosses segments    |
| `positions` | [B, T] int32    | position within the segment                  |
| `prefix`    | [B, T] bool, or | positions visible to the whole segment, to   |
|             | None            | queries before and after (prefix LM)         |

`prefix` is None if no row has a prefix: attention kernels then know at compile
time that the mask is causal.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from lm import config as config_lib


def _field(dtype: type, **given) -> Any:
  return dataclasses.field(metadata={"dtype": dtype}, **given)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """The table above, as a pytree.

  Leaves are NumPy arrays on the host, JAX arrays on devices, or descriptions of
  arrays (shapes, shardings). A single row of an objective has leaves [T].
  """

  inputs: Any = _field(np.int32)
  targets: Any = _field(np.int32)
  weights: Any = _field(np.float32)
  segments: Any = _field(np.int32)
  positions: Any = _field(np.int32)
  prefix: Any = _field(np.bool_, default=None)

  def present(self) -> dict[str, Any]:
    """Field name -> leaf, without `prefix` if None."""
    named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return {name: x for name, x in named.items() if x is not None}


def empty(rows: int, length: int, *, prefix: bool = False) -> Batch:
  """A batch of padding only, in NumPy arrays [rows, length]."""
  return _make(prefix, lambda dtype: np.zeros((rows, length), dtype))


def abstract(
  config: config_lib.Config,
  sharding: jax.sharding.Sharding | None = None,
) -> Batch:
  """Shapes, dtypes and sharding of the global training batches of `config`."""
  shape = (config.train.batch_size, config.train.sequence_length)
  return _make(
    config.data.looks_ahead,
    lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding),
  )


def unscored(inputs: np.ndarray) -> Batch:
  """Batch for a forward pass without loss: a document per row, no targets."""
  rows, length = inputs.shape
  return dataclasses.replace(
    empty(rows, length),
    inputs=np.asarray(inputs, np.int32),
    segments=np.ones((rows, length), np.int32),
    positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  )


def _make(prefix, leaf) -> Batch:
  return Batch(
    **{
      field.name: leaf(field.metadata["dtype"])
      for field in dataclasses.fields(Batch)
      if prefix or field.name != "prefix"
    }
  )
