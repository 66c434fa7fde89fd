"""The shape of Llama 3.2 1B (1,235,814,400 parameters), on C4.

  pip install huggingface_hub
  hf download allenai/c4 --repo-type dataset --include 'en/*.gz' --local-dir c4
  python -m lm.train --config=configs/llama_1b.py --workdir=runs/llama_1b

Data: C4's English part, 1024 and 8 files, 305 GB, in ./c4.
Hardware: 64 accelerators of 32 GB or more, 4 sequences each.
Size: 2.1e6 tokens a step; 25e9 tokens (20 a parameter)
and 1.9e20 FLOPs (6 N D).
Evidence: not measured yet.
"""

from lm import config as config_lib


def get_config() -> config_lib.Config:
  config = config_lib.Config()
  model = config.model
  model.vocab_size = 128_256
  model.n_layers = 16
  model.d_model = 2048
  model.n_heads, model.n_kv_heads, model.d_head = 32, 8, 64
  model.d_mlp = 8192
  model.context_length = 131_072
  model.tied_embedding = True
  model.rope_scaling = config_lib.RopeScaling(factor=32.0)
  model.norm_epsilon = 1e-5
  model.mlp = "swiglu"
  model.rope_theta = 500_000.0
  model.dtype = "bfloat16"
  model.remat = "full"

  config.tokenizer.train_bytes = 1_000_000_000
  config.data.train = ("jsonl:c4/en/c4-train.*.json.gz#text",)
  config.data.validation = ("jsonl:c4/en/c4-validation.*.json.gz#text",)

  optimizer = config.optimizer
  optimizer.name = "adamw"
  optimizer.peak_lr = 3e-4
  optimizer.b2 = 0.95
  optimizer.weight_decay = 0.1
  optimizer.schedule = "cosine"
  optimizer.warmup_steps = 2000
  optimizer.final_lr_fraction = 0.1

  config.mesh.data = 1
  config.mesh.fsdp = None

  train = config.train
  train.steps = 12_000
  train.batch_size = 256
  train.sequence_length = 8192
  train.eval_every = 1000
  config.checkpoint.save_every = 1000
  return config
