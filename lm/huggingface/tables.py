"""Tables of each family: tensor names in a checkpoint -> parameter paths."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
  """A tensor `theirs` of a checkpoint and the parameters `ours` within, joined
  along the output axis if several.

  In `theirs`, "{}" is the layer. A matrix is stored as [outputs, inputs], as in
  torch.nn.Linear, or as [inputs, outputs] if not `linear`, as in GPT-2's
  Conv1D. Heads and head dimension are stored as one axis. A row is ignored if
  the model lacks the parameters, such as biases. Layers before `first` lack the
  tensor. A `folded` tensor has `folded` rows: reading adds the first row to
  each row of the parameter, and writing writes zeros. An `untied` tensor is
  there only where the output head is a matrix of its own.
  """

  theirs: str
  ours: tuple[str, ...]
  linear: bool = True
  first: int = 0
  folded: int = 0
  untied: bool = False


def row(theirs: str, *ours: str, linear: bool = True) -> Row:
  return Row(theirs, ours, linear)


def _layers(prefix: str, *rows: Row) -> tuple[Row, ...]:
  return tuple(
    dataclasses.replace(
      r,
      theirs=f"{prefix}.{{}}.{r.theirs}",
      ours=tuple(f"layers/{path}" for path in r.ours),
    )
    for r in rows
  )


def _norms(**ours: str) -> tuple[Row, ...]:
  """Rows for the scale and the bias of norms."""
  return tuple(
    row(f"{name}.{theirs}", f"{path}/{part}")
    for name, path in ours.items()
    for theirs, part in (("weight", "scale"), ("bias", "bias"))
  )


_ENDS = (
  row("model.embed_tokens.weight", "embed"),
  row("model.norm.weight", "final_norm/scale"),
  row("model.norm.bias", "final_norm/bias"),
  row("lm_head.weight", "head"),
)
_ATTENTION = tuple(
  row(f"self_attn.{name}_proj.{theirs}", f"attention/{name}{ours}")
  for name in "qkvo"
  for theirs, ours in (("weight", ""), ("bias", "_bias"))
) + tuple(
  row(f"self_attn.{name}.weight", f"attention/{name}/scale")
  for name in ("q_norm", "k_norm")
)
_MLP = tuple(
  row(f"mlp.{name}_proj.{theirs}", f"mlp/{name}{ours}")
  for name in ("gate", "up", "down")
  for theirs, ours in (("weight", ""), ("bias", "_bias"))
)
_PRE = _norms(
  input_layernorm="attention_norm", post_attention_layernorm="mlp_norm"
)
_POST = _norms(
  post_attention_layernorm="attention_post_norm",
  post_feedforward_layernorm="mlp_post_norm",
)
_BOTH = (
  *_norms(
    input_layernorm="attention_norm", pre_feedforward_layernorm="mlp_norm"
  ),
  *_POST,
)


def _table(*rows: Row) -> tuple[Row, ...]:
  return (*_ENDS, *_layers("model.layers", *rows))


LLAMA = _table(*_ATTENTION, *_MLP, *_PRE)
GEMMA = _table(*_ATTENTION, *_MLP, *_BOTH)
OLMO = _table(*_ATTENTION, *_MLP, *_POST)
PHI3 = _table(
  row("self_attn.qkv_proj.weight", *(f"attention/{name}" for name in "qkv")),
  row("self_attn.o_proj.weight", "attention/o"),
  row("mlp.gate_up_proj.weight", "mlp/gate", "mlp/up"),
  row("mlp.down_proj.weight", "mlp/down"),
  *_PRE,
)
STARCODER2 = _table(
  *_ATTENTION,
  row("mlp.c_fc.weight", "mlp/up"),
  row("mlp.c_fc.bias", "mlp/up_bias"),
  row("mlp.c_proj.weight", "mlp/down"),
  row("mlp.c_proj.bias", "mlp/down_bias"),
  *_PRE,
)
GPT2 = (
  row("transformer.wte.weight", "embed"),
  row("transformer.wpe.weight", "position_embed"),
  row("transformer.ln_f.weight", "final_norm/scale"),
  row("transformer.ln_f.bias", "final_norm/bias"),
  row("lm_head.weight", "head"),
  *_layers(
    "transformer.h",
    row("attn.c_attn.weight", *(f"attention/{n}" for n in "qkv"), linear=False),
    row("attn.c_attn.bias", *(f"attention/{n}_bias" for n in "qkv")),
    row("attn.c_proj.weight", "attention/o", linear=False),
    row("attn.c_proj.bias", "attention/o_bias"),
    row("mlp.c_fc.weight", "mlp/up", linear=False),
    row("mlp.c_fc.bias", "mlp/up_bias"),
    row("mlp.c_proj.weight", "mlp/down", linear=False),
    row("mlp.c_proj.bias", "mlp/down_bias"),
    *_norms(ln_1="attention_norm", ln_2="mlp_norm"),
  ),
)


def _both(theirs: str, *ours: str) -> tuple[Row, ...]:
  """Rows for the matrix and the bias of a torch.nn.Linear."""
  return (
    row(f"{theirs}.weight", *ours),
    row(f"{theirs}.bias", *(f"{path}_bias" for path in ours)),
  )


BERT = (
  row("bert.embeddings.word_embeddings.weight", "embed"),
  row("bert.embeddings.position_embeddings.weight", "position_embed"),
  # Token type embeddings: all tokens of a text have type 0.
  Row(
    "bert.embeddings.token_type_embeddings.weight",
    ("position_embed",),
    folded=2,
  ),
  *_norms(**{"bert.embeddings.LayerNorm": "embedding_norm"}),
  *_both("cls.predictions.transform.dense", "head_transform/dense"),
  *_norms(**{"cls.predictions.transform.LayerNorm": "head_transform/norm"}),
  row("cls.predictions.decoder.weight", "head"),
  row("cls.predictions.bias", "head_bias"),
  # transformers computes with this one, which it ties to the one above together
  # with the head alone: here the later row is the one that is kept.
  Row("cls.predictions.decoder.bias", ("head_bias",), untied=True),
  *_layers(
    "bert.encoder.layer",
    *_both("attention.self.query", "attention/q"),
    *_both("attention.self.key", "attention/k"),
    *_both("attention.self.value", "attention/v"),
    *_both("attention.output.dense", "attention/o"),
    *_both("intermediate.dense", "mlp/up"),
    *_both("output.dense", "mlp/down"),
    *_norms(
      **{
        "attention.output.LayerNorm": "attention_post_norm",
        "output.LayerNorm": "mlp_post_norm",
      }
    ),
  ),
)
MODERNBERT = (
  row("model.embeddings.tok_embeddings.weight", "embed"),
  *_norms(
    **{
      "model.embeddings.norm": "embedding_norm",
      "model.final_norm": "final_norm",
      "head.norm": "head_transform/norm",
    }
  ),
  *_both("head.dense", "head_transform/dense"),
  row("decoder.weight", "head"),
  row("decoder.bias", "head_bias"),
  *_layers(
    "model.layers",
    # Checkpoints have no attention norm in the first layer; lm.model stacks a
    # scale for this layer too, and does not read the scale.
    *(
      dataclasses.replace(r, first=1)
      for r in _norms(attn_norm="attention_norm")
    ),
    *_both("attn.Wqkv", *(f"attention/{name}" for name in "qkv")),
    *_both("attn.Wo", "attention/o"),
    *_norms(mlp_norm="mlp_norm"),
    *_both("mlp.Wi", "mlp/gate", "mlp/up"),
    *_both("mlp.Wo", "mlp/down"),
  ),
)
