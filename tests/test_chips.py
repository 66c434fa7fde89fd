"""Peaks of chips, compared with the table of JAX's kernels for TPUs."""

import doors
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


MESHES = {
  "lm.train": """
config = config_lib.Config(mesh=config_lib.MeshConfig(data=n_devices, fsdp=1))
mesh = mesh_lib.make(config, jax.devices()[:n_devices])
""",
  "lm.sample": "mesh = flags._mesh([str(n_devices), '1', '1'])",
}


@pytest.mark.parametrize("command", MESHES)
def test_programs_over_several_cpu_devices_come_from_no_cache(
  command, tmp_path
):
  program = f"""
import sys, jax, numpy as np
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm.sample import flags

for n_devices in map(int, sys.argv[1:]):
  {MESHES[command].strip().replace(chr(10), chr(10) + "  ")}
  rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  x = jax.device_put(np.ones(8, np.float32), rows)
  jax.block_until_ready(jax.jit(lambda x: x / x.sum())(x))
"""

  def kept(*n_devices):
    folder = tmp_path / "-".join(n_devices)
    child = doors.Popen(
      program,
      n_devices,
      JAX_NUM_CPU_DEVICES="4",
      JAX_COMPILATION_CACHE_DIR=str(folder),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
      JAX_ENABLE_COMPILATION_CACHE="1",
    )
    _, said = child.communicate()
    assert child.returncode == 0, said
    return len(list(folder.glob("*lambda*-cache"))), said

  assert kept("1", "1") == (1, "")
  for n_devices in (("2",), ("1", "2"), ("4", "1")):
    n_kept, said = kept(*n_devices)
    assert n_kept == (n_devices[0] == "1")
    assert said.startswith(f"compilation cache {tmp_path}") and "CPU" in said
    assert said.count("\n") == 1
