"""Cloud TPU VMs, by queued resources and nothing but `gcloud`.

A small state machine: wait for the queued resource (make it where there is
none, make it anew where it was preempted), install on all workers, start, and
follow the output. The run itself belongs to the workers: this command may be
stopped, and given again it follows the run that goes on.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable

from launch import accelerators, shell, specs
from lm import schema

_POLL_SECONDS = 30
# Of ssh, and so of gcloud: it lost a worker, and the run may well go on there.
_SSH_FAILED = 255

# States of a queued resource:
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources
# Those to wait in, and those that end in nothing but deletion.
_PASSING = (
  "CREATING",
  "ACCEPTED",
  "WAITING_FOR_RESOURCES",
  "PROVISIONING",
  "SUSPENDING",
  "DELETING",
)
_GONE = ("SUSPENDED", "FAILED")
# What is left by another command that deleted it.
_DELETED = ("DELETING", "NONE")

# A worker's scripts. They run in the run's directory; beside it lie the lock,
# which the trainer and all that it started hold while they go on, and the rest.
_ENTER = 'mkdir -p "$1" && cd "$1" || exit\nbeside=../$1\nshift\n'

_INSTALL = """\
flock --nonblock "$beside.lock" true || exit 0  # it is installed and runs
set -e
{unpack}{install}
"""

_START = """\
exec 9> "$beside.lock"
flock --nonblock 9 || exit 0  # it runs already
rm -f "$beside.status"
{activate}setsid bash -c "$@" > "$beside.log" 2>&1 < /dev/null &
echo "$!" > "$beside.pid"
"""

_TASK = f"""\
{shell.SUPERVISE}status=$1
shift
supervise "$@"
echo "$?" > "$status"
"""

_FOLLOW = """\
flock "$beside.lock" true &
tail -n +1 -F --pid="$!" "$beside.log"
exit "$(cat "$beside.status" 2> /dev/null || echo 1)"
"""

_STOP = """\
! flock --nonblock "$beside.lock" true || exit 0
pid=$(cat "$beside.pid")
kill -TERM -- "-$pid"
flock --wait 60 "$beside.lock" true || kill -KILL -- "-$pid"
"""


def steps(spec: specs.Spec) -> dict[str, shell.Step]:
  """Everything that is ever run, by name, in the order of a smooth run."""
  accelerator = accelerators.find(spec.accelerator)
  if not isinstance(accelerator, accelerators.Tpu):
    rule = "--to=tpu_vm needs a TPU such as v5e-16"
    raise specs.refusal("accelerator", spec.accelerator, rule)
  specs.require(
    spec.zone is not None, "zone", spec.zone, "--to=tpu_vm needs a zone"
  )
  specs.require_bucket(spec)
  nodes = (
    (f"--node-count={spec.slices}", f"--node-prefix={spec.name}")
    if spec.slices > 1
    else (f"--node-id={spec.name}",)
  )
  state = ("describe", spec.name, "--format=value(state.state)")
  create = (
    "create",
    spec.name,
    *nodes,
    f"--accelerator-type={accelerator.gcloud_type}",
    f"--runtime-version={accelerator.runtime_version}",
    *(("--spot",) if spec.spot else ()),
  )
  delete = ("delete", spec.name, "--force", "--quiet")
  return {
    "describe": _gcloud(spec, *state, about="the state, every half minute"),
    **({} if spec.install else _pack(spec)),
    "create": _gcloud(spec, *create, about="where there is none"),
    **_on_workers(spec),
    "delete": _gcloud(
      spec, *delete, about="when it was preempted, and after a complete run"
    ),
  }


def _archive(spec: specs.Spec) -> str:
  return f"runs/{spec.name}.tar.gz"


def _pack(spec: specs.Spec) -> dict[str, shell.Step]:
  pack = ("git", "archive", "--format=tar.gz", f"--output={_archive(spec)}")
  return {
    "runs": shell.Step(("mkdir", "-p", "runs")),
    "pack": shell.Step((*pack, "HEAD"), about="what is committed"),
  }


def _on_workers(spec: specs.Spec) -> dict[str, shell.Step]:
  copy = ("scp", _archive(spec), f"{spec.name}:", *_ALL)
  copied = {"copy": _gcloud(spec, *copy, about="to all workers")}
  install = _INSTALL.format(
    unpack="" if spec.install else f"tar -xzf ../{spec.name}.tar.gz\n",
    install=(spec.install or shell.install("tpu", spec.bucket)).rstrip(),
  )
  start = _START.format(activate=shell.ACTIVATE)
  task = (_TASK, "launch", f"../{spec.name}.status", *spec.argv)
  return {
    **({} if spec.install else copied),
    "install": _ssh(spec, install, about="on all workers"),
    "start": _ssh(spec, start, *task, about="where it does not run yet"),
    "follow": _ssh(spec, _FOLLOW, about="the output, then the exit code"),
    "stop": _ssh(spec, _STOP, about="what is left of a run that failed"),
  }


# The queue's own ssh and scp reach all workers of all slices. A batch is 64
# workers at most, so no command may wait for the others before it returns.
_ALL = ("--worker=all", "--node=all", "--batch-size=all")


def _gcloud(spec: specs.Spec, verb: str, *rest: str, about: str) -> shell.Step:
  group = ("gcloud", "compute", "tpus", "queued-resources", verb)
  return shell.Step((*group, *rest, f"--zone={spec.zone}"), about=about)


def _ssh(spec: specs.Spec, script: str, *words: str, about: str) -> shell.Step:
  command = shlex.join(shell.bash(_ENTER + script, spec.name, *words))
  return _gcloud(
    spec, "ssh", spec.name, *_ALL, f"--command={command}", about=about
  )


def render(spec: specs.Spec) -> list[shell.Step]:
  return list(steps(spec).values())


def delete(spec: specs.Spec) -> list[shell.Step]:
  return [steps(spec)["delete"]]


def run(spec: specs.Spec, sleep: Callable[[float], object] = time.sleep) -> int:
  """Brings the run to its end; returns 0, or the exit code it gave up with.

  A failure and a preemption each take one of `spec.retries`.
  """
  step = steps(spec)
  try:
    return _Machine(spec, step, sleep).run()
  except KeyboardInterrupt:
    _say(
      "left; a run that was started goes on, and TPUs that are there or in the "
      "queue are billed, run or not; the same command goes on from here. To "
      f"end that: {shlex.join(step['delete'].argv)}"
    )
    return 130


class _Machine:
  """A queued resource and a run on it, brought to their end."""

  def __init__(self, spec, step, sleep):
    self.spec, self.step, self.sleep = spec, step, sleep
    self.left = spec.retries
    self.delay = 10.0
    self.seen = None  # the last state that gcloud said
    self.expected = False  # a queued resource that we have not deleted

  def run(self) -> int:
    self._state()  # where gcloud refuses all, that is told first
    for name in ("runs", "pack"):  # before anything is billed
      if name in self.step and self._do(name):
        raise schema.ConfigError(
          f"{shlex.join(self.step[name].argv)}: failed, see above; run this in "
          "a git checkout, or set spec.install"
        )
    while True:
      self._await_active()
      last, code = self._train()
      # No exit code is trusted before the state: a preemption ends commands
      # in any way.
      state = self._state()
      if (last, code) == ("follow", 0) and state in ("ACTIVE", *_DELETED):
        _say("complete")
        return self._delete()
      if state != "ACTIVE":
        continue
      if (last, code) == ("follow", 2):
        return self._give_up(code, "a mistake in the config or the flags")
      if (last, code) == ("follow", 130):
        return self._give_up(code, "the run was interrupted")
      _say(f"{last}: exit code {code}, and the TPUs are there")
      if not self._retry():
        return self._give_up(code, "no retries left")
      # What fails earlier says nothing of a run that goes on.
      if last in ("start", "follow") and code != _SSH_FAILED:
        self._do("stop")

  def _await_active(self) -> None:
    """Returns once the queued resource is ACTIVE, made or remade as needed.

    Raises ConfigError where gcloud refuses it, it ends once too often, or
    another command has deleted it.
    """
    while (state := self._state()) != "ACTIVE":
      if state == "NONE":
        if self.expected:
          raise schema.ConfigError(
            f"{self.spec.name}: another command has deleted its queued "
            "resource, so it is not made anew; to go on with the run, give "
            "this command again"
          )
        code = self._do("create")
        # Without a quota it is told at once, after a preemption tried again.
        if code and (self.left == self.spec.retries or not self._retry()):
          raise schema.ConfigError(
            f"gcloud could not create {self.spec.name} (exit code {code}); see "
            "what it says above"
          )
      elif state in _GONE:
        if not self._retry():
          raise schema.ConfigError(
            f"{self.spec.name}: {state}, and no retries left; see why with "
            f"{shlex.join(self.step['describe'].argv[:-2])}, or raise "
            "spec.retries"
          )
        if self._do("delete") == 0:
          self.expected = False
      else:
        self.sleep(_POLL_SECONDS)

  def _train(self) -> tuple[str, int]:
    """The last step that was taken, and its exit code."""
    name, code = "", 0
    for name in ("copy", "install", "start", "follow"):
      code = self._do(name) if name in self.step else 0
      if code:
        break
    return name, code

  def _delete(self) -> int:
    """Deletes what a complete run leaves; returns 0 once that is under way."""
    while self._state() not in _DELETED and (code := self._do("delete")):
      if not self._retry():
        return self._give_up(code, "complete, but gcloud could not delete it")
    return 0

  def _state(self) -> str:
    """The queued resource's state, or NONE where there is none.

    Raises ConfigError where gcloud does not say: at once the first time, as
    where nobody is logged in, later when no retries are left.
    """
    while True:
      done = self.step["describe"].run(capture_output=True)
      state = done.stdout.strip() if done.returncode == 0 else None
      if done.returncode and "NOT_FOUND" in done.stderr:
        state = "NONE"
      if state is not None:
        break
      if self.seen is None:
        raise schema.ConfigError(f"gcloud: {done.stderr.strip()}")
      if not self._retry():
        raise schema.ConfigError(
          f"gcloud: {done.stderr.strip()}; the run may go on and what is there "
          "is billed: this command follows it again, --delete ends it"
        )
    if state not in (*_PASSING, *_GONE, "ACTIVE", "NONE"):
      raise schema.ConfigError(
        f"{self.spec.name}: its queued resource is in state {state!r}, which "
        "is not known here; look at it, then delete it with --delete"
      )
    if state != self.seen:
      _say(f"{self.spec.name}: {state}")
    self.seen = state
    if state not in (*_DELETED, *_GONE):
      self.expected = True
    return state

  def _do(self, name: str) -> int:
    _say(name)
    return self.step[name].run(stdin=subprocess.DEVNULL).returncode

  def _retry(self) -> bool:
    """Takes one retry and waits; False where there is none left."""
    if not self.left:
      return False
    self.left -= 1
    _say(f"again in {self.delay:.0f} s, retries left: {self.left}")
    self.sleep(self.delay)
    self.delay = min(2 * self.delay, 300.0)
    return True

  def _give_up(self, code: int, why: str) -> int:
    _say(
      f"exit code {code}: {why}. The TPUs are still yours and are billed; to "
      f"end that: {shlex.join(self.step['delete'].argv)}"
    )
    return code


def _say(text: str) -> None:
  clock = time.strftime("%H:%M:%S")
  print(f"{clock} launch: {text}", file=sys.stderr, flush=True)
