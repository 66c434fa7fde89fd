"""What a client waits for a short completion while another one scores.

python benchmarks/serve.py [--workdir=RUN]

Without a run, a tiny one is trained for a step. The other client sends a text
of 1 MB to /v1/score and leaves after 0.7 seconds, again and again; its load may
lengthen completions of 4 tokens threefold, no more.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import turns
from absl import flags

from lm import cli

_WORKDIR = cli.define_path("workdir", "Run directory.")
_N = flags.DEFINE_integer(
  "n", 30, "Completions measured, idle and loaded.", lower_bound=1
)
_FLAGS = flags.DEFINE_string("serve", "", "More flags of lm.serve.")


def train(workdir: str) -> None:
  command = "-m lm.train --config=configs/tiny.py --config.train.steps=1"
  subprocess.run(
    [sys.executable, *command.split(), f"--workdir={workdir}"],
    check=True,
    stdout=subprocess.DEVNULL,
  )


@contextlib.contextmanager
def served(workdir: str):
  """Yields the address of a server of this run."""
  command = ["-m", "lm.serve", f"--workdir={workdir}", "--port=0"]
  with subprocess.Popen(
    [sys.executable, *command, *_FLAGS.value.split()],
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout is not None
    try:
      if not (line := process.stdout.readline()):
        raise turns.Ended(f"lm.serve ended with {process.wait()}")
      yield line.split()[-1].rstrip("/")
    finally:
      process.terminate()


def post(url: str, body: dict, seconds: float = 600) -> None:
  kind = {"Content-Type": "application/json"}
  request = urllib.request.Request(url, json.dumps(body).encode(), kind)
  with urllib.request.urlopen(request, timeout=seconds) as answer:
    answer.read()


def complete(url: str, n: int) -> list[float]:
  """Seconds that each of `n` completions of 4 tokens took."""
  seconds = []
  for i in range(n):
    body = {"prompt": "def f(", "max_tokens": 4, "min_tokens": 4, "seed": i}
    start = time.perf_counter()
    post(f"{url}/v1/completions", body)
    seconds.append(time.perf_counter() - start)
  return seconds


def score(url: str, over: threading.Event) -> None:
  text = "the quick brown fox " * 50_000
  while not over.is_set():
    with contextlib.suppress(OSError):  # it leaves
      post(f"{url}/v1/score", {"input": text}, 0.7)


def main() -> None:
  with contextlib.ExitStack() as stack:
    workdir = _WORKDIR.value
    if workdir is None:
      workdir = stack.enter_context(tempfile.TemporaryDirectory())
      train(workdir)
    url = stack.enter_context(served(workdir))
    complete(url, 3)  # compiles
    post(f"{url}/v1/score", {"input": "a" * 5000})
    idle = complete(url, _N.value)
    over = threading.Event()
    stack.callback(over.set)
    other = threading.Thread(target=score, args=(url, over))
    other.start()
    time.sleep(1)
    loaded = complete(url, _N.value)
    over.set()
    other.join()
  for name, seconds in (("idle", idle), ("loaded", loaded)):
    middle, most = statistics.median(seconds), max(seconds)
    print(f"{name}: median {1e3 * middle:.1f} ms, longest {1e3 * most:.1f} ms")
  middle = statistics.median(loaded) / statistics.median(idle)
  most = max(loaded) / max(idle)
  print(f"ratio of medians {middle:.2f}, of the longest {most:.2f}")


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  cli.run(main, takes_config=False)
