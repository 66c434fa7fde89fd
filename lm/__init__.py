"""Pretrain decoder language models by next-token prediction, in JAX."""

import gc
import sys

if sys.argv[:1] == ["-m"]:  # python -m lm.VERB
  # Importing JAX and its libraries makes a million objects that stay. Looking
  # for garbage among them every 700 took a fifth of a command's start.
  gc.set_threshold(50_000)
