"""Compiles a config's train step for TPUs that are not there, on a CPU.

  python benchmarks/aot.py --config=configs/llama3_8b.py --topology=v5p:4x4x4

Needs the `tpu` extra (libtpu). Prints bytes per chip as XLA's memory analysis
has them, and what the compiler estimates of the step (benchmarks/cycles.py); a
step that does not fit is told as out of memory, in the compiler's words.
Options of the compiler are tried by LIBTPU_INIT_ARGS="--xla_NAME=VALUE ...".
"""

import os

from absl import flags

from lm import cli, schema
from lm import config as config_lib

_TOPOLOGY = flags.DEFINE_string(
  "topology", "v5p:4x4x4", "Chips to compile for, of one slice."
)
_SLICES = flags.DEFINE_integer("slices", 1, "How many of them.", lower_bound=1)
GIB = 2**30


def main(config: config_lib.Config) -> None:
  # libtpu would otherwise ask a metadata server what machine this is.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["JAX_PLATFORMS"] = "cpu"
  # Several may compile at once: none of them opens a TPU.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  import time

  import cycles
  from jax.experimental import topologies

  from lm import mesh as mesh_lib
  from lm.model import counts
  from lm.train import programs

  try:
    topology = topologies.get_topology_desc(
      platform="tpu",
      topology_name=_TOPOLOGY.value,
      num_slices=_SLICES.value,
    )
  except RuntimeError as error:
    raise schema.ConfigError(
      f"--topology={_TOPOLOGY.value}: {error}; write chips that libtpu knows, "
      "such as v5p:4x4x4 (pip install -e '.[tpu]')"
    ) from error
  mesh = mesh_lib.make(config, topology.devices)
  started = time.perf_counter()
  program = programs.compile_step(config, mesh)
  memory = program.memory_analysis()
  seconds = time.perf_counter() - started
  print(
    f"{counts.parameter_count(config.model):,} parameters on {mesh.size} chips "
    f"of {_SLICES.value} x {_TOPOLOGY.value}, {dict(mesh.shape)}, "
    f"{config.tokens_per_step // mesh.size:,} tokens a chip"
  )
  print(
    f"bytes per chip: peak {memory.peak_memory_in_bytes / GIB:.2f} GiB, "
    f"state {memory.argument_size_in_bytes / GIB:.2f} GiB, "
    f"temporary {memory.temp_size_in_bytes / GIB:.2f} GiB, "
    f"in the host's memory {memory.host_temp_size_in_bytes / GIB:.2f} GiB "
    f"(compiled in {seconds:.0f} s)"
  )
  of = cycles.estimate(program.as_text())
  print(
    f"estimated cycles per chip: {of.cycles / 1e6:,.0f}e6, "
    f"{of.again / of.cycles:.1%} of them to compute values again; not among "
    f"them: runs of kernels {of.kernels}; GB of results of collectives "
    f"{ {name: round(n / 1e9, 1) for name, n in of.collectives.items()} }"
  )


if __name__ == "__main__":
  cli.run(main)
