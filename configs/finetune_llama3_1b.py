"""Fine-tunes Llama 3.2 1B on conversations, by LoRA.

  hf download meta-llama/Llama-3.2-1B --local-dir models/llama3.2-1b
  python -m lm.train --config=configs/finetune_llama3_1b.py \\
    --workdir=runs/llama_chat
  python -m lm.serve --workdir=runs/llama_chat
  python -m lm.convert --from=runs/llama_chat --to=models/llama_chat

All weights: --config.model.lora=None --config.optimizer.peak_lr=2e-5. Other
conversations: see configs/finetune_gpt2.py.

Hardware: one accelerator of 24 GB; for all weights 80 GB, or several by
--config.mesh.fsdp.
Evidence: not measured, without the weights at hand. tests/test_finetune.py runs
these commands on small random weights.
"""

import pathlib

from lm import cli
from lm import config as config_lib
from lm.huggingface import published

HERE = pathlib.Path(__file__).parent


def get_config() -> config_lib.Config:
  c = cli.load(str(HERE / "finetune_gpt2.py"))
  c.init_from = "models/llama3.2-1b"
  c.model = published.model("llama3.2-1b")
  c.model.dtype = "bfloat16"
  c.model.remat = "dots"
  c.model.lora = config_lib.LoraConfig(rank=16, alpha=32)
  c.tokenizer.chat_template = str(HERE / "llama3.jinja")
  c.optimizer.peak_lr = 2e-4
  c.train.sequence_length = 2048
  return c
