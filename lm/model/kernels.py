"""Fused attention kernels: which one a model can use, and their calls.

B batch, T query length, S key length, N query heads, K kv heads, H head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm import config as config_lib
from lm import schema, sharding

# TPU lane count: splash attention needs rows of a multiple of 128 tokens.
_LANES = 128


def choose(cfg: config_lib.ModelConfig, *, length: int, prefix: bool) -> str:
  """Resolves `auto` to a kernel for the platform being compiled for.

  Raises ConfigError if a named kernel does not support the model, the row
  length or prefixes.
  """
  kernel = cfg.attention
  if kernel == "auto":
    kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(
      sharding.platform(), "reference"
    )
    if kernel == "cudnn" and (
      cfg.attention_softcap is not None or cfg.dtype == "float32"
    ):
      kernel = "reference"  # cuDNN supports neither soft-caps nor float32
    if kernel == "splash" and (prefix or length % _LANES):
      kernel = "reference"  # splash has static masks and whole tiles
  if kernel == "cudnn" and cfg.attention_softcap is not None:
    raise schema.ConfigError(
      "config.model.attention='cudnn': cuDNN has no attention_softcap; set "
      "attention='reference'"
    )
  if kernel == "cudnn" and cfg.dtype == "float32":
    raise schema.ConfigError(
      "config.model.attention='cudnn': cuDNN attention is bfloat16 only; set "
      "dtype='bfloat16' or attention='reference'"
    )
  if kernel == "splash" and prefix:
    raise schema.ConfigError(
      "config.model.attention='splash': its mask is fixed when it is compiled, "
      "so it has no prefixes; set attention='reference'"
    )
  if kernel == "splash" and length % _LANES:
    raise schema.ConfigError(
      f"config.model.attention='splash': rows of {length} tokens are no "
      f"multiple of {_LANES}; change the length or set attention='reference'"
    )
  return kernel


def cudnn(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  seen: Bool[Array, "B T S"],
  scale: float,
) -> Float[Array, "B T N H"]:
  """cuDNN's fused attention, by jax.nn; bfloat16 only. `seen` is the mask."""

  def local(q, k, v, seen):
    return jax.nn.dot_product_attention(
      q, k, v, mask=seen[:, None], scale=scale, implementation="cudnn"
    )

  heads = ("batch", None, "heads", None)
  kv = ("batch", None, "kv_heads", None)
  run = sharding.per_shard(
    local, heads, kv, kv, ("batch", None, None), out_axes=heads
  )
  return run(q, k, v, seen)


def splash(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  segments: Int[Array, "B T"],
  window: int | None,
  softcap: float | None,
) -> Float[Array, "B T N H"]:
  """Splash attention, JAX's TPU kernel, of scaled `q`; skips masked tiles.

  The kernel measures the window in row indices, not positions; within a
  document both distances are equal.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as library,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  def local(q, k, v, segments):
    _, T, N, _ = q.shape
    mask = (
      masks.CausalMask((T, T))
      if window is None
      else masks.LocalMask((T, T), (window - 1, 0), 0)
    )
    # 512 fits the vector memory of every TPU.
    block = next(b for b in (512, 256, _LANES) if T % b == 0)
    sizes = library.BlockSizes(
      block_q=block,
      block_kv=block,
      block_kv_compute=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      block_q_dq=block,
      block_kv_dq=block,
    )
    kernel = library.make_splash_mha(
      masks.MultiHeadMask([mask] * N),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      attn_logits_soft_cap=softcap,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    ids = library.SegmentIds(segments, segments)
    out = jax.vmap(kernel)(q, k, v, ids)
    assert isinstance(out, jax.Array)  # no residuals requested
    return jnp.swapaxes(out, 1, 2)

  heads = ("batch", None, "heads", None)
  kv = ("batch", None, "kv_heads", None)
  run = sharding.per_shard(
    local, heads, kv, kv, ("batch", None), out_axes=heads
  )
  return run(q, k, v, segments)
