"""Attention kernels: which one a model can use, calls of Mosaic, cuDNN and
splash, and the blocked form in XLA's own operations.

B batch, T query length, S key length, C queries of a block, N query heads, K kv
heads, G = N / K, H head.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lm import config as config_lib
from lm import schema, sharding
from lm.model import remat
from lm.model.weights import float32_sums, in_order

# Score of a masked key: low enough for exp() to give 0, high enough for sums
# to stay finite.
MASKED = -1e30

# TPU lane count: splash attention needs rows of a multiple of 128 tokens.
_LANES = 128


def choose(cfg: config_lib.ModelConfig, *, length: int) -> str:
  """Resolves `auto` to a kernel for the platform being compiled for: the first
  that supports the model and the row length.

  Raises ConfigError if a named kernel does not support them.
  """
  if cfg.attention != "auto":
    if reason := _unsupported(cfg.attention, cfg, length):
      raise schema.ConfigError(
        f"config.model.attention={cfg.attention!r}: {reason}, or set "
        "attention='reference'"
      )
    return cfg.attention
  on_gpu = ("mosaic", "cudnn")
  candidates = {"tpu": ("splash",), "gpu": on_gpu, "cuda": on_gpu}
  for kernel in candidates.get(sharding.platform(), ()):
    if _unsupported(kernel, cfg, length) is None:
      return kernel
  return "reference"


def _unsupported(
  kernel: str, cfg: config_lib.ModelConfig, length: int
) -> str | None:
  """Why `kernel` cannot run, and what to change; None if it can."""
  if kernel == "splash" and length % _LANES:
    return (
      f"rows of {length} tokens are no multiple of {_LANES}; change the length"
    )
  if kernel in ("cudnn", "mosaic") and cfg.dtype == "float32":
    return "the kernel is bfloat16 only; set dtype='bfloat16'"
  if kernel == "cudnn" and cfg.attention_softcap is not None:
    return "cuDNN has no attention_softcap; set it to None"
  if kernel == "mosaic" and importlib.util.find_spec("tokamax") is None:
    return (
      "tokamax is not installed; on Python 3.12 or newer, pip install -e "
      "'.[cuda12]'"
    )
  if kernel == "mosaic" and _capability() not in ("9", "10"):
    return (
      "the kernel's gradient is for GPUs of compute capability 9 and 10 "
      "(Hopper and Blackwell); use one"
    )
  return None


def _capability() -> str | None:
  """Major compute capability of an NVIDIA GPU; None for another device."""
  version = getattr(jax.local_devices()[0], "compute_capability", None)
  return None if version is None else str(version).split(".")[0]


def key_ranges(
  segments: Int[Array, "B T"],
  prefix: Bool[Array, "B T"] | None,
  window: int | None,
) -> tuple[Int[Array, "B T"], Int[Array, "B T"] | None]:
  """Keys that the query at each place of a row sees: places [first, stop).

  `stop` None is the place after the query. A prefix opens its document; then
  the keys of a query are a range (`attention.visible`). Padding is a document.
  """
  T = segments.shape[1]
  places = jnp.arange(T, dtype=jnp.int32)[None]
  opens = jnp.concatenate(
    [jnp.ones_like(segments[:, :1]), jnp.diff(segments)], axis=1
  )
  first = jax.lax.cummax(jnp.where(opens != 0, places, 0), axis=1)
  if window is not None:
    first = jnp.maximum(first, places - window + 1)
  if prefix is None:
    return first, None
  # The place of the next token outside of the prefix.
  ends = jnp.where(prefix & (opens == 0), T, places)
  after = jnp.concatenate([ends[:, 1:], jnp.full_like(ends[:, :1], T)], axis=1)
  after = jax.lax.cummin(after, axis=1, reverse=True)
  stop = jnp.where(prefix, after, places + 1)
  if window is not None:
    stop = jnp.minimum(stop, places + window)
  return first, stop


def mosaic(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  segments: Int[Array, "B T"],
  prefix: Bool[Array, "B T"] | None,
  window: int | None,
  softcap: float | None,
  scale: float,
) -> Float[Array, "B T N H"]:
  """tokamax's FlashAttention for Hopper and Blackwell GPUs, in Pallas's Mosaic;
  bfloat16 only. It takes the range of keys of each query: no array [T, T].
  """
  # Needs a newer Python than this project: pyright may not find it.
  from tokamax._src.ops.attention import (  # pyright: ignore[reportMissingImports]
    base,
    pallas_mosaic_gpu,
  )

  def local(q, k, v, segments, prefix=None):
    first, stop = key_ranges(segments, prefix, window)
    mask = base.Mask(
      k_start=first[:, None],
      k_end=None if stop is None else stop[:, None],
      is_causal=stop is None,
    )
    return pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()(
      q, k, v, mask=mask, logits_scale=scale, logits_soft_cap=softcap
    )

  return _per_shard(local, q, k, v, segments, prefix)


def _per_shard(local, q, k, v, segments, prefix):
  """Runs `local` on each device's rows and heads; None is left out."""
  heads = ("batch", None, "heads", None)
  kv = ("batch", None, "kv_heads", None)
  rows = [x for x in (segments, prefix) if x is not None]
  axes = [("batch", None)] * len(rows)
  run = sharding.per_shard(local, heads, kv, kv, *axes, out_axes=heads)
  return run(q, k, v, *rows)


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


