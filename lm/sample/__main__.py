"""Continues prompts from a checkpoint, and shows how.

python -m lm.sample --workdir=RUN --prompt='def main(' --temperature=0.8
python -m lm.sample --workdir=RUN --prompt='def main(' --candidates=5
python -m lm.sample --workdir=RUN --prompt='def main(' --trace
python -m lm.sample --workdir=RUN --score=FILE --html=OUT.html
python -m lm.sample --workdir=RUN --chat
"""

import dataclasses
import io
import math
import os
import sys
import time
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from lm import cli, files, schema
from lm.data import tokenizer as tokenizer_lib
from lm.sample import beam, chat, heat, loading, show
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib

flags.adopt_module_key_flags(loading)  # for --help
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "Text to continue; repeat it for several. Default: none."
)
_PROMPT_FILE = cli.define_paths(
  "prompt_file", "File whose whole text is one more prompt."
)
_SUFFIX = flags.DEFINE_string(
  "infill_suffix",
  None,
  "Write what belongs between the prompt and this. Only for models that were "
  "trained to fill gaps.",
)
_ORDER = flags.DEFINE_enum(
  "infill_order", "psm", ["psm", "spm"], "Which comes first: prefix or suffix."
)
_CANDIDATES = flags.DEFINE_integer(
  "candidates",
  None,
  "Show so many candidates for the next token. With --trace and --score: list "
  "so many for each token; default there: 5.",
  lower_bound=1,
)
_TRACE = flags.DEFINE_bool("trace", False, "Show how each token is drawn.")
_SCORE = cli.define_path(
  "score", "File: how likely is its text, and that it ends there?"
)
_HTML = cli.define_path("html", "Page to write, with --score.")
_CHAT = flags.DEFINE_bool("chat", False, "Answer the lines of stdin.")
_SYSTEM = flags.DEFINE_string("system", None, "System message of --chat.")
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

# Fields of Request, each with a flag of the same name.
_RULES = {
  "temperature": "0 always takes the likeliest token.",
  "top_k": "Draw from the k likeliest tokens; 0: from all.",
  "top_p": "Draw from the likeliest of this total probability.",
  "min_p": "Leave out tokens below this share of the likeliest.",
  "typical_p": "Locally typical sampling: the total probability to keep.",
  "repetition_penalty": "Of tokens in the prompt or drawn; 1: none.",
  "frequency_penalty": "For each time that a token was drawn.",
  "presence_penalty": "For each token that was drawn.",
  "logit_bias": "ID:VALUE, added to the id's logit; repeatable.",
  "forbidden": "Id that is never drawn; repeatable.",
  "temperature_last": "Cut first, then divide by the temperature.",
  "max_new_tokens": f"Default: {request_lib.DEFAULT_NEW_TOKENS}, or what the "
  "context leaves.",
  "min_tokens": "Tokens before which no end is drawn.",
  "stop": "Text that ends the continuation; repeatable.",
  "stop_ids": "Id that ends it besides eos; repeatable.",
  "seed": "Sample i of a prompt uses seed + i.",
  "n_samples": "Continuations of each prompt.",
  "alternatives": "Likeliest ids to list for each token (--json).",
  "processed": "List probabilities after the rules (--json).",
  "bidirectional_prompt": "The prompt sees itself both ways (prefix LM).",
}
_DEFINE = {
  float: flags.DEFINE_float,
  int: flags.DEFINE_integer,
  int | None: flags.DEFINE_integer,
  bool: flags.DEFINE_bool,
  Sequence[int]: flags.DEFINE_multi_integer,
  Sequence[str]: flags.DEFINE_multi_string,
  Mapping[int, float]: flags.DEFINE_multi_string,
}
for _name, _about in _RULES.items():
  _kind = typing.get_type_hints(request_lib.Request)[_name]
  _default = getattr(request_lib.Request(), _name)
  if not isinstance(_default, bool | int | float | None):
    _default = []
  _DEFINE[_kind](_name, _default, _about)

