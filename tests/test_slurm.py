"""`--to=slurm` on a real SLURM: two nodes on this machine's loopback.

The cluster is made in a temporary directory and gone after. Needs root (slurmd
starts jobs as their user) and `apt-get install slurm-wlm munge`.
"""

import getpass
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from lm.train import metrics

ROOT = pathlib.Path(__file__).parent.parent
PATH = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
MISSING = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    bool(MISSING) or os.getuid() != 0,
    reason=f"NOT TESTED ON SLURM: needs root and {', '.join(TOOLS)} (missing: "
    f"{', '.join(MISSING) or 'none'}); apt-get install slurm-wlm munge",
  ),
]

# Nodes are named by addresses: the first is where JAX's processes meet, and no
# other name need be known here. Each says that it has cores of its own.
CONF = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# What a cancelled job gets to save in, in seconds.
KillWait=120
NodeName=DEFAULT CPUs=2
NodeName=127.0.0.1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=127.0.0.2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def _free_ports(count: int) -> list[int]:
  sockets = [socket.socket() for _ in range(count)]
  for s in sockets:
    s.bind(("127.0.0.1", 0))
  ports = [s.getsockname()[1] for s in sockets]
  for s in sockets:
    s.close()
  return ports


class Cluster:
  """The daemons, and commands given to them."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    folder.chmod(0o755)  # munged's socket must be within reach
    (folder / "state").mkdir()
    (folder / "corpus").mkdir()
    for path in (ROOT / "lm").glob("*.py"):
      shutil.copy(path, folder / "corpus")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(
      CONF.format(folder=folder, user=getpass.getuser(), ports=_free_ports(3))
    )
    self.environment = {
      **os.environ,
      "SLURM_CONF": str(conf),
      "PATH": PATH,
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
    }
    self.daemons: list[subprocess.Popen] = []

  def start(self) -> None:
    files = {"socket": "munge.socket", "pid-file": "munge.pid"}
    files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    files |= {"key-file": "munge.key"}
    options = [f"--{k}={self.folder}/{v}" for k, v in files.items()]
    self._daemon("munged", "--foreground", "--num-threads=10", *options)
    self.until(lambda: (self.folder / "munge.socket").exists())
    self._daemon("slurmctld", "-D")
    for node in ("127.0.0.1", "127.0.0.2"):
      self._daemon("slurmd", "-D", "-N", node)
    ready = ("sinfo", "--noheader", "--format=%D %t")
    self.until(lambda: self.ask(*ready, check=False).strip() == "2 idle")

  def _daemon(self, *argv: str) -> None:
    log = (self.folder / f"daemon-{len(self.daemons)}.log").open("w")
    with log:
      self.daemons.append(
        subprocess.Popen(
          argv, env=self.environment, stdout=log, stderr=subprocess.STDOUT
        )
      )

  def until(self, holds) -> None:
    for _ in range(300):
      if holds():
        return
      time.sleep(0.1)
    logs = sorted(self.folder.glob("daemon-*.log"))
    raise TimeoutError("\n---\n".join(log.read_text()[-2000:] for log in logs))

  def stop(self) -> None:
    self.ask("scancel", "--me", "--signal=KILL", "--full", check=False)
    self.ask("scancel", "--me", check=False)
    time.sleep(1)
    for daemon in reversed(self.daemons):
      daemon.terminate()
    for daemon in self.daemons:
      daemon.wait(timeout=30)

  def ask(self, *argv: str, check: bool = True) -> str:
    done = subprocess.run(
      argv,
      env=self.environment,
      capture_output=True,
      text=True,
      cwd=self.folder,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  def launch(self, name: str, steps: int) -> str:
    """Submits two nodes that train tiny; returns the job's number."""
    said = self.ask(
      sys.executable,
      "-m",
      "launch",
      "--to=slurm",
      f"--spec={ROOT}/launch/pod.yaml",
      f"--spec.name={name}",
      f"--spec.bucket={self.folder}",
      "--spec.slices=2",
      "--",
      *("python", "-m", "lm.train", "--workdir={workdir}"),
      f"--config={ROOT}/configs/tiny.py",
      f"--config.train.steps={steps}",
      f"--config.data.cache_dir={self.folder}/cache",
      f"--config.data.train=text:{self.folder}/corpus/*.py",
      f"--config.data.validation=text:{self.folder}/corpus/cli.py",
    )
    return said.split("Submitted batch job ")[1].split()[0]

  def state(self, job: str) -> str:
    about = self.ask("scontrol", "--oneliner", "show", "job", job)
    return re.findall(r"JobState=(\w+)", about)[0]

  def wait(self, job: str) -> str:
    """The state in which the job ends."""
    ended = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL")
    for _ in range(2000):
      if (state := self.state(job)) in ended:
        return state
      time.sleep(0.2)
    raise TimeoutError(self.log("*"))

  def wait_for_step(self, name: str, step: int) -> None:
    for _ in range(3000):
      if max(self.reports(name), default=0) >= step:
        return
      time.sleep(0.1)
    raise TimeoutError(self.log(name))

  def log(self, name: str) -> str:
    found = self.folder.glob(f"runs/{name}.slurm.log")
    return "\n".join(path.read_text() for path in found)

  def reports(self, name: str) -> dict[int, dict[str, float]]:
    """Step -> what was reported then, time left out."""
    # Its last line may be half written.
    entries = metrics.read(str(self.folder / name))
    exact = ("train/loss", "grad_norm", "lr", "eval/loss")
    return {e["step"]: {k: e[k] for k in exact if k in e} for e in entries}


