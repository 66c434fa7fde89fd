"""Families of models: maps of config.json and of tensors, in both directions.

A Family consists of parts of config.json and a table of tensors; an entry of
`FAMILIES` adds a family. Default values follow transformers 5.24.
"""

from typing import Any

from lm import schema
from lm.huggingface import family, multimodal, parts, rope, tables
from lm.huggingface.family import Family

_SILU = parts.choice("hidden_act", "mlp", {"silu": "swiglu"}, "silu")
_GELU_TANH = {
  "gelu_new": "gelu",
  "gelu_pytorch_tanh": "gelu",
  "gelu": "gelu_exact",
}
_GEGLU = {"gelu_pytorch_tanh": "geglu", "gelu": "geglu_exact"}
_ATTENTION_BIAS = parts.biases("attention_bias", "qkv", "o", default=False)
_MLP_BIAS = parts.biases("mlp_bias", "mlp", default=False)


def _sizes(*, tied: bool, norm: str, epsilon: float) -> tuple[parts.Part, ...]:
  return (
    parts.same("vocab_size", "vocab_size"),
    parts.same("hidden_size", "d_model"),
    parts.same("intermediate_size", "d_mlp"),
    parts.same("num_hidden_layers", "n_layers"),
    parts.same("max_position_embeddings", "context_length"),
    parts.same(norm, "norm_epsilon", epsilon),
    parts.same("tie_word_embeddings", "tied_embedding", tied),
  )


def _rms(*, tied: bool, epsilon: float = 1e-6) -> tuple[parts.Part, ...]:
  return _sizes(tied=tied, norm="rms_norm_eps", epsilon=epsilon)


def _gemma(*more: parts.Part) -> tuple[parts.Part, ...]:
  return (
    *_rms(tied=True),
    parts.fixed(norm_unit_offset=True, scale_embedding=True),
    _ATTENTION_BIAS,
    parts.must("use_bidirectional_attention", None, False),
    *more,
  )


# Activation, norms, query scale and softcap of Gemma 2 and 3. The key
# hidden_act, present in some config.json files, is accepted and not read.
def _gemma2(final_cap: float | None) -> tuple[Any, ...]:
  return (
    parts.choice("hidden_activation", "mlp", _GEGLU, "gelu_pytorch_tanh"),
    parts.Part(("hidden_act",), lambda c: {}, lambda m: {}),
    parts.fixed(norm_placement="both"),
    parts.heads(4, width=256),
    parts.Part(
      ("query_pre_attn_scalar",),
      lambda c: {"query_scale_dim": c.get("query_pre_attn_scalar", 256)},
      lambda m: {"query_pre_attn_scalar": m.query_scale_dim or m.d_head},
    ),
    parts.same("final_logit_softcapping", "logit_softcap", final_cap),
  )


def _qwen_windows() -> parts.Part:
  return parts.windows(
    lambda c, i: i >= c.get("max_window_layers", 28),
    "max_window_layers",
    switch="use_sliding_window",
  )


def _gemma3_types(c: parts.Content, i: int) -> bool:
  pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern")
  return (i + 1) % (pattern or 6) != 0


_OLMO = (
  *_rms(tied=False, epsilon=1e-5),
  parts.heads(),
  _SILU,
  _ATTENTION_BIAS,
  parts.fixed(norm_placement="post", qk_norm="projection"),
)

_MODERN_ACTIVATION = parts.choice("hidden_activation", "mlp", _GEGLU, "gelu")


def _head_activation(layers: parts.Part) -> parts.Part:
  """classifier_activation: in lm.model the head has that of the `layers`."""
  theirs, (key,) = "classifier_activation", layers.keys

  def read(c: parts.Content) -> dict[str, Any]:
    wanted = parts.get(c, key, "gelu")
    parts.check(theirs, parts.get(c, theirs, "gelu"), (wanted,))
    return {}

  return parts.Part((theirs,), read, lambda m: {theirs: layers.write(m)[key]})


_ENCODER = (
  parts.fixed(causal=False, embedding_norm=True, head_transform=True),
  parts.must("is_decoder", False),
)

