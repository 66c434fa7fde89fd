"""Stand-in for `gcloud`, put on the PATH by tests/test_launch_runs.py.

Keeps a queued resource of two workers in the directory CLOUD, where a worker's
home is a folder. `ssh` really runs the command in each home, as sshd would.
The first runs that are followed are preempted, as many as CLOUD/preemptions
says; then as many connections are lost as CLOUD/losses says. A verb fails as
often as CLOUD/fails-VERB says; another command deletes all once a run is
followed, where CLOUD/deletions says so.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

CLOUD = pathlib.Path(os.environ["CLOUD"])
STATE = CLOUD / "state"
NEXT = {
  "WAITING_FOR_RESOURCES": "PROVISIONING",
  "PROVISIONING": "ACTIVE",
  "SUSPENDING": "SUSPENDED",
}


def main(argv: list[str]) -> int:
  with (CLOUD / "calls").open("a") as file:
    file.write(json.dumps(argv) + "\n")
  group, verb, rest = argv[:3], argv[3], argv[4:]
  if group != ["compute", "tpus", "queued-resources"]:
    return 2
  options = dict(
    w.split("=", 1) for w in rest if w.startswith("--") and "=" in w
  )
  if take(f"fails-{verb}"):
    print("ERROR: UNAVAILABLE: try again", file=sys.stderr)
    return 1
  if verb == "describe":
    return describe()
  if verb == "create":
    STATE.write_text("WAITING_FOR_RESOURCES")
    for home in homes():
      home.mkdir(parents=True)
    return 0
  if verb == "delete":
    return delete()
  if verb == "scp":
    for home in homes():
      shutil.copy(rest[0], home)
    return 0
  if verb == "ssh":
    return ssh(options["--command"])
  return 2


def homes() -> list[pathlib.Path]:
  return [CLOUD / "worker0", CLOUD / "worker1"]


def describe() -> int:
  if (CLOUD / "refusal").exists():
    print((CLOUD / "refusal").read_text(), file=sys.stderr)
    return 1
  if not STATE.exists():
    print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
    return 1
  state = STATE.read_text()
  print(state)
  if state == "DELETING":
    STATE.unlink()
  else:
    STATE.write_text(NEXT.get(state, state))
  return 0


def delete() -> int:
  STATE.unlink()
  for home in homes():
    shutil.rmtree(home)
  return 0


def ssh(command: str) -> int:
  workers = [
    subprocess.Popen(
      ["bash", "-c", command], cwd=home, env={**os.environ, "HOME": str(home)}
    )
    for home in homes()
  ]
  if "tail -n +1" in command:
    if take("preemptions"):
      time.sleep(1)
      for worker in workers:
        worker.kill()
      STATE.write_text("SUSPENDING")
      for pid in CLOUD.glob("worker*/*.pid"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
          os.killpg(int(pid.read_text()), signal.SIGKILL)
      return 255
    if take("losses"):
      for worker in workers:
        worker.kill()
      return 255
  codes = [worker.wait() for worker in workers]
  if "tail -n +1" in command and take("deletions"):
    delete()
  return next((code for code in codes if code), 0)


def take(name: str) -> bool:
  file = CLOUD / name
  left = int(file.read_text()) if file.exists() else 0
  file.write_text(str(max(0, left - 1)))
  return left > 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
