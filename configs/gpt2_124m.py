"""GPT-2 small (124,439,808 parameters), with nanoGPT's schedule, on C4.

  pip install huggingface_hub
  hf download allenai/c4 --repo-type dataset --include 'en/*.gz' --local-dir c4
  python -m lm.train --config=configs/gpt2_124m.py --workdir=runs/gpt2_124m

Data: C4's English part, 1024 and 8 files, 305 GB, in ./c4.
Hardware: 8 accelerators of 40 GB; 12 sequences each, five times a step.
Size: 491,520 tokens a step; 295e9 tokens and 2.2e20 FLOPs (6 N D) in the run.
Evidence: not measured yet.
"""

from lm import config as config_lib


def get_config() -> config_lib.Config:
  config = config_lib.Config()
  model = config.model
  model.vocab_size = 50_257
  model.n_layers = 12
  model.d_model = 768
  model.n_heads, model.n_kv_heads, model.d_head = 12, 12, 64
  model.d_mlp = 3072
  model.context_length = 1024
  model.norm = "layernorm"
  model.norm_epsilon = 1e-5
  model.mlp = "gelu"
  model.biases = ("qkv", "o", "mlp", "norm")
  model.positions = "learned"
  model.tied_embedding = True
  model.dtype = "bfloat16"

  config.tokenizer.train_bytes = 100_000_000
  config.data.train = ("jsonl:c4/en/c4-train.*.json.gz#text",)
  config.data.validation = ("jsonl:c4/en/c4-validation.*.json.gz#text",)

  optimizer = config.optimizer
  optimizer.name = "adamw"
  optimizer.peak_lr = 6e-4
  optimizer.b2 = 0.95
  optimizer.weight_decay = 0.1
  optimizer.schedule = "cosine"
  optimizer.warmup_steps = 2000
  optimizer.final_lr_fraction = 0.1

  train = config.train
  train.steps = 600_000
  train.batch_size = 480
  train.sequence_length = 1024
  train.microbatches = 5
  train.eval_every = 1000
  train.eval_batches = 100
  config.checkpoint.save_every = 1000
  return config
