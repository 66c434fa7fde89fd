"""Peaks of chips, compared with the table of JAX's kernels for TPUs."""

import pytest
from jax.experimental.pallas import tpu

from lm import chips

KINDS = {
  "TPU v4": tpu.ChipVersion.TPU_V4,
  "TPU v5 lite": tpu.ChipVersion.TPU_V5E,
  "TPU v5": tpu.ChipVersion.TPU_V5P,
  "TPU v6 lite": tpu.ChipVersion.TPU_V6E,
  "TPU7x": tpu.ChipVersion.TPU_7X,
}


@pytest.mark.parametrize("kind", KINDS)
def test_peaks_are_those_of_a_device_of_jax(kind):
  """A device is a chip, or one of a chip's cores where these are devices of
  their own. JAX's numbers are of a core; its bandwidths are a tenth lower.
  """
  version = KINDS[kind]
  n_cores = 2 if version.supports_megacore else 1
  core = tpu.get_tpu_info_for_chip(version, n_cores)
  peak, bandwidth = chips.peak_flops(kind), chips.memory_bandwidth(kind)
  assert peak == pytest.approx(n_cores * core.bf16_ops_per_second, rel=0.01)
  assert bandwidth == pytest.approx(
    n_cores * core.mem_bw_bytes_per_second, rel=0.13
  )


def test_variants_of_a_card_are_told_apart():
  kinds = ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA H200")
  bandwidths = [chips.memory_bandwidth(kind) for kind in kinds]
  assert bandwidths == sorted(set(bandwidths))
  assert chips.peak_flops("cpu") is chips.memory_bandwidth("cpu") is None
