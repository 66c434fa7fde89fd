"""Families of Hugging Face against transformers: logits, gradients, tokens."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from lm import batch as batch_lib
from lm.huggingface import folder
from lm.model import decoder

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
COMMON = SPECIAL | {
  "vocab_size": 37,
  "hidden_size": 24,
  "intermediate_size": 29,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "max_position_embeddings": 48,
  "initializer_range": 0.3,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 100.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 100.0,
  "factor": 4.0,
  "original_max_position_embeddings": 12,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}


def longrope(rotary):
  return {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0 + 0.1 * i for i in range(rotary // 2)],
    "long_factor": [2.0 + i for i in range(rotary // 2)],
    "original_max_position_embeddings": 16,
  }


def case(name, change=None, **fields):
  """A config of transformers: the class `name`, with `fields` over COMMON."""
  return name, {**COMMON, **fields}, change


CASES = {
  "gpt2": (
    "GPT2",
    SPECIAL
    | {
      "vocab_size": 37,
      "n_positions": 48,
      "n_embd": 21,
      "n_layer": 2,
      "n_head": 3,
      "n_inner": 29,
      "initializer_range": 0.3,
    },
    None,
  ),
  "llama1": case("Llama", num_key_value_heads=6),
  "llama3": case("Llama", rope_parameters=LLAMA3, head_dim=10),
  "llama_tied_biased": case(
    "Llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True
  ),
  "code_llama": case("Llama", rope_parameters=PLAIN | {"rope_theta": 1e6}),
  "llama_linear": case("Llama", rope_parameters=LINEAR),
  "llama_yarn": case("Llama", rope_parameters=YARN),
  "mistral": case("Mistral", sliding_window=7, head_dim=10),
  "mistral_full": case("Mistral", sliding_window=None),
  "qwen2": case("Qwen2", tie_word_embeddings=True),
  "qwen2_windows": case(
    "Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1
  ),
  "qwen3": case("Qwen3", head_dim=10, tie_word_embeddings=True),
  "qwen3_yarn": case("Qwen3", head_dim=10, rope_parameters=YARN),
  "gemma": case("Gemma", head_dim=10, num_key_value_heads=1),
  "gemma2": case(
    "Gemma2",
    head_dim=10,
    sliding_window=5,
    query_pre_attn_scalar=7,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
  ),
  "gemma3": case(
    "Gemma3Text",
    num_hidden_layers=8,
    head_dim=10,
    sliding_window=5,
    query_pre_attn_scalar=7,
    rope_parameters={
      "full_attention": LINEAR,
      "sliding_attention": PLAIN | {"rope_theta": 20.0},
    },
  ),
  "olmo2": case("Olmo2"),
  "olmo3": case(
    "Olmo3",
    num_hidden_layers=5,
    sliding_window=5,
    rope_parameters={"full_attention": YARN, "sliding_attention": PLAIN},
  ),
  "smollm3": case("SmolLM3", num_hidden_layers=5),
  "phi3": case("Phi3", sliding_window=9),
  "phi3_longrope": case(
    "Phi3",
    hidden_size=48,
    rope_parameters=longrope(8),
    original_max_position_embeddings=16,
  ),
  "phi4_mini": case(
    "Phi3",
    hidden_size=48,
    rope_parameters=longrope(6) | {"partial_rotary_factor": 0.75},
    original_max_position_embeddings=16,
    tie_word_embeddings=True,
  ),
  "starcoder2": case("Starcoder2", sliding_window=9),
}


def reference(name, path, seed=0):
  """A random model of transformers, saved in `path`; every array matters."""
  kind, fields, _ = CASES[name]
  config = getattr(transformers, f"{kind}Config")(
    **fields, attn_implementation="eager"
  )
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for parameter_name, x in model.named_parameters():
      if x.ndim == 1:  # norms and biases, which start as constants
        x += 0.3 * torch.randn_like(x)
      if "embed" in parameter_name or "wte" in parameter_name:
        x *= 2
  model.save_pretrained(path)
  return model


@functools.lru_cache
def _forward(cfg):
  def logits(params, batch):
    x, _ = decoder.forward(cfg, params, batch)
    return decoder.bind(cfg, params).logits(x)

  return jax.jit(logits)


def ours(path, inputs):
  found = folder.find(str(path))
  params = folder.load_on(found)
  return np.asarray(_forward(found.model)(params, batch_lib.unscored(inputs)))


def tokens(rows=2, length=40, seed=1):
  rng = np.random.default_rng(seed)
  return rng.integers(37, size=(rows, length), dtype=np.int32)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, tmp_path):
  """In float32, over more positions than the original length."""
  model = reference(name, tmp_path)
  inputs = tokens()
  with torch.no_grad():
    want = model(torch.tensor(inputs, dtype=torch.int64)).logits.numpy()
  assert want.std() > 0.3
  got = ours(tmp_path, inputs)
  scale = max(1.0, want.std())
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * scale)
