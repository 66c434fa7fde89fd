"""One decoder and every objective, on the embedded corpus: no download.

  python -m lm.train --config=configs/quickstart_objectives.py \\
    --workdir=runs/objectives

Model, optimizer and corpus are those of configs/quickstart.py; the rows are a
mixture, and validation has each objective (docs/one_mechanism.md).

Hardware: 2 CPU cores, 5 minutes.
Evidence: losses of each objective in docs/one_mechanism.md; 1.5893 bits per
byte of the causal source, which has 0.3 of the rows, where the same machine has
1.4684 by configs/quickstart.py.
"""

import pathlib

from lm import cli
from lm import config as config_lib

BASE = pathlib.Path(__file__).with_name("quickstart.py")
OBJECTIVES = ("causal", "prefix", "span_corruption", "fim", "masked")


def get_config() -> config_lib.Config:
  c = cli.load(str(BASE))
  c.data.train = tuple(
    f"tfds:python_stdlib:train|{name}" for name in OBJECTIVES
  )
  c.data.train_weights = (0.3, 0.1, 0.2, 0.2, 0.2)
  c.data.validation = tuple(
    f"tfds:python_stdlib:validation|{name}" for name in OBJECTIVES
  )
  return c
