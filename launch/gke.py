"""Google Kubernetes Engine: a JobSet, a Job per TPU slice, a pod per host.

Needs a cluster with the JobSet controller and node pools of the accelerator,
and kubectl pointed at it. GKE tells TPU pods of each other and of their slice
(TPU_WORKER_ID, MEGASCALE_*), which JAX reads; GPU pods are told here.
"""

import re
import shlex

from launch import accelerators, shell, specs

_CONTAINER = "train"
_JOB = "slice"
_PORT = 8476


def jobset(spec: specs.Spec) -> dict:
  """The manifest (jobset.x-k8s.io/v1alpha2)."""
  specs.require_bucket(spec)
  accelerator = accelerators.find(spec.accelerator)
  specs.require(
    accelerator is not None,
    "accelerator",
    spec.accelerator,
    "--to=gke needs a TPU such as v5e-16 or GPUs such as H100:8",
  )
  specs.require(
    spec.image is not None,
    "image",
    spec.image,
    "--to=gke needs a container image with bash; it holds the project, or "
    "spec.install brings it",
  )
  tpu = isinstance(accelerator, accelerators.Tpu)
  specs.require(
    not tpu or spec.slices == 1 or accelerator.hosts > 1,
    "slices",
    spec.slices,
    f"GKE joins no slices of a single host, such as {spec.accelerator}; take "
    "a larger slice",
  )
  failure = {
    "maxRestarts": spec.retries,
    # A mistake in the config (exit code 2) and a stop by hand (130) are not
    # tried again.
    "rules": [
      {
        "name": "final",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
      }
    ],
  }
  slices = {
    "name": _JOB,
    # Slices are Jobs; GPU machines are the pods of one Job.
    "replicas": spec.slices if tpu else 1,
    "template": {"spec": _job(spec, accelerator)},
  }
  # A slice has a node pool to itself.
  topology = "alpha.jobset.sigs.k8s.io/exclusive-topology"
  pools = {"annotations": {topology: "cloud.google.com/gke-nodepool"}}
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": spec.name, **(pools if tpu else {})},
    "spec": {"failurePolicy": failure, "replicatedJobs": [slices]},
  }


def _job(spec: specs.Spec, accelerator) -> dict:
  tpu = isinstance(accelerator, accelerators.Tpu)
  pods = accelerator.hosts if tpu else spec.slices
  final = {"containerName": _CONTAINER, "operator": "In", "values": [2, 130]}
  return {
    "completionMode": "Indexed",
    "parallelism": pods,
    "completions": pods,
    # One pod's failure is the run's: all start again from the checkpoint.
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [{"action": "FailJob", "onExitCodes": final}]
    },
    "template": {"spec": _pod(spec, accelerator)},
  }


def _pod(spec: specs.Spec, accelerator) -> dict:
  tpu = isinstance(accelerator, accelerators.Tpu)
  if tpu:
    nodes = {
      "cloud.google.com/gke-tpu-accelerator": accelerator.gke_label,
      "cloud.google.com/gke-tpu-topology": accelerator.topology,
    }
    limits = {"google.com/tpu": accelerator.chips_per_host}
  else:
    nodes = {"cloud.google.com/gke-accelerator": accelerator.gke_label}
    limits = {"nvidia.com/gpu": accelerator.count}
  spot = "cloud.google.com/gke-spot"
  tolerated = {"key": spot, "operator": "Exists"}
  if spec.spot:
    nodes[spot] = "true"
  if spec.zone is not None:
    nodes["topology.kubernetes.io/zone"] = spec.zone
  install = f"bash -e -c {shlex.quote(spec.install or '')} || exit 1\n"
  script = (
    f"{shell.SUPERVISE}{install if spec.install else ''}"
    f'{shell.ACTIVATE}supervise "$@"\n'
  )
  return {
    "restartPolicy": "Never",
    # To save in; a spot node is taken this soon after it is told.
    "terminationGracePeriodSeconds": 25 if spec.spot else 120,
    "nodeSelector": nodes,
    **({"tolerations": [tolerated]} if spec.spot else {}),
    "containers": [
      {
        "name": _CONTAINER,
        "image": spec.image,
        "command": [_literal(w) for w in shell.bash(script, *spec.argv)],
        **({} if tpu else {"env": _join(spec)}),
        "resources": {"limits": limits},
      }
    ],
  }


def _join(spec: specs.Spec) -> list[dict]:
  """What each GPU pod is told; JobSet gives pod 0 its name in the cluster."""
  index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  return [
    {
      "name": "COORDINATOR_ADDRESS",
      "value": f"{spec.name}-{_JOB}-0-0.{spec.name}:{_PORT}",
    },
    {"name": "PROCESS_COUNT", "value": str(spec.slices)},
    {
      "name": "PROCESS_INDEX",
      "valueFrom": {"fieldRef": {"fieldPath": index}},
    },
  ]


def _literal(word: str) -> str:
  """`word` as Kubernetes must read it: $$ is its $, $(NAME) a variable."""
  return re.sub(r"\$(?=[$(])", "$$", word)


def render(spec: specs.Spec) -> list[shell.Step]:
  create = ("kubectl", "create", "--filename=-")
  return [shell.Step(create, shell.to_yaml(jobset(spec)), about="submit")]


def delete(spec: specs.Spec) -> list[shell.Step]:
  argv = ("kubectl", "delete", "jobset", spec.name)
  return [shell.Step(argv, about="delete")]


def run(spec: specs.Spec) -> int:
  """Submits; the job's life is the cluster's."""
  code = shell.run_all(render(spec))
  if not code:
    first = (
      f"jobset.sigs.k8s.io/jobset-name={spec.name},"
      "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    )
    print(
      f"output: kubectl logs --follow --selector={first}; "
      f"state: kubectl get jobset {spec.name}; "
      f"stop: kubectl delete jobset {spec.name}"
    )
  return code
