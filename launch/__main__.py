"""Runs a spec on this machine, a cluster or a cloud.

  python -m launch --to=PLACE [--spec=FILE] [--spec.FIELD=VALUE ...]
                   [--dry_run | --delete] [-- COMMAND ...]

Which place?

  local    this machine's CPU, as several processes: to see that a run works
           with more than one before paying for it. Needs nothing.
  slurm    a cluster with a queue that you log in to. Needs sbatch, and a
           checkout and an environment on a file system that all nodes share.
  tpu_vm   TPUs on Google Cloud and no cluster: the shortest way to them. Needs
           gcloud. This command looks after the run; stopped, it can be given
           again. TPUs are deleted when the run is complete.
  gke      TPUs or GPUs in a Google Kubernetes Engine cluster, for a team that
           has one. Needs kubectl, JobSet in the cluster, and an image.
  sky      GPUs, or one TPU slice, on whichever cloud has them cheapest. Needs
           SkyPilot, with its own access to the clouds.

tpu_vm, gke and sky also need --spec.bucket, an object store for the run.

All of them go on from the last checkpoint after a preemption, a failure or a
time limit, except local, which fails. A mistake in the config (exit code 2) and
a run that was interrupted (130) are not tried again.

The spec is a YAML file, by default launch/pod.yaml, in which each field is
explained; --spec.FIELD=VALUE changes one, and what stands after -- takes the
place of its command. In the command {workdir} is the run's directory,
BUCKET/NAME. --dry_run prints what would be run, as shell, and runs nothing.
--delete ends the run and gives its machines back.

  python -m launch --to=local --spec.local.processes=2 --spec.local.devices=4
  python -m launch --to=slurm --spec.slices=2 --spec.slurm.partition=cpu
  python -m launch --to=slurm --spec.accelerator=H100:8 --spec.slices=4 \\
    --spec.install='source .venv/bin/activate'
  python -m launch --to=tpu_vm --spec.accelerator=v5e-16 \\
    --spec.zone=us-west4-a --spec.bucket=gs://my-bucket/runs
  python -m launch --to=gke --spec.accelerator=v5p-128 --spec.slices=2 \\
    --spec.image=us-docker.pkg.dev/my-project/my/image \\
    --spec.bucket=gs://my-bucket/runs --dry_run
  python -m launch --to=sky --spec.accelerator=H100:8 \\
    --spec.bucket=gs://my-bucket/runs -- \\
    python -m lm.train --config=configs/gpt2_124m.py '--workdir={workdir}'

Who may use what is each tool's own affair (gcloud, kubectl, sky): credentials
are neither read nor kept nor printed here.
"""

import argparse
import io
import sys
import types
from collections.abc import Sequence

from launch import gke, local, sky, slurm, specs, tpu_vm
from lm import cli, schema

PLACES: dict[str, types.ModuleType] = {
  "local": local,
  "slurm": slurm,
  "tpu_vm": tpu_vm,
  "gke": gke,
  "sky": sky,
}


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    raise schema.ConfigError(f"{message}; see python -m launch --help")


def main(arguments: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""
  cut = arguments.index("--") if "--" in arguments else len(arguments)
  own, command = arguments[:cut], arguments[cut + 1 :]
  overrides, own = schema.split_arguments(own, "spec")
  parser = _Parser(
    "launch",
    description=__doc__,
    usage=argparse.SUPPRESS,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--to", metavar="PLACE", help=", ".join(PLACES))
  parser.add_argument("--spec", metavar="FILE", default="launch/pod.yaml")
  what = parser.add_mutually_exclusive_group()
  what.add_argument("--dry_run", action="store_true", help="print, run nothing")
  what.add_argument("--delete", action="store_true", help="end the run")
  flags = parser.parse_args(own)
  if flags.to is None:
    raise schema.ConfigError(
      f"--to: missing; write --to=PLACE, one of {', '.join(PLACES)}"
    )
  if flags.to not in PLACES:
    known = schema.unknown(flags.to, PLACES)
    raise schema.ConfigError(f"--to={flags.to}: {known}")
  place = PLACES[flags.to]
  spec = specs.load(flags.spec, overrides, command)
  if flags.dry_run:
    print("\n".join(map(str, place.render(spec))), end="")
    return 0
  if flags.delete:
    return max(step.run().returncode for step in place.delete(spec))
  return place.run(spec)


if __name__ == "__main__":
  # A script that is printed has the bytes that it would be run with.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
  if isinstance(sys.stderr, io.TextIOWrapper):
    sys.stderr.reconfigure(errors="backslashreplace")
  try:
    sys.exit(main(sys.argv[1:]))
  except KeyboardInterrupt:
    sys.exit(130)
  except Exception as error:
    told = cli.explain(error)
    if told is None:
      raise
    sys.exit(cli.refuse(told))
