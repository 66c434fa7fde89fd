"""Continues prompts from a checkpoint.

  python -m lm.sample --workdir=RUN --prompt='def main(' --temperature=0.8
  python -m lm.sample --workdir=RUN --prefix_file=F --suffix_file=G
  python -m lm.sample --workdir=RUN --fill='def f(<sentinel_0>): return 1'

The second fills the gap between two texts (fill-in-the-middle, a model trained
with the objective fim), the third several gaps of one text (a model trained
with span_corruption). Both write the whole text; --noecho, what was drawn.

`lm.explain` shows how tokens are drawn, `lm.chat` holds a conversation,
`lm.serve` serves other programs.
"""

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from absl import flags

from lm import cli, schema
from lm.data import marked
from lm.data import tokenizer as tokenizer_lib
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
_FILL = flags.DEFINE_string(
  "fill",
  None,
  "Text with gaps <sentinel_0>, <sentinel_1>, ...: write what belongs into "
  "each. The text is read in both directions. The model must have been trained "
  "with the span_corruption objective; any other model writes noise.",
)
_ECHO = flags.DEFINE_bool(
  "echo",
  True,
  "Write the prompt before the text drawn and the suffix after it; --noecho "
  "writes the text drawn alone.",
)
_JSON = flags.DEFINE_bool("json", False, "One JSON document on stdout.")
_STREAM = flags.DEFINE_bool(
  "stream", None, "Show text as it is drawn; default: one sample, a terminal."
)


def main() -> int:
  sample_flags.check()
  for name in ("alternatives", "processed"):
    sample_flags.require_beside(name, "json")
  if _FILL.value is None:
    texts = _PROMPTS.texts()
  else:
    # A stop text would end the text of all gaps together, sentinels left out.
    ignored = (*_PROMPTS.names, "stream", "stop", "bidirectional_prompt")
    sample_flags.refuse_beside("fill", ignored)
    schema.check_text("fill", _FILL.value)
    texts = [_FILL.value]
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
  if _FILL.value is None:
    requests = _PROMPTS.infilled(requests, tokenizer)
  else:
    prompt = marked.sentinel_ids(tokenizer, _FILL.value)
    requests = [
      dataclasses.replace(r, prompt=prompt, bidirectional_prompt=True)
      for r in requests
    ]
  sampler = sample_flags.sampler(found)
  _PROMPTS.check_fit(sampler, requests, texts)
  return _generate(sampler, requests, texts)


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
    alone = len(before) == 1 and _BEAMS.value is None and _FILL.value is None
    streams = alone and sys.stdout.isatty() and not _JSON.value
  start = time.perf_counter()
  results: list[request_lib.Result] = []
  if _BEAMS.value is not None:
    found = [sampler.beam(r, _BEAMS.value) for r in requests]
    before = [t for t, r in zip(texts, found, strict=True) for _ in r]
    results = [result for one in found for result in one]
  elif streams:
    drawn = _streamed(sampler, requests[0], results)
    _write(_around(before[0], ((text, True) for text in drawn)))
  else:
    results = sampler.generate(requests)
  seconds = time.perf_counter() - start
  parts = [
    _parts(text, result, sampler.tokenizer)
    for text, result in zip(before, results, strict=True)
  ]
  if _JSON.value:
    print(output.dumps({"results": _dicts(sampler, results, parts)}))
  elif not streams:
    for i, (shown, result) in enumerate(zip(parts, results, strict=True), 1):
      if len(results) > 1:
        seed, reason = result.seed, result.finish_reason
        print(f"--- {i} of {len(results)}: seed {seed}, {reason} ---")
      _write(shown)
  n_tokens = sum(len(result.token_ids) for result in results)
  print(
    f"{schema.counted(n_tokens, 'token')} in {seconds:.1f} s, compilation "
    f"included: {n_tokens / seconds:.1f} tokens/s",
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


def _around(
  before: str, drawn: Iterable[tuple[str, bool]]
) -> Iterator[tuple[str, bool]]:
  """The prompt, then `drawn`, then the suffix, as (text, whether drawn)."""
  yield before, False
  yield from drawn
  yield _PROMPTS.suffix or "", False


def _parts(
  text: str, result: request_lib.Result, tokenizer: tokenizer_lib.Tokenizer
) -> list[tuple[str, bool]]:
  """The whole text of a result, in parts of (text, whether drawn)."""
  if _FILL.value is None:
    return [*_around(text, [(result.text, True)])]
  ended = result.finish_reason == "eos"  # By an id that is not filled in.
  drawn = result.token_ids[: len(result.token_ids) - ended]
  return marked.filled(text, marked.spans(tokenizer, drawn))


def _dicts(
  sampler: sampler_lib.Sampler,
  results: list[request_lib.Result],
  parts: list[list[tuple[str, bool]]],
) -> list[dict[str, Any]]:
  """Results for JSON; where gaps were filled, `filled` is the whole text."""
  found = output.results(results, sampler.tokenizer)
  if _PROMPTS.suffix is not None or _FILL.value is not None:
    for one, shown in zip(found, parts, strict=True):
      one["filled"] = "".join(text for text, _ in shown)
  return found


def _write(parts: Iterable[tuple[str, bool]]) -> None:
  """Writes (text, whether drawn), what was drawn in bold on a terminal.

  With --noecho only what was drawn, a line for each filled gap.
  """
  first = True
  for text, drawn in parts:
    if drawn or _ECHO.value:
      # Without the text between them, gaps would run into each other.
      between = not (first or _ECHO.value or _FILL.value is None)
      output.write("\n" * between + text, bold=drawn)
      first = False
  output.write("\n")


if __name__ == "__main__":
  cli.run(main, takes_config=False)
