"""Published settings of models often fine-tuned.

An entry holds the keys of the published config.json with an effect on logits,
and is read like any config.json.
"""

from typing import Any

from lm import config as config_lib
from lm import schema
from lm.huggingface import families

CONFIGS: dict[str, dict[str, Any]] = {
  # huggingface.co/openai-community/gpt2
  "gpt2": {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
  },
  # huggingface.co/meta-llama/Llama-3.2-1B
  "llama3.2-1b": {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
      "rope_type": "llama3",
      "factor": 32.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
  },
  # huggingface.co/Qwen/Qwen3-0.6B
  "qwen3-0.6b": {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
  },
}


def model(name: str) -> config_lib.ModelConfig:
  """Returns the ModelConfig of an entry; raises ConfigError if unknown."""
  if name not in CONFIGS:
    raise schema.ConfigError(
      f"published model: {schema.unknown(name, CONFIGS)}"
    )
  content = CONFIGS[name]
  return families.find(content["model_type"]).read(content)
