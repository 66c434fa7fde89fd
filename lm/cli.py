"""The CLI shared by every `python -m lm.VERB`: flags, config, errors.

`--config=FILE` names a Python file with `get_config()`, and each
`--config.FIELD=VALUE` (or `--config.FIELD VALUE`) then overrides a field;
`--help` lists every field with its default. The field's annotation decides
how VALUE is parsed: `None`, numbers and tuples as Python literals, strings
verbatim. A mistake ends in a line on stderr and exit code 2, before any
compilation or write.
"""

import atexit
import contextlib
import difflib
import functools
import glob
import io
import logging as pylogging
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import rich.console
from absl import app, flags, logging

import lm
from lm import config as config_lib
from lm import files, schema, validation

# Flags defined here belong to the CLI that defines them: its --help lists them.
flags.disclaim_key_flags()


def run(
  main: Callable[..., int | None],
  *,
  takes_config: bool = True,
  lists: Sequence[str] = (),
) -> None:
  """Parses the command line, calls `main`, exits with the result of `main`.

  `main` gets the validated Config, or no argument if `takes_config` is False
  (the CLI reads the config from a checkpoint). Other flags are absl flags
  defined by the CLI; the repeatable ones named in `lists` also take several
  values at once, `--NAME A B`. An error known to `explain` prints a line on
  stderr and exits with its exit code; Ctrl-C exits with 130, a closed output
  pipe with 141. Every other exception is a bug and keeps the traceback.
  """
  for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, name) is None:  # closed, as by `>&-`
      setattr(sys, name, open(os.devnull, mode))
  for stream in (sys.stdout, sys.stderr):
    # Text that the terminal's encoding cannot show is printed as escapes.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")
  if os.environ.get("COLUMNS") == "0":
    del os.environ["COLUMNS"]  # rich would print nothing
  _hush_libraries()
  # rich would exit with 1 in place of the BrokenPipeError.
  rich.console.Console.on_broken_pipe = _reraise
  _define_shared_flags()
  overrides, arguments = [], spread(sys.argv, lists)
  if takes_config:
    define_path("config", "Config file; --config.FIELD=VALUE changes a field.")
    overrides, arguments = schema.split_arguments(arguments, "config")

  def show_help() -> None:
    app.usage(shorthelp=True, writeto_stdout=True)
    if takes_config:
      print("\nFields of the config, with their defaults:\n")
      print("\n".join(schema.described(config_lib.Config, "config")))
    sys.stdout.flush()

  def parse(argv: list[str]) -> list[str]:
    if {"--help", "-help", "-?"} & {*argv}:
      sys.exit(guarded(show_help))
    # By default absl prints every line that libraries log.
    flags.FLAGS.verbosity = logging.ERROR
    try:
      return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
      hint = _fields_hint(error.flagname) if takes_config else ""
      sys.exit(refuse(schema.ConfigError(f"{error}{hint}")))
    except (flags.Error, schema.ConfigError) as error:
      sys.exit(refuse(schema.ConfigError(str(error))))

  def work(argv: list[str]) -> int | None:
    if signal.getsignal(signal.SIGINT) is lm.stopped:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    config = [load(flags.FLAGS.config, overrides)] if takes_config else []
    if len(argv) > 1:
      raise schema.ConfigError(f"{argv[1]!r}: not a flag; write --FLAG=VALUE")
    _use_shared_flags()
    code = main(*config)
    sys.stdout.flush()
    return code

  within = functools.partial(guarded, work)
  app.run(within, argv=arguments, flags_parser=parse)


def _fields_hint(name: str) -> str:
  """For the error on an unknown flag: the fields of the config of its name."""
  paths = [
    path
    for path, _ in schema.leaves(config_lib.Config(), "config")
    if path.endswith(f".{name}")
  ]
  if not paths:
    return ""
  return f"; a field of the config is set by --{' or --'.join(paths)}=VALUE"


def guarded(work: Callable[..., int | None], *arguments) -> int | None:
  """work(*arguments), or the exit code of what stops it, told on stderr."""
  try:
    return work(*arguments)
  except KeyboardInterrupt:
    # A second one would be a traceback out of what ends the program.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("stopped by Ctrl-C", file=sys.stderr)
    return _leave(130)
  except BrokenPipeError:  # the reader of the pipe has exited, as `head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return _leave(141)
  except Exception as error:
    if (told := explain(error)) is not None:
      return _leave(refuse(told))
    error.add_note(
      "This is an error in the program: report it, with this traceback and "
      "the command, to the project's issue tracker."
    )
    if not _joined():
      raise
    traceback.print_exc()
    return _leave(1)