# Flag -> the flag required beside it.
_HOMES = {
  "html": "score",
  "system": "chat",
  "infill_order": "infill_suffix",
  "alternatives": "json",
  "processed": "json",
}
_PROMPTS = {"prompt", "prompt_file", "infill_suffix", "infill_order"}
_ALONE = _RULES.keys() - {"alternatives", "processed", "n_samples"}
# Fields of Request supported by beam search (lm/sample/beam.py).
_SEARCHED = {
  *("repetition_penalty", "frequency_penalty", "presence_penalty"),
  *("logit_bias", "forbidden", "max_new_tokens", "min_tokens", "stop_ids"),
  *("processed", "bidirectional_prompt"),
}
# Modes, and the flags allowed in each.
_MODES = {
  "chat": {"system"} | _ALONE - {"bidirectional_prompt"},
  "score": {"candidates", "html", "json"},
  "trace": {"candidates", "json"} | _PROMPTS | _ALONE,
  "candidates": {"json"} | _PROMPTS | _ALONE - {"max_new_tokens"},
  "beams": {"json"} | _PROMPTS | _SEARCHED,
  "generate": {"stream", "json"} | _PROMPTS | _RULES.keys(),
}


def main() -> int:
  loading.check()
  mode = _mode()
  # Files and requests first: the checkpoint takes longer to read.
  texts = _PROMPT.value + [_read("prompt_file", p) for p in _PROMPT_FILE.value]
  texts = texts or [""]
  requests = [_request(text) for text in texts]
  path = _SCORE.value
  scored = "" if path is None else _read("score", path)
  if path is not None and not scored:
    raise schema.ConfigError(f"--score={path}: is empty; name a text")
  if _HTML.value is not None:
    files.check_output(_HTML.value, "--html")
  found = loading.meta()
  _check(mode, requests, tokenizer_lib.Tokenizer.from_json(found.tokenizer))
  sampler = loading.sampler(found)
  if mode == "chat":
    # The chat refuses a line of invalid UTF-8 and goes on.
    if isinstance(sys.stdin, io.TextIOWrapper):
      sys.stdin.reconfigure(errors="surrogateescape")
    return chat.talk(sampler, requests[0], _SYSTEM.value)
  if path is not None:
    return _score(sampler, path, scored)
  if _SUFFIX.value is not None:
    requests = [_infill(sampler, requests, _SUFFIX.value)]
  if mode == "candidates":
    return _candidates(sampler, requests)
  if mode == "trace":
    return _trace(sampler, requests)
  return _generate(sampler, requests, texts)


def _mode() -> str:
  """Selects the mode by the flags. Raises ConfigError on a misplaced flag."""
  ours = set().union(*_MODES.values(), _MODES) - {"generate"}
  given = {
    name
    for name in ours
    if flags.FLAGS[name].present and flags.FLAGS[name].value is not False
  }
  for name, home in _HOMES.items():
    if name in given and home not in given:
      raise schema.ConfigError(
        f"--{name}: is for --{home}; add that, or leave it out"
      )
  mode = next((name for name in _MODES if name in given), "generate")
  for name in sorted(given - _MODES[mode] - {mode}):
    raise schema.ConfigError(
      f"--{name}: has no part in --{mode}; leave one of them out"
    )
  return mode


def _request(prompt: str) -> request_lib.Request:
  rules: dict[str, Any] = {name: flags.FLAGS[name].value for name in _RULES}
  rules["logit_bias"] = dict(map(_bias, rules["logit_bias"]))
  return request_lib.Request(prompt=prompt, **rules)


