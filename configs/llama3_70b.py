"""The shape of Llama 3 70B (70,553,706,496 parameters), on C4.

  pip install huggingface_hub
  hf download allenai/c4 --repo-type dataset --include 'en/*.gz' --local-dir c4
  python -m lm.train --config=configs/llama3_70b.py --workdir=runs/llama3_70b

Data: C4's English part, 1024 and 8 files, 305 GB, in ./c4.
Hardware: 1024 accelerators, a sequence each.
Size: 8.4e6 tokens a step; 1.4e12 tokens (20 a parameter)
and 6.0e23 FLOPs (6 N D).
Evidence: not measured yet.
"""

from lm import config as config_lib


def get_config() -> config_lib.Config:
  config = config_lib.Config()
  model = config.model
  model.vocab_size = 128_256
  model.n_layers = 80
  model.d_model = 8192
  model.n_heads, model.n_kv_heads, model.d_head = 64, 8, 128
  model.d_mlp = 28_672
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
  optimizer.peak_lr = 1.5e-4
  optimizer.b2 = 0.95
  optimizer.weight_decay = 0.1
  optimizer.schedule = "cosine"
  optimizer.warmup_steps = 2000
  optimizer.final_lr_fraction = 0.1

  config.mesh.data = 1
  config.mesh.fsdp = None

  train = config.train
  train.steps = 170_000
  train.batch_size = 1024
  train.sequence_length = 8192
  train.eval_every = 1000
  config.checkpoint.save_every = 1000
  return config
