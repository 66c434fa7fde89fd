"""Training objectives: a window of tokens to one batch row (lm/batch.py).

An objective is a pure NumPy function of tokens [T+1] and document numbers
[T+1], from 1 within the window, 0 for padding. The model and the train step do
not depend on the objective.
"""

import numpy as np

from lm import batch as batch_lib


def causal(tokens: np.ndarray, documents: np.ndarray) -> batch_lib.Batch:
  """Next-token prediction: one row, each leaf [T].

  Weight is 0 at padding, and where the target opens a new document: the tokens
  before do not predict the next document.
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