def _check(
  mode: str,
  requests: list[request_lib.Request],
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  """Raises ConfigError on invalid requests, before parameters are read."""
  for name, text in (("infill_suffix", _SUFFIX), ("system", _SYSTEM)):
    tokenizer_lib.check_text(f"--{name}", text.value or "")
  for request in requests:
    request_lib.check(request, tokenizer.size)
  n = len(requests)
  if _SUFFIX.value is not None and n > 1:
    raise schema.ConfigError(
      f"--infill_suffix: fills one gap; give one prompt, not {n}"
    )
  if _STREAM.value and (n > 1 or requests[0].n_samples > 1 or _JSON.value):
    raise schema.ConfigError(
      "--stream: shows one sample as it is drawn; leave out --json, and ask "
      "for one prompt and one sample"
    )
  most = tokenizer.size
  if mode != "candidates":
    most = min(most, request_lib.MAX_ALTERNATIVES)
  if (_CANDIDATES.value or 0) > most:
    raise schema.ConfigError(
      f"--candidates={_CANDIDATES.value}: must be at most {most}"
    )


def _bias(text: str) -> tuple[int, float]:
  name, _, value = text.rpartition(":")
  try:
    return int(name), float(value)
  except ValueError as error:
    raise schema.ConfigError(
      f"--logit_bias={text}: must be ID:VALUE, such as 7:-1.5"
    ) from error


def _read(flag: str, path: str) -> str:
  try:
    # As in a `text:` source: no byte order mark, newlines unchanged.
    with open(path, encoding="utf-8-sig", newline="") as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise schema.ConfigError(
      f"--{flag}={path}: {error}; name a file of UTF-8 text"
    ) from error


def _infill(
  sampler: sampler_lib.Sampler,
  requests: list[request_lib.Request],
  suffix: str,
) -> request_lib.Request:
  """The single request, with an infilling (FIM) prompt."""
  prefix = str(requests[0].prompt)
  ids = chat.fim_ids(sampler.tokenizer, prefix, suffix, _ORDER.value)
  return dataclasses.replace(requests[0], prompt=ids)


# --- modes -------------------------------------------------------------------


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
    print(show.dumps({"results": show.results(results, sampler.tokenizer)}))
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
  return _refuse_nan(f"in samples of seed {failed}") if failed else 0


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
  show.write(before)
  for text in texts:
    show.write(text, bold=True)
  show.write((_SUFFIX.value or "") + "\n")


def _candidates(
  sampler: sampler_lib.Sampler, requests: list[request_lib.Request]
) -> int:
  found = [sampler.next_token(r, _CANDIDATES.value or 5) for r in requests]
  tables = [
    show.candidates(one, request, sampler.tokenizer)
    for one, request in zip(found, requests, strict=True)
  ]
  show.put({"next_tokens": found}, tables, _JSON.value)
  poisoned = any(math.isnan(one.chosen.probability) for one in found)
  return _refuse_nan("after the prompt") if poisoned else 0


def _trace(
  sampler: sampler_lib.Sampler, requests: list[request_lib.Request]
) -> int:
  traces = [show.trace(sampler, r, _CANDIDATES.value or 5) for r in requests]
  tables = [show.step_table(step) for trace in traces for step in trace.steps]
  show.put({"traces": traces}, tables, _JSON.value)
  poisoned = any(trace.finish_reason == "error" for trace in traces)
  return _refuse_nan("in the last step") if poisoned else 0


def _score(sampler: sampler_lib.Sampler, path: str, text: str) -> int:
  tokenizer = sampler.tokenizer
  score = sampler.score(text, alternatives=_CANDIDATES.value or 5, eos=True)
  if math.isnan(score.total):
    return _refuse_nan(f"in {path}")
  if _HTML.value is not None:
    name = show.printable(os.path.basename(path))  # may not be UTF-8
    page = heat.page(score, tokenizer, name)
    files.replace(_HTML.value, page)
  rows = show.tokens(score, tokenizer)
  shown = [
    heat.heat_map(score, tokenizer),
    heat.token_table(rows),
    heat.summary(score),
  ]
  value = {"file": path, **heat.figures(score), "tokens": rows}
  show.put(value, shown, _JSON.value)
  return 0


def _refuse_nan(where: str) -> int:
  print(f"error: NaN logits {where}", file=sys.stderr)
  return 1


if __name__ == "__main__":
  cli.run(main, takes_config=False)