def spread(arguments: Sequence[str], lists: Sequence[str]) -> list[str]:
  """`arguments` with `--NAME A B` written as `--NAME=A --NAME=B`, for the flags
  named in `lists`.
  """
  found, flag = [], None
  for i, argument in enumerate(arguments):
    if argument.startswith("-"):
      name, has_value, _ = argument.partition("=")
      flag = name if name in [f"--{flag}" for flag in lists] else None
      following = arguments[i + 1 : i + 2]
      if flag and not has_value and following and following[0][:1] != "-":
        continue
      found.append(argument)
    else:
      found.append(argument if flag is None else f"{flag}={argument}")
  return found


def _define_shared_flags() -> None:
  for name, about in _PROCESSES.items():
    flags.DEFINE_string(name, None, about)
  define_path(
    "compilation_cache",
    "Directory of compiled programs, for many runs and processes: a start "
    "compiles nothing that is there.",
    run=True,
  )


def _use_shared_flags() -> None:
  """Sets what lm/processes.py and JAX's compilation cache read.

  JAX finds a program by its code, options, library version and hardware, the
  CPU's features included, and compiles an entry that cannot be read. The
  directory is a flag, not a field of the config: entries are executed, and a
  checkpoint from elsewhere shall not name them.
  """
  for name in _PROCESSES:
    if (value := flags.FLAGS[name].value) is not None:
      os.environ[name.upper()] = str(value)
  if (directory := flags.FLAGS.compilation_cache) is not None:
    files.check_directory(directory, "--compilation_cache")
    import jax

    from lm import chips

    chips.write_cache_atomically()
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _hush_libraries() -> None:
  """Drops logged stack traces of errors that are raised anyway.

  Orbax logs a stack for each thread that an error passes through, and pending
  TensorStore reads call back into an event loop that Orbax has closed.
  """

  def is_news(record: pylogging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)

  logging.get_absl_logger().addFilter(is_news)
  hook = sys.unraisablehook

  def told(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  sys.unraisablehook = told


def _reraise(self: rich.console.Console) -> None:
  raise


def explain(error: Exception) -> schema.UserError | None:
  """Maps an error of a library or the operating system to a UserError; returns
  None for a bug.

  Errors that lower layers let through are translated here only.
  """
  if isinstance(error, schema.UserError):
    return error
  if isinstance(error, OSError):
    name = error.filename
    where = "" if name is None else f"{name}: "
    return schema.RunError(f"{where}{error.strerror or error}")
  if isinstance(error, MemoryError):
    return schema.RunError(
      "out of memory; make the model or the batch smaller, or use a larger "
      "machine"
    )
  if type(error).__name__ == "JaxRuntimeError":  # jax may not be imported
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text:
      return schema.RunError(
        f"out of device memory: {text[:300]}; lower train.batch_size (for "
        "lm.evaluate, --batch_size), raise train.microbatches, set "
        "model.remat='full', or use more devices"
      )
    if notes := getattr(error, "__notes__", ()):
      return schema.RunError(f"{text[:300]}. {' '.join(notes)}")
  # JAX's, of a JAX_PLATFORMS that is none, or of an accelerator in use.
  if str(error).startswith("Unable to initialize backend"):
    return schema.RunError(str(error))
  return None


class _Path(flags.ArgumentParser):
  """absl parser of a flag that holds a path, `run` one of a run directory."""

  def __init__(self, name: str, run: bool = False):
    self._name, self._run = name, run

  def parse(self, argument: Any) -> Any:
    check = files.user_path if self._run else files.local_path
    return check(argument, f"--{self._name}")

  def flag_type(self) -> str:
    return "path or URL" if self._run else "path"


def define_path(
  name: str, about: str, *, run: bool = False
) -> flags.FlagHolder:
  """Defines a path flag: `~` is the home directory, and '' is refused, as are
  object stores, but for the directory of a run.
  """
  return flags.DEFINE(_Path(name, run), name, None, about)


def define_paths(
  name: str, about: str, *, run: bool = False
) -> flags.FlagHolder:
  """Defines a repeatable path flag, as `define_path`; default []."""
  return flags.DEFINE_multi(
    _Path(name, run), flags.ArgumentSerializer(), name, [], about
  )


class _OptionalPath(_Path):
  """absl parser of a path that the flag alone, without a value, leaves open."""

  def parse(self, argument: Any) -> Any:
    if argument in ("true", "false"):  # absl's, for --NAME and --noNAME
      return argument == "true" or None
    return super().parse(argument)


def define_optional_path(name: str, about: str) -> flags.FlagHolder:
  """Defines a flag `--NAME[=PATH]`: True without a value, None if absent."""
  return flags.DEFINE_flag(
    flags.Flag(
      _OptionalPath(name),
      flags.ArgumentSerializer(),
      *(name, None, about),
      boolean=True,
    )
  )


class _Optional(flags.IntegerParser):
  """absl parser of an integer that the flag alone, without a value, sets."""

  def __init__(self, alone: int, least: int, most: int):
    super().__init__(lower_bound=least, upper_bound=most)
    self._alone = alone

  def parse(self, argument: Any) -> Any:
    if argument in ("true", "false"):  # absl's, for --NAME and --noNAME
      return self._alone if argument == "true" else None
    return super().parse(argument)


def define_optional_integer(
  name: str, alone: int, about: str, *, least: int, most: int
) -> flags.FlagHolder:
  """Defines a flag `--NAME[=N]`: `alone` if it has no value, None if absent."""
  parser = _Optional(alone, least, most)
  return flags.DEFINE_flag(
    flags.Flag(
      parser, flags.ArgumentSerializer(), name, None, about, boolean=True
    )
  )


# Flags that set the environment variables of lm/processes.py.
_PROCESSES = {
  "coordinator_address": "host:port of the first of several processes. SLURM, "
  "Open MPI, TPU VMs and GKE tell a process this, its number and their count.",
  "process_count": "How many processes the run has.",
  "process_index": "Which of them this one is, from 0.",
}


def _joined() -> bool:
  """Whether jax.distributed has joined this process to a run of several."""
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()


def _leave(code: int) -> int:
  """Returns `code`, or calls os._exit where normal shutdown would block or
  crash: if the run has several processes, which may wait for this process; if
  `code` is 1, mostly an outside failure, such as a full disk; or if `code` is
  130, since Ctrl-C may have stopped XLA while it compiled.
  """
  joined = _joined()
  if code == 130 and not joined:
    atexit._run_exitfuncs()  # which end child processes
  if code in (1, 130) or joined:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):
        stream.flush()
    os._exit(code)
  return code


