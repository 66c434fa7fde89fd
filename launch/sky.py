"""Any cloud, by SkyPilot: a managed job, which it starts again elsewhere when
its machines are preempted.

SkyPilot's errors policy starts a job again whatever its exit code; ours does
not after a mistake in the config, so retries are the script's own.
"""

import pathlib
import shlex

from launch import accelerators, shell, specs

# SkyPilot names the machines; TPUs find each other by themselves.
_JOIN = """\
COORDINATOR_ADDRESS="$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):8476"
export COORDINATOR_ADDRESS
export PROCESS_COUNT="$SKYPILOT_NUM_NODES" PROCESS_INDEX="$SKYPILOT_NODE_RANK"
"""


def task(spec: specs.Spec) -> dict:
  """The SkyPilot task."""
  specs.require_bucket(spec)
  accelerator = accelerators.find(spec.accelerator)
  specs.require(
    accelerator is not None,
    "accelerator",
    spec.accelerator,
    "--to=sky needs a TPU such as v5e-8 or GPUs such as H100:8",
  )
  tpu = isinstance(accelerator, accelerators.Tpu)
  specs.require(
    not tpu or spec.slices == 1,
    "slices",
    spec.slices,
    "--to=sky takes one TPU slice; several have tpu_vm and gke",
  )
  resources: dict = {
    "accelerators": (
      f"tpu-{accelerator.gcloud_type}" if tpu else spec.accelerator
    ),
    "use_spot": spec.spot,
    "job_recovery": {
      "max_restarts_on_errors": 0,
      # Stopped by SIGTERM, as at a preemption.
      "recover_on_exit_codes": [143],
    },
  }
  if tpu:
    runtime = {"runtime_version": accelerator.runtime_version}
    resources["accelerator_args"] = runtime
  if spec.zone is not None:
    known = "/" in spec.zone or "-" not in spec.zone
    resources["infra"] = spec.zone if known else f"gcp/*/{spec.zone}"
  if spec.image is not None:
    resources["image_id"] = f"docker:{spec.image}"
  install = shell.install("tpu" if tpu else "cuda12", spec.bucket)
  script = (
    f"{shell.RETRY}{'' if tpu else _JOIN}{shell.ACTIVATE}"
    f"retry {spec.retries} 10 {shlex.join(spec.argv)}\n"
  )
  return {
    "name": spec.name,
    "num_nodes": spec.slices,
    "resources": resources,
    # The checkout, which `install` may be without.
    **({"workdir": "."} if spec.install is None else {}),
    "setup": f"set -e\n{spec.install or install}",
    "run": script,
  }


def _path(spec: specs.Spec) -> pathlib.Path:
  """Where the task is written: `sky` reads none from standard input."""
  return pathlib.Path("runs") / f"{spec.name}.sky.yaml"


def render(spec: specs.Spec) -> list[shell.Step]:
  path = str(_path(spec))
  launch = ("sky", "jobs", "launch", "--yes", "--detach-run", path)
  return [
    shell.Step(("mkdir", "-p", "runs")),
    shell.Step(("tee", path), shell.to_yaml(task(spec)), about="the task"),
    shell.Step(launch, about="submit"),
  ]


def delete(spec: specs.Spec) -> list[shell.Step]:
  argv = ("sky", "jobs", "cancel", "--yes", "--name", spec.name)
  return [shell.Step(argv, about="cancel")]


def run(spec: specs.Spec) -> int:
  """Submits; the job's life is SkyPilot's."""
  code = shell.run_all(render(spec))
  if not code:
    print(
      f"output: sky jobs logs --name {spec.name}; state: sky jobs queue; "
      f"stop: sky jobs cancel --name {spec.name}"
    )
  return code
