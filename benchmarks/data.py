"""Tokens per second of the input pipeline alone, to batches on the host.

python benchmarks/data.py --config=configs/quickstart.py
"""

import itertools
import time

from lm import cli
from lm import config as config_lib
from lm.data import pipeline, store

_SECONDS = 5


def main(config: config_lib.Config) -> None:
  t = config.train
  batches = pipeline.train_batches(config, store.prepare(config))
  # Prefetched batches would count as made in no time.
  for _ in itertools.islice(batches, 4 * config.data.prefetch_rows):
    pass
  n, started = 0, time.perf_counter()
  while time.perf_counter() - started < _SECONDS:
    next(batches)
    n += 1
  seconds = time.perf_counter() - started
  batches.close()
  rate = n * config.tokens_per_step / seconds
  print(
    f"B={t.batch_size} T={t.sequence_length} sources={config.data.train}: "
    f"{rate:,.0f} tokens/s"
  )


if __name__ == "__main__":
  cli.run(main)
