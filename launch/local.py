"""This machine: N processes of M CPU devices each, joined over loopback."""

import signal
import socket
import subprocess
import sys
import threading
import time

from launch import shell, specs
from lm import config as config_lib

# What the other processes get to end by themselves once one has failed.
GRACE_SECONDS = 30.0


def render(spec: specs.Spec, port: int | None = None) -> list[shell.Step]:
  """A step per process; they run at the same time.

  `port` is where process 0 waits for the others, by default one that is free.
  """
  count = spec.local.processes
  join = f"COORDINATOR_ADDRESS=127.0.0.1:{port or _free_port()}"
  shared = (
    "JAX_PLATFORMS=cpu",
    f"JAX_NUM_CPU_DEVICES={spec.local.devices}",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo",
  )
  return [
    shell.Step(
      (
        "env",
        *shared,
        # One process alone has nobody to wait for.
        *(
          (join, f"PROCESS_COUNT={count}", f"PROCESS_INDEX={index}")
          if count > 1
          else ()
        ),
        *spec.argv,
      ),
      about=f"process {index}, at the same time as the others",
    )
    for index in range(count)
  ]


def delete(spec: specs.Spec) -> list[shell.Step]:
  raise config_lib.ConfigError(
    "--delete: nothing of --to=local outlives its command; stop it by ctrl-C"
  )


def run(spec: specs.Spec) -> int:
  """Runs all processes; the exit code is the first that is not 0.

  SIGTERM and SIGINT are passed on to all. Once one has failed the others get
  GRACE_SECONDS to end.
  """
  children = [
    subprocess.Popen(
      step.argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for step in render(spec)
  ]

  def forward(number, _):
    for child in children:
      if child.poll() is None:
        child.send_signal(number)

  previous = {
    number: signal.signal(number, forward)
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  readers = [
    threading.Thread(target=_prefix, args=(index, child.stdout), daemon=True)
    for index, child in enumerate(children)
  ]
  for reader in readers:
    reader.start()
  code = _wait(children)
  for reader in readers:
    reader.join()
  for number, handler in previous.items():
    signal.signal(number, handler)
  return code


def _wait(children: list[subprocess.Popen]) -> int:
  first, deadline = 0, float("inf")
  while True:
    codes = [child.poll() for child in children]
    failed = [code for code in codes if code]
    if failed and not first:
      first, deadline = failed[0], time.monotonic() + GRACE_SECONDS
    if None not in codes:
      return 128 - first if first < 0 else first  # as shells say "by signal"
    if time.monotonic() > deadline:
      for child in children:
        child.kill()
    time.sleep(0.1)


def _prefix(index: int, stream) -> None:
  """Passes lines on, each after the index of its process."""
  with stream:
    for line in stream:
      sys.stdout.write(f"[{index}] {line.decode(errors='replace')}")
      sys.stdout.flush()


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]
