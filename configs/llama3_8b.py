"""The shape of Llama 3 8B (8,030,261,248 parameters), on C4.

  pip install huggingface_hub
  hf download allenai/c4 --repo-type dataset --include 'en/*.gz' --local-dir c4
  python -m lm.train --config=configs/llama3_8b.py --workdir=runs/llama3_8b

Data: C4's English part, 1024 and 8 files, 305 GB, in ./c4.
Hardware: 64 to 512 accelerators, each with a row or more of the batch.
Size: 4.2e6 tokens a step; 168e9 tokens (21 a parameter)
and 8.1e21 FLOPs (6 N D).
Evidence: compiles for v5p:4x4x4 with one row of 8192 tokens a chip: peak
7.9 GiB a chip, 9.7 with model.remat=save_context (python benchmarks/aot.py).
No loss or tokens/s measured.
"""

from lm import config as config_lib


def get_config() -> config_lib.Config:
  config = config_lib.Config()
  model = config.model
  model.vocab_size = 128_256
  model.n_layers = 32
  model.d_model = 4096
  model.n_heads, model.n_kv_heads, model.d_head = 32, 8, 128
  model.d_mlp = 14_336
  model.context_length = 8192
  model.tied_embedding = False
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
  train.steps = 40_000
  train.batch_size = 512
  train.sequence_length = 8192
  train.eval_every = 1000
  config.checkpoint.save_every = 1000
  return config
