"""launch/: words stay words, and what each place does, with stand-in tools."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest
import test_launch
import yaml

from launch import gke, local, shell, sky, slurm, specs, tpu_vm
from lm import schema

GCLOUD = pathlib.Path(__file__).parent / "stand_in_gcloud.py"
CLOUD = test_launch.CLOUD
ROOT = test_launch.ROOT
spec = test_launch.spec

# --- words stay words --------------------------------------------------------

HOSTILE = (
  "a b'c\"d$(touch PWNED)`touch PWNED`;touch PWNED\n&&touch PWNED #"
  "\\ $HOME$$(HOME)$(HOME) ${HOME} * ~ \r\n{workdir"
)


@pytest.fixture
def tools(tmp_path, monkeypatch):
  """A directory of stand-ins at the head of PATH, and in it the current
  directory and the home. `record` notes its arguments in the file `record`.
  """
  folder = tmp_path / "tools"
  folder.mkdir()
  record = f"""#!{sys.executable}
import json, os, sys
text = sys.stdin.read() if sys.argv[0].endswith(("sbatch", "kubectl")) else None
with open("{tmp_path}/" + os.path.basename(sys.argv[0]), "a") as file:
  file.write(json.dumps([sys.argv[1:], text]) + "\\n")
"""
  srun = '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\n"$@"\n'
  for name in ("record", "sbatch", "kubectl", "sky", "scancel", "python3"):
    program(folder / name, record)
  program(folder / "srun", srun)
  gcloud = f'#!/bin/sh\nexec {sys.executable} {GCLOUD} "$@"\n'
  program(folder / "gcloud", gcloud)
  for name in ("preemptions", "losses"):
    (tmp_path / name).write_text("0")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("CLOUD", str(tmp_path))
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  return tmp_path


def program(path: pathlib.Path, text: str) -> None:
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def recorded(tools: pathlib.Path, name: str = "record") -> list:
  """[arguments, standard input] of each call of a stand-in so far."""
  lines = (tools / name).read_text().splitlines()
  (tools / name).unlink()
  return [json.loads(line) for line in lines]


def bash(script: str, **environment) -> subprocess.CompletedProcess:
  return subprocess.run(
    ["bash", "-c", script],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
  )


def hostile(**fields) -> specs.Spec:
  """Every text of it hostile, as `validate` would never let it through."""
  return spec(
    **{
      "name": HOSTILE,
      "zone": HOSTILE,
      "image": HOSTILE,
      "bucket": f"gs://{HOSTILE}",
      "install": "true",
      "retries": 0,
      "command": ("record", HOSTILE, "{workdir}", ""),
      "slurm": specs.SlurmConfig(partition=HOSTILE, account=HOSTILE),
      **fields,
    }
  )


WORDS = [HOSTILE, f"gs://{HOSTILE}/{HOSTILE}", ""]


def nothing_else_ran(tools: pathlib.Path) -> bool:
  return not list(tools.rglob("PWNED"))


@pytest.mark.parametrize("field", ["name", "zone"])
def test_names_that_are_code_are_refused(field):
  with pytest.raises(schema.ConfigError, match=f"spec.{field}="):
    specs.validate(spec(**{field: HOSTILE}))


def test_quoting_local(tools, capfd):
  given = hostile(local=specs.LocalConfig(processes=1))
  assert local.run(given) == 0
  assert bash(str(local.render(given)[0])).returncode == 0
  assert recorded(tools) == [[WORDS, None]] * 2
  assert nothing_else_ran(tools)


def test_bytes_that_are_no_text_arrive(tools):
  """In any locale."""
  word = os.fsdecode("é€".encode() + b"\xff")
  program(tools / "tools" / "sbatch", "#!/bin/sh\ncat > script\n")
  code = f"from launch import __main__ as m; m.main({['--to=slurm']!r} + "
  code += f"{['--spec', str(ROOT / 'launch/pod.yaml')]!r} + "
  code += "['--', 'record', *__import__('sys').argv[1:]])"
  for locale in ({}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}):
    more = {"PYTHONPATH": str(ROOT), "PYTHONCOERCECLOCALE": "0", **locale}
    done = subprocess.run(
      [sys.executable, "-c", code, word], env={**os.environ, **more}
    )
    assert done.returncode == 0
    assert bash("bash script", SLURM_JOB_ID="1").returncode == 0
    assert recorded(tools) == [[[word], None]]


def test_slurm_ends_where_install_fails(tools):
  """It would go on with another Python, and be tried again and again."""
  script = slurm.render(hostile(install="false"))[1].stdin
  assert script and bash(script).returncode == 1
  assert not (tools / "record").exists()


def test_a_shell_runs_local_processes_at_the_same_time(tools):
  """Each ends once the other has begun."""
  other = "$((1 - PROCESS_INDEX))"
  script = f"touch $PROCESS_INDEX; until [ -e {other} ]; do sleep 0.1; done"
  given = spec(local=specs.LocalConfig(), command=("bash", "-c", script))
  printed = "\n".join(map(str, local.render(given)))
  assert (
    subprocess.run(["timeout", "60", "bash", "-c", printed]).returncode == 0
  )


def test_quoting_slurm(tools):
  """Also: what --dry_run prints, run by a shell, is what `run` does."""
  given = hostile()
  assert slurm.run(given) == 0
  assert bash("\n".join(map(str, slurm.render(given)))).returncode == 0
  one, two = recorded(tools, "sbatch")
  assert one == two
  assert "\r\n" not in (slurm.render(given)[1].stdin or "")
  assert f"--job-name={HOSTILE}" in one[0] and f"--account={HOSTILE}" in one[0]
  assert bash(one[1], SLURM_JOB_ID="1").returncode == 0
  assert recorded(tools) == [[WORDS, None]]
  assert bash(str(slurm.delete(given)[0])).returncode == 0
  assert recorded(tools, "scancel")[0][0] == ["--me", f"--jobname={HOSTILE}"]
  assert nothing_else_ran(tools)


def test_quoting_gke(tools):
  given = hostile(accelerator="v5e-16")
  assert gke.run(given) == 0
  assert bash(str(gke.render(given)[0])).returncode == 0
  one, two = (yaml.safe_load(stdin) for _, stdin in recorded(tools, "kubectl"))
  assert one == two and one["metadata"]["name"] == HOSTILE
  command = [test_launch.expand(word) for word in test_launch.container(one)]
  assert command[-3:] == WORDS
  assert subprocess.run(command).returncode == 0
  assert recorded(tools) == [[WORDS, None]]
  assert nothing_else_ran(tools)


def test_quoting_sky(tools):
  given = hostile(accelerator="H100:8")
  assert sky.run(given) == 0
  path = tools / "runs" / f"{HOSTILE}.sky.yaml"
  written = path.read_text()
  path.unlink()
  text = "\n".join(map(str, sky.render(given)))
  assert bash(text).returncode == 0
  one, two = recorded(tools, "sky")
  assert one == two and path.read_text() == written
  task = yaml.safe_load(written)
  assert task["name"] == HOSTILE
  nodes = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_NODES": "2", "NODE_RANK": "1"}
  told = {f"SKYPILOT_{k}": v for k, v in nodes.items()}
  assert bash(task["run"], **told).returncode == 0
  assert recorded(tools) == [[WORDS, None]]
  assert nothing_else_ran(tools)


def test_quoting_tpu_vm(tools):
  given = hostile(accelerator="v5e-16")
  assert tpu_vm.run(given, sleep=lambda _: None) == 0
  by_run = (tools / "calls").read_text().splitlines()
  (tools / "calls").unlink()
  text = "\n".join(map(str, tpu_vm.render(given)))
  assert bash(text).returncode == 0
  by_shell = (tools / "calls").read_text().splitlines()
  # `run` asks for the state again and again, and has nothing to stop.
  assert {*by_run} == {x for x in by_shell if "kill -TERM --" not in x}
  assert recorded(tools) == [[WORDS, None]] * 4  # two workers, two ways
  assert nothing_else_ran(tools)


# --- TPU VMs -----------------------------------------------------------------

# A run of three steps, each seen in the file that its argument names; it goes
# on where it was stopped.
STEPS = """
while [ "$(wc -l < "$1")" -lt 3 ]; do
  echo step >> "$1"
  [ "$(wc -l < "$1")" -gt 1 ] || sleep 60
