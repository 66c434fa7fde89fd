"""What is known of chips: peak rates, and options of their compilers."""

from typing import Any

import jax

Options = dict[str, Any]

# FLOP/s for dense bfloat16 by a prefix of JAX's `device_kind`, from vendors'
# data sheets. Longer prefixes stand first: the first match counts.
_PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 2307e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}

# XLA options by platform.
_OPTIONS: dict[str, Options] = {
  # Reductions, not products, by YNNPACK. Its products are as fast as Eigen's
  # for large matrices; for the small ones of attention (256 x 64 x 256) they
  # take 1.7 times as long (benchmarks/products.py).
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
}
# Added to a program that runs once. LLVM's third level takes two to four times
# as long as the second for the initial state, whose bits and time are the same.
_ONCE: dict[str, Options] = {"cpu": {"xla_backend_optimization_level": 2}}


def peak_flops(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of one device; None for a CPU or an unknown chip."""
  for prefix, peak in _PEAK_FLOPS.items():
    if device_kind.startswith(prefix):
      return peak
  return None


def compiler_options(platform: str, *, runs_once: bool = False) -> Options:
  """`compiler_options` of a program for `platform`: cpu, gpu or tpu."""
  options = _OPTIONS.get(platform, {})
  # What the user has asked for goes before.
  if runs_once and not jax.config.read("jax_disable_most_optimizations"):
    options = options | _ONCE.get(platform, {})
  return options