def refuse(error: Exception) -> int:
  """Prints `error` as a single line on stderr; returns the exit code."""
  print("error:", " ".join(str(error).split()), file=sys.stderr)
  return getattr(error, "exit_code", 1)


def load(path: str | None, overrides: Sequence[str] = ()) -> config_lib.Config:
  """Loads the config file `path` and applies `--config.FIELD=VALUE` overrides.

  Raises ConfigError if the file, a field or a value is missing or invalid.
  """
  if path is None:
    raise schema.ConfigError("--config: missing; write --config=FILE.py")
  config = _from_file(path)
  schema.check_types(config, config_lib.Config, "config")
  for argument in overrides:
    field, equals, text = argument.removeprefix("--").partition("=")
    if not equals:
      raise schema.ConfigError(f"{argument}: no value; write {argument}=VALUE")
    schema.override(config, "config", field.split(".")[1:], text)
  return validation.validate(config)


def _from_file(path: str) -> config_lib.Config:
  if not os.path.isfile(path):
    files = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.py"))
    near = difflib.get_close_matches(path, files, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise schema.ConfigError(f"--config={path}: no such file{hint}")
  config = None
  try:
    names = runpy.run_path(path)
    if "get_config" in names:
      config = names["get_config"]()
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    where = f"{path}:{lines[-1]}" if lines else path
    raise schema.ConfigError(
      f"--config={where}: {type(error).__name__}: {error}"
    ) from error
  if not isinstance(config, config_lib.Config):
    raise schema.ConfigError(
      f"--config={path}: needs a function get_config() that returns a Config"
    )
  return config