done
"""


# Waits, on a worker, until its output has been asked for.
UNTIL_FOLLOWED = """\
until grep -q 'tail -n [+]1' ../../calls; do sleep 0.1; done"""


def verbs(tools: pathlib.Path) -> list[str]:
  """What gcloud was asked for, repeated looks at the state left out."""
  calls = [json.loads(x) for x in (tools / "calls").read_text().splitlines()]
  names = {
    "installed and runs": "install",
    "setsid": "start",
    "tail -n +1": "follow",
    "kill -TERM --": "stop",
  }
  found = []
  for _, _, _, verb, *rest in calls:
    if verb == "ssh":
      (verb,) = (n for mark, n in names.items() if mark in " ".join(rest))
    if verb != "describe":
      found.append(verb)
  return found


def run_on_tpu(capfd, **fields) -> tuple[int, str, list[float]]:
  """Exit code, what was said, and the pauses that were asked for."""
  pauses: list[float] = []
  given = {**CLOUD, "accelerator": "v5e-16", "install": "true", **fields}
  checked = specs.validate(spec(**given))
  code = tpu_vm.run(checked, sleep=pauses.append)
  said = capfd.readouterr()
  return code, said.out + said.err, pauses


def test_tpu_vm_comes_back_after_a_preemption(tools, capfd):
  """From nothing to a complete run, the checkout copied; the second time the
  queued resource is made anew and the run goes on.
  """
  git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
  (tools / "marker").write_text("of the checkout")
  for words in (["init"], ["add", "marker"], ["commit", "-qm", "one"]):
    subprocess.run([*git, *words], check=True, capture_output=True)
  (tools / "preemptions").write_text("1")
  progress = tools / "progress"
  progress.write_text("")
  once = (
    f'cat marker; [ "$PWD" = "{tools}/worker0/llama-1b" ] || exit 0\n{STEPS}'
  )
  code, said, pauses = run_on_tpu(
    capfd, install=None, command=("bash", "-c", once, "-", str(progress))
  )
  assert code == 0, said
  worked = ["create", "scp", "install", "start", "follow", "delete"]
  assert verbs(tools) == worked * 2
  assert progress.read_text() == "step\n" * 3
  assert "of the checkout" in said and "llama-1b: SUSPENDED" in said
  assert "retries left: 9" in said and "launch: complete" in said
  assert pauses.count(10.0) == 1
  installed = {" ".join(call[0][:3]) for call in recorded(tools, "python3")}
  assert installed == {"-m pip install", "-m uv venv", "-m uv pip"}


def test_tpu_vm_goes_on_with_what_is_there(tools, capfd):
  """Given again while the run goes on, it follows it and installs nothing."""
  script = f"echo begun; {UNTIL_FOLLOWED}; echo ended"
  command = ("bash", "-c", script, HOSTILE)
  given = spec(
    **CLOUD, accelerator="v5e-16", install="echo installing", command=command
  )
  step = tpu_vm.steps(given)
  for name in ("create", "install", "start"):
    assert step[name].run().returncode == 0
  (tools / "state").write_text("ACTIVE")
  capfd.readouterr()
  assert tpu_vm.run(given, sleep=lambda _: None) == 0
  said = capfd.readouterr().out
  assert said.count("begun") == said.count("ended") == 2  # two workers, once
  assert "installing" not in said


@pytest.mark.parametrize(
  ("fails", "verbs_after", "pauses"),
  [
    # A mistake in the config is not tried again.
    ("exit 2", [], []),
    # Nor what was interrupted.
    ("exit 130", [], []),
    # What else fails is, with growing pauses, and what is left is stopped.
    ("exit 7", ["stop", "install", "start", "follow"] * 2, [10.0, 20.0]),
    # A run that SIGTERM stopped is not complete, though it exits 0.
    pytest.param(
      'trap "exit 0" TERM; kill -TERM "$PPID"; sleep 1 & wait',
      ["stop", "install", "start", "follow"] * 2,
      [10.0, 20.0],
      marks=pytest.mark.slow,
    ),
  ],
)
def test_tpu_vm_gives_up(fails, verbs_after, pauses, tools, capfd):
  code, said, waited = run_on_tpu(
    capfd, retries=2, command=("bash", "-c", fails)
  )
  assert code == {"exit 2": 2, "exit 130": 130, "exit 7": 7}.get(fails, 143)
  assert verbs(tools) == ["create", "install", "start", "follow", *verbs_after]
  assert [p for p in waited if p != 30] == pauses
  assert "still yours and are billed" in said and "delete llama-1b" in said


def test_tpu_vm_leaves_a_run_whose_connection_is_lost(tools, capfd):
  """It is followed again, from the start of its output, and not stopped."""
  (tools / "losses").write_text("1")
  again = """until [ "$(grep -c 'tail -n [+]1' ../../calls)" = 2 ]"""
  waits = f"echo $$ >> ../../begun; {again}; do sleep 0.1; done"
  command = ("bash", "-c", waits)
  code, said, _ = run_on_tpu(capfd, command=command)
  assert code == 0 and "exit code 255" in said
  attempt = ["install", "start", "follow"]
  assert verbs(tools) == ["create", *attempt, *attempt, "delete"]
  assert len((tools / "begun").read_text().split()) == 2  # workers


def test_tpu_vm_preempted_too_often(tools, capfd):
  (tools / "preemptions").write_text("9")
  with pytest.raises(schema.ConfigError, match="no retries left"):
    run_on_tpu(capfd, retries=1, command=("sleep", "60"))
  assert verbs(tools).count("create") == 2


def test_tpu_vm_refused_by_gcloud(tools):
  (tools / "refusal").write_text("ERROR: PERMISSION_DENIED: no access")
  given = spec(**CLOUD, accelerator="v5e-16")
  with pytest.raises(schema.ConfigError, match="PERMISSION_DENIED"):
    tpu_vm.run(given, sleep=lambda _: pytest.fail("waits for nothing"))
  assert verbs(tools) == []


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (7, None)])
def test_tpu_vm_makes_nothing_anew_that_was_deleted(code, ends, tools, capfd):
  """By --delete while it follows, or by a second command that follows too."""
  (tools / "deletions").write_text("1")
  command = ("bash", "-c", f"exit {code}")
  if ends is None:
    with pytest.raises(schema.ConfigError, match="another command has deleted"):
      run_on_tpu(capfd, command=command)
  else:
    assert run_on_tpu(capfd, command=command)[0] == ends
  assert verbs(tools) == ["create", "install", "start", "follow"]


def test_tpu_vm_makes_anew_what_was_being_deleted_before(tools, capfd):
  (tools / "state").write_text("DELETING")
  assert run_on_tpu(capfd, command=("true",))[0] == 0
  assert verbs(tools) == ["create", "install", "start", "follow", "delete"]


@pytest.mark.parametrize("verb", ["create", "delete"])
def test_tpu_vm_asks_again_after_a_preemption(verb, tools, capfd, monkeypatch):
  """Where gcloud fails once, hours after the first answer."""
  (tools / "preemptions").write_text("1")
  do = tpu_vm._Machine._do

  def fails_once(machine, name):
    if machine.left == 9 and name == verb:
      (tools / f"fails-{verb}").write_text("1")
      monkeypatch.setattr(tpu_vm._Machine, "_do", do)
    return do(machine, name)

  monkeypatch.setattr(tpu_vm._Machine, "_do", fails_once)
  command = ("bash", "-c", "[ -e ../../begun ] || { >> ../../begun; sleep 9; }")
  code, said, pauses = run_on_tpu(capfd, command=command)
  assert code == 0, said
  assert verbs(tools)[-4:] == ["install", "start", "follow", "delete"]
  assert [p for p in pauses if p != 30] == [10.0, 20.0]


def test_tpu_vm_says_that_it_could_not_delete(tools, capfd):
  """After it has tried as often as it may: what is there is billed."""
  (tools / "fails-delete").write_text("1")
  assert run_on_tpu(capfd, command=("true",))[0] == 0
  (tools / "fails-delete").write_text("3")
  code, said, _ = run_on_tpu(capfd, command=("true",), retries=2)
  assert code == 1 and "still yours and are billed" in said


def test_tpu_vm_refuses_at_once_what_cannot_begin(tools, capfd):
  """No quota; and no checkout, before anything is made and billed."""
  (tools / "fails-create").write_text("1")
  with pytest.raises(schema.ConfigError, match="could not create"):
    run_on_tpu(capfd, command=("true",))
  with pytest.raises(schema.ConfigError, match="git archive .*in a git check"):
    run_on_tpu(capfd, command=("true",), install=None)
  assert verbs(tools) == ["create"]


def test_tpu_vm_stops_no_run_that_it_did_not_reach(tools, capfd):
  """Given again while the run goes on, and the network is down for a while."""
  command = ("bash", "-c", f"echo begun >> ../../begun; {UNTIL_FOLLOWED}")
  fields = {**CLOUD, "accelerator": "v5e-16", "install": "true"}
  step = tpu_vm.steps(spec(**fields, command=command))
  for name in ("create", "start"):
    assert step[name].run().returncode == 0
  (tools / "state").write_text("ACTIVE")
  (tools / "fails-ssh").write_text("1")
  code, said, _ = run_on_tpu(capfd, command=command)
  assert code == 0 and "install: exit code 1" in said
  assert "stop" not in verbs(tools)
  assert (tools / "begun").read_text() == "begun\n" * 2  # workers


def test_tpu_vm_left_in_the_queue_says_what_is_billed(tools, capfd):
  def interrupted(_):
    raise KeyboardInterrupt

  given = spec(**CLOUD, accelerator="v5e-16", install="true")
  assert tpu_vm.run(given, sleep=interrupted) == 130
  said = capfd.readouterr().err
  assert "in the queue are billed" in said and "delete llama-1b" in said
  assert verbs(tools) == ["create"]


def test_tpu_vm_stops_what_hangs(tools):
  """`stop` ends a run on the worker, and the lock is free after."""
  command = ("bash", "-c", "echo begun >> ../../begun; exec sleep 60")
  given = spec(**CLOUD, accelerator="v5e-16", command=command)
  step = tpu_vm.steps(given)
  for name in ("create", "start"):
    assert step[name].run().returncode == 0
  begun, deadline = tools / "begun", time.monotonic() + 30
  while not begun.exists() or begun.read_text() != "begun\n" * 2:  # workers
    assert time.monotonic() < deadline
    time.sleep(0.01)
  step["stop"].run()
  assert step["follow"].run().returncode == 143


# --- supervise and retry -----------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 7])
def test_supervise_returns_the_exit_code(code):
  assert (
    bash(f"{shell.SUPERVISE}supervise bash -c 'exit {code}'").returncode == code
  )


@pytest.mark.parametrize("stopped", ["exit 0", "exit 3"])
def test_supervise_says_143_after_sigterm(stopped, tmp_path):
  """The command is told, gets the time it takes, and is not complete."""
  script = (
    f"trap 'sleep 0.5; echo saved; {stopped}' TERM; echo ready; "
    "for i in {1..600}; do sleep 0.1; done"
  )
  outer = f'{shell.SUPERVISE}supervise "$@"; code=$?; echo over; exit $code'
  command = (outer, "-", "bash", "-c", script)
  with subprocess.Popen(
    ["bash", "-c", *command], stdout=subprocess.PIPE, text=True
  ) as child:
    assert child.stdout and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.stdout.read() == "saved\nover\n"
  assert child.returncode == 143


@pytest.mark.parametrize(
  ("codes", "last"),
  [
    ([0], 0),
    ([2, 0], 2),
    ([130, 0], 130),
    ([143, 0], 143),
    ([1, 7, 0], 0),
    ([1, 1, 1, 0], 1),
  ],
)
def test_retry(codes, last, tmp_path):
  """Two more starts at most, and none after 0, 2, 130 or 143."""
  (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
  take = "read -r code < codes; sed -i 1d codes; exit $code"
  script = f'{shell.RETRY}retry 2 0 bash -c "$1"'
  done = subprocess.run(["bash", "-c", script, "-", take], cwd=tmp_path)
  assert done.returncode == last


# --- local -------------------------------------------------------------------

PROCESS = """
import os, signal, sys, time
me = os.environ["PROCESS_INDEX"]
names = "PROCESS_COUNT JAX_NUM_CPU_DEVICES JAX_PLATFORMS".split()
def told(*_):
  print("told", flush=True)
  sys.exit(0)
