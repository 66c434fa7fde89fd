"""tests/reference.py against what Hugging Face transformers computes."""

import families
import numpy as np
import pytest
import reference

from lm import batch as batch_lib


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_reference_equals_transformers(name):
  """Both in float64, so only a difference in meaning can show.

  Remaking the golden file is legitimate when a tiny config changes, never when
  this test fails (tests/goldens/make_reference.py).
  """
  cfg = families.PUBLISHED[name]
  params, inputs, logits = families.golden(name)
  ours = reference.forward(params, cfg, batch_lib.unscored(inputs))
  np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-10)
