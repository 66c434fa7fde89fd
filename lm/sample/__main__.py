"""Continues prompts from a checkpoint.

python -m lm.sample --workdir=RUN --prompt='def main(' --temperature=0.8
"""

import sys
import time

from absl import flags
from rich import console as console_lib

from lm import config as config_lib
from lm import door
from lm.sample import sampler as sampler_lib

_DEFAULTS = sampler_lib.Request()
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of lm.train.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default: the last.")
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "Text to continue; repeat it for several. Default: none."
)
_PROMPT_FILE = flags.DEFINE_multi_string(
  "prompt_file", [], "File whose whole text is one more prompt."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", _DEFAULTS.temperature, "0 always takes the likeliest token."
)
_TOP_K = flags.DEFINE_integer(
  "top_k", _DEFAULTS.top_k, "Draw from the k likeliest tokens; 0: from all."
)
_TOP_P = flags.DEFINE_float(
  "top_p", _DEFAULTS.top_p, "Draw from the likeliest of this total probability."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens",
  _DEFAULTS.max_new_tokens,
  f"Default: {sampler_lib.DEFAULT_NEW_TOKENS}, or what the context leaves.",
)
_SEED = flags.DEFINE_integer(
  "seed", _DEFAULTS.seed, "Sample i of a prompt uses seed + i."
)
_N_SAMPLES = flags.DEFINE_integer(
  "n_samples", _DEFAULTS.n_samples, "Continuations of each prompt."
)


def main() -> int:
  if _WORKDIR.value is None:
    raise config_lib.ConfigError("--workdir: missing; write --workdir=RUN")
  prompts = _PROMPT.value + [_read(path) for path in _PROMPT_FILE.value]
  requests = [
    sampler_lib.Request(
      prompt=prompt,
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      max_new_tokens=_MAX_NEW_TOKENS.value,
      seed=_SEED.value,
      n_samples=_N_SAMPLES.value,
    )
    for prompt in prompts or [""]
  ]
  sampler = sampler_lib.Sampler.from_checkpoint(_WORKDIR.value, _STEP.value)
  start = time.perf_counter()
  results = sampler.generate(requests)
  seconds = time.perf_counter() - start
  for number, result in enumerate(results, 1):
    if len(results) > 1:
      seed, reason = result.seed, result.finish_reason
      print(f"--- {number} of {len(results)}: seed {seed}, {reason} ---")
    _show(result)
  n_tokens = sum(len(result.token_ids) for result in results)
  print(
    f"{n_tokens} tokens in {seconds:.1f} s, compilation included: "
    f"{n_tokens / seconds:.1f} tokens/s",
    file=sys.stderr,
  )
  failed = [r.seed for r in results if r.finish_reason == "error"]
  if failed:
    print(f"error: NaN logits in samples of seed {failed}", file=sys.stderr)
  return 1 if failed else 0


def _read(path: str) -> str:
  try:
    with open(path, encoding="utf-8", newline="") as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise config_lib.ConfigError(
      f"--prompt_file={path}: {error}; name a file of UTF-8 text"
    ) from error


def _show(result: sampler_lib.Result) -> None:
  """The prompt, then the continuation: in bold, where that can be seen."""
  if not sys.stdout.isatty():
    print(f"{result.request.prompt}{result.text}", flush=True)
    return
  console = console_lib.Console(markup=False, highlight=False, soft_wrap=True)
  console.print(result.request.prompt, end="")
  console.print(result.text, style="bold")


if __name__ == "__main__":
  door.run(main, takes_config=False)
