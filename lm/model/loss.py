"""Chunked causal cross-entropy: never holds the logits of a whole batch.

B batch, T length, C tokens of a chunk, D model, V vocabulary. Losses are
returned as sums; the caller divides by the weights once, over the global batch.
Cutting into chunks and sums over devices are in chunks.py.

tokamax's fused linear_softmax_cross_entropy_loss (0.0.17) is not used: no
weight per token, no z-loss and no soft-cap.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm import sharding
from lm.model import chunks
from lm.model import weights as weights_lib


@jax.named_scope("loss")
def cross_entropy(
  x: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  bias: Float[Array, "V"] | None = None,
  chunk: int,
  softcap: float | None = None,
  z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Returns (sum of weight * (nll + z_loss * log Z ^ 2), sum of weight * nll).

  Only the first sum is differentiable, in x, head and the head's `bias`. The
  forward pass computes the gradient beside the loss, chunk by chunk, and logits
  only once: the backward pass only multiplies by the scalar cotangent. Logits
  accumulate in float32; z-loss is PaLM's (arXiv:2204.02311).
  """
  options = chunk, softcap, z_loss
  return _cross_entropy(options, x, head, bias, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, x, head, bias, targets, weights):
  rows = ("batch", "length")
  run = sharding.per_shard(
    functools.partial(_local_sums, options),
    (*rows, None),
    ("vocab", "embed"),
    ("vocab",),
    rows,
    rows,
    out_axes=((), ()),
  )
  return run(x, head, bias, targets, weights)


def _forward(options, x, head, bias, targets, weights):
  """Head and bias have no gradient where they are frozen, as under LoRA."""
  rows = ("batch", "length")
  of_x, of_head, of_bias = (*rows, None), ("vocab", "embed"), ("vocab",)
  trains = head.perturbed, bias is not None and bias.perturbed
  run = sharding.per_shard(
    functools.partial(_local_sums_and_gradients, options, trains),
    of_x,
    of_head,
    of_bias,
    rows,
    rows,
    out_axes=(
      (),
      (),
      of_x,
      of_head if trains[0] else (),
      of_bias if trains[1] else (),
    ),
  )
  parts = x, head, bias, targets, weights
  loss, nll, *slopes = run(*(None if a is None else a.value for a in parts))
  return (loss, nll), tuple(slopes)


def _backward(options, gradients, cotangents):
  del options
  dx, *of_head = gradients
  scale, _ = cotangents
  dx = dx * scale.astype(dx.dtype)
  return dx, *(None if d is None else d * scale for d in of_head), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


# --- on one device: local rows, local shard of the vocabulary ----------------


def _local_sums(options, x, head, bias, targets, weights):
  chunk, softcap, z_loss = options
  head = chunks.whole_head(head, x.dtype)

  def one(sums, piece):
    x, targets, weights = piece
    scores, _ = chunk_logits(x, head, bias, softcap)
    nll, log_z, _ = chunk_nll(scores, targets)
    return _add(sums, nll, log_z, weights, z_loss), None

  zero = jnp.zeros((), jnp.float32)
  sums, _ = chunks.over(one, (zero, zero), chunk, x, targets, weights)
  return tuple(chunks.psum(s, "batch", "length") for s in sums)


def _local_sums_and_gradients(options, trains, x, head, bias, targets, weights):
  chunk, softcap, z_loss = options
  whole = chunks.whole_head(head, x.dtype)

  def one(carry, piece):
    *sums, dhead, dbias = carry
    x, targets, weights = piece
    scores, slope = chunk_logits(x, whole, bias, softcap)
    nll, log_z, hit = chunk_nll(scores, targets)
    share = jnp.exp(scores - log_z[..., None])
    share *= (1 + 2 * z_loss * log_z)[..., None]
    d = (share - hit) * slope * weights[..., None]
    if dbias is not None:
      dbias += jnp.sum(d, axis=0)
    # Compute dtype for both operands: float32 would slow the matmul.
    d = d.astype(x.dtype)
    dx = weights_lib.float32_sums("CV,VD->CD", d, whole)
    if dhead is not None:
      dhead += weights_lib.float32_sums("CV,CD->VD", d, x)
    dx = chunks.psum(dx, "vocab").astype(x.dtype)
    return (*_add(sums, nll, log_z, weights, z_loss), dhead, dbias), dx

  zero, f32 = jnp.zeros((), jnp.float32), jnp.float32
  dhead = jnp.zeros(whole.shape, f32) if trains[0] else None
  dbias = jnp.zeros(bias.shape, f32) if trains[1] else None
  first = zero, zero, dhead, dbias
  carry, dx = chunks.over(one, first, chunk, x, targets, weights)
  loss, nll = (chunks.psum(s, "batch", "length") for s in carry[:2])
  dhead, dbias = carry[2:]
  if dbias is not None:
    dbias = chunks.psum(dbias, "batch", "length").astype(bias.dtype)
  if dhead is None:
    return loss, nll, dx, None, dbias
  # Sum over all tokens, then shard along the width again.
  width = sharding.shared_axes("embed")
  tokens = sharding.shared_axes("batch", "length")
  if others := [axis for axis in tokens if axis not in width]:
    dhead = jax.lax.psum(dhead, others)
  if width:
    dhead = jax.lax.psum_scatter(dhead, width, scatter_dimension=1, tiled=True)
  return loss, nll, dx, dhead.astype(head.dtype), dbias


def chunk_logits(x, head, bias, softcap):
  """Float32 logits [C, V] of a chunk, and d(logits) / d(x head + bias)."""
  scores = weights_lib.scores(x, head)
  if bias is not None:
    scores += bias[None]
  if softcap is None:
    return scores, jnp.float32(1)
  scores = softcap * jnp.tanh(scores / softcap)
  return scores, 1 - jnp.square(scores / softcap)


def chunk_nll(scores, targets):
  """Negative log-likelihood in nats, log Z, and one-hot targets, per token."""
  top = chunks.pmax(jnp.max(scores, axis=-1))
  total = jnp.sum(jnp.exp(scores - top[..., None]), axis=-1)
  log_z = top + jnp.log(chunks.psum(total, "vocab"))
  # A gather over a sharded vocabulary would communicate; a comparison is local.
  hit = chunks.ids(scores) == targets[:, None]
  chosen = chunks.psum(jnp.sum(jnp.where(hit, scores, 0), axis=-1), "vocab")
  return log_z - chosen, log_z, hit


def _add(sums, nll, log_z, weights, z_loss):
  loss, plain = sums
  nll_sum = jnp.sum(weights * nll)
  z_sum = z_loss * jnp.sum(weights * jnp.square(log_z)) if z_loss else 0.0
  return loss + nll_sum + z_sum, plain + nll_sum
