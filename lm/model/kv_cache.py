"""KV cache: one ring buffer per layer.

Full-attention layers have R = `longest` entries per row, windowed layers at
most window + n_new - 1. Position p is stored at entry p % R. Row lengths alone
tell the position stored in each entry, and rejected draft tokens (speculative
decoding) need no erasing.

B rows, T new tokens, N query heads, K kv heads, R entries, H head.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm import config as config_lib
from lm import sharding
from lm.model import kernels, weights

# Leading logical axes of every array of a layer; other axes are not sharded.
_HEADS = ("batch", "kv_heads")
# Symmetric int8 range, [-127, 127]: -128 has no positive counterpart.
_INT8 = 127


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["values", "scales"],
  meta_fields=[],
)
@dataclasses.dataclass
class Vectors:
  """Keys or values of a layer: unquantised, or int8 with a scale per vector.

  `rows` are two axes, B and K, flattened to a single B * K axis within a step.
  """

  values: Float[Array, "*rows R H"] | Int[Array, "*rows R H"]
  scales: Float[Array, "*rows R"] | None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys", "values", "lengths"],
  meta_fields=[],
)
@dataclasses.dataclass
class Cache:
  """KV cache of all layers, and the number of tokens in each row."""

  keys: tuple[Vectors, ...]
  values: tuple[Vectors, ...]
  lengths: Int[Array, "B"]


def n_places(
  cfg: config_lib.ModelConfig, layer: int, longest: int, n_new: int
) -> int:
  """Ring buffer size R of a layer, for rows of up to `longest` tokens.

  A step writes up to `n_new` tokens, of which some may be rejected later:
  windowed layers have n_new - 1 extra entries.
  """
  window = cfg.windows[layer % len(cfg.windows)]
  return longest if window is None else min(longest, window + n_new - 1)


def empty(
  cfg: config_lib.ModelConfig,
  n_rows: int,
  longest: int,
  *,
  n_new: int = 1,
  int8: bool = False,
) -> Cache:
  """An empty KV cache, created sharded."""

  def vectors(layer):
    R = n_places(cfg, layer, longest, n_new)
    shape = (n_rows, cfg.n_kv_heads, R, cfg.d_head)
    where = sharding.spec(*_HEADS)
    dtype = jnp.int8 if int8 else cfg.dtype
    return Vectors(
      jnp.zeros(shape, dtype, out_sharding=where),
      jnp.zeros(shape[:3], jnp.float32, out_sharding=where) if int8 else None,
    )

  layers = range(cfg.n_layers)
  return Cache(
    tuple(vectors(i) for i in layers),
    tuple(vectors(i) for i in layers),
    jnp.zeros(n_rows, jnp.int32, out_sharding=sharding.spec("batch")),
  )


def of_prompts(
  cfg: config_lib.ModelConfig,
  pairs: list[tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]],
  lengths: Int[Array, "B"],
  longest: int,
  *,
  n_new: int = 1,
  int8: bool = False,
) -> Cache:
  """KV cache after prefill of left-aligned prompts, from keys and values."""

  def vectors(x, layer):
    R = n_places(cfg, layer, longest, n_new)

    def local(x, lengths):
      held = jnp.clip(_held(lengths - 1, R), 0, x.shape[1] - 1)
      x = jnp.take_along_axis(x, held[:, :, None, None], axis=1)
      return _pack(x.swapaxes(1, 2), int8)

    run = sharding.per_shard(
      local,
      ("batch", None, "kv_heads", None),
      ("batch",),
      out_axes=_HEADS,
    )
    return run(x, lengths)

  return Cache(
    tuple(vectors(k, i) for i, (k, _) in enumerate(pairs)),
    tuple(vectors(v, i) for i, (_, v) in enumerate(pairs)),
    lengths,
  )


def _pack(x: Float[Array, "B K T H"], int8: bool) -> Vectors:
  if not int8:
    return Vectors(x, None)
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=-1)
  scales = jnp.where(largest > 0, largest, 1) / _INT8
  return Vectors(jnp.round(x / scales[..., None]).astype(jnp.int8), scales)


def _held(last: Int[Array, "B"], R: int) -> Int[Array, "B R"]:
  """Position stored in each entry r if the newest position is `last`: the
  largest p <= last with p % R == r, negative if entry r is still empty.
  """
  last = last[:, None]
  return last - (last - jnp.arange(R)[None]) % R


def extend(
  layer: tuple[Vectors, Vectors],
  lengths: Int[Array, "B"],
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  *,
  scale: float,
  window: int | None,
  softcap: float | None,
) -> tuple[Float[Array, "B T N H"], tuple[Vectors, Vectors]]:
  """Writes T tokens from position `lengths` on, then attends from these T."""

  def local(keys, values, lengths, q, k, v):
    T, R = q.shape[1], keys.values.shape[2]
    positions = lengths[:, None] + jnp.arange(T)[None]
    whole = keys, values
    keys, values = _write(keys, k, positions), _write(values, v, positions)
    held = _held(positions[:, -1], R)[:, None]
    distance = positions[:, :, None] - held
    seen = (held >= 0) & (distance >= 0)
    if window is not None:
      seen &= distance < window
    out = _attend(q * scale, keys, values, seen, softcap)
    return out, *jax.tree.map(
      lambda x, old: x.reshape(old.shape), (keys, values), whole
    )

  heads = ("batch", None, "heads", None)
  kv = ("batch", None, "kv_heads", None)
  run = sharding.per_shard(
    local, _HEADS, _HEADS, ("batch",), heads, kv, kv,
    out_axes=(heads, _HEADS, _HEADS),
  )  # fmt: skip
  out, keys, values = run(*layer, lengths, q, k, v)
  return out, (keys, values)


def _write(
  cache: Vectors, new: Float[Array, "B T K H"], positions: Int[Array, "B T"]
) -> Vectors:
  packed = _pack(new.swapaxes(1, 2), cache.scales is not None)
  B, K, R = cache.values.shape[:3]
  # Rows and heads are flattened into a single axis: with an axis of length 1,
  # XLA's CPU compiler would repeat the write at the read, and copy the cache.
  row = jnp.arange(B * K)[:, None]
  places = jnp.repeat(positions % R, K, axis=0)

  def put(old, new):
    new = new.astype(old.dtype).reshape(B * K, *new.shape[2:])
    old = old.reshape(B * K, *old.shape[2:])
    return old.at[row, places].set(
      new, unique_indices=True, mode="promise_in_bounds"
    )

  scales = None
  if cache.scales is not None:
    scales = put(cache.scales, packed.scales)
  return Vectors(put(cache.values, packed.values), scales)


def _attend(q, keys, values, seen: Bool[Array, "B T R"], softcap):
  """Plain attention in the layout of the cache, heads first: no transpose."""
  B, T, N, H = q.shape
  K = keys.values.shape[0] // B
  G = N // K
  q = jnp.moveaxis(q.reshape(B, T, K, G, H), 1, 3).reshape(B * K, G * T, H)
  scores = weights.float32_sums("XMH,XRH->XMR", q, keys.values.astype(q.dtype))
  if keys.scales is not None:
    scores *= keys.scales[:, None]
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  seen = jnp.repeat(jnp.tile(seen, (1, G, 1)), K, axis=0)
  scores = jnp.where(seen, scores, kernels.MASKED)
  shares = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  total = jnp.sum(shares, axis=-1, keepdims=True)
  if values.scales is not None:
    shares *= values.scales[:, None]
  shares = shares.astype(q.dtype)
  out = weights.float32_sums(
    "XMR,XRH->XMH", shares, values.values.astype(q.dtype)
  )
  out = (out / total).astype(q.dtype).reshape(B, K, G, T, H)
  return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)


def insert(cache: Cache, row: Cache, new: Bool[Array, "B"]) -> Cache:
  """Copies the single row of `row` into each row of `cache` marked `new`.

  On a mesh each device along the batch holds a copy of `row` and writes to the
  local new rows: no communication.
  """

  def local(old, row, new):
    n, (slots,) = jnp.sum(new), jnp.nonzero(new, size=len(new), fill_value=0)

    def put(i, old):
      return jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_slice(
          a, b, (slots[i], *(0,) * (a.ndim - 1))
        ),
        old,
        row,
      )

    return jax.lax.fori_loop(0, n, put, old)

  def run(axes, old, row):
    insert_rows = sharding.per_shard(
      local, axes, axes, ("batch",), out_axes=axes
    )
    return insert_rows(old, row, new)

  lists = (cache.keys, cache.values), (row.keys, row.values)
  keys, values = run(_HEADS, *lists)
  return Cache(keys, values, run(("batch",), cache.lengths, row.lengths))
