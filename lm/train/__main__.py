"""`python -m lm.train --config=configs/NAME.py --workdir=RUN`."""

import os
import signal

# The handlers are installed before the imports below: the imports can take
# longer than the sender of a signal waits. A stop now has nothing to save.
for _signal, _code in (
  (signal.SIGTERM, 0),
  (signal.SIGHUP, 0),
  (signal.SIGINT, 130),
):
  if signal.getsignal(_signal) != signal.SIG_IGN:  # nohup sets it
    signal.signal(_signal, lambda *_, code=_code: os._exit(code))

from absl import flags  # noqa: E402

from lm import cli, files, processes, schema  # noqa: E402
from lm import config as config_lib  # noqa: E402
from lm.train import stop as stop_lib  # noqa: E402

_WORKDIR = cli.define_path(
  "workdir", "Directory of the run; an unfinished one goes on.", run=True
)
_FROM_STEP = flags.DEFINE_integer(
  "from_step",
  None,
  "Go on from this checkpoint; later ones are moved to abandoned/.",
  lower_bound=1,
)


def main(config: config_lib.Config) -> int:
  if _WORKDIR.value is None:
    raise schema.ConfigError("--workdir: missing; write --workdir=runs/NAME")
  files.check_run_directory(_WORKDIR.value, "--workdir")
  # Hides the notices and warnings of XLA; errors are still printed.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  stop = stop_lib.Stop()

  def load():
    from lm.train import loop

    processes.join(config.mesh.heartbeat_seconds)
    return loop

  loop = stop.start("joining the other processes", load)
  code = loop.train(config, _WORKDIR.value, stop, from_step=_FROM_STEP.value)
  # All is saved. Python takes half a second to end, and gives other handlers
  # than this one back before.
  for which in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(which, signal.SIG_IGN)
  return code


if __name__ == "__main__":
  cli.run(main)
