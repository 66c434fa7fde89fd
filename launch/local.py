"""This machine: N processes of M CPU devices each, joined over loopback."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from launch import shell, specs
from lm import schema

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
      beside=index < count - 1,
    )
    for index in range(count)
  ]


def delete(spec: specs.Spec) -> list[shell.Step]:
  raise schema.ConfigError(
    "--delete: nothing of --to=local outlives its command; stop it by ctrl-C"
  )


def run(spec: specs.Spec) -> int:
  """Runs all processes; the exit code is the first that is not 0.

  SIGTERM, SIGINT and SIGHUP are passed on to all, once each time: the processes
  are in sessions of their own, where ctrl-C does not reach them from the
  terminal too. Once one has failed the others get GRACE_SECONDS to end.
  """
  told: list[int] = []

  def note(number, _):
    told.append(number)

  previous = {
    number: signal.signal(number, note)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    # As `nohup` asks.
    if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)
  }
  children: list[subprocess.Popen] = []
  readers: list[threading.Thread] = []
  program, *arguments = spec.command
  # The Python that runs this, whatever PATH has.
  if program in ("python", "python3"):
    spec = dataclasses.replace(spec, command=(sys.executable, *arguments))
  try:
    for step in render(spec):
      children.append(
        subprocess.Popen(
          step.argv,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          start_new_session=True,
        )
      )
    for i, child in enumerate(children):
      reader = threading.Thread(
        target=_prefix, args=(i, child.stdout), daemon=True
      )
      reader.start()
      readers.append(reader)
    return _wait(children, told)
  finally:
    _kill(children)  # what they left would hold the pipes open
    for reader in readers:
      reader.join()
    for child in children:
      with child:  # which closes the pipe and waits
        pass
    for number, handler in previous.items():
      signal.signal(number, handler)


def _wait(children: list[subprocess.Popen], told: list[int]) -> int:
  """Waits for all, passing on the signals that come to stand in `told`."""
  first, deadline = 0, float("inf")
  while True:
    while told:
      number = told.pop(0)
      for child in children:
        child.send_signal(number)
    codes = [child.poll() for child in children]
    failed = [code for code in codes if code]
    if failed and not first:
      for i, code in enumerate(codes):
        if code and code < 0 and code != -signal.SIGPIPE:
          how = f"signal {-code} ({signal.strsignal(-code)})"
          print(f"[{i}] ended by {how}", file=sys.stderr)
      first, deadline = failed[0], time.monotonic() + GRACE_SECONDS
    if None not in codes:
      return 128 - first if first < 0 else first  # as shells say "by signal"
    if time.monotonic() > deadline:
      _kill(children)
    time.sleep(0.1)


def _kill(children: list[subprocess.Popen]) -> None:
  """Ends those that still run, and whatever they started."""
  for child in children:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(child.pid, signal.SIGKILL)


def _prefix(index: int, stream) -> None:
  """Passes lines on, each after the index of its process. Where the reader of
  ours has gone, as `head` does, the process loses its own.
  """
  with stream, contextlib.suppress(BrokenPipeError):
    for line in stream:
      sys.stdout.write(f"[{index}] {line.decode(errors='replace')}")
      sys.stdout.flush()


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]
