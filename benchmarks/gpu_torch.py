"""PyTorch's side of gpu.py: transformers' Llama, compiled, in bfloat16."""

import os
import time
from collections.abc import Callable

import decode
import torch
import transformers
from transformers.integrations import sdpa_attention

from lm import config as config_lib
from lm.huggingface import families

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama(cfg: config_lib.ModelConfig, attention: str):
  """The model of `cfg`, with random weights in float32."""
  content = families.find("llama").write(cfg)
  ids = dict.fromkeys(("bos_token_id", "eos_token_id"))
  config = transformers.AutoConfig.for_model(
    **content, **ids, attn_implementation=attention
  )
  torch.set_num_threads(os.cpu_count() or 1)
  torch.set_float32_matmul_precision("high")
  torch.manual_seed(0)
  with torch.device(DEVICE):
    return transformers.LlamaForCausalLM(config)


def peak_bytes() -> int | None:
  return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def training(job) -> Callable[..., dict]:
  """Measures rows, tokens of a row and steps."""
  # If it is named "sdpa", a compiled model builds the causal mask, and PyTorch
  # then leaves its flash kernel. For other names transformers builds no mask.
  transformers.AttentionInterface.register(
    "causal_sdpa", sdpa_attention.sdpa_attention_forward
  )
  model = llama(job.config().model, "causal_sdpa").train()
  compiled = torch.compile(model, dynamic=False)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True
  )

  def step(ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(DEVICE, torch.bfloat16):
      loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()

  def measure(rows: int, length: int, n_steps: int) -> dict:
    ids = torch.from_numpy(job.tokens(rows, length)).long().to(DEVICE)
    losses = [float(step(ids)) for _ in range(3)]  # compiles
    started = time.perf_counter()
    for _ in range(n_steps):
      loss = step(ids)
    float(loss)  # waits for the device
    seconds = (time.perf_counter() - started) / n_steps
    return {
      "tokens_per_second": rows * length / seconds,
      "first_loss": losses[0],
      "peak_bytes": peak_bytes(),
    }

  return measure


def decoding(job) -> Callable[..., dict]:
  """Measures as decode.py's sides do."""
  model = llama(job.config().model, "sdpa").to(torch.bfloat16)
  run = decode.theirs(model, job.rules, compiled=True)

  def measure(*ask: int) -> dict:
    run(*ask)  # compiles
    return decode.medians(run, *ask) | {"peak_bytes": peak_bytes()}

  return measure
