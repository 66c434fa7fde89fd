"""Shows how a checkpoint continues a prompt, and how likely a text is.

  python -m lm.explain --workdir=RUN --prompt='def main('
  python -m lm.explain --workdir=RUN --prompt='def main(' --trace
  python -m lm.explain --workdir=RUN --score=FILE --html=OUT.html
  python -m lm.explain --workdir=RUN --fill='def f(<mask>):'

By default, the candidates for the next token with each candidate's probability
after each sampling rule; with --trace, the candidates at each token of the
continuation; with --score, the log-probability of each token of a text; with
--fill, the candidates for each <mask> of a text, read in both directions.
"""

import math
import os

from absl import flags
from rich import text as text_lib

from lm import cli, files, schema
from lm.data import marked
from lm.data import tokenizer as tokenizer_lib
from lm.explain import heat, tables
from lm.sample import flags as sample_flags
from lm.sample import output
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib

_PROMPTS = sample_flags.Prompts()
_RULES, _request = sample_flags.define_request(
  "n_samples", "alternatives", "processed"
)
flags.adopt_module_key_flags(sample_flags)  # for --help
_CANDIDATES = flags.DEFINE_integer(
  "candidates", 5, "Candidates to list for each token.", lower_bound=1
)
_TRACE = flags.DEFINE_bool("trace", False, "Show how each token is drawn.")
_SCORE = cli.define_path(
  "score", "File: how likely is its text, and that it ends there?"
)
_FILL = flags.DEFINE_string(
  "fill",
  None,
  "Text with one <mask> or more: which token belongs into each? The model must "
  "have been trained with the masked objective; any other model writes noise.",
)
_HTML = cli.define_path("html", "Page to write, with --score.")
_JSON = flags.DEFINE_bool("json", False, "One JSON document on stdout.")


def main() -> int:
  sample_flags.check()
  sample_flags.require_beside("html", "score")
  if _SCORE.value is not None:
    ignored = ("trace", "fill", *_PROMPTS.names, *_RULES)
    sample_flags.refuse_beside("score", ignored)
    return _score(_SCORE.value)
  if _FILL.value is not None:
    ignored = ("trace", *_PROMPTS.names, *_RULES)
    sample_flags.refuse_beside("fill", ignored)
    return _fill(_FILL.value)
  if not _TRACE.value:
    for name in ("max_new_tokens", "stop"):
      sample_flags.require_beside(name, "trace")
  texts = _PROMPTS.texts()
  requests = [_request(text) for text in texts]
  found, tokenizer = sample_flags.checked(requests)
  _check_candidates(tokenizer, all_ids=not _TRACE.value)
  requests = _PROMPTS.infilled(requests, tokenizer)
  show = _trace if _TRACE.value else _next_token
  sampler = sample_flags.sampler(found)
  _PROMPTS.check_fit(sampler, requests, texts)
  return show(sampler, requests)


def _check_candidates(
  tokenizer: tokenizer_lib.Tokenizer, all_ids: bool = False
) -> None:
  most = tokenizer.size
  if not all_ids:
    most = min(most, request_lib.MAX_ALTERNATIVES)
  if _CANDIDATES.value > most:
    raise schema.ConfigError(
      f"--candidates={_CANDIDATES.value}: must be at most {most}"
    )


def _next_token(
  sampler: sampler_lib.Sampler, requests: list[request_lib.Request]
) -> int:
  found = [sampler.next_token(r, _CANDIDATES.value) for r in requests]
  shown = [
    tables.candidates(one, request, sampler.tokenizer)
    for one, request in zip(found, requests, strict=True)
  ]
  tables.put({"next_tokens": found}, shown, _JSON.value)
  poisoned = any(math.isnan(one.chosen.probability) for one in found)
  return output.refuse_nan("after the prompt") if poisoned else 0


def _trace(
  sampler: sampler_lib.Sampler, requests: list[request_lib.Request]
) -> int:
  traces = [tables.trace(sampler, r, _CANDIDATES.value) for r in requests]
  shown = [tables.step_table(step) for trace in traces for step in trace.steps]
  tables.put({"traces": traces}, shown, _JSON.value)
  poisoned = any(trace.finish_reason == "error" for trace in traces)
  return output.refuse_nan("in the last step") if poisoned else 0


def _score(path: str) -> int:
  text = sample_flags.read_text("score", path)
  if not text:
    raise schema.ConfigError(f"--score={path}: is empty; name a text")
  if _HTML.value is not None:
    files.check_output(_HTML.value, "--html")
    if os.path.exists(_HTML.value) and os.path.samefile(path, _HTML.value):
      raise schema.ConfigError(
        f"--html={_HTML.value}: is the text of --score; name another file"
      )
  found, tokenizer = sample_flags.checked([])
  _check_candidates(tokenizer)
  if not tokenizer.n_bytes(tokenizer.encode(text)):
    raise schema.ConfigError(
      f"--score={path}: the tokenizer keeps none of its text "
      f"({tokenizer.lossy}); name another text"
    )
  sampler = sample_flags.sampler(found)
  score = sampler.score(text, alternatives=_CANDIDATES.value, eos=True)
  if math.isnan(score.total):
    return output.refuse_nan(f"in {path}")
  if _HTML.value is not None:
    name = output.printable(os.path.basename(path))  # may not be UTF-8
    page = heat.page(score, tokenizer, name)
    files.replace(_HTML.value, page)
  rows = output.tokens(score, tokenizer)
  shown = [
    heat.heat_map(score, tokenizer),
    heat.token_table(rows),
    heat.summary(score),
  ]
  value = {"file": path, **heat.figures(score), "tokens": rows}
  tables.put(value, shown, _JSON.value)
  return 0


def _fill(text: str) -> int:
  found, tokenizer = sample_flags.checked([])
  _check_candidates(tokenizer, all_ids=True)
  ids = marked.mask_ids(tokenizer, text)
  sampler = sample_flags.sampler(found)
  masks = sampler.fill(text, _CANDIDATES.value)
  if any(math.isnan(mask.entropy) for mask in masks):
    return output.refuse_nan("at a mask")
  likeliest = [mask.candidates[0].id for mask in masks]
  filled = marked.fill_masks(tokenizer, text, likeliest)
  shown = [
    *(tables.masked(i, m, ids, tokenizer) for i, m in enumerate(masks, 1)),
    text_lib.Text(output.printable(filled)),
  ]
  rows = [
    {
      "place": mask.place,
      "entropy": mask.entropy,
      "candidates": output.choices(tokenizer, mask.candidates),
    }
    for mask in masks
  ]
  value = {"text": text, "filled": filled, "masks": rows}
  tables.put(value, shown, _JSON.value)
  return 0


if __name__ == "__main__":
  cli.run(main, takes_config=False)
