"""Fine-tunes GPT-2 (124M) on conversations, all weights.

  hf download openai-community/gpt2 --local-dir models/gpt2
  python -m lm.train --config=configs/finetune_gpt2.py --workdir=runs/gpt2_chat
  python -m lm.serve --workdir=runs/gpt2_chat
  python -m lm.convert --from=runs/gpt2_chat --to=models/gpt2_chat

The conversations are those that this project makes of the Python standard
library; for others:

  --config.data.train='("jsonl:mine.jsonl|chat",)' \\
  --config.data.validation='("jsonl:held_out.jsonl|chat",)'

Hardware: one accelerator of 16 GB.
Evidence: not measured, without the weights at hand. tests/test_finetune.py runs
these commands on small random weights.
"""

import pathlib

from lm import config as config_lib
from lm.huggingface import published

HERE = pathlib.Path(__file__).parent


def get_config() -> config_lib.Config:
  c = config_lib.Config()
  c.init_from = "models/gpt2"
  c.model = published.model("gpt2")
  c.model.dtype = "bfloat16"
  c.model.remat = "dots"
  c.tokenizer.kind = "huggingface"
  c.tokenizer.chat_template = str(HERE / "plain.jinja")
  c.data.train = ("instruct:python_stdlib:train|chat",)
  c.data.validation = ("instruct:python_stdlib:validation|chat",)
  c.data.epochs = 3

  c.optimizer.name = "adamw"
  c.optimizer.peak_lr = 5e-5
  c.optimizer.b2 = 0.999
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup_steps = 20
  c.train.steps = 100_000  # or as many as three epochs have
  c.train.batch_size = 16
  c.train.sequence_length = 1024
  c.train.eval_every = 100
  c.checkpoint.save_every = 100
  return c
