"""tests/reference.py against what Hugging Face transformers computes."""

import families
import numpy as np
import pytest
import reference


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_reference_equals_transformers(name):
  """Both in float64, so only a difference in meaning can show.

  Remaking the golden file is legitimate when a tiny config changes, never when
  this test fails (tests/goldens/make_reference.py).
  """
  cfg = families.PUBLISHED[name]
  params, inputs, logits = families.golden(name)
  B, T = inputs.shape
  ours = reference.forward(
    params,
    cfg,
    inputs,
    segments=np.ones((B, T), np.int32),
    positions=np.broadcast_to(np.arange(T), (B, T)),
    prefix=np.zeros((B, T), bool),
  )
  np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-10)
