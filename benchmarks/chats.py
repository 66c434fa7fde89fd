"""Tokens per second of chats, with their targets, from messages to ids.

  python benchmarks/chats.py --workdir=runs/chat

Encodes the embedded instruction pairs by the tokenizer and the chat template of
a run, and compares with the speed of the run's steps.
"""

import argparse
import os
import statistics
import time

import turns

from lm import checkpoint
from lm.data import chat, sources
from lm.data import tokenizer as tokenizer_lib
from lm.train import metrics


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", default="runs/chat")
  options = parser.parse_args()
  meta = checkpoint.load_meta(options.workdir)
  tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  source = sources.open_source(
    "instruct:python_stdlib:train", meta.config.data, chat=True
  )
  found = [source[i] for i in range(len(source))]
  chats = [d.messages for d in found if isinstance(d, sources.Conversation)]
  started = time.perf_counter()
  encoded = chat.encode_batch(tokenizer, chats, os.cpu_count() or 1)
  seconds = time.perf_counter() - started
  n = sum(len(pair[0]) for pair in encoded if isinstance(pair, tuple))
  reports = metrics.read(options.workdir)
  speed = statistics.median(r["tokens_per_second"] for r in reports)
  print(
    f"{n / seconds:,.0f} tokens/s of {len(chats):,} conversations, "
    f"{n / seconds / speed:.0f} times the {speed:,.0f} of the run's steps"
  )


if __name__ == "__main__":
  turns.run(main)
