"""What an accelerator's name means to each cloud: one table, its sources here.

TPU names count TensorCores for v4 and v5p (two a chip) and chips for v5e and
v6e, as Cloud TPU does. Types, runtime versions and topologies:
https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /runtimes. Labels of
GKE's nodes: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
and src/xpk/core/system_characteristics.py of AI-Hypercomputer/xpk.
"""

import dataclasses

from lm import schema

# Chips of a slice -> its topology, on a two- and a three-dimensional torus.
_FLAT = {
  1: "1x1",
  4: "2x2",
  8: "2x4",
  16: "4x4",
  32: "4x8",
  64: "8x8",
  128: "8x16",
  256: "16x16",
}
_DEEP = {
  4: "2x2x1",
  8: "2x2x2",
  16: "2x2x4",
  32: "2x4x4",
  64: "4x4x4",
  128: "4x4x8",
  256: "4x8x8",
  512: "8x8x8",
  1024: "8x8x16",
  2048: "8x16x16",
}


@dataclasses.dataclass(frozen=True)
class Tpu:
  """One slice; on GKE a host has four chips, of v5e and v6e too."""

  gcloud_type: str
  runtime_version: str
  gke_label: str
  topology: str
  chips: int

  @property
  def chips_per_host(self) -> int:
    return min(self.chips, 4)

  @property
  def hosts(self) -> int:
    return self.chips // self.chips_per_host


@dataclasses.dataclass(frozen=True)
class Gpu:
  """One machine with `count` of them."""

  name: str
  count: int
  gke_label: str


# Our name -> Cloud TPU's prefix, runtime version, GKE's label, cores in the
# name a chip, topologies.
_TPUS = {
  "v4": ("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", 2, _DEEP),
  "v5e": ("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 1, _FLAT),
  "v5p": ("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", 2, _DEEP),
  "v6e": ("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", 1, _FLAT),
}

TPUS = {
  f"{name}-{chips * cores}": Tpu(
    f"{prefix}-{chips * cores}", runtime, label, topology, chips
  )
  for name, (prefix, runtime, label, cores, shapes) in _TPUS.items()
  for chips, topology in shapes.items()
}

# SkyPilot's name -> GKE's label.
GPUS = {
  "L4": "nvidia-l4",
  "A100": "nvidia-tesla-a100",
  "A100-80GB": "nvidia-a100-80gb",
  "H100": "nvidia-h100-80gb",
  "H200": "nvidia-h200-141gb",
  "B200": "nvidia-b200",
}


def find(name: str) -> Tpu | Gpu | None:
  """The accelerator that `name` names, None for `cpu`; raises ConfigError."""
  if name == "cpu":
    return None
  if name in TPUS:
    return TPUS[name]
  kind, _, count = name.partition(":")
  if kind in GPUS and count in ("1", "2", "4", "8"):
    return Gpu(kind, int(count), GPUS[kind])
  near = schema.unknown(name, [*TPUS, *(f"{gpu}:8" for gpu in GPUS), "cpu"])
  near = near.partition("Known:")[0]
  raise schema.ConfigError(
    f"spec.accelerator={name!r}: {near}Known: cpu; a TPU such as v5e-16, with "
    f"{', '.join(_TPUS)}; 1, 2, 4 or 8 GPUs a machine such as H100:8, with "
    f"{', '.join(GPUS)}"
  )