signal.signal(signal.SIGTERM, told)
print("of", *[os.environ[name] for name in names], flush=True)
time.sleep(float(sys.argv[1 + int(me)]))
sys.exit(3 if me == "1" else 0)
"""


def start_local(*seconds: str) -> subprocess.Popen:
  sizes = ("--spec.local.processes=2", "--spec.local.devices=3")
  command = (sys.executable, "-c", PROCESS, *seconds)
  return subprocess.Popen(
    [sys.executable, "-m", "launch", "--to=local", *sizes, "--", *command],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )


def test_local_runs_all_and_says_who_failed():
  child = start_local("1", "0")
  said, _ = child.communicate(timeout=30)
  assert sorted(said.splitlines()) == ["[0] of 2 3 cpu", "[1] of 2 3 cpu"]
  assert child.returncode == 3


def test_local_runs_its_own_python():
  """In an environment that is not active."""
  command = ("python", "-c", "import sys; print(sys.executable)")
  ended = subprocess.run(
    [sys.executable, "-m", "launch", "--to=local", "--", *command],
    cwd=ROOT,
    env=os.environ | {"PATH": "/usr/bin:/bin"},
    stdout=subprocess.PIPE,
    text=True,
  )
  said = {f"[{i}] {sys.executable}" for i in range(2)}
  assert set(ended.stdout.splitlines()) == said


def test_local_passes_sigterm_on():
  child = start_local("60", "60")
  assert child.stdout
  said = [child.stdout.readline() for _ in range(2)]
  child.send_signal(signal.SIGTERM)
  said += child.communicate(timeout=30)[0].splitlines(keepends=True)
  assert sorted(said) == [
    "[0] of 2 3 cpu\n",
    "[0] told\n",
    "[1] of 2 3 cpu\n",
    "[1] told\n",
  ]
  assert child.returncode == 0


COUNTING = """
import signal, sys, time
count = 0
def told(number, _):
  global count
  count += 1
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
  signal.signal(number, told)
