"""A SLURM cluster: one sbatch job, which comes back until the run is complete.

Runs in the checkout, on a file system that all nodes share. A process per GPU,
or per node without any; JAX joins them by what SLURM tells each.
"""

import shlex

from launch import accelerators, shell, specs

# Before the time limit, in seconds: what saving a checkpoint may take.
_NOTICE_SECONDS = 120

_SCRIPT = """\
#!/usr/bin/env bash
{retry}{install}
# A task says 143 where SIGTERM reached it: from the time limit's notice, a
# preemption, or scancel. A job that still counts as running then goes back into
# the queue; one that was cancelled does not. Tasks are not ended by srun when
# another fails, which would look the same: they end when they miss their peer.
task={task}
# SIGTERM would make srun kill its tasks at once.
tell() {{ scancel --signal=TERM "$SLURM_JOB_ID"; }}
retry {retries} 30 srun --cpu-bind=none bash -c "$task" launch \\
  {command}
code=$?
if [ "$code" = 143 ] &&
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  echo "launch: stopped before the end; back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def render(spec: specs.Spec) -> list[shell.Step]:
  accelerator = accelerators.find(spec.accelerator)
  specs.require(
    not isinstance(accelerator, accelerators.Tpu),
    "accelerator",
    spec.accelerator,
    "--to=slurm takes cpu or GPUs such as H100:8; TPUs have tpu_vm and gke",
  )
  gpus = accelerator.count if isinstance(accelerator, accelerators.Gpu) else 0
  script = _SCRIPT.format(
    retry=shell.RETRY,
    install=f"\nset -e\n{spec.install}\nset +e\n" if spec.install else "",
    task=shlex.quote(f'{shell.SUPERVISE}supervise "$@"'),
    retries=spec.retries,
    # sbatch takes no script with DOS line ends, not even within a word.
    command=shlex.join(spec.argv).replace("\r", "'$'\\r''"),
  )
  options = {
    "partition": spec.slurm.partition,
    "account": spec.slurm.account,
    "gpus-per-node": gpus or None,
  }
  argv = (
    "sbatch",
    f"--job-name={spec.name}",
    f"--nodes={spec.slices}",
    f"--ntasks-per-node={max(1, gpus)}",
    f"--time={spec.slurm.minutes}",
    f"--signal=B:TERM@{_NOTICE_SECONDS}",
    # A node that is lost sends the job back into the queue.
    "--requeue",
    "--open-mode=append",
    f"--output={_log(spec)}",
    # The nodes are ours alone, so that no task is bound to a few cores, with
    # all of their memory: without --mem=0 a task gets the cluster's default.
    "--exclusive",
    "--mem=0",
    # Two jobs of one name would write into one directory: the second waits.
    "--dependency=singleton",
    *(f"--{k}={v}" for k, v in options.items() if v is not None),
  )
  return [
    shell.Step(("mkdir", "-p", "runs")),
    shell.Step(argv, script, about="submit"),
  ]


def _log(spec: specs.Spec) -> str:
  return f"runs/{spec.name}.slurm.log"


def delete(spec: specs.Spec) -> list[shell.Step]:
  argv = ("scancel", "--me", f"--jobname={spec.name}")
  return [shell.Step(argv, about="cancel")]


def run(spec: specs.Spec) -> int:
  """Submits; the job's life is SLURM's."""
  code = shell.run_all(render(spec))
  if not code:
    print(
      f"output: {_log(spec)}; state: squeue --me; "
      f"stop: scancel --me --jobname={spec.name}"
    )
  return code