@pytest.fixture(scope="module")
def cluster():
  with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
    made = Cluster(pathlib.Path(folder))
    try:
      made.start()
      yield made
    finally:
      made.stop()


STEPS = 60


def test_two_nodes_and_on_after_scancel(cluster):
  """One run unbroken; one cancelled halfway, then submitted again. Both are
  complete, with the same numbers.
  """
  whole = cluster.launch("whole", STEPS)
  assert cluster.wait(whole) == "COMPLETED", cluster.log("whole")
  assert "on 2 cpu devices" in cluster.log("whole")
  expected = cluster.reports("whole")
  assert max(expected) == STEPS

  first = cluster.launch("broken", STEPS)
  cluster.wait_for_step("broken", 20)
  cluster.ask("scancel", first)
  assert cluster.wait(first) == "CANCELLED", cluster.log("broken")
  queued = ("squeue", "--noheader", "--me")
  cluster.until(lambda: cluster.ask(*queued) == "")
  # It was told in time to save, did, and is not in the queue again.
  saved = re.findall(r"step (\d+) is saved", cluster.log("broken"))
  assert len(saved) == 1 and 20 <= int(saved[0]) < STEPS, cluster.log("broken")
  assert cluster.ask(*queued) == ""

  second = cluster.launch("broken", STEPS)
  assert cluster.wait(second) == "COMPLETED", cluster.log("broken")
  assert f"from step {saved[0]} to {STEPS}" in cluster.log("broken")
  found = cluster.reports("broken")
  assert {step: found[step] for step in expected} == expected


def test_it_queues_again_before_the_time_limit(cluster):
  """What SLURM does at the notice (--signal=B:TERM) is done by hand: the run
  saves, the job queues by itself and completes the run.
  """
  job = cluster.launch("noticed", 100)
  cluster.wait_for_step("noticed", 20)
  cluster.ask("scancel", "--batch", "--signal=TERM", job)
  for _ in range(600):
    if cluster.state(job) == "PENDING":
      break
    time.sleep(0.1)

  def cleared():
    states = cluster.ask("sinfo", "--noheader", "--Node", "--format=%T").split()
    return set(states) == {"idle"}

  # A node takes a start within the second in which it ended the job's last one
  # for that one ("job credential revoked"), and the job fails.
  cluster.until(cleared)
  time.sleep(2)

  def started():
    # SLURM waits two minutes for the nodes to have cleared; they have sooner.
    again = ("scontrol", "update", f"JobId={job}", "StartTime=now")
    cluster.ask(*again, check=False)
    return cluster.state(job) != "PENDING"

  cluster.until(started)
  assert cluster.wait(job) == "COMPLETED", cluster.log("noticed")
  log = cluster.log("noticed")
  (saved,) = re.findall(r"step (\d+) is saved", log)
  assert "back into the queue" in log
  assert f"from step {saved} to 100" in log
  assert max(cluster.reports("noticed")) == 100


def test_a_mistake_is_not_tried_again(cluster):
  job = cluster.launch("mistake", 0)
  assert cluster.wait(job) == "FAILED"
  log = cluster.log("mistake")
  assert "config.train.steps=0: must be at least 1" in log
  assert "again in" not in log
