"""Strictness, set once for every test; warnings are in pyproject.toml.

No persistent compilation cache: a test that reads XLA's warnings or times a
compilation would pass on an executable from an earlier run.
"""

import importlib.util
import pkgutil

import jax
import jaxtyping

import lm

# Annotations such as Float[Array, "B T D"] are executed at every call. The
# config is left out: its own validation of its own types is what is tested.
HAS_CHECKER = importlib.util.find_spec("beartype") is not None
if HAS_CHECKER:
  rooms = {room.name for room in pkgutil.iter_modules(lm.__path__)}
  jaxtyping.install_import_hook(
    [f"lm.{room}" for room in rooms - {"config"}], "beartype.beartype"
  )

# A mesh needs devices; NamedShardings are tested on eight.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_report_header():
  state = "executed" if HAS_CHECKER else "NOT executed: beartype is missing"
  return f"shape annotations: {state}"
