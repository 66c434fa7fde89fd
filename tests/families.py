"""One tiny config per published family, sizes as prime as each family allows.

V 37, F 29, T <= 23; G differs from K; the smallest windows and caps that bite.
"""

import dataclasses
import pathlib

import numpy as np

from lm import batch as batch_lib
from lm import config as config_lib

GPT2 = config_lib.ModelConfig(
  vocab_size=37,
  n_layers=2,
  d_model=21,
  n_heads=3,
  n_kv_heads=3,
  d_head=7,
  d_mlp=29,
  context_length=23,
  norm="layernorm",
  norm_epsilon=1e-5,
  mlp="gelu",
  biases=("qkv", "o", "mlp", "norm"),
  positions="learned",
)

# The rotary planes have wavelengths 6, 16, 40, 100 and 250: scaling keeps two,
# bends one and stretches two.
LLAMA3 = config_lib.ModelConfig(
  vocab_size=37,
  n_layers=2,
  d_model=18,
  n_heads=6,
  n_kv_heads=2,
  d_head=10,
  d_mlp=29,
  context_length=23,
  norm_epsilon=1e-5,
  mlp="swiglu",
  rope_theta=100.0,
  rope_scaling=config_lib.RopeScaling(
    factor=8.0,
    low_frequency_factor=1.0,
    high_frequency_factor=4.0,
    original_length=64,
  ),
  tied_embedding=False,
)

QWEN3 = config_lib.ModelConfig(
  vocab_size=37,
  n_layers=2,
  d_model=18,
  n_heads=6,
  n_kv_heads=2,
  d_head=10,
  d_mlp=29,
  context_length=23,
  norm_epsilon=1e-5,
  qk_norm="head",
  mlp="swiglu",
  rope_theta=100.0,
)

GEMMA2 = config_lib.ModelConfig(
  vocab_size=37,
  n_layers=3,
  d_model=18,
  n_heads=6,
  n_kv_heads=2,
  d_head=10,
  d_mlp=29,
  context_length=23,
  norm_unit_offset=True,
  norm_placement="both",
  mlp="geglu",
  rope_theta=100.0,
  windows=(5, None),
  query_scale_dim=7,
  attention_softcap=2.0,
  logit_softcap=3.0,
  scale_embedding=True,
)

# Eight layers: the pattern of six starts again and stops within.
GEMMA3 = config_lib.ModelConfig(
  vocab_size=37,
  n_layers=8,
  d_model=18,
  n_heads=6,
  n_kv_heads=2,
  d_head=10,
  d_mlp=29,
  context_length=23,
  norm_unit_offset=True,
  norm_placement="both",
  qk_norm="head",
  mlp="geglu",
  rope_theta=100.0,
  rope_scaling=LLAMA3.rope_scaling,
  rope_theta_windowed=20.0,
  windows=(5, 5, 5, 5, 5, None),
  query_scale_dim=7,
  scale_embedding=True,
)

QWEN2 = dataclasses.replace(QWEN3, qk_norm=None, biases=("qkv",))

STARCODER2 = dataclasses.replace(
  QWEN2,
  norm="layernorm",
  mlp="gelu",
  biases=("qkv", "o", "mlp", "norm"),
  windows=(5,),
)

# The windowed layers have a base of their own, which is the same, and so none
# of YaRN. Its blend is of two of the five planes.
OLMO3 = dataclasses.replace(
  QWEN2,
  n_layers=5,
  biases=(),
  norm_placement="post",
  qk_norm="projection",
  rope_scaling=config_lib.RopeScaling(
    kind="yarn", factor=8.0, beta_fast=4.0, beta_slow=0.5, original_length=64
  ),
  rope_theta_windowed=100.0,
  windows=(5, 5, 5, None),
  tied_embedding=False,
)

# Three of five planes rotate, with the long divisors: rows are longer than 16.
PHI3 = dataclasses.replace(
  QWEN2,
  d_model=20,
  n_heads=2,
  n_kv_heads=1,
  biases=(),
  rotary_fraction=0.6,
  rope_scaling=config_lib.RopeScaling(
    kind="longrope",
    factor=23 / 16,
    original_length=16,
    short_factors=(1.0, 1.5, 2.0),
    long_factors=(1.0, 3.0, 7.0),
  ),
  windows=(11,),
)

SMOLLM3 = dataclasses.replace(
  QWEN2, n_layers=6, biases=(), rope_layers=(True, True, True, False)
)

