"""Flags of every command that samples: the model, the prompts, the rules.

Importing defines the flags of the model: checkpoint, mesh, weight format, draft
model. A command that reads prompts also makes `Prompts`, and one that draws
tokens calls `define_request`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from lm import checkpoint, chips, cli, schema, sharding
from lm import mesh as mesh_lib
from lm.data import fim
from lm.data import tokenizer as tokenizer_lib
from lm.sample import loaded_model
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib

_WORKDIR = cli.define_path("workdir", "Run directory of lm.train.", run=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default: the last.")
_MESH = flags.DEFINE_list(
  "mesh",
  None,
  "Devices along data, fsdp and tensor, such as 1,1,4; default: one device.",
)
_WEIGHTS = flags.DEFINE_enum(
  "weights",
  None,
  loaded_model.WEIGHTS,
  "Keep the weights so; default: the model's own dtype.",
)
_INT8_CACHE = flags.DEFINE_bool(
  "int8_cache", False, "Keep keys and values in 8 bits."
)
_AHEAD = flags.DEFINE_integer(
  "ahead",
  0,
  "Tokens proposed at each step, by --draft or what the text repeats; no token "
  "depends on it.",
  lower_bound=0,
  upper_bound=loaded_model.MAX_AHEAD,
)
_DRAFT = cli.define_path(
  "draft", "Run directory of a smaller model that proposes tokens.", run=True
)
_ADAPTER = cli.define_path(
  "adapter",
  "Adapter (LoRA) for the model: a folder in PEFT's format, or a run. A run "
  "that was trained with model.lora has its own.",
  run=True,
)


_templates: list[flags.FlagHolder] = []


def define_chat_template() -> None:
  """Defines --chat_template, for commands that hold conversations."""
  _templates.append(
    cli.define_path(
      "chat_template",
      "Jinja file that lays out conversations; default: the checkpoint's.",
    )
  )


def _chat_template() -> str | None:
  if not _templates:
    return None
  return tokenizer_lib.read_template(_templates[0].value, "--chat_template")


def check() -> str:
  """Returns --workdir. Raises ConfigError on invalid flags.

  Does not initialize the devices.
  """
  if _WORKDIR.value is None:
    raise schema.ConfigError("--workdir: missing; write --workdir=RUN")
  if _MESH.value is not None:
    _shape(_MESH.value)
  if _DRAFT.value is not None and _AHEAD.value == 0:
    raise schema.ConfigError(
      f"--draft={_DRAFT.value}: proposes --ahead tokens; set that too"
    )
  if _DRAFT.value is not None and not checkpoint.steps(_DRAFT.value):
    raise schema.ConfigError(
      f"--draft={_DRAFT.value}: has no checkpoint; name a run of lm.train"
    )
  return _WORKDIR.value


def meta() -> checkpoint.Meta:
  """Metadata of the checkpoint selected by the flags.

  Raises ConfigError on invalid flags, and if --mesh cannot shard the model or
  the draft model.
  """
  found = checkpoint.load_meta(check(), _STEP.value)
  if _MESH.value is not None:
    flags_said = f"--mesh={','.join(_MESH.value)}"
    shape = dict(zip(sharding.MESH_AXES, _shape(_MESH.value), strict=True))
    models = {flags_said: found.config.model}
    if _DRAFT.value is not None:
      draft = checkpoint.load_meta(_DRAFT.value)
      models[f"--draft={_DRAFT.value}, {flags_said}"] = draft.config.model
    for said, model in models.items():
      try:
        mesh_lib.check_model(model, shape)
      except schema.ConfigError as error:
        raise schema.ConfigError(f"{said}: {error}") from error
  return found


def checked(
  requests: Iterable[request_lib.Request],
) -> tuple[checkpoint.Meta, tokenizer_lib.Tokenizer]:
  """`meta()` and its tokenizer. Raises ConfigError on an invalid request: the
  parameters, which take longer to read, are not read yet.
  """
  found = meta()
  tokenizer = tokenizer_lib.Tokenizer.from_json(found.tokenizer)
  if (template := _chat_template()) is not None:
    tokenizer = tokenizer.with_template(template)
  for request in requests:
    request_lib.check(request, tokenizer.size)
  return found, tokenizer


def sampler(found: checkpoint.Meta | None = None) -> sampler_lib.Sampler:
  """Loads the model of `found` (default: `meta()`) and any draft model.

  Raises ConfigError, for example if --mesh needs more devices than exist.
  """
  mesh = None if _MESH.value is None else _mesh(_MESH.value)
  step = (found or meta()).step
  load = sampler_lib.Sampler.from_checkpoint
  options = {"weights": _WEIGHTS.value, "int8_cache": _INT8_CACHE.value}
  draft = None
  if _DRAFT.value is not None:
    draft = load(_DRAFT.value, None, mesh, **options)
  options |= {"ahead": _AHEAD.value, "draft": draft}
  options["chat_template"] = _chat_template()
  return load(check(), step, mesh, adapter=_ADAPTER.value, **options)


def _mesh(numbers: list[str]) -> jax.sharding.Mesh:
  shape, found = _shape(numbers), jax.devices()
  n = math.prod(shape)
  if n > len(found):
    raise schema.ConfigError(
      f"--mesh={','.join(numbers)}: needs {n} devices; there are {len(found)}"
    )
  chips.forgo_unsafe_cache(found[:n])
  return jax.make_mesh(shape, sharding.MESH_AXES, devices=found[:n])


def _shape(numbers: list[str]) -> tuple[int, ...]:
  try:
    shape = tuple(map(int, numbers))
  except ValueError:
    shape = ()
  if len(shape) != len(sharding.MESH_AXES) or min(shape) < 1:
    raise schema.ConfigError(
      f"--mesh={','.join(numbers)}: must be {len(sharding.MESH_AXES)} numbers "
      f"of devices, along {', '.join(sharding.MESH_AXES)}, such as 1,1,4"
    )
  return shape


# --- prompts ------------------------------------------------------------------


class Prompts:
  """Defines the flags of prompts and of infilling, and reads the flags.

  `suffix` is the text after the gap once `texts` has run; None: no infilling.
  """

  names = (
    "prompt",
    "prompt_file",
    "prefix_file",
    "suffix",
    "suffix_file",
    "fim_order",
  )

  def __init__(self):
    self.suffix: str | None = None
    self._prompt = flags.DEFINE_multi_string(
      "prompt", [], "Text to continue; repeat it for several. Default: none."
    )
    self._file = cli.define_paths(
      "prompt_file", "File whose whole text is one more prompt."
    )
    self._prefix_file = cli.define_path(
      "prefix_file",
      "File of the text before a gap, as --prompt_file; beside --suffix or "
      "--suffix_file.",
    )
    self._suffix = flags.DEFINE_string(
      "suffix",
      None,
      "Infilling: write what belongs between the prompt and this text. The "
      "model must have been trained with the fim objective; any other model "
      "writes noise.",
    )
    self._suffix_file = cli.define_path(
      "suffix_file", "File whose whole text is the --suffix."
    )
    self._order = flags.DEFINE_enum(
      "fim_order",
      "psm",
      list(fim.ORDERS),
      "Infilling: what the model reads first, the prefix (psm) or the suffix "
      "(spm).",
    )

  def texts(self) -> list[str]:
    """The prompts, at least one. Raises ConfigError on an unreadable file, on a
    suffix given twice, and on a suffix beside several prompts.
    """
    texts = list(self._prompt.value)
    texts += [read_text("prompt_file", path) for path in self._file.value]
    if self._prefix_file.value is not None:
      texts.append(read_text("prefix_file", self._prefix_file.value))
    self.suffix = self._read_suffix()
    if self.suffix is None:
      for name in ("prefix_file", "fim_order"):
        if given(name):
          raise schema.ConfigError(
            f"--{name}: is for --suffix or --suffix_file; add one of them, or "
            "leave it out"
          )
    elif len(texts) > 1:
      name = "suffix" if given("suffix") else "suffix_file"
      raise schema.ConfigError(
        f"--{name}: fills one gap; give one prompt, not {len(texts)}"
      )
    return texts or [""]

  def _read_suffix(self) -> str | None:
    text, path = self._suffix.value, self._suffix_file.value
    if path is None:
      if text is not None:
        schema.check_text("--suffix", text)
      return text
    if text is not None:
      raise schema.ConfigError(
        "--suffix_file: the suffix is given by --suffix too; leave one out"
      )
    return read_text("suffix_file", path)

  def infilled(
    self,
    requests: list[request_lib.Request],
    tokenizer: tokenizer_lib.Tokenizer,
  ) -> list[request_lib.Request]:
    """The requests; a suffix turns the one prompt into an infilling prompt."""
    if self.suffix is None:
      return requests
    prompt = str(requests[0].prompt)
    ids = fim.fim_ids(tokenizer, prompt, self.suffix, self._order.value)
    return [dataclasses.replace(requests[0], prompt=ids)]

  def check_fit(
    self,
    sampler: sampler_lib.Sampler,
    requests: Iterable[request_lib.Request],
    texts: Iterable[str],
  ) -> None:
    """Raises ConfigError, which quotes the texts that the user gave, unless all
    requests fit the context: none is drawn before.
    """
    for request, text in zip(requests, texts, strict=True):
      sampler.resolve(request, shown=text + (self.suffix or ""))


def read_text(flag: str, path: str) -> str:
  """Text of the file named by a flag; raises ConfigError unless UTF-8 text."""
  try:
    # As in a `text:` source: no byte order mark, newlines unchanged.
    with open(path, encoding="utf-8-sig", newline="") as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise schema.ConfigError(
      f"--{flag}={path}: {error}; name a file of UTF-8 text"
    ) from error


# --- the rules of a request ---------------------------------------------------

_DEFINE: dict[Any, Callable] = {
  float: flags.DEFINE_float,
  int: flags.DEFINE_integer,
  bool: flags.DEFINE_bool,
  Sequence[int]: flags.DEFINE_multi_integer,
  Sequence[str]: flags.DEFINE_multi_string,
  Mapping[int, float]: flags.DEFINE_multi_string,
}


def define_request(
  *left_out: str,
) -> tuple[tuple[str, ...], Callable[[str], request_lib.Request]]:
  """Defines a flag for each field of Request but `prompt` and `left_out`.

  Returns the names, and a function from a prompt to the Request of the flags,
  which raises ConfigError on a malformed --logit_bias, or two of an id.
  """
  default = request_lib.Request()
  about = schema.comments(request_lib.Request)
  hints = schema.hints(request_lib.Request)
  names = tuple(name for name in hints if name not in ("prompt", *left_out))
  for name in names:
    kind, _ = schema.bare(hints[name])
    value = getattr(default, name)
    scalar = value is None or isinstance(value, bool | int | float)
    _DEFINE[kind](name, value if scalar else [], " ".join(about[name]))

  def request(prompt: str) -> request_lib.Request:
    fields: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
    biases = list(map(_bias, fields["logit_bias"]))
    fields["logit_bias"] = dict(biases)
    if len(fields["logit_bias"]) < len(biases):
      raise schema.ConfigError("--logit_bias: an id stands twice; name it once")
    return request_lib.Request(prompt=prompt, **fields)

  return names, request


def _bias(text: str) -> tuple[int, float]:
  name, _, value = text.rpartition(":")
  try:
    return int(name), float(value)
  except ValueError as error:
    raise schema.ConfigError(
      f"--logit_bias={text}: must be ID:VALUE, such as 7:-1.5"
    ) from error


# --- flags that belong together -----------------------------------------------


def given(name: str) -> bool:
  """Whether the command line sets the flag (to other than False)."""
  flag = flags.FLAGS[name]
  return bool(flag.present) and flag.value is not False


def require_beside(name: str, other: str) -> None:
  """Raises ConfigError if flag `name` is given without flag `other`."""
  if given(name) and not given(other):
    raise schema.ConfigError(
      f"--{name}: is for --{other}; add that, or leave it out"
    )


def refuse_beside(mode: str, names: Iterable[str]) -> None:
  """Raises ConfigError if any of the flags `names` is given: flag `mode`, which
  is given, would ignore the flag.
  """
  for name in names:
    if given(name):
      raise schema.ConfigError(
        f"--{name}: has no part in --{mode}; leave one of them out"
      )
