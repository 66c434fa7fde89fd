"""`python -m lm.train --config=configs/NAME.py --workdir=RUN`."""

import os

from absl import flags

from lm import config as config_lib
from lm import door
from lm.train import stop as stop_lib

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; an unfinished one goes on."
)


def main(config: config_lib.Config) -> int:
  if not _WORKDIR.value:
    raise config_lib.ConfigError(
      "--workdir: missing; write --workdir=runs/NAME"
    )
  # XLA's own notices are no news to who trains; errors stay.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  stop = stop_lib.Stop()

  def load():
    from lm import sharding
    from lm.train import loop

    sharding.start_processes(config.mesh.heartbeat_seconds)
    return loop

  loop = stop.start("joining the other processes", load)
  return loop.train(config, _WORKDIR.value, stop)


if __name__ == "__main__":
  door.run(main)
