"""Continues prompts from a checkpoint.

  python -m lm.sample --workdir=RUN --prompt='def main(' --temperature=0.8

`lm.explain` shows how tokens are drawn, `lm.chat` holds a conversation,
`lm.serve` serves other programs.
"""

import sys
import time
from collections.abc import Iterable, Iterator

from absl import flags

from lm import cli, schema
from lm.sample import beam, output
from lm.sample import flags as sample_flags
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib

_PROMPTS = sample_flags.Prompts()
_, _request = sample_flags.define_request()
flags.adopt_module_key_flags(sample_flags)  # for --help
_BEAMS = flags.DEFINE_integer(
  "beams",
  None,
  "Search for the likeliest continuations with so many beams; draws nothing.",
  lower_bound=1,
  upper_bound=beam.MAX_BEAMS,
)
_JSON = flags.DEFINE_bool("json", False, "One JSON document on stdout.")
_STREAM = flags.DEFINE_bool(
  "stream", None, "Show text as it is drawn; default: one sample, a terminal."
)


def main() -> int:
  sample_flags.check()
  for name in ("alternatives", "processed"):
    sample_flags.require_beside(name, "json")
  texts = _PROMPTS.texts()
  requests = [_request(text) for text in texts]
  n_samples = sum(request.n_samples for request in requests)
  if _STREAM.value and (n_samples > 1 or _BEAMS.value or _JSON.value):
    raise schema.ConfigError(
      "--stream: shows one sample as it is drawn; leave out --json and "
      "--beams, and ask for one prompt and one sample"
    )
  if _BEAMS.value is not None:
    for request in requests:
      beam.check(request, _BEAMS.value)
  found, tokenizer = sample_flags.checked(requests)
  requests = _PROMPTS.infilled(requests, tokenizer)
  return _generate(sample_flags.sampler(found), requests, texts)


def _generate(
  sampler: sampler_lib.Sampler,
  requests: list[request_lib.Request],
  texts: list[str],
) -> int:
  """Prints continuations; `texts` are the prompts as the user wrote them."""
  before = [
    t for t, r in zip(texts, requests, strict=True) for _ in range(r.n_samples)
  ]
  streams = _STREAM.value
  if streams is None:
    alone = len(before) == 1 and _BEAMS.value is None
    streams = alone and sys.stdout.isatty() and not _JSON.value
  start = time.perf_counter()
  results: list[request_lib.Result] = []
  if _BEAMS.value is not None:
    found = [sampler.beam(r, _BEAMS.value) for r in requests]
    before = [t for t, r in zip(texts, found, strict=True) for _ in r]
    results = [result for one in found for result in one]
  elif streams:
    _write(before[0], _streamed(sampler, requests[0], results))
  else:
    results = sampler.generate(requests)
  seconds = time.perf_counter() - start
  if _JSON.value:
    print(output.dumps({"results": output.results(results, sampler.tokenizer)}))
  elif not streams:
    for i, (text, result) in enumerate(zip(before, results, strict=True), 1):
      if len(results) > 1:
        seed, reason = result.seed, result.finish_reason
        print(f"--- {i} of {len(results)}: seed {seed}, {reason} ---")
      _write(text, [result.text])
  n_tokens = sum(len(result.token_ids) for result in results)
  print(
    f"{n_tokens} tokens in {seconds:.1f} s, compilation included: "
    f"{n_tokens / seconds:.1f} tokens/s",
    file=sys.stderr,
  )
  failed = [r.seed for r in results if r.finish_reason == "error"]
  return output.refuse_nan(f"in samples of seed {failed}") if failed else 0


def _streamed(
  sampler: sampler_lib.Sampler,
  request: request_lib.Request,
  results: list[request_lib.Result],
) -> Iterator[str]:
  """Yields text as drawn; at the end appends the result to `results`."""
  for piece in sampler.stream([request]):
    yield piece.text
    if piece.result is not None:
      results.append(piece.result)


def _write(before: str, texts: Iterable[str]) -> None:
  """Writes the prompt, then the continuation, in bold on a terminal."""
  output.write(before)
  for text in texts:
    output.write(text, bold=True)
  output.write(_PROMPTS.suffix + "\n")


if __name__ == "__main__":
  cli.run(main, takes_config=False)
