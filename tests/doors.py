"""The programs of this project, many command lines one after another, and
Python programs that belong to tests.

Each runs in a fork of one process that has imported the libraries already: it
has the exit code, the streams and the files of a process of its own, and
starts in milliseconds, where imports alone take seconds.
"""

import atexit
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import gc
import importlib
import io
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import runpy
import socket
import sys
import threading

ROOT = str(pathlib.Path(__file__).parent.parent)
# What takes long to import and most need; none of these defines a flag.
# tensorboardX is left out, which would import torch.
_PRELOADED = """
jax.numpy flax.nnx optax orbax.checkpoint grain tensorstore sentencepiece rich
tensorflow_datasets lm.train.loop lm.evaluate.corpora lm.sample.sampler
lm.evaluate.compare_output lm.evaluate.harness lm.data.chat lm.explain.heat
lm.serve.app lm.verify.checks uvicorn launch.specs jinja2
""".split()


@dataclasses.dataclass
class Ended:
  """How a program ended; `code` is -9 where it had to be killed."""

  code: int
  out: str
  err: str


def run(
  module: str,
  arguments: list[str],
  directory: str,
  *,
  encoding: str = "utf-8",
  timeout: float = 60.0,
) -> Ended:
  """`python -m module arguments` in `directory`, without the rights of root
  over files; `encoding` is that of stdout and stderr.
  """
  program = Popen(module, arguments, directory, encoding=encoding, nobody=True)
  timer = threading.Timer(timeout, program.kill)
  timer.start()
  try:
    out, err = program.communicate()
  finally:
    timer.cancel()
  return Ended(program.returncode, out, err)


class Popen:
  """`python -m program arguments`, or where the program has several lines,
  `python -c program arguments`: a `subprocess.Popen` of it with piped text.
  `nobody` has no rights of root over files. Variables JAX_... of `environment`
  are options of JAX.
  """

  def __init__(
    self,
    program,
    arguments=(),
    directory=ROOT,
    *,
    encoding="utf-8",
    nobody=False,
    **environment,
  ):
    ours, theirs = zip(
      *(multiprocessing.Pipe(duplex=False) for _ in range(2)), strict=True
    )
    where = str(directory), environment, encoding, nobody
    self._process = _start(_program, program, [*arguments], theirs, *where)
    for end in theirs:
      end.close()
    # A copy of each: a connection closes its own.
    self.stdout, self.stderr = (os.fdopen(os.dup(x.fileno())) for x in ours)
    self.pid = self._process.pid

  @property
  def returncode(self) -> int | None:
    with _ONE:
      return self._process.exitcode

  poll = returncode.fget

  def wait(self, timeout: float | None = None) -> int:
    ended = [self._process.sentinel]
    if not multiprocessing.connection.wait(ended, timeout):
      self.kill()
      raise TimeoutError(f"process {self.pid} had to be killed")
    with _ONE:
      self._process.join()
    return self._process.exitcode

  def communicate(self, timeout: float | None = None) -> tuple[str, str]:
    with self, concurrent.futures.ThreadPoolExecutor(2) as pool:
      said = [pool.submit(x.read) for x in (self.stdout, self.stderr)]
      self.wait(timeout)
      return said[0].result(), said[1].result()

  def send_signal(self, which: int) -> None:
    os.kill(self.pid, which)

  def kill(self) -> None:
    self._process.kill()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.stdout.close()
    self.stderr.close()
    self.wait()


def joined(program, arguments, n: int, **environment) -> list[Popen]:
  """`n` processes of a program, which join each other over loopback, with
  `arguments`(index) each.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    host, port = free.getsockname()
  environment |= {
    "COORDINATOR_ADDRESS": f"{host}:{port}",
    "PROCESS_COUNT": str(n),
    # chips.forgo_unsafe_cache would turn it off, and say so in a line.
    "JAX_ENABLE_COMPILATION_CACHE": "0",
  }
  return [
    Popen(program, arguments(i), PROCESS_INDEX=str(i), **environment)
    for i in range(n)
  ]


# Starting a process asks all others whether they have ended, and an exit code
# can be read once.
_ONE = threading.Lock()


def start_server() -> None:
  """Processes are forked by the first server that was started."""
  _start(os.getpid).join()


def _start(target, *args):
  context = multiprocessing.get_context("forkserver")
  with _ONE:
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=target, args=args)
    process.start()
  return process


def _program(
  program, arguments, ends, directory, environment, encoding, nobody
):
  gc.freeze()  # or a collection would copy all memory of the server
  for fd, end in enumerate(ends, 1):
    os.dup2(end.fileno(), fd)
    end.close()
  # The server's, of files, would seek.
  sys.stdout = open(1, "w", encoding=encoding)
  sys.stderr = open(
    2, "w", buffering=1, encoding=encoding, errors="backslashreplace"
  )
  os.chdir(directory)
  sys.path.insert(0, ROOT)
  os.environ.update(environment)
  # As where the packages that read object stores are not installed.
  sys.modules |= {"gcsfs": None, "s3fs": None}  # type: ignore[dict-item]
  if nobody:
    _be_nobody()
  import jax

  from lm import chips

  chips.write_cache_atomically()
  for name, value in ({"JAX_PLATFORMS": "cpu"} | environment).items():
    if name.startswith("JAX_"):
      number = value.isdecimal()
      jax.config.update(name.lower(), int(value) if number else value)
  sys.argv = [program, *arguments]
  try:
    if "\n" in program:
      exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
      runpy.run_module(program, run_name="__main__", alter_sys=True)
  finally:
    atexit._run_exitfuncs()  # a fork ends without exit handlers


def _be_nobody() -> None:
  """Gives up all capabilities, so that the modes of files count for root too
  (capset(2), version 3).
  """
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)
  none = (ctypes.c_uint32 * 6)()
  if ctypes.CDLL(None, use_errno=True).capset(header, none):
    raise OSError(ctypes.get_errno(), "capset")


def many(
  module: str, calls: list[list[str]], lines: str = ""
) -> list[tuple[int | str, str]]:
  """(exit code or error message, stdout) of `python -m module` for each list
  of arguments, in one process: the calls share what they compile. Each call
  reads `lines` from stdin.
  """
  here, there = multiprocessing.Pipe()
  process = _start(_many, module, calls, lines, there)
  there.close()
  found = here.recv()
  process.join()
  return found


def _many(module, calls, lines, there):
  gc.freeze()
  sys.path.insert(0, ROOT)
  import jax

  from lm import chips

  chips.write_cache_atomically()
  jax.config.update("jax_platforms", "cpu")
  program = importlib.import_module(f"{module}.__main__")
  from absl import flags
  from absl.testing import flagsaver

  from lm import schema

  flags.FLAGS([module])
  found = []
  for arguments in calls:
    out, sys.stdin = io.StringIO(), io.StringIO(lines)
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out):
      try:
        flags.FLAGS([module, *arguments])
        code = program.main()
      except (schema.ConfigError, flags.Error) as error:
        code = str(error)
    found.append((code, out.getvalue()))
  there.send(found)


def flags_of(module: str) -> dict[str, str]:
  """The flags of a door and what each takes: int, path, string enum, ..."""
  here, there = multiprocessing.Pipe()
  process = _start(_flags, module, there)
  there.close()
  found = here.recv()
  process.join()
  return found


def _flags(module, there):
  sys.path.insert(0, ROOT)
  importlib.import_module(f"{module}.__main__")
  from absl import flags

  there.send(
    {
      flag.name: flag.flag_type()
      for home, defined in flags.FLAGS.flags_by_module_dict().items()
      for flag in defined
      if home.startswith("lm.")
    }
  )