BERT = dataclasses.replace(
  GPT2,
  causal=False,
  norm_placement="residual",
  embedding_norm=True,
  mlp="gelu_exact",
  head_transform=True,
  head_bias=True,
)

MODERNBERT = dataclasses.replace(
  BERT,
  n_layers=5,
  d_model=20,
  n_heads=2,
  n_kv_heads=2,
  d_head=10,
  norm_placement="pre",
  first_attention_norm=False,
  mlp="geglu_exact",
  biases=(),
  positions="rope",
  rope_theta=100.0,
  rope_theta_windowed=20.0,
  windows=(None, 5, 5),
)

# Families that transformers implements too: the golden file has their logits.
PUBLISHED = {
  "gpt2": GPT2,
  "llama3": LLAMA3,
  "qwen3": QWEN3,
  "gemma2": GEMMA2,
  "gemma3": GEMMA3,
  "qwen2": QWEN2,
  "starcoder2": STARCODER2,
  "olmo3": OLMO3,
  "phi3": PHI3,
  "smollm3": SMOLLM3,
  "bert": BERT,
  "modernbert": MODERNBERT,
}

# What no single family has together: LayerNorm without biases, one kv head.
RELU2 = config_lib.ModelConfig(
  vocab_size=37,
  n_layers=2,
  d_model=17,
  n_heads=5,
  n_kv_heads=1,
  d_head=6,
  d_mlp=29,
  context_length=23,
  norm="layernorm",
  qk_norm="head",
  mlp="relu2",
  rope_theta=100.0,
)

# Biases everywhere that they can be; fewer layers than windows.
BIASED = config_lib.ModelConfig(
  vocab_size=37,
  n_layers=2,
  d_model=17,
  n_heads=6,
  n_kv_heads=3,
  d_head=10,
  d_mlp=29,
  context_length=23,
  norm="layernorm",
  norm_placement="both",
  qk_norm="head",
  mlp="geglu",
  biases=("qkv", "o", "mlp", "norm"),
  rope_theta=100.0,
  windows=(3, None, 2),
  tied_embedding=False,
)

# Norms after the sum, exact GELU; two patterns, of three and of two layers.
RESIDUAL = dataclasses.replace(
  STARCODER2,
  n_layers=8,
  norm_placement="residual",
  qk_norm="projection",
  mlp="gelu_exact",
  biases=("o", "norm"),
  rope_layers=(False, True, True),
  rope_scaling=config_lib.RopeScaling(kind="linear", factor=3.0),
  windows=(5, None),
)

ALL = PUBLISHED | {"relu2": RELU2, "biased": BIASED, "residual": RESIDUAL}


DECODERS = {name: cfg for name, cfg in ALL.items() if cfg.causal}


def packed_batch(
  lengths: list[list[int]],
  n_tokens: int,
  vocab_size: int,
  seed: int = 0,
  *,
  prefix: bool = True,
) -> batch_lib.Batch:
  """Rows of documents of these lengths, padded to n_tokens.

  About a third of each document is its prefix, where there is to be one;
  padding has random tokens, so that reading it shows.
  """
  rng = np.random.default_rng(seed)
  shape = (len(lengths), n_tokens)
  batch = batch_lib.empty(*shape, prefix=prefix)
  batch.inputs[:] = rng.integers(vocab_size, size=shape, dtype=np.int32)
  for row, documents in enumerate(lengths):
    start = 0
    for segment, length in enumerate(documents, 1):
      here = (row, slice(start, start + length))
      batch.segments[here] = segment
      batch.positions[here] = np.arange(length)
      if prefix:
        batch.prefix[row, start : start + (length + 1) // 3] = True
      start += length
  return batch


def golden(name: str) -> tuple[dict, np.ndarray, np.ndarray]:
  """(float32 params, inputs [B, T], float64 logits [B, T, V]) by transformers.

  Raises FileNotFoundError where tests/goldens/hf_tiny.npz is missing.
  """
  params: dict = {}
  with np.load(pathlib.Path(__file__).parent / "goldens/hf_tiny.npz") as file:
    prefix = f"{name}/params/"
    for key in file:
      if key.startswith(prefix):
        *parents, leaf = key.removeprefix(prefix).split("/")
        node = params
        for parent in parents:
          node = node.setdefault(parent, {})
        node[leaf] = file[key]
    return params, file[f"{name}/inputs"], file[f"{name}/logits"]
