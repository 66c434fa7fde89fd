"""Fine-tunes Qwen3 0.6B on conversations, by LoRA.

  hf download Qwen/Qwen3-0.6B --local-dir models/qwen3-0.6b
  python -m lm.train --config=configs/finetune_qwen3_0_6b.py \\
    --workdir=runs/qwen_chat
  python -m lm.serve --workdir=runs/qwen_chat
  python -m lm.convert --from=runs/qwen_chat --to=models/qwen_chat

The template is plain ChatML; Qwen's own leaves earlier reasoning out.
All weights, and other conversations: see configs/finetune_llama3_1b.py.

Hardware: one accelerator of 16 GB; for all weights 40 GB.
Evidence: not measured, without the weights at hand. tests/test_finetune.py runs
these commands on small random weights.
"""

import pathlib

from lm import cli
from lm import config as config_lib
from lm.huggingface import published

HERE = pathlib.Path(__file__).parent


def get_config() -> config_lib.Config:
  c = cli.load(str(HERE / "finetune_llama3_1b.py"))
  c.init_from = "models/qwen3-0.6b"
  c.model = published.model("qwen3-0.6b")
  c.model.dtype = "bfloat16"
  c.model.remat = "dots"
  c.model.lora = config_lib.LoraConfig(rank=16, alpha=32)
  c.tokenizer.chat_template = str(HERE / "chatml.jinja")
  return c