print("ready", flush=True)
while count < 1:
  time.sleep(0.01)
time.sleep(1)
print("told", count, flush=True)
sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_local_passes_a_terminals_signal_on_once(number):
  """A terminal signals the whole foreground process group."""
  sizes = ("--spec.local.processes=2", "--spec.local.devices=1")
  child = subprocess.Popen(
    [sys.executable, "-m", "launch", "--to=local", *sizes, "--"]
    + [sys.executable, "-c", COUNTING],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  assert child.stdout
  said = [child.stdout.readline() for _ in range(2)]
  os.killpg(child.pid, number)
  said += child.communicate(timeout=30)[0].splitlines(keepends=True)
  assert sorted(said) == [
    "[0] ready\n",
    "[0] told 1\n",
    "[1] ready\n",
    "[1] told 1\n",
  ]
  assert child.returncode == 130


def test_local_says_which_process_was_killed(capfd):
  """As where memory runs out: the process itself can say nothing."""
  script = "if test $PROCESS_INDEX = 1; then kill -9 $$; fi"
  given = spec(local=specs.LocalConfig(), command=("sh", "-c", script))
  assert local.run(given) == 137
  assert "[1] ended by signal 9 (Killed)" in capfd.readouterr().err


def test_local_leaves_handlers_as_they_were(monkeypatch, capfd):
  """Also where a process cannot be started; those that run are ended."""
  numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  before = [signal.getsignal(number) for number in numbers]
  assert local.run(spec(command=("true",))) == 0
  assert [signal.getsignal(number) for number in numbers] == before
  render, began = local.render, time.monotonic()

  def second_fails(given):
    first, _ = render(given)
    return [first, shell.Step(("/no/such/program",))]

  monkeypatch.setattr(local, "render", second_fails)
  with pytest.raises(FileNotFoundError):
    local.run(spec(command=("sleep", "600")))
  assert [signal.getsignal(number) for number in numbers] == before
  assert time.monotonic() - began < 60


def test_nothing_outlives_local(capfd):
  """Nor does it wait for what a process left, which holds its output open."""
  began = time.monotonic()
  assert local.run(spec(command=("bash", "-c", "sleep 60 & echo $!"))) == 0
  assert time.monotonic() - began < 30
  pids = [int(x.split()[1]) for x in capfd.readouterr().out.splitlines()]
  assert len(pids) == 2
  # What is killed closes its output a moment before it is gone.
  while any(map(_runs, pids)):
    assert time.monotonic() - began < 30
    time.sleep(0.01)


def _runs(pid: int) -> bool:
  """Whether the process is there and more than a zombie."""
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except (FileNotFoundError, ProcessLookupError):
    return False
  return state.rpartition(")")[2].split()[0] not in ("Z", "X")


def test_local_ends_with_the_reader_of_its_output():
  command = f"{sys.executable} -m launch --to=local -- yes | head -n 1"
  done = subprocess.run(
    ["bash", "-o", "pipefail", "-c", command],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (141, "")


def test_local_kills_who_misses_its_peer(monkeypatch, capfd):
  monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
  command = (sys.executable, "-c", PROCESS, "60", "0")
  began = time.monotonic()
  assert local.run(spec(command=command)) == 3
  assert time.monotonic() - began < 30


@pytest.mark.slow
def test_local_trains(tmp_path):
  """The trainer itself: two processes of two devices are one run."""
  train = (sys.executable, "-m", "lm.train", "--config=configs/tiny.py")
  done = test_launch.launch(
    "--to=local",
    f"--spec.bucket={tmp_path}",
    "--spec.local.devices=2",
    "--",
    *train,
    "--workdir={workdir}",
    f"--config.data.cache_dir={tmp_path}/cache",
    "--config.data.train=text:lm/*.py",
    "--config.data.validation=text:lm/cli.py",
  )
  assert done.returncode == 0, done.stdout
  assert "[0] 30,880 parameters on 4 cpu devices" in done.stdout
  reports = (tmp_path / "tiny/metrics.jsonl").read_text().splitlines()
  assert json.loads(reports[-1])["step"] == 20
