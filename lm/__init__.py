"""Pretrain decoder language models by next-token prediction, in JAX."""

import gc
import sys

if sys.argv[:1] == ["-m"]:  # python -m lm.VERB
  # Importing JAX and its libraries makes 270,000 objects that stay: looking for
  # garbage every 700 of them takes a tenth of the time (benchmarks/start.py).
  gc.set_threshold(50_000)
