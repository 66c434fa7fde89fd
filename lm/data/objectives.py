"""From a window of tokens to one row of the batch (lm/batch.py).

An objective is a pure NumPy function of tokens [T+1] and their documents
[T+1], numbered from 1 within the window with 0 at padding. The model and the
step never know which objective made a row.
"""

import numpy as np

from lm import batch as batch_lib


def causal(tokens: np.ndarray, documents: np.ndarray) -> batch_lib.Batch:
  """Next-token prediction: one row, each leaf [T].

  Weight is 0 where the target opens another document, since nothing before it
  tells which, and at padding.
  """
  segments = documents[:-1].astype(np.int32)
  n = len(segments)
  index = np.arange(n, dtype=np.int32)
  starts = np.where(np.diff(segments, prepend=-1) != 0, index, 0)
  positions = index - np.maximum.accumulate(starts)
  same = (documents[1:] == segments) & (segments > 0)
  return batch_lib.Batch(
    inputs=tokens[:-1].astype(np.int32),
    targets=tokens[1:].astype(np.int32),
    weights=same.astype(np.float32),
    segments=segments,
    positions=np.where(segments > 0, positions, 0).astype(np.int32),
  )
