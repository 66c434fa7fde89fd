"""`python -m lm.verify --config=FILE`: checks a config on this machine.

  python -m lm.verify --config=configs/llama3_8b.py --only=meshes,dtypes

Nothing of the config's corpus is read. Exit code 1 where a check fails.
"""

import os

import rich.console
from absl import flags

from lm import cli, files, schema
from lm import config as config_lib

_ONLY = flags.DEFINE_list("only", None, "Checks to make; default: all.")
_SHRINK = flags.DEFINE_bool(
  "shrink",
  None,
  "Check a copy of small widths, depth, lengths and batch that keeps every "
  "switch; default: where the config is large.",
)
_DEVICES = flags.DEFINE_integer(
  "devices",
  8,
  "Devices that a CPU is to look like.",
  lower_bound=1,
  upper_bound=256,  # each device has its own threads
)
_OUTPUT = cli.define_path("output", "JSON file to write.")
_FAULTS = flags.DEFINE_bool(
  "faults",
  False,
  "Instead, break training runs on purpose and see them recover: minutes.",
)


def main(config: config_lib.Config) -> int:
  if _OUTPUT.value is not None:
    files.check_output(_OUTPUT.value, "--output")
    read = ("--config", flags.FLAGS.config)
    files.check_apart([read, ("--output", _OUTPUT.value)])
  if _ONLY.value is not None and (_FAULTS.value or not _ONLY.value):
    raise schema.ConfigError(
      f"--only={','.join(_ONLY.value)}: must name checks, and has no part in "
      "--faults"
    )
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import jax

  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  # Full float32 matrix products: TPUs and GPUs take fewer bits by default.
  jax.config.update("jax_default_matmul_precision", "highest")
  from lm.verify import checks, result, shrink

  names = checks.choose(_ONLY.value)
  checked, changed = shrink.config_to_check(config, _SHRINK.value)
  todo = [
    (n, checks.CHECKS[n], config if n in checks.TRACED else checked)
    for n in names
  ]
  if _FAULTS.value:
    from lm.verify.faults import cases

    todo = [("faults", cases.run, checked)]
  results = []
  with rich.console.Console(stderr=True).status("") as status:
    for name, check, its_config in todo:
      status.update(f"checking {name}")
      for found in checks.attempt(name, check, its_config):
        results.append(found)
        if _FAULTS.value:
          status.update(f"{len(results)} done, the last {found.compared}")
  devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  title = f"{flags.FLAGS.config} on {devices}, {changed}"
  if _OUTPUT.value is not None:
    result.write(results, _OUTPUT.value, {"title": title})
  result.show(results, title)
  return 0 if all(r.passed for r in results) else 1


if __name__ == "__main__":
  cli.run(main)
