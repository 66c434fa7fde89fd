"""The decoder: embedding, layers, final norm, head; or an encoder, by
cfg.causal=False.

B batch, T length, D model, V vocabulary, L layers. A model is a config and a
pure dict of arrays; the functions below join the two. The layers run one after
another in stack.py. `forward` stops before the head: the loss never holds all
logits (lm/model/loss.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from lm import batch as batch_lib
from lm import config as config_lib
from lm.model import attention, dropout, layers, lora, rotary, stack, weights

Params = Any  # nested dict of arrays; `layers` arrays have a leading axis L
# What layers report beside their output: name -> float32 array, [] of a layer
# and [L] of the model; under "square", a dict of such arrays to report by their
# roots. Each is a sum over the batch's tokens (not padding), so that
# microbatches and devices add up.
Aux = dict[str, Any]


class Block(nnx.Module):
  """Layer: attention and feed-forward, each added to the residual, with norms
  as cfg.norm_placement says.
  """

  def __init__(self, cfg: config_lib.ModelConfig, rngs: nnx.Rngs):
    D = cfg.d_model
    self.dropout = cfg.residual_dropout
    self.placement = cfg.norm_placement

    def norm(*placements):
      return layers.Norm(D, cfg) if self.placement in placements else None

    before, after = ("pre", "both"), ("both", "post", "residual")
    self.attention_norm = norm(*before)
    self.attention = attention.Attention(cfg, rngs=rngs)
    self.attention_post_norm = norm(*after)
    self.mlp_norm = norm(*before)
    self.mlp = layers.MLP(cfg, rngs=rngs)
    self.mlp_post_norm = norm(*after)
    # Last, so that the other weights start as without adapters.
    parts = {"attention": self.attention, "mlp": self.mlp}
    self.lora = lora.Adapters(cfg, parts, rngs) if cfg.lora else None

  def __call__(
    self,
    x: Float[Array, "B T D"],
    tokens: attention.Tokens,
    angles: tuple[Array, Array] | None,
    window: int | None,
    keys: Key[Array, "B"] | None = None,
    extend: Callable | None = None,
    statistics: bool = False,
    raw: Bool[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], Any, Aux]:
    """Returns (residual, what attention keeps for a KV cache, aux).

    `raw`, if given, says whether attention reads the residual without a norm.

    With `statistics`, aux["square"] has the mean squares over D of the
    residual and of what attention and MLP add to it.
    """
    rows = (
      (None, None)
      if keys is None
      else jax.vmap(jax.random.split, out_axes=1)(keys)
    )
    adapters = {} if self.lora is None else self.lora.updates(keys)
    with jax.named_scope("attention"):
      y = x if self.attention_norm is None else self.attention_norm(x)
      if raw is not None:
        y = jnp.where(raw, x, y)
      y, new = self.attention(y, tokens, angles, window, extend, adapters)
      x, attended = self._add(x, y, self.attention_post_norm, rows[0])
    with jax.named_scope("mlp"):
      y = x if self.mlp_norm is None else self.mlp_norm(x)
      y = self.mlp(y, adapters)
      x, fed = self._add(x, y, self.mlp_post_norm, rows[1])
    aux: Aux = {}
    if statistics:
      parts = {"residual": x, "attention": attended, "mlp": fed}
      aux["square"] = {
        name: _sum_of_squares(part, tokens) for name, part in parts.items()
      }
    return x, new, aux

  def _add(self, x, y, norm, keys):
    """(residual with the update y, what was added to the residual)."""
    if norm is None or self.placement == "residual":
      x += dropout.dropout(y, self.dropout, keys)
      return (x if norm is None else norm(x)), y
    y = norm(y)
    return x + dropout.dropout(y, self.dropout, keys), y


@jax.named_scope("statistics")
def _sum_of_squares(x, tokens):
  """Sum over tokens of the mean over D of x ^ 2, in float32."""
  square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1)
  return jnp.sum(jnp.where(tokens.segments > 0, square, 0.0))


class Decoder(nnx.Module):
  """The model. `layers` is a single Block with arrays stacked along a leading
  axis L, or, after `unroll`, a list of L Blocks.
  """

  def __init__(self, cfg: config_lib.ModelConfig, rngs: nnx.Rngs):
    V, D, scale = cfg.vocab_size, cfg.d_model, cfg.init_scale
    self.cfg = cfg
    self.embed = weights.table(rngs, (V, D), ("vocab", "embed"), scale)
    if cfg.positions == "learned":
      shape = (cfg.context_length, D)
      self.position_embed = weights.table(rngs, shape, (None, "embed"), scale)
    self.embedding_norm = layers.Norm(D, cfg) if cfg.embedding_norm else None

    @nnx.split_rngs(splits=cfg.n_layers)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
    def stacked(rngs):
      return Block(cfg, rngs)

    self.layers = stacked(rngs)
    ends = cfg.norm_placement != "residual"
    self.final_norm = layers.Norm(D, cfg) if ends else None
    if not cfg.tied_embedding:
      axes = ("embed", "vocab")
      self.head = weights.matrix(rngs, (D, V), axes, scale, role="head")
    self.head_transform = (
      layers.HeadTransform(cfg, rngs=rngs) if cfg.head_transform else None
    )
    self.head_bias = (
      weights.vector(0.0, (V,), ("vocab",)) if cfg.head_bias else None
    )

  def unroll(self) -> "Decoder":
    """Replaces the stacked `layers` by a list of L Blocks; returns self."""
    graph, stacked = nnx.split(self.layers)
    leaves, tree = jax.tree.flatten(stacked)
    # Not x[i]: its gradient is a sum of L arrays that are padded with zeros.
    of_layers = zip(*map(jnp.unstack, leaves), strict=True)
    self.layers = nnx.List(
      nnx.merge(graph, jax.tree.unflatten(tree, layer)) for layer in of_layers
    )
    return self

  def __call__(
    self,
    inputs: Int[Array, "B T"],
    tokens: attention.Tokens,
    keys: Key[Array, "B"] | None = None,
    *,
    statistics: bool = False,
  ) -> tuple[Float[Array, "B T D"], Aux]:
    """Hidden states for the head, and aux with a leading axis L.

    PRNG `keys`, one per row, enable dropout.
    """
    cfg = self.cfg
    if not cfg.causal:
      everything = jnp.ones_like(tokens.segments, bool)
      tokens = dataclasses.replace(tokens, prefix=everything)
    x = self.embedded(inputs, tokens, keys)
    angles = rotary.angles(cfg, tokens.positions)
    if not cfg.scan_layers and not isinstance(self.layers, nnx.List):
      self.unroll()
    x, aux = stack.run(
      self.layers,
      x,
      keys,
      cfg=cfg,
      tokens=tokens,
      angles=angles,
      statistics=statistics,
    )
    return self.finish(x), aux

  @jax.named_scope("final_norm")
  def finish(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    x = x if self.final_norm is None else self.final_norm(x)
    return x if self.head_transform is None else self.head_transform(x)

  def head_weight(self) -> Float[Array, "V D"]:
    """Weight of the output head; the embedding table if tied."""
    return self.embed[...] if self.cfg.tied_embedding else self.head[...].T

  def head_parts(
    self,
  ) -> tuple[Float[Array, "V D"], Float[Array, "V"] | None]:
    """Weight and bias of the output head."""
    bias = None if self.head_bias is None else self.head_bias[...]
    return self.head_weight(), bias

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Next-token logits, accumulated in float32, with any soft-cap applied."""
    weight, bias = self.head_parts()
    out = weights.scores(x, weight, "batch", "length", "vocab")
    if bias is not None:
      out += bias[None, None]
    cap = self.cfg.logit_softcap
    return out if cap is None else cap * jnp.tanh(out / cap)

  @jax.named_scope("embed")
  def embedded(self, inputs, tokens, keys=None) -> Float[Array, "B T D"]:
    cfg = self.cfg
    dtype = jnp.dtype(cfg.dtype)
    x = layers.look_up(self.embed[...], inputs, "vocab", dtype)
    if cfg.scale_embedding:
      x *= jnp.asarray(cfg.d_model**0.5, x.dtype)
    if cfg.positions == "learned":
      table = self.position_embed[...]
      x += layers.look_up(table, tokens.positions, None, dtype)
    if self.embedding_norm is not None:
      x = self.embedding_norm(x)
    own = dropout.fold_rows(keys, cfg.n_layers)
    return dropout.dropout(x, cfg.embedding_dropout, own)


