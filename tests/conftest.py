"""Strictness and speed, set once for every test; warnings are in
pyproject.toml.

Tests spend their time in the compiler, so XLA is told to optimise little, and
what one test or child process has compiled serves the next: the compilation
cache lives as long as the session. A test that reads what the compiler says
asks for `compiled_anew`, one that reads what it plans for `optimised`.
"""

import atexit
import gc
import importlib.util
import os
import pathlib
import pkgutil
import shutil
import signal
import tempfile

import jax
import jaxtyping
import pytest
from jax._src import compilation_cache

import lm

# Annotations such as Float[Array, "B T D"] are executed at every call. The
# config is left out: its own validation of its own types is what is tested.
HAS_CHECKER = importlib.util.find_spec("beartype") is not None
CONFIG = set(
  "config config_optional effects objective schema validation".split()
)
if HAS_CHECKER:
  rooms = {room.name for room in pkgutil.iter_modules(lm.__path__)}
  jaxtyping.install_import_hook(
    [f"lm.{room}" for room in rooms - CONFIG],
    "beartype.beartype",
  )

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: the workers share one
  CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"]
else:
  CACHE = tempfile.mkdtemp(prefix="lm-tests-compiled-")
  atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
  if jax.__version_info__ < (0, 11):
    # The older code generator of XLA's CPU compiler takes half the time. JAX
    # 0.12 has only the newer one. A program in one part takes a tenth less than
    # one in many, which are for more cores. Workers inherit this, too.
    flags = os.getenv("XLA_FLAGS", "") + (
      " --xla_cpu_use_fusion_emitters=false"
      " --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ["XLA_FLAGS"] = flags
QUICK = {
  "jax_disable_most_optimizations": True,
  "jax_compilation_cache_dir": CACHE,
  "jax_persistent_cache_min_compile_time_secs": 0,
  "jax_traceback_in_locations_limit": 0,  # where an operation was written
}
for option, value in QUICK.items():
  jax.config.update(option, value)
  os.environ[option.upper()] = str(value)  # for child processes
# A background job or nohup ignores these, and child processes would inherit it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# A mesh needs devices; NamedShardings are tested on eight.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


# Programs over several devices are not kept. chips.forgo_unsafe_cache would
# turn the cache off for those of one device, too, which most are.
_keep = compilation_cache.put_executable_and_time


def _keep_safe(key, name, executable, *rest):
  if len(executable.local_devices()) == 1:
    _keep(key, name, executable, *rest)


compilation_cache.put_executable_and_time = _keep_safe
chips = importlib.import_module("lm.chips")  # with its annotations executed
chips.forgo_unsafe_cache = lambda devices: None
chips.write_cache_atomically()  # for pytest's other workers


def pytest_report_header():
  state = "executed" if HAS_CHECKER else "NOT executed: beartype is missing"
  return f"shape annotations: {state}"


# The files that take longest, the longest first.
LONG = """
test_faults test_slurm test_step test_verify test_train test_wrong_inputs
test_harness test_families test_processes test_lora test_sample test_resume
test_model_properties test_engine
""".split()


def pytest_collection_modifyitems(items):
  """Long files first, so that no worker (pytest -n) ends with one alone."""
  rank = {name: i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
  """What is imported stays, and programs make much garbage that has no cycle:
  a twentieth of the time went into looking for some.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_freed():
  """A CPU program has memory maps of its own, of which a process may have
  65,530: all tests together need more, and XLA then crashes.
  """
  yield
  jax.clear_caches()


@pytest.fixture
def compiled_anew():
  """Nothing comes out of the compilation cache."""
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()


@pytest.fixture
def optimised():
  """XLA optimises as it does for users."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def _draw():
  """Runs draw no curves.png, half a second each; the function that would."""
  from lm.train import plot

  with pytest.MonkeyPatch.context() as patch:
    draw = plot.draw
    patch.setattr(plot, "draw", lambda workdir: None)
    yield draw


@pytest.fixture
def curves(_draw, monkeypatch):
  """Runs draw curves.png."""
  monkeypatch.setattr("lm.train.plot.draw", _draw)


@pytest.fixture(scope="session")
def make(tmp_path_factory, _draw):
  """Makes the config of a small run over a few source files of this project,
  its fields changed by keyword: make(train__steps=3).
  """
  from lm import config as config_lib
  from lm import validation

  corpus = tmp_path_factory.mktemp("corpus")
  for path in pathlib.Path(lm.__path__[0]).glob("*.py"):
    shutil.copy(path, corpus)

  def config(**fields):
    c = config_lib.Config()
    c.tokenizer.kind = "bytes"
    c.data.train = (f"text:{corpus}/*.py",)
    c.data.validation = (f"text:{corpus}/cli.py",)
    c.data.cache_dir = str(corpus / "cache")
    c.model = config_lib.ModelConfig(
      vocab_size=384,
      n_layers=2,
      d_model=16,
      n_heads=2,
      n_kv_heads=2,
      d_head=8,
      d_mlp=32,
      context_length=32,
      residual_dropout=0.1,
    )
    c.optimizer = config_lib.OptimizerConfig(
      name="adamw", peak_lr=1e-2, warmup_steps=2, ema_decay=0.9
    )
    c.train = config_lib.TrainConfig(
      steps=12,
      batch_size=8,
      sequence_length=32,
      log_every=2,
      eval_every=6,
      eval_batches=3,
    )
    c.checkpoint = config_lib.CheckpointConfig(save_every=3, keep_last=9)
    c.mesh.fsdp = 2
    for path, value in fields.items():
      room, field = path.split("__")
      setattr(getattr(c, room), field, value)
    return validation.validate(c)

  return config
