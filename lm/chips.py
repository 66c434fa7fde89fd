"""What is known of chips: peak rates, memory bandwidth, compiler options."""

from typing import Any, NamedTuple

import jax

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
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
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


def compiler_options(platform: str, *, runs_once: bool = False) -> Options:
  """`compiler_options` of a program for `platform`: cpu, gpu or tpu."""
  options = _OPTIONS.get(platform, {})
  # What the user has asked for goes before.
  if runs_once and not jax.config.read("jax_disable_most_optimizations"):
    options = options | _ONCE.get(platform, {})
  return options
