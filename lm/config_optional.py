"""Parts of a config that are None by default: RoPE scaling, LoRA, skipped
steps, tasks during training. Their defaults hold where a config has the part.

This module does not import JAX.
"""

import dataclasses
from typing import Annotated, Literal

from lm.schema import AtMost, BelowOne, Count, Positive


@dataclasses.dataclass(unsafe_hash=True)
class RopeScaling:
  """RoPE scaling: lower frequencies, for texts longer than `original_length`.
  lm/model/rotary.py has the formulas.
  """

  # `llama3` divides low frequencies by `factor` (Llama 3.1, arXiv:2407.21783),
  # `linear` all of them (arXiv:2306.15595), `yarn` those that turn less than
  # beta_fast times in original_length (arXiv:2309.00071), `longrope` each by a
  # number of its own (arXiv:2402.13753).
  kind: Literal["llama3", "linear", "yarn", "longrope"] = "llama3"
  # `longrope` reads `factor` for the attention factor alone.
  factor: Positive = 8.0
  # Length of the texts before the scaling. `linear` does not read it.
  original_length: Count = 8192
  low_frequency_factor: Positive = 1.0
  high_frequency_factor: Positive = 4.0
  # `yarn` blends between this many turns in original_length, and beta_slow;
  # `truncate` rounds both ends of the blend to whole frequencies.
  beta_fast: Positive = 32.0
  beta_slow: Positive = 1.0
  truncate: bool = True
  # Divisors of `longrope`, one per frequency: the short ones for all texts
  # where context_length is at most original_length, else the long ones for all.
  short_factors: tuple[Positive, ...] = ()
  long_factors: tuple[Positive, ...] = ()
  # `yarn` and `longrope` multiply rotated queries and keys by it; None:
  # 0.1 ln(factor) + 1, and sqrt(1 + ln(factor) / ln(original_length)).
  attention_factor: Positive | None = None


@dataclasses.dataclass(unsafe_hash=True)
class LoraConfig:
  """LoRA (arXiv:2106.09685): low-rank updates of the layers' matrices are
  trained, and what `full` names; all other weights are frozen. lm/model/lora.py
  says how.
  """

  rank: Count = 8
  # An update is multiplied by alpha / rank.
  alpha: Positive = 16.0
  # rsLoRA (arXiv:2312.03732): multiply by alpha / sqrt(rank) instead.
  rank_stabilized: bool = False
  # Dropout of the input of each update.
  dropout: BelowOne = 0.0
  # Matrices that are adapted; (): all matrices of the layers.
  targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ()
  # Embedding and head (if not tied) that are trained whole beside the updates,
  # as where chats bring tokens that the base never saw (PEFT: modules_to_save).
  full: tuple[Literal["embed", "head"], ...] = ()

  @property
  def scale(self) -> float:
    divisor = self.rank**0.5 if self.rank_stabilized else self.rank
    return self.alpha / divisor


@dataclasses.dataclass
class SkipConfig:
  """Skips the update of a step whose loss or gradient norm is not finite, or
  more than `sigma` standard deviations above its mean over the last `window`
  steps.
  """

  # Steps before, of which the mean and the standard deviation are taken.
  window: Annotated[
    Count, AtMost(10**6, "since the state holds as many numbers")
  ] = 128
  # Standard deviations above the mean from which a step is an outlier.
  sigma: Positive = 6.0


@dataclasses.dataclass
class TasksConfig:
  """Tasks of lm-evaluation-harness (extra `eval`) during training, reported as
  task/NAME/METRIC.
  """

  # Names, groups or patterns, as of `python -m lm.evaluate --tasks`.
  names: tuple[str, ...] = ("docstring_bodies",)
  # Steps from one time to the next; the last step is one, too.
  every: Count = 1000
  # Documents of each task; None: all.
  limit: Count | None = None
  # Folder with the .yaml files of your own tasks; None: no such tasks.
  include_path: str | None = None
