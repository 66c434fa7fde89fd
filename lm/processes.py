"""Multi-process runs: jax.distributed start-up, and agreement checks."""

import glob
import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm import schema

T = TypeVar("T")


def join(heartbeat_seconds: int) -> None:
  """Initializes jax.distributed if the environment names other processes.

  Environment variables set by hand: COORDINATOR_ADDRESS (host:port of process
  0), PROCESS_COUNT and PROCESS_INDEX; the last two may come from SLURM or Open
  MPI. Without COORDINATOR_ADDRESS, JAX reads SLURM, Open MPI or a TPU's
  metadata. A process without a heartbeat for `heartbeat_seconds` is lost, and
  all remaining processes end. Raises ConfigError on a wrong or incomplete
  setting, RunError if the other processes are not reached.
  """
  names = ("COORDINATOR_ADDRESS", "PROCESS_COUNT", "PROCESS_INDEX")
  address, count, index = (_first_set(*_ALIASES[name]) for name in names)
  # lm/train/stop.py handles SIGTERM and makes the processes agree when to end;
  # JAX's preemption service would take the signal away.
  jax.config.update("jax_enable_preemption_service", False)
  # Gloo: the only collectives between processes on CPUs.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if address is None and not _in_cluster():
    if os.environ.get("PROCESS_COUNT", "1") != "1":
      raise schema.ConfigError(
        f"PROCESS_COUNT={count}: needs COORDINATOR_ADDRESS beside it, in the "
        "environment or as a flag"
      )
    return
  if address is not None and (count is None or index is None):
    raise schema.ConfigError(
      f"COORDINATOR_ADDRESS={address}: needs PROCESS_COUNT and PROCESS_INDEX "
      "beside it, in the environment or as flags"
    )
  if address and not re.search(r":\d+$", address):
    raise schema.ConfigError(
      f"COORDINATOR_ADDRESS={address}: needs host:port, of process 0"
    )
  try:
    jax.distributed.initialize(
      coordinator_address=address,
      num_processes=None if address is None else int(count or 0),
      process_id=None if address is None else int(index or 0),
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except ValueError as error:
    raise schema.ConfigError(
      f"COORDINATOR_ADDRESS={address}, PROCESS_COUNT={count}, "
      f"PROCESS_INDEX={index}: {error}"
    ) from error
  except jax.errors.JaxRuntimeError as error:
    raise schema.RunError(
      f"COORDINATOR_ADDRESS={address}: the other processes were not reached: "
      f"{str(error)[:200]}"
    ) from error


def refuse_several(reason: str) -> None:
  """Raises ConfigError, with the reason and the remedy, if the environment
  names several processes: by hand as for `join`, by SLURM or by Open MPI.
  """
  by_hand = "COORDINATOR_ADDRESS" in os.environ
  count = _first_set(*_ALIASES["PROCESS_COUNT"])
  if (by_hand or _in_step()) and count not in (None, "1"):
    raise schema.ConfigError(f"{count} processes: {reason}")


def wait_for_all(what: str) -> None:
  """Collective barrier: returns after every process has called; `what` names
  the barrier.
  """
  multihost_utils.sync_global_devices(what)


def check_agreement(facts: Mapping[str, str]) -> None:
  """Collective. Raises ConfigError on every process unless each fact has the
  same value on all processes. All processes must pass the same fact names.
  """
  if jax.process_count() == 1:
    return
  words = [
    np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.uint32)
    for value in facts.values()
  ]
  # [process, fact, 2]
  found = multihost_utils.process_allgather(np.stack(words))
  for i, (name, value) in enumerate(facts.items()):
    others = np.flatnonzero((found[:, i] != found[0, i]).any(axis=-1))
    if len(others):
      _let_others_exit()
      raise schema.ConfigError(
        f"{name}: process(es) {others.tolist()} have another value than "
        f"process 0; on process {jax.process_index()} it is {value[:300]}. All "
        "processes of a run need the same config and the same data"
      )


def _let_others_exit() -> None:
  """Before an error on all processes: process 0 coordinates, and exits last."""
  if jax.process_index() == 0:
    time.sleep(1.0)


def broadcast(text: str | None, source: int = 0) -> str:
  """Collective: the text of the process `source`, on every process; others may
  pass None.
  """
  if jax.process_count() == 1:
    return text or ""
  mine = jax.process_index() == source
  content = (text or "").encode()
  n = int(multihost_utils.broadcast_one_to_all(np.int32(len(content)), mine))
  # Texts share programs: as many words as the next power of two.
  words = np.zeros(1 << (n // 4).bit_length(), np.uint32)
  if mine:
    words.view(np.uint8)[:n] = np.frombuffer(content, np.uint8)
  words = np.asarray(multihost_utils.broadcast_one_to_all(words, mine))
  return words.view(np.uint8)[:n].tobytes().decode()


def only_first(function: Callable[[], T]) -> T | None:
  """Collective: `function()` on process 0, None on the others; an error of it
  is raised on every process.
  """
  first = jax.process_index() == 0
  return on_all(lambda: function() if first else None)


def on_all(function: Callable[[], T]) -> T:
  """Collective: `function()` on every process.

  If it raises on some processes, the others do not wait for those: they raise
  the first one's error, as ConfigError if it is one, else as RunError.
  """
  if jax.process_count() == 1:
    return function()
  # On CPUs a first collective waits half a minute for the slowest process, and
  # further ones for long: `function` may load data for minutes.
  broadcast("")
  try:
    result, mine = function(), None
  except Exception as error:
    result, mine = None, error
  failed = multihost_utils.process_allgather(np.array(mine is not None))
  if not failed.any():
    return cast(T, result)
  first = int(np.argmax(failed))
  said = isinstance(mine, schema.ConfigError), _said(mine)
  is_config, line = json.loads(broadcast(json.dumps(said), first))
  _let_others_exit()
  if mine is not None:
    raise mine
  kind = schema.ConfigError if is_config else schema.RunError
  raise kind(f"process {first}: {line}")


def _said(error: Exception | None) -> str:
  known = isinstance(error, schema.UserError)
  return str(error) if known else f"{type(error).__name__}: {error}"


_ALIASES = {
  "COORDINATOR_ADDRESS": ("COORDINATOR_ADDRESS",),
  "PROCESS_COUNT": ("PROCESS_COUNT", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"),
  "PROCESS_INDEX": ("PROCESS_INDEX", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"),
}


def _first_set(*names: str) -> str | None:
  return next((os.environ[n] for n in names if n in os.environ), None)


def _in_step() -> bool:
  """Whether SLURM's srun (not `sbatch` alone) or Open MPI started this."""
  names = ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE")
  return any(name in os.environ for name in names)


def _in_cluster() -> bool:
  """Whether JAX will detect several processes by SLURM, Open MPI or TPU."""
  count = _first_set("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
  if count is not None and _in_step():
    return int(count) > 1
  if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
    return False
  if "TPU_WORKER_HOSTNAMES" in os.environ:  # GKE
    hosts = os.environ["TPU_WORKER_HOSTNAMES"].split(",")
    slices = int(os.environ.get("MEGASCALE_NUM_SLICES", 1))
    return len(hosts) * slices > 1
  if "TPU_SKIP_MDS_QUERY" in os.environ:  # no metadata server to ask
    return False
  has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(has_tpu) and importlib.util.find_spec("libtpu") is not None
