"""Holds a conversation with a checkpoint in the terminal.

  python -m lm.chat --workdir=RUN --temperature=0.8

Lines of stdin are the user's messages; the checkpoint's chat template turns the
conversation into a prompt (lm/data/chat.py).
"""

import io
import sys

from absl import flags

from lm import cli, schema
from lm.chat import talk
from lm.sample import flags as sample_flags

_, _request = sample_flags.define_request(
  "n_samples", "alternatives", "processed", "bidirectional_prompt"
)
sample_flags.define_chat_template()
flags.adopt_module_key_flags(sample_flags)  # for --help
_SYSTEM = flags.DEFINE_string("system", None, "System message.")


def main() -> int:
  sample_flags.check()
  request = _request("")
  schema.check_text("--system", _SYSTEM.value or "")
  found, tokenizer = sample_flags.checked([request])
  start = talk.opening(tokenizer, _SYSTEM.value)
  sampler = sample_flags.sampler(found)
  # A line of invalid UTF-8 is refused, and the conversation goes on.
  if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="surrogateescape")
  return talk.talk(sampler, request, start)


if __name__ == "__main__":
  cli.run(main, takes_config=False)
