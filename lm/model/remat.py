"""Rematerialization: which values of a layer are kept for the backward pass,
and which are computed again (`config.model.remat`).

T query length, S key length, D model, F mlp, N query heads, K kv heads, H head.
"""

from collections.abc import Callable
from typing import Literal

import jax
from jax import ad_checkpoint
from jaxtyping import Array

from lm import config as config_lib

# Values of a layer; in brackets the numbers that a token keeps, and the
# multiply-adds that are not done again for them. `context` (N H + N; S N H in a
# causal row): the attention's mixture of values, and the log of the softmax's
# sum; splash and `reference` name it, kernels for GPUs do not, and run again.
# `out_proj` (D; N H D): the attention's result. `q` (N H; D N H), and `k` and
# `v` (K H; D K H each): rotated. `up` and `gate` (F; D F each). So `context`
# gives S per number, the others D.
Name = Literal["context", "out_proj", "q", "k", "v", "up", "gate"]

# Each policy keeps what those before it keep, too. MaxText calls the third
# save_dot_with_context_except_mlp.
_SAVED: dict[str, tuple[Name, ...]] = {"save_context": ("context",)}
_SAVED["save_out_proj"] = (*_SAVED["save_context"], "out_proj")
_SAVED["save_attention"] = (*_SAVED["save_out_proj"], "q", "k", "v")
_SAVED["minimal_with_context"] = (*_SAVED["save_attention"], "up", "gate")


def name(x: Array, name: Name) -> Array:
  """`x`, which a policy may keep; no operation of the compiled program."""
  return ad_checkpoint.checkpoint_name(x, name)


def checkpointed(layer: Callable, cfg: config_lib.ModelConfig) -> Callable:
  """`layer` under cfg.remat: the same values and gradients. `save_*` and
  `minimal_with_context` keep values by their names, with cfg.remat_offload in
  the host's memory (lm/mesh.py refuses devices without one).
  """
  if cfg.remat == "none":
    return layer
  policies = jax.checkpoint_policies
  if cfg.remat == "full":
    policy = None
  elif cfg.remat == "dots":
    policy = policies.dots_with_no_batch_dims_saveable
  elif not cfg.remat_offload:
    policy = policies.save_only_these_names(*_SAVED[cfg.remat])
  else:
    policy = policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=list(_SAVED[cfg.remat]),
      offload_src="device",
      offload_dst="pinned_host",
    )
  return jax.checkpoint(layer, policy=policy)
