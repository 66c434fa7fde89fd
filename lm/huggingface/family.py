"""What a family of models is: a map of config.json, and a table of tensors."""

import dataclasses
import re
from typing import Any

from lm import config as config_lib
from lm import files, schema, validation
from lm.huggingface import parts, tables

ALL_BIASES = ("qkv", "o", "mlp", "norm")


@dataclasses.dataclass(frozen=True)
class Family:
  """`model_type` and `architecture` as in config.json. `extras` is a pattern of
  tensors that hold no parameters; `prefix` of tensors of the model without its
  head, which some files leave out. `head` is the tensor of the output head; if
  tied, a file may have it if it equals the embedding.
  """

  model_type: str
  architecture: str
  settings: tuple[parts.Part, ...]
  rows: tuple[tables.Row, ...]
  prefix: str = "model."
  head: str = "lm_head.weight"
  extras: str = r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

  def read(self, content: parts.Content) -> config_lib.ModelConfig:
    """The model of a config.json. Raises ConfigError on a key or a value that
    stands for another model than ours can be.
    """
    known = {key for part in self.settings for key in part.keys}
    require_known(content, known, self.model_type)
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


def require_known(
  content: parts.Content, known: set[str], model_type: str
) -> None:
  """Raises ConfigError on a key that is neither `known` nor harmless."""
  for key, value in content.items():
    if value and key not in known | HARMLESS:
      raise schema.ConfigError(
        f"config.json: {key}={schema.shown(value)}: unknown to the family "
        f"{model_type!r}, and may change the model; remove it if it does not"
      )


# Keys that change no logits: metadata, training, generation, code to run.
HARMLESS = set(
  "_attn_implementation _name_or_path architectures attention_dropout"
  " attn_pdrop auto_map bos_token_id cache_implementation classifier_dropout"
  " classifier_pooling cls_token_id deterministic_flash_attn"
  " attention_probs_dropout_prob hidden_dropout_prob initializer_cutoff_factor"
  " mlp_dropout reference_compile repad_logits_with_grad sep_token_id"
  " sparse_pred_ignore_index sparse_prediction"
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
