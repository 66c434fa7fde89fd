"""The smallest model that trains, for tests and a first look: bytes as tokens.

  python -m lm.train --config=configs/tiny.py --workdir=runs/tiny

Hardware: one CPU core, seconds.
Evidence: not measured yet.
"""

from lm import config as config_lib


def get_config() -> config_lib.Config:
  config = config_lib.Config()
  config.tokenizer.kind = "bytes"
  model = config.model
  model.vocab_size = 384  # of the bytes tokenizer
  model.n_layers = 2
  model.d_model = 32
  model.n_heads, model.n_kv_heads, model.d_head = 4, 2, 8
  model.d_mlp = 64
  model.context_length = 64

  config.optimizer.warmup_steps = 5
  train = config.train
  train.steps = 20
  train.batch_size = 8
  train.sequence_length = 64
  train.log_every = 5
  train.eval_every = 10
  train.eval_batches = 2
  config.checkpoint.save_every = 10
  return config
