"""Our side of gpu.py, in JAX: speeds, and checks of what was compiled."""

import re
import time
from collections.abc import Callable

import decode
import jax
import train

from lm import chips
from lm import mesh as mesh_lib
from lm.model import kernels
from lm.train import programs


def memory(name: str) -> int | None:
  """Bytes of the device, as JAX counts them; None on a CPU."""
  return (jax.devices()[0].memory_stats() or {}).get(name)


def card() -> dict:
  """The device, and what is known of it."""
  kind = jax.devices()[0].device_kind
  return {
    "device": kind,
    "platform": jax.default_backend(),
    "memory_bytes": memory("bytes_limit"),
    "peak_flops": chips.peak_flops(kind),
    "memory_bandwidth": chips.memory_bandwidth(kind),
  }


def count_compilations() -> Callable[[], int]:
  """A function that returns the number of compilations from now on."""
  found = []

  def listen(name: str, *_, **__) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
      found.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return lambda: len(found)


def compile_lightest(job, rows: int, length: int):
  """(config, mesh, program, its memory) with the lightest remat that fits."""
  limit = memory("bytes_limit")
  for remat in ("none", "dots", "full"):
    config = job.config(rows, length, remat)
    mesh = mesh_lib.make(config)
    compiled = programs.compile_step(config, mesh)
    m = compiled.memory_analysis()
    needed = m.argument_size_in_bytes + m.output_size_in_bytes
    needed += m.temp_size_in_bytes - m.alias_size_in_bytes
    if limit is None or needed < 0.95 * limit:  # the rest is for fragmentation
      break
  return config, mesh, compiled, m


def attention_used(config, mesh, compiled) -> dict:
  """The kernel chosen, and the calls of fused attention in the program."""
  with jax.set_mesh(mesh):
    kernel = kernels.choose(config.model, length=config.train.sequence_length)
  targets = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
  calls = sorted({t for t in targets if "fmha" in t or "mosaic" in t})
  on_gpu = jax.default_backend() == "gpu"
  return {
    "attention": kernel,
    "attention_calls": calls,
    "attention_is_fused": bool(calls) if on_gpu else None,
  }


def training(job) -> Callable[..., dict]:
  """Measures rows, tokens of a row and steps."""
  n_compilations, states = count_compilations(), []

  def measure(rows: int, length: int, n_steps: int) -> dict:
    config, mesh, compiled, analysis = compile_lightest(job, rows, length)
    state = states.pop() if states else programs.create_state(config, mesh)
    batch = train.placed(config, mesh, job.tokens(rows, length + 1))
    before, losses = jax.tree.leaves(state), []
    for _ in range(3):  # warms up
      state, metrics = compiled(state, batch)
      losses.append(float(metrics["loss"]))
    n_before, started = n_compilations(), time.perf_counter()
    for _ in range(n_steps):
      state, metrics = compiled(state, batch)
    float(metrics["loss"])  # waits for the device
    seconds = (time.perf_counter() - started) / n_steps
    n_after = n_compilations()
    states.append(state)
    return {
      "tokens_per_second": rows * length / seconds,
      "first_loss": losses[0],
      "remat": config.model.remat,
      "peak_bytes": memory("peak_bytes_in_use"),
      "checks": {
        "compilations_after_warmup": n_after - n_before,
        "state_donated": all(leaf.is_deleted() for leaf in before),
        "alias_bytes": analysis.alias_size_in_bytes,
        **attention_used(config, mesh, compiled),
      },
    }

  return measure


def decoding(job) -> Callable[..., dict]:
  """Measures as decode.py's sides do."""
  n_compilations = count_compilations()
  run = decode.ours(job.config().model, job.rules)

  def measure(*ask: int) -> dict:
    run(*ask)  # compiles
    n_before = n_compilations()
    found, n_after = decode.medians(run, *ask), n_compilations()
    return found | {
      "peak_bytes": memory("peak_bytes_in_use"),
      "checks": {"compilations_after_warmup": n_after - n_before},
    }

  return measure
