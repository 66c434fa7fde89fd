"""What is known of chips: peak rates, memory bandwidth, compiler options; and
JAX's cache of compiled programs: where none may come from it, how they come in.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax._src import lru_cache
from jax.experimental.compilation_cache import compilation_cache

from lm import files

Options = dict[str, Any]


class _Chip(NamedTuple):
  flops: float  # dense bfloat16, per second
  bandwidth: float | None  # bytes per second of the memory; None: by variant


# Of a device of JAX: a chip, but on a TPU7x one of the chip's two cores. By a
# prefix of `device_kind`, from the data sheets: Google's pages of each TPU,
# NVIDIA's of the A100, H100 (SXM, PCIe, NVL) and H200. Longer prefixes stand
# first: the first match counts.
_CHIPS = {
  "TPU v4": _Chip(275e12, 1200e9),
  "TPU v5 lite": _Chip(197e12, 819e9),
  "TPU v5": _Chip(459e12, 2765e9),
  "TPU v6 lite": _Chip(918e12, 1638e9),
  "TPU7x": _Chip(2307e12 / 2, 7380e9 / 2),
  "NVIDIA A100": _Chip(312e12, None),
  "NVIDIA H100 PCIe": _Chip(756e12, 2000e9),
  "NVIDIA H100 NVL": _Chip(835e12, 3900e9),
  "NVIDIA H100": _Chip(989e12, 3350e9),
  "NVIDIA H200": _Chip(989e12, 4800e9),
}

# XLA options by platform.
_OPTIONS: dict[str, Options] = {
  # Reductions, not products, by YNNPACK. Its products are as fast as Eigen's
  # for large matrices; for the small ones of attention (256 x 64 x 256) they
  # take 1.7 times as long (benchmarks/products.py).
  # Tried without a gain for the quickstart's step, by XLA_FLAGS:
  # xla_cpu_prefer_vector_width=512, xla_cpu_enable_platform_dependent_math,
  # xla_cpu_ftz, xla_cpu_enable_fast_min_max, xla_cpu_scheduler_type and
  # xla_cpu_copy_insertion_use_region_analysis; with a loss:
  # xla_cpu_experimental_enable_tiling_propagation,
  # xla_cpu_use_fusion_emitters=false.
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
  # None for "tpu": of those tried with libtpu 0.0.42 on a product whose weight
  # is gathered over all chips, and its gradient, none changed a collective.
  # v5e:16x16 gathers beside products without options, and sums gradients by
  # all-reduces also with
  # - xla_enable_async_all_reduce and
  #   xla_tpu_enable_async_collective_fusion_fuse_all_reduce;
  # - MaxText's for reduce-scatters: xla_tpu_assign_all_reduce_scatter_layout,
  #   xla_tpu_use_minor_sharding_for_major_trivial_input and
  #   xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1.
  # v5p:4x4x4 gathers by all-reduces (with fsdp=32 it does not), also with
  # - xla_enable_all_gather_3d_emitter;
  # - xla_enable_async_all_gather, xla_tpu_prefer_async_allgather_to_allreduce;
  # - MaxText's for all-gathers: xla_tpu_overlap_compute_collective_tc and
  #   xla_tpu_enable_async_collective_fusion{,_fuse_all_gather,_multiple_steps}.
  # LIBTPU_INIT_ARGS tries others, in benchmarks/aot.py too.
}
# Added to a program that computes in bfloat16: YNNPACK has products of it,
# Eigen none (benchmarks/train.py --dtype=bfloat16).
_BFLOAT16: dict[str, Options] = {
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": (
      "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    )
  }
}
# Added to a program that runs once. LLVM's third level takes two to four times
# as long as the second for the initial state, whose bits are the same
# (benchmarks/compile.py).
_ONCE: dict[str, Options] = {"cpu": {"xla_backend_optimization_level": 2}}


def peak_flops(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of one device; None for a CPU or an unknown chip."""
  chip = _find(device_kind)
  return None if chip is None else chip.flops


def memory_bandwidth(device_kind: str) -> float | None:
  """Bytes per second of one device's memory; None where it is not known."""
  chip = _find(device_kind)
  return None if chip is None else chip.bandwidth


def _find(device_kind: str) -> _Chip | None:
  for prefix, chip in _CHIPS.items():
    if device_kind.startswith(prefix):
      return chip
  return None


def compiler_options(
  platform: str, dtype: str = "float32", *, runs_once: bool = False
) -> Options:
  """`compiler_options` of a program for `platform` (cpu, gpu or tpu), which
  computes in `dtype`.
  """
  options = _OPTIONS.get(platform, {})
  if dtype == "bfloat16":
    options = options | _BFLOAT16.get(platform, {})
  # What the user has asked for goes before.
  if runs_once and not jax.config.read("jax_disable_most_optimizations"):
    options = options | _ONCE.get(platform, {})
  return options


def forgo_unsafe_cache(devices: Sequence[Any]) -> None:
  """Turns JAX's compilation cache off in this process if `devices` (of JAX)
  are several CPU devices: programs over them are not safe to come from it.

  XLA keeps the collectives of a CPU program in one order by a resource that all
  of them use. In a program that was read from a cache each loop has a resource
  of its own (`WhileThunkFromProto` in XLA's thunk_proto_serdes.cc): collectives
  inside and outside a loop run in any order, devices wait for one another, and
  XLA ends the process after 40 seconds: seen with JAX 0.10, not with 0.12.
  """
  if len(devices) == 1 or devices[0].platform != "cpu":
    return
  now = jax.config.values
  folder = now["jax_compilation_cache_dir"]
  if folder is None or not now["jax_enable_compilation_cache"]:
    return
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  if jax.process_index() == 0:
    print(
      f"compilation cache {folder}: not used, since programs over "
      f"{len(devices)} CPU devices can deadlock when they come from a cache",
      file=sys.stderr,
    )


def write_cache_atomically() -> None:
  """Lets compiled programs come into JAX's compilation cache whole.

  JAX writes them in place, and an entry that is there for good: a process that
  starts meanwhile reads a part of a program, and after a kill every start finds
  one, warns, and compiles. A cache of bounded size stays as it is.
  """
  in_place = lru_cache.LRUCache.put
  if in_place.__module__ == __name__:
    return

  def put(self: Any, key: str, value: bytes) -> None:
    if self.eviction_enabled:
      return in_place(self, key, value)
    path = self.path / f"{key}-cache"
    if not path.exists():
      files.replace(path, value)

  lru_cache.LRUCache.put = put