def splash_blocks(length: int) -> tuple[int, int]:
  """Rows and columns of splash attention's tiles [T, S], and the columns that
  are computed at a time; both divide `length`.

  libtpu has no estimate of a Pallas kernel, and none was timed: the choice is
  by count. In a causal head of 8192 tokens 36 tiles of 1024 are a quarter of
  the steps of 136 tiles of 512, for 6 % more products. By the data sheets (lm/
  chips.py) a v6e computes a tile of 512 by 512 of heads of 128 in 0.15 us, and
  reads its keys and values in 0.16 us; 1024 takes 0.58 and 0.32 us. 1024 by
  512 compiles for v4, v5e, v5p and v6e, with heads of 128 and 256, in at most
  14.2 MiB of vector memory; 2048 exceeds the 16 MiB that a kernel has on v5p.
  """
  block = next(b for b in (1024, 512, 256, _LANES) if length % b == 0)
  return block, min(block, 512)


def splash(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  segments: Int[Array, "B T"],
  prefix: Bool[Array, "B T"] | None,
  window: int | None,
  softcap: float | None,
) -> Float[Array, "B T N H"]:
  """Splash attention, JAX's TPU kernel, of scaled `q`; skips masked tiles.

  The kernel measures the window in row indices, not positions; within a
  document both distances are equal. Its mask is fixed when it is compiled, and
  segments are not: with `prefix`, keys and values stand twice in a row, once to
  be seen from later positions, and once from earlier ones, in a segment that no
  query has unless the key is in a prefix. There is no array [T, T].
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as library,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  def local(q, k, v, segments, prefix=None):
    _, T, N, _ = q.shape
    mask = (
      masks.CausalMask((T, T))
      if window is None
      else masks.LocalMask((T, T), (window - 1, 0), 0)
    )
    of_keys = segments
    if prefix is not None:
      mask = _two_way_mask(masks, T, window)
      k, v = (jnp.concatenate([x, x], axis=1) for x in (k, v))
      ahead = jnp.where(prefix, segments, -1)
      of_keys = jnp.concatenate([segments, ahead], axis=1)
    kernel = library.make_splash_mha(
      masks.MultiHeadMask([mask] * N),
      block_sizes=_splash_sizes(library, T),
      head_shards=1,
      q_seq_shards=1,
      attn_logits_soft_cap=softcap,
      residual_checkpoint_name="context",
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    ids = library.SegmentIds(segments, of_keys)
    out = jax.vmap(kernel)(q, k, v, ids)
    assert isinstance(out, jax.Array)  # no residuals requested
    return jnp.swapaxes(out, 1, 2)

  return _per_shard(local, q, k, v, segments, prefix)


def _splash_sizes(library: Any, T: int) -> Any:
  """Splash's tiles of all three kernels: forward, dk and dv, dq."""
  block, part = splash_blocks(T)
  return library.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=part,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=part,
    block_q_dq=block,
    block_kv_dq=block,
  )


def _two_way_mask(masks: Any, T: int, window: int | None) -> Any:
  """Splash's mask [T, 2 T] of keys that stand twice: not later, and later."""

  class TwoWay(masks.Mask):
    @property
    def shape(self):
      return T, 2 * T

    def __getitem__(self, index):
      queries, keys = (
        np.arange(n)[some] for n, some in zip(self.shape, index, strict=True)
      )
      distance = queries[:, None] - keys % T
      seen = np.where(keys < T, distance >= 0, distance < 0)
      return seen & (np.abs(distance) < (window or T))

    def __eq__(self, other):
      return self is other

    def __hash__(self):
      return id(self)

  return TwoWay()


# --- attention in blocks of queries, in XLA's own operations ------------------

# Queries of a block, and blocks at most, which are unrolled.
_BLOCK, _MOST_BLOCKS = 128, 8


