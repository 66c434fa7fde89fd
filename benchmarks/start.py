"""How long a command takes to its first step, and to its first token.

  python benchmarks/start.py [--workdir=RUN] [--checkout=DIR]

Prints the CPU seconds of `import lm.train.loop`, as a command imports it and as
a program does; the wall and the CPU seconds from the command to the report of
the first step of training, with nothing compiled before and with a compilation
cache; and, of RUN, those to the first character of a sample. CPU seconds, read
from /proc, hardly depend on what else the machine does.
With `--checkout`, another checkout takes turns with this one. Medians of the
turns; the range of each is printed behind it.
"""

import argparse
import contextlib
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import turns

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMPORT = "import sys; sys.argv = ['{}']; import lm.train.loop"
# The first step is reported when the second has been dispatched, and the second
# with the evaluation after it.
TRAIN = (
  "--config=configs/tiny.py --config.train.steps=2 --config.train.log_every=1 "
  "--config.optimizer.warmup_steps=0 --config.train.eval_every=2"
).split()
SAMPLE = ["--prompt=def main(", "--stream", "--max_new_tokens=8"]


def environment(checkout: pathlib.Path, cache: str | None) -> dict[str, str]:
  """That of the commands; a cache that is None holds nothing."""
  kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  kept |= {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
  if cache is not None:
    kept["JAX_COMPILATION_CACHE_DIR"] = cache
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  return kept


def cpu_of_import(checkout: pathlib.Path, started_as: str) -> float:
  """CPU seconds; `started_as` is sys.argv[0], "-m" in a command."""
  command = [sys.executable, "-c", IMPORT.format(started_as)]

  def used():
    total = resource.getrusage(resource.RUSAGE_CHILDREN)
    return total.ru_utime + total.ru_stime

  before = used()
  where = environment(checkout, None)
  subprocess.run(command, check=True, env=where, cwd=checkout)
  return used() - before


def cpu_seconds(pid: int) -> float:
  """CPU seconds of all threads of a process so far."""
  text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  user, system = text.rpartition(")")[2].split()[11:13]
  return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(
  command: list[str], checkout: pathlib.Path, cache: str | None
) -> Iterator[subprocess.Popen]:
  """The child, which is waited for; it ends with the benchmark."""
  where = environment(checkout, cache)
  with subprocess.Popen(
    command, env=where, cwd=checkout, stdout=subprocess.PIPE
  ) as child:
    try:
      yield child
      child.communicate()
    finally:
      child.kill()
  if child.returncode:
    sys.exit(f"error: {' '.join(command)}: exit code {child.returncode}")


def first_step(
  checkout: pathlib.Path, cache: str | None
) -> tuple[float, float]:
  """(wall seconds, CPU seconds) from the command to the first report."""
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / "run"
    command = [sys.executable, "-m", "lm.train", *TRAIN]
    command += [f"--workdir={workdir}", f"--config.data.cache_dir={ROOT}/data"]
    report = workdir / "metrics.jsonl"
    began = time.monotonic()
    with running(command, checkout, cache) as child:
      # The file is empty until the first report.
      while not (report.exists() and report.stat().st_size):
        if child.poll() is not None:
          return 0.0, 0.0  # `running` tells of it
        time.sleep(0.01)
      return time.monotonic() - began, cpu_seconds(child.pid)


def first_token(
  checkout: pathlib.Path, cache: str | None, workdir: str
) -> tuple[float, float]:
  """(wall seconds, CPU seconds) from the command to the first character."""
  command = [sys.executable, "-m", "lm.sample", f"--workdir={workdir}", *SAMPLE]
  began = time.monotonic()
  with running(command, checkout, cache) as child:
    assert child.stdout is not None
    while child.stdout.read(1) == b" ":
      pass
    return time.monotonic() - began, cpu_seconds(child.pid)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=os.path.abspath)
  parser.add_argument("--checkout", type=pathlib.Path)
  parser.add_argument("--turns", type=turns.at_least(1), default=3)
  arguments = parser.parse_args()
  if arguments.workdir and not os.path.isdir(arguments.workdir):
    parser.error(f"--workdir={arguments.workdir}: is not there; name a run")
  sides = {"this checkout": ROOT}
  if arguments.checkout:
    sides["the other"] = arguments.checkout.resolve()
  with tempfile.TemporaryDirectory() as folder:
    found = {}
    for turn in range(arguments.turns + 1):
      for side, checkout in sides.items():
        cache = os.path.join(folder, side)
        now = {
          "import, command, CPU": cpu_of_import(checkout, "-m"),
          "import, program, CPU": cpu_of_import(checkout, "x.py"),
        }
        for kind, kept in (("cold", None), ("cached", cache)):
          spent = {"step": first_step(checkout, kept)}
          if arguments.workdir:
            spent["token"] = first_token(checkout, kept, arguments.workdir)
          for what, (wall, cpu) in spent.items():
            now[f"first {what}, {kind}, wall"] = wall
            now[f"first {what}, {kind}, CPU"] = cpu
        if turn:  # the first fills the caches: data, programs, pages of files
          for name, seconds in now.items():
            found.setdefault((name, side), []).append(seconds)
  print(f"seconds; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
  for (name, side), s in found.items():
    low, middle, high = min(s), statistics.median(s), max(s)
    print(f"{name:26} {side:14} {middle:5.1f} ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
  turns.run(main)
