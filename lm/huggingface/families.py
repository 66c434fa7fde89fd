"""Families of models: how config.json and tensors map to ours, both ways.

A family is its parts of config.json and its table of tensors; a new family is
an entry of `FAMILIES`. Defaults are those of transformers 5.24.
"""

import dataclasses
import re
from typing import Any

from lm import config as config_lib
from lm import files, schema, validation
from lm.huggingface import parts, rope, tables


@dataclasses.dataclass(frozen=True)
class Family:
  """`model_type` and `architecture` as in config.json. `extras` is a pattern of
  tensors that hold no parameters; `prefix` of tensors of the model without its
  head, which some files leave out.
  """

  model_type: str
  architecture: str
  settings: tuple[parts.Part, ...]
  rows: tuple[tables.Row, ...]
  prefix: str = "model."
  extras: str = r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

  def read(self, content: parts.Content) -> config_lib.ModelConfig:
    """The model of a config.json. Raises ConfigError on a key or a value that
    stands for another model than ours can be.
    """
    known = {key for part in self.settings for key in part.keys} | HARMLESS
    for key, value in content.items():
      if value and key not in known:
        raise schema.ConfigError(
          f"config.json: {key}={schema.shown(value)}: unknown to the family "
          f"{self.model_type!r}, and may change the model; remove it if it "
          "does not"
        )
    try:
      return validation.check_model(self.map(content))
    except schema.ConfigError as error:
      said = str(error).removeprefix("config.json: ")
      raise schema.ConfigError(f"config.json: {said}") from error

  def map(self, content: parts.Content) -> config_lib.ModelConfig:
    """`read` without any check between fields."""
    fields: dict[str, Any] = {}
    biases: tuple[Any, ...] = ()
    try:
      for part in self.settings:
        found = part.read(content)
        fields |= found
        biases += found.get("biases", ())
    except (TypeError, ValueError, LookupError, ZeroDivisionError) as error:
      raise schema.ConfigError(
        f"config.json: a value is of the wrong type ({files.first_line(error)})"
      ) from error
    fields["biases"] = tuple(part for part in ALL_BIASES if part in biases)
    kind = config_lib.ModelConfig
    return kind(
      **{name: parts.as_declared(kind, name, x) for name, x in fields.items()}
    )

  def write(self, model: config_lib.ModelConfig) -> dict[str, Any]:
    """config.json of the model, as far as the family has it."""
    found: dict[str, Any] = {
      "architectures": [self.architecture],
      "model_type": self.model_type,
    }
    for part in self.settings:
      found |= part.write(model)
    return found

  def is_extra(self, name: str) -> bool:
    """Whether a tensor of a checkpoint holds no parameters."""
    return re.fullmatch(self.extras, name) is not None


# Keys that change no logits: metadata, training, generation, code to run.
HARMLESS = set(
  "_attn_implementation _name_or_path architectures attention_dropout"
  " attn_pdrop auto_map bos_token_id cache_implementation"
  " chunk_size_feed_forward dtype embd_pdrop embedding_dropout eos_token_id"
  " gradient_checkpointing"
  " id2label initializer_range label2id max_length model_type n_ctx"
  " name_or_path num_labels output_attentions output_hidden_states pad_token_id"
  " pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop"
  " residual_dropout return_dict scale_attention_softmax_in_fp32"
  " attention_softmax_in_fp32 summary_activation summary_first_dropout"
  " summary_proj_to_labels summary_type summary_use_proj task_specific_params"
  " torch_dtype transformers_version use_cache".split()
)

# --- config.json -------------------------------------------------------------

ALL_BIASES = ("qkv", "o", "mlp", "norm")
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


# Activation, norms, scale and caps of Gemma 2 and 3. They do not read
# hidden_act, which some files have, too.
def _gemma2(cap: float | None, final_cap: float | None) -> tuple[Any, ...]:
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
    parts.same("attn_logit_softcapping", "attention_softcap", cap),
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

# In the order in which a model that several families can express is exported.
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
      parts.fixed(norm="layernorm", positions="learned", biases=ALL_BIASES),
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
      # transformers takes `gelu` for the tanh form here.
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
      *_gemma2(50.0, 30.0),
      rope.everywhere(10_000.0),
      parts.windows(lambda c, i: i % 2 == 0, "sliding_window_size"),
    ),
    tables.GEMMA,
  ),
  Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _gemma(
      *_gemma2(None, None),
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
)
BY_NAME = {family.model_type: family for family in FAMILIES}

_EXPERTS = "is a mixture of experts, which lm.model does not have yet"
_ENCODER_DECODER = (
  "is an encoder-decoder; lm trains the objective of T5 in a decoder: a source "
  "'...|span_corruption'"
)
_BERT = (
  "needs a norm of the embeddings and a masked-LM head of its own, which "
  "lm.model does not have"
)
_REFUSED = {
  **dict.fromkeys(
    ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "phimoe"),
    _EXPERTS,
  ),
  **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "bart"), _ENCODER_DECODER),
  **dict.fromkeys(("bert", "modernbert", "roberta"), _BERT),
  "gemma3": "reads images, too; only its text part 'gemma3_text' is supported",
}


def find(model_type: Any) -> Family:
  """The family of a config.json; raises ConfigError if there is none."""
  said = f"config.json: model_type={model_type!r}: "
  if isinstance(model_type, str) and model_type in BY_NAME:
    return BY_NAME[model_type]
  if isinstance(model_type, str) and model_type in _REFUSED:
    raise schema.ConfigError(f"{said}{_REFUSED[model_type]}")
  raise schema.ConfigError(
    f"{said}not supported; supported are {', '.join(BY_NAME)}"
  )