def blocked(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  seen: Bool[Array, "B T S"],
  causal: bool,
  window: int | None,
  softcap: float | None,
) -> Float[Array, "B T N H"]:
  """Attention of scaled `q`, a block of queries at a time; each device computes
  its rows and heads. `seen` [B, T, S] is the mask.

  If `causal`, later keys and keys before the window are left out of a block. As
  in FlashAttention (arXiv:2205.14135) the backward pass recomputes the
  probabilities: no float array [T, S] is saved.
  """

  def local(q, k, v, seen):
    (B, T, N, H), K = q.shape, k.shape[2]
    # The queries of a kv head are the rows of a matrix, G of each position.
    q = q.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)
    # Laid out once, for all products; in each of them it would take longer.
    q, k, v = map(in_order, (q, k.swapaxes(1, 2), v.swapaxes(1, 2)))
    out = _attend_blocks((causal, window, softcap), q, k, v, seen)
    out = out.reshape(B, K, T, N // K, H).swapaxes(1, 2)
    return out.reshape(B, T, N, H)

  heads = ("batch", "length", "heads", None)
  whole = ("batch", None, "kv_heads", None)
  mask = ("batch", "length", None)
  if sharding.has_mesh():
    seen = jax.sharding.reshard(seen, sharding.partition(*mask))
  run = sharding.per_shard(local, heads, whole, whole, mask, out_axes=heads)
  return run(q, k, v, seen)


def _blocks(seen, n_rows, causal, window):
  """Yields (slice of rows R, slice of keys, mask [B, 1, R, S])."""
  T, S = seen.shape[1:]
  G = n_rows // T
  C = max(_BLOCK, -(-T // _MOST_BLOCKS))
  for start in range(0, T, C):
    stop = min(start + C, T)
    first = max(0, start - window + 1) if causal and window is not None else 0
    keys = slice(first, stop if causal else S)
    mask = jnp.repeat(seen[:, start:stop, keys], G, axis=1)[:, None]
    yield slice(start * G, stop * G), keys, mask


def _attend_blocks(options, q, k, v, seen):
  return _attend_forward(options, q, k, v, seen)[0]


def _attend_forward(options, q, k, v, seen):
  *how, softcap = options
  outs, logs = [], []
  for some, keys, mask in _blocks(seen, q.shape[2], *how):
    scores = float32_sums("BKRH,BKSH->BKRS", q[:, :, some], k[:, :, keys])
    if softcap is not None:
      scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask, scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    shares = jnp.exp(scores - top)
    total = jnp.sum(shares, axis=-1, keepdims=True)
    # Normalised after the product: [R, H] has fewer numbers than [R, S].
    out = float32_sums("BKRS,BKSH->BKRH", shares.astype(v.dtype), v[:, :, keys])
    outs.append((out / total).astype(v.dtype))
    logs.append(top + jnp.log(total))
  out = remat.name(jnp.concatenate(outs, axis=2), "context")
  logs = remat.name(jnp.concatenate(logs, axis=2), "context")
  return out, (q, k, v, seen, out, logs)


def _attend_backward(options, saved, d_out):
  """Gradients of q, k and v."""
  (*how, softcap), f32 = options, jnp.float32
  # Not before the backward pass: XLA would compute the scores in the forward.
  saved, d_out = jax.lax.optimization_barrier((saved, in_order(d_out)))
  q, k, v, seen, out, logs = saved
  delta = jnp.sum(d_out.astype(f32) * out.astype(f32), axis=-1, keepdims=True)
  d_q, d_k, d_v = [], jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32)
  for some, keys, mask in _blocks(seen, q.shape[2], *how):
    q_, d_ = q[:, :, some], d_out[:, :, some]
    k_, v_ = k[:, :, keys], v[:, :, keys]
    scores = float32_sums("BKRH,BKSH->BKRS", q_, k_)
    slope = None
    if softcap is not None:
      scores = softcap * jnp.tanh(scores / softcap)
      slope = 1 - jnp.square(scores / softcap)
    scores = jnp.where(mask, scores, MASKED)
    shares = jnp.exp(scores - logs[:, :, some])
    d_v = d_v.at[:, :, keys].add(
      float32_sums("BKRS,BKRH->BKSH", shares.astype(q.dtype), d_)
    )
    d = float32_sums("BKRH,BKSH->BKRS", d_, v_) - delta[:, :, some]
    d *= shares
    d = (d if slope is None else d * slope).astype(q.dtype)
    d_k = d_k.at[:, :, keys].add(float32_sums("BKRS,BKRH->BKSH", d, q_))
    d_q.append(float32_sums("BKRS,BKSH->BKRH", d, k_))
  d_q = jnp.concatenate(d_q, axis=2)
  return *(d.astype(q.dtype) for d in (d_q, d_k, d_v)), None


_attend_blocks = jax.custom_vjp(_attend_blocks, nondiff_argnums=(0,))
_attend_blocks.defvjp(_attend_forward, _attend_backward)
