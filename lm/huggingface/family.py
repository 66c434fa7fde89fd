"""The class Family: a map of config.json and a table of tensors."""

import dataclasses
import re
from typing import Any

from lm import config as config_lib
from lm import files, schema, validation
from lm.huggingface import parts, tables

ALL_BIASES = ("qkv", "o", "mlp", "norm")


@dataclasses.dataclass(frozen=True)
class Family:
  """A family; `model_type` and `architecture` are values in config.json.

  Tensor names begin with `prefix`, except in files of a model without its head.
  `head` names the tensor of the output head: with tied embeddings, a file may
  hold the head if the head equals the embedding. The pattern `extras` matches
  the names of tensors without parameters, such as masks.
  """

  model_type: str
  architecture: str
  settings: tuple[parts.Part, ...]
  rows: tuple[tables.Row, ...]
  prefix: str = "model."
  head: str = "lm_head.weight"
  extras: str = r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

  def read(self, content: parts.Content) -> config_lib.ModelConfig:
    """Returns the ModelConfig of a config.json. Raises ConfigError on unknown
    keys and on values without an equivalent in ModelConfig.
    """
    known = {key for part in self.settings for key in part.keys}
    require_known(content, known, self.model_type)
    try:
      return validation.check_model(self.map(content))
    except schema.ConfigError as error:
      said = str(error).removeprefix("config.json: ")
      raise schema.ConfigError(f"config.json: {said}") from error

  def map(self, content: parts.Content) -> config_lib.ModelConfig:
    """Like `read`, without the check for unknown keys and between fields."""
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
    """Returns config.json for the model. Settings beyond the family are lost
    without an error: `expressible.lost` finds them.
    """
    found: dict[str, Any] = {
      "architectures": [self.architecture],
      "model_type": self.model_type,
    }
    for part in self.settings:
      found |= part.write(model)
    return found

  def is_extra(self, name: str) -> bool:
    """Whether the tensor `name` of a checkpoint holds no parameters."""
    return re.fullmatch(self.extras, name) is not None


def require_known(
  content: parts.Content, known: set[str], model_type: str
) -> None:
  """Raises ConfigError on a set key outside of `known` and `HARMLESS`."""
  for key, value in content.items():
    if value and key not in known | HARMLESS:
      raise schema.ConfigError(
        f"config.json: {key}={schema.shown(value)}: unknown to the family "
        f"{model_type!r}, and may change the model; remove it if it does not"
      )


# Keys without effect on logits: metadata, training, generation, code to load.
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
