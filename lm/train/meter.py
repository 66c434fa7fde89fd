"""Throughput of a run: tokens per second, step time, MFU, data waits."""

import jax

from lm import chips
from lm import config as config_lib
from lm.model import counts


class Meter:
  """Measures rates between the reports of one start of a run."""

  def __init__(self, config: config_lib.Config, start_step: int):
    self._config = config
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    self._peak = None if peak is None else peak * jax.device_count()
    self._before = (start_step, 0.0, 0.0)

  def read(
    self, step: int, step_seconds: float, wait_seconds: float
  ) -> dict[str, float | None]:
    """Rates since the last reading, from seconds of all steps so far (without
    evaluation and saving) and of all waits for data. `mfu` is the model's
    FLOP/s (lm/model/counts.py) over the devices' bfloat16 peak, None if the
    peak is unknown. The `step_seconds` returned includes waits.
    """
    now = step, step_seconds, wait_seconds
    steps, stepped, waited = (
      a - b for a, b in zip(now, self._before, strict=True)
    )
    self._before = now
    seconds = max(1e-9, stepped + waited)
    rate = steps * self._config.tokens_per_step / seconds
    length = self._config.train.sequence_length
    flops = rate * counts.train_flops(self._config.model, length)
    return {
      "tokens_per_second": rate,
      "step_seconds": seconds / max(1, steps),
      "mfu": None if self._peak is None else flops / self._peak,
      "data_wait_fraction": waited / seconds,
    }