# If several families can express a model, the first of them is exported.
FAMILIES: tuple[Family, ...] = (
  Family(
    "llama",
    "LlamaForCausalLM",
    (
      *_rms(tied=False),
      parts.heads(),
      _SILU,
      _ATTENTION_BIAS,
      _MLP_BIAS,
      rope.everywhere(10_000.0),
    ),
    tables.LLAMA,
  ),
  Family(
    "gpt2",
    "GPT2LMHeadModel",
    (
      parts.same("vocab_size", "vocab_size"),
      parts.same("n_positions", "context_length"),
      parts.same("n_embd", "d_model"),
      parts.same("n_layer", "n_layers"),
      parts.Part(
        ("n_head", "n_inner"),
        lambda c: {
          "n_heads": parts.get(c, "n_head"),
          "n_kv_heads": parts.get(c, "n_head"),
          "d_head": parts.get(c, "n_embd") // parts.get(c, "n_head"),
          "d_mlp": c.get("n_inner") or 4 * parts.get(c, "n_embd"),
        },
        lambda m: {"n_head": m.n_heads, "n_inner": m.d_mlp},
      ),
      parts.same("layer_norm_epsilon", "norm_epsilon", 1e-5),
      parts.choice("activation_function", "mlp", _GELU_TANH, "gelu_new"),
      parts.same("tie_word_embeddings", "tied_embedding", True),
      parts.fixed(
        norm="layernorm", positions="learned", biases=family.ALL_BIASES
      ),
      parts.must("scale_attn_weights", True),
      parts.must("scale_attn_by_inverse_layer_idx", False),
      parts.ignored(
        resid_pdrop=lambda m: m.residual_dropout,
        embd_pdrop=lambda m: m.embedding_dropout,
        attn_pdrop=lambda m: 0.0,
      ),
    ),
    tables.GPT2,
    prefix="transformer.",
    extras=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
  ),
  Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (
      *_rms(tied=False),
      parts.heads(32, width=128),
      _SILU,
      _ATTENTION_BIAS,
      parts.fixed(qk_norm="head"),
      rope.everywhere(10_000.0),
      _qwen_windows(),
    ),
    tables.LLAMA,
  ),
  Family(
    "mistral",
    "MistralForCausalLM",
    (
      *_rms(tied=False),
      parts.heads(8),
      _SILU,
      rope.everywhere(10_000.0),
      parts.window(4096),
    ),
    tables.LLAMA,
  ),
  Family(
    "qwen2",
    "Qwen2ForCausalLM",
    (
      *_rms(tied=False),
      parts.heads(32),
      _SILU,
      parts.fixed(biases=("qkv",)),
      rope.everywhere(10_000.0),
      _qwen_windows(),
    ),
    tables.LLAMA,
  ),
  Family(
    "gemma",
    "GemmaForCausalLM",
    _gemma(
      # For `gelu`, transformers computes the tanh approximation in Gemma 1.
      parts.choice(
        "hidden_act",
        "mlp",
        {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"},
        "gelu_pytorch_tanh",
      ),
      parts.must("hidden_activation", None, "gelu_pytorch_tanh"),
      parts.heads(16, width=256),
      rope.everywhere(10_000.0),
    ),
    tables.LLAMA,
  ),
  Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _gemma(
      *_gemma2(30.0),
      parts.same("attn_logit_softcapping", "attention_softcap", 50.0),
      rope.everywhere(10_000.0),
      parts.windows(lambda c, i: i % 2 == 0, "sliding_window_size"),
    ),
    tables.GEMMA,
  ),
  Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _gemma(
      *_gemma2(None),
      # transformers has the key in Gemma 3 too, and does not compute with it.
      parts.must("attn_logit_softcapping", None),
      parts.fixed(qk_norm="head"),
      rope.by_type(1_000_000.0, 10_000.0, "rope_local_base_freq"),
      parts.windows(
        _gemma3_types, "sliding_window_pattern", "_sliding_window_pattern"
      ),
    ),
    tables.GEMMA,
  ),
  Family(
    "olmo2",
    "Olmo2ForCausalLM",
    (*_OLMO, rope.everywhere(10_000.0)),
    tables.OLMO,
  ),
  Family(
    "olmo3",
    "Olmo3ForCausalLM",
    (
      *_OLMO,
      rope.by_type(500_000.0, None),
      parts.windows(lambda c, i: (i + 1) % 4 != 0),
    ),
    tables.OLMO,
  ),
  Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    (
      *_rms(tied=True),
      parts.heads(4),
      _SILU,
      _ATTENTION_BIAS,
      _MLP_BIAS,
      rope.everywhere(2_000_000.0),
      parts.nope(),
      parts.windows(
        lambda c, i: not parts.has_rope(c, i),
        "max_window_layers",
        default=None,
        switch="use_sliding_window",
      ),
    ),
    tables.LLAMA,
  ),
  Family(
    "phi3",
    "Phi3ForCausalLM",
    (
      *_rms(tied=False, epsilon=1e-5),
      parts.heads(),
      _SILU,
      rope.everywhere(10_000.0, partial=True),
      parts.window(),
      parts.must("attention_bias", False),
      parts.must("mlp_bias", False),
      parts.must("lm_head_bias", False),
      parts.must("interpolate_factor", 1),
      parts.must("full_attn_mod", 1),
    ),
    tables.PHI3,
  ),
  Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    (
      *_sizes(tied=True, norm="norm_epsilon", epsilon=1e-5),
      parts.heads(2),
      parts.choice("hidden_act", "mlp", _GELU_TANH, "gelu_pytorch_tanh"),
      parts.biases("use_bias", "qkv", "o", "mlp", default=True),
      parts.fixed(norm="layernorm", biases=("norm",)),
      rope.everywhere(10_000.0),
      parts.window(),
      parts.must("mlp_type", "default"),
      parts.must("norm_type", "layer_norm"),
      parts.ignored(
        residual_dropout=lambda m: m.residual_dropout,
        embedding_dropout=lambda m: m.embedding_dropout,
      ),
    ),
    tables.STARCODER2,
  ),
  Family(
    "bert",
    "BertForMaskedLM",
    (
      *_sizes(tied=True, norm="layer_norm_eps", epsilon=1e-12),
      parts.heads(),
      parts.choice("hidden_act", "mlp", _GELU_TANH, "gelu"),
      parts.fixed(norm="layernorm", norm_placement="residual"),
      parts.fixed(
        positions="learned", biases=family.ALL_BIASES, head_bias=True
      ),
      *_ENCODER,
      parts.must("type_vocab_size", 2),
      parts.must("position_embedding_type", "absolute"),
    ),
    tables.BERT,
    prefix="bert.",
    head="cls.predictions.decoder.weight",
    extras=r"bert\.(pooler\.dense|embeddings\.position_ids).*"
    r"|cls\.seq_relationship\..*|cls\.predictions\.decoder\.bias",
  ),
  Family(
    "modernbert",
    "ModernBertForMaskedLM",
    (
      *_sizes(tied=True, norm="norm_eps", epsilon=1e-5),
      parts.heads(),
      _MODERN_ACTIVATION,
      _head_activation(_MODERN_ACTIVATION),
      parts.fixed(norm="layernorm", first_attention_norm=False),
      parts.biases("norm_bias", "norm", default=False),
      _ATTENTION_BIAS,
      # In transformers mlp_bias also adds a bias to the head's dense layer.
      parts.must("mlp_bias", False),
      parts.must("classifier_bias", False),
      parts.same("decoder_bias", "head_bias", True),
      *_ENCODER,
      parts.windows(
        lambda c, i: i % c.get("global_attn_every_n_layers", 3) != 0,
        "global_attn_every_n_layers",
        default=128,
        reach="local_attention",
      ),
      rope.by_type(
        160_000.0, 10_000.0, "local_rope_theta", "global_rope_theta"
      ),
    ),
    tables.MODERNBERT,
    head="decoder.weight",
  ),
)
BY_NAME = {one.model_type: one for one in FAMILIES}

_EXPERTS = "is a mixture of experts, which lm.model does not have yet"
_ENCODER_DECODER = (
  "is an encoder-decoder; lm trains the objective of T5 in a decoder: a source "
  "'...|span_corruption'"
)
_REFUSED = {
  **dict.fromkeys(
    ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "phimoe"),
    _EXPERTS,
  ),
  **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "bart"), _ENCODER_DECODER),
  **dict.fromkeys(
    ("gemma3n", "llava", "mistral3", "paligemma", "qwen2_vl", "qwen2_5_vl"),
    "reads images, too, and only of gemma3 is the text part read alone",
  ),
}


def find(model_type: Any) -> Family:
  """Returns the family `model_type`; raises ConfigError if not supported."""
  said = f"config.json: model_type={model_type!r}: "
  if isinstance(model_type, str) and model_type in BY_NAME:
    return BY_NAME[model_type]
  if isinstance(model_type, str) and model_type in _REFUSED:
    raise schema.ConfigError(f"{said}{_REFUSED[model_type]}")
  raise schema.ConfigError(
    f"{said}not supported; supported are "
    f"{', '.join([*BY_NAME, *multimodal.BY_NAME])}"
  )
