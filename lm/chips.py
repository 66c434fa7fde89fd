"""Peak rates of accelerators, from their vendors' data sheets."""

# FLOP/s for dense bfloat16 by a prefix of JAX's `device_kind`. Longer prefixes
# stand first: the first match counts.
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


def peak_flops(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of one device; None for a CPU or an unknown chip."""
  for prefix, peak in _PEAK_FLOPS.items():
    if device_kind.startswith(prefix):
      return peak
  return None
