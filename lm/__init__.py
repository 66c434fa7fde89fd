"""Pretrain decoder language models by next-token prediction, in JAX."""

import gc
import os
import signal
import sys


def stopped(*_) -> None:
  """Handles Ctrl-C where no exception can be caught, with a line and no
  traceback: during imports, and there is nothing to save.
  """
  os.write(2, b"stopped by Ctrl-C\n")
  os._exit(130)


if sys.argv[:1] == ["-m"]:  # python -m lm.VERB
  # Importing JAX and its libraries makes 270,000 objects that stay: looking for
  # garbage every 700 of them takes a tenth of the time (benchmarks/start.py).
  gc.set_threshold(50_000)
  # Until lm/cli.py catches KeyboardInterrupt; nohup and `&` ignore the signal.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stopped)
