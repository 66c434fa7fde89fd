"""Parts of the map between config.json and ModelConfig.

A family's map is a tuple of parts (lm/huggingface/families.py). A part reads
keys of config.json into fields of ModelConfig, and writes the keys from the
fields. Writing may lose settings beyond the family: `expressible.lost` reads
the written config.json again and returns the differences.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lm import config as config_lib
from lm import schema

Content = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
  """`read` maps config.json to fields of ModelConfig, and `write` maps a
  ModelConfig to keys of config.json. `keys` are the keys known to the part. The
  field `biases` is the union over all parts of a family.
  """

  keys: tuple[str, ...]
  read: Callable[[Content], dict[str, Any]]
  write: Callable[[config_lib.ModelConfig], dict[str, Any]]


_REQUIRED = object()


def as_declared(kind: type, field: str, value: Any) -> Any:
  """Converts a JSON value to the type of a field of the dataclass `kind`: JSON
  may have 8 for 8.0 or 256.0 for 256, and has lists for tuples.
  """
  inner, _ = schema.bare(schema.hints(kind)[field])
  if inner is float and type(value) is int:
    return float(value)
  if inner is int and type(value) is float and value.is_integer():
    return int(value)
  if isinstance(value, list):
    return tuple(float(x) if type(x) is int else x for x in value)
  return value


def get(content: Content, key: str, default: Any = _REQUIRED) -> Any:
  """Returns the value of `key`, or `default` if the key is missing; without a
  default raises ConfigError.
  """
  if key in content:
    return content[key]
  if default is _REQUIRED:
    raise schema.ConfigError(f"config.json: lacks {key!r}")
  return default


def same(theirs: str, ours: str, default: Any = _REQUIRED) -> Part:
  """A key `theirs` with the meaning of the field `ours`."""
  return Part(
    (theirs,),
    lambda c: {ours: get(c, theirs, default)},
    lambda m: {theirs: getattr(m, ours)},
  )


def fixed(**ours: Any) -> Part:
  """Fields with the same value in every model of the family."""
  return Part((), lambda c: ours, lambda m: {})


def must(theirs: str, *values: Any) -> Part:
  """A key restricted to `values`; the first value is default and written."""

  def read(c: Content) -> dict[str, Any]:
    check(theirs, get(c, theirs, values[0]), values)
    return {}

  return Part((theirs,), read, lambda m: {theirs: values[0]})


def check(key: str, value: Any, values: tuple[Any, ...]) -> None:
  """Raises ConfigError unless the value of `key` is one of `values`."""
  if value not in values:
    raise schema.ConfigError(
      f"config.json: {key}={value!r}: not supported, only "
      f"{' or '.join(map(repr, values))}"
    )


def choice(
  theirs: str, ours: str, values: Mapping[str, Any], default: str
) -> Part:
  """A key with `values` mapped to values of the field `ours`.

  If several values have the same meaning, the default is preferred in writing.
  """

  def read(c: Content) -> dict[str, Any]:
    value = get(c, theirs, default)
    check(theirs, value, tuple(values))
    return {ours: values[value]}

  def write(m: config_lib.ModelConfig) -> dict[str, Any]:
    names = [default, *values]
    named = [name for name in names if values[name] == getattr(m, ours)]
    return {theirs: (named or names)[0]}

  return Part((theirs,), read, write)


def biases(theirs: str, *parts: str, default: bool) -> Part:
  """A boolean key for the biases of `parts` of a layer."""
  return Part(
    (theirs,),
    lambda c: {"biases": parts if get(c, theirs, default) else ()},
    lambda m: {theirs: bool({*parts} & {*m.biases})},
  )


def ignored(**theirs: Callable[[config_lib.ModelConfig], Any]) -> Part:
  """Keys without effect on logits: name -> value to write for a model."""
  return Part(
    tuple(theirs),
    lambda c: {},
    lambda m: {name: write(m) for name, write in theirs.items()},
  )


def heads(kv: int | None = None, *, width: int | None = None) -> Part:
  """Number of query heads, number of kv heads (default `kv`; None: as many as
  query heads), and head dimension (default `width`; None: D / heads).
  """

  def read(c: Content) -> dict[str, Any]:
    n = get(c, "num_attention_heads")
    d_head = get(c, "head_dim", width)
    return {
      "n_heads": n,
      "n_kv_heads": get(c, "num_key_value_heads", kv) or n,
      "d_head": d_head or get(c, "hidden_size") // n,
    }

  def write(m: config_lib.ModelConfig) -> dict[str, Any]:
    return {
      "num_attention_heads": m.n_heads,
      "num_key_value_heads": m.n_kv_heads,
      "head_dim": m.d_head,
    }

  keys = ("num_attention_heads", "num_key_value_heads", "head_dim")
  return Part(keys, read, write)


# --- windows and layers without positions ------------------------------------

TYPES = {False: "full_attention", True: "sliding_attention"}


def window(default: int | None = None) -> Part:
  """The key sliding_window: the same window, or none, in all layers."""
  return Part(
    ("sliding_window",),
    lambda c: {"windows": (get(c, "sliding_window", default),)},
    lambda m: {"sliding_window": m.windows[0]},
  )


def windows(
  types: Callable[[Content, int], bool],
  *keys: str,
  default: int | None = 4096,
  switch: str | None = None,
  reach: str | None = None,
) -> Part:
  """Windows by layer, from the key layer_types.

  Without layer_types, layer i has a window if `types(config.json, i)` is true;
  `types` reads `keys`. Windows are ignored unless the key `switch` is true. In
  place of sliding_window, the key `reach` gives the positions on both sides
  together (ModernBERT).
  """
  key = reach or "sliding_window"

  def read(c: Content) -> dict[str, Any]:
    size = get(c, key, default)
    if reach is not None:
      size = size // 2 + 1
    if switch is not None and not get(c, switch, False):
      size = None
    given, n = c.get("layer_types"), get(c, "num_hidden_layers")
    if given is None:
      given = [TYPES[types(c, i)] for i in range(n)]
    if len(given) != n:
      raise schema.ConfigError(
        f"config.json: layer_types={given!r}: must be {n} entries, one a layer"
      )
    for kind in given:
      check("layer_types", kind, tuple(TYPES.values()))
    if size is None and TYPES[True] in (c.get("layer_types") or ()):
      keys_off = " or ".join(filter(None, (key, switch)))
      raise schema.ConfigError(
        f"config.json: layer_types={given!r}: has windows, which {keys_off} "
        "turns off; make them say the same"
      )
    return {
      "windows": period([size if t == TYPES[True] else None for t in given])
    }

  def write(m: config_lib.ModelConfig) -> dict[str, Any]:
    layers = by_layer(m.windows, m.n_layers)
    sizes = sorted({size for size in layers if size is not None})
    size = sizes[0] if sizes else None
    if reach is not None:
      size = 2 * (size - 1) if size else default
    found = {
      key: size,
      "layer_types": [TYPES[size is not None] for size in layers],
    }
    if "sliding_window_pattern" in keys:
      found["sliding_window_pattern"] = len(period(layers))
    if "max_window_layers" in keys:
      full = [i for i, size in enumerate(layers) if size is None]
      found["max_window_layers"] = max(full, default=-1) + 1
    return found if switch is None else {**found, switch: bool(sizes)}

  named = (key, "layer_types", *keys)
  return Part(named if switch is None else (*named, switch), read, write)


def by_layer(pattern: tuple[Any, ...], n: int) -> list[Any]:
  """Repeats `pattern` over n layers."""
  return [pattern[i % len(pattern)] for i in range(n)]


def period(layers: list[Any]) -> tuple[Any, ...]:
  """Inverse of `by_layer`: the shortest pattern repeating into `layers`."""
  for n in range(1, len(layers) + 1):
    if by_layer(tuple(layers[:n]), len(layers)) == layers:
      return tuple(layers[:n])
  return tuple(layers)


def has_rope(c: Content, i: int) -> bool:
  """Whether layer i of a SmolLM3 has rotary positions."""
  if (given := c.get("no_rope_layers")) is not None:
    return bool(given[i])
  return (i + 1) % get(c, "no_rope_layer_interval", 4) != 0


def nope() -> Part:
  """Layers without rotary positions, "NoPE" (SmolLM3, arXiv:2501.18795)."""

  def read(c: Content) -> dict[str, Any]:
    n = get(c, "num_hidden_layers")
    return {"rope_layers": period([has_rope(c, i) for i in range(n)])}

  def write(m: config_lib.ModelConfig) -> dict[str, Any]:
    layers = [int(rope) for rope in by_layer(m.rope_layers, m.n_layers)]
    found: dict[str, Any] = {"no_rope_layers": layers}
    if 0 in layers:
      found["no_rope_layer_interval"] = layers.index(0) + 1
    return found

  return Part(("no_rope_layers", "no_rope_layer_interval"), read, write)