# --- functions of (config, params) -------------------------------------------


def init_params(cfg: config_lib.ModelConfig, key: Key[Array, ""]) -> Params:
  """Initial parameters; under jit with a mesh in context, created sharded."""
  return nnx.to_pure_dict(nnx.state(Decoder(cfg, nnx.Rngs(params=key))))


@functools.lru_cache
def _graph(cfg: config_lib.ModelConfig) -> nnx.GraphDef:
  """Structure of the model without arrays, the same for every mesh."""
  return nnx.graphdef(_abstract(cfg))


@functools.lru_cache
def _abstract(cfg: config_lib.ModelConfig) -> Decoder:
  """Model with abstract arrays, traced under an empty mesh."""
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    return nnx.eval_shape(lambda: Decoder(cfg, nnx.Rngs(0)))


@functools.lru_cache
def declared(cfg: config_lib.ModelConfig) -> Any:
  """The `Weight` of every parameter, as a tree like the parameters."""

  def of(path, param):
    return dataclasses.replace(
      weights.declared(param),
      stacked=path[0].key == "layers",
      frozen=cfg.lora is not None and not lora.is_trained(cfg.lora, path),
    )

  return nnx.to_pure_dict(
    jax.tree_util.tree_map_with_path(
      of,
      nnx.state(_abstract(cfg)),
      is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
  )


def bind(cfg: config_lib.ModelConfig, params: Params) -> Decoder:
  """The model as an nnx module holding `params`."""
  return nnx.merge(_graph(cfg), params)


def forward(
  cfg: config_lib.ModelConfig,
  params: Params,
  batch: batch_lib.Batch,
  *,
  keys: Key[Array, "B"] | None = None,
  statistics: bool = False,
) -> tuple[Float[Array, "B T D"], Aux]:
  """Hidden states after the final norm, the input of the head, and aux.

  PRNG `keys`, one per row, enable dropout. `statistics` adds the mean squares
  of `Block` to aux, which is empty otherwise.
  """
  tokens = attention.Tokens(batch.positions, batch.segments, batch.prefix)
  model = bind(cfg, params)
  return model(batch.inputs, tokens, keys, statistics=statistics)
