"""Rotary positions in config.json, in the forms of transformers 4 and 5.

Transformers 4 has the keys rope_theta and rope_scaling. Transformers 5 has both
settings in rope_parameters, a key unknown to transformers 4: a config.json with
only the new form loses rope_theta there (+0.765 nats per token,
marin-community/marin#7146). Hence both forms are read, and both are written.
"""

import math
from typing import Any

from lm import config as config_lib
from lm import schema
from lm.huggingface import parts

# By kind of scaling: key in config.json -> field of RopeScaling.
_ORIGINAL = "original_max_position_embeddings"
_SCALINGS: dict[str, dict[str, str]] = {
  "llama3": {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    _ORIGINAL: "original_length",
  },
  "linear": {"factor": "factor"},
  "yarn": {
    "factor": "factor",
    _ORIGINAL: "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
  },
  "longrope": {
    "short_factor": "short_factors",
    "long_factor": "long_factors",
    "factor": "factor",
    _ORIGINAL: "original_length",
    "attention_factor": "attention_factor",
  },
}
_FORMER_KINDS = {"su": "longrope"}
_PHI3_ORIGINAL = 4096  # Where a Phi-3 lacks the key, whatever rope_scaling has.
_FRACTION, _THETA = "partial_rotary_factor", "rope_theta"


def everywhere(theta: float, *, partial: bool = False) -> parts.Part:
  """Rotary positions with the same settings in all layers; `theta` is the
  default base.

  With `partial`, as in Phi-3, a fraction of the head dimensions may rotate, and
  longrope is the only scaling.
  """

  def read(c: parts.Content) -> dict[str, Any]:
    default = {_ORIGINAL: _PHI3_ORIGINAL} if partial else {}
    base, fraction, scaling = _flat({**default, **c}, theta)
    if not partial:
      parts.check(_FRACTION, fraction, (1.0,))
    elif scaling is not None:
      parts.check("rope_type", scaling.kind, ("longrope",))
    return {
      "rope_theta": base,
      "rope_scaling": scaling,
      "rotary_fraction": fraction,
    }

  def write(m: config_lib.ModelConfig) -> dict[str, Any]:
    share = {_FRACTION: m.rotary_fraction} if partial else {}
    scaling = m.rope_scaling
    if partial and scaling is not None and scaling.kind != "longrope":
      scaling = None
    return {
      **share,
      _THETA: m.rope_theta,
      "rope_scaling": _former(m, scaling, partial),
      "rope_parameters": {**_today(m, m.rope_theta, scaling), **share},
      **({_ORIGINAL: _original(m, scaling)} if partial else {}),
    }

  keys = (_THETA, "rope_scaling", "rope_parameters", _FRACTION, _ORIGINAL)
  return parts.Part(keys, read, write)


def by_type(
  theta: float,
  local: float | None,
  local_key: str | None = None,
  theta_key: str = _THETA,
) -> parts.Part:
  """Rotary positions with a separate base, and no scaling, in windowed layers.

  `theta` and `local` are the default bases of full and of windowed layers, and
  `theta_key` and `local_key` their keys in transformers 4. With `local` None,
  windowed layers default to the base of full layers.
  """
  full, sliding = parts.TYPES[False], parts.TYPES[True]

  def read(c: parts.Content) -> dict[str, Any]:
    given = c.get("rope_parameters") or {}
    if given and full not in given and sliding not in given:
      raise schema.ConfigError(
        f"config.json: rope_parameters={given!r}: must be by layer type"
      )
    outer = {**c, "rope_parameters": given.get(full), _THETA: c.get(theta_key)}
    base, fraction, scaling = _flat(outer, theta)
    parts.check(_FRACTION, fraction, (1.0,))
    former = None if local_key is None else c.get(local_key)
    inner = {
      "rope_parameters": given.get(sliding),
      _THETA: former,
      "max_position_embeddings": c.get("max_position_embeddings"),
    }
    own, fraction, scaled = _flat(inner, base if local is None else local)
    parts.check(_FRACTION, fraction, (1.0,))
    if scaled is not None:
      raise schema.ConfigError(
        f"config.json: rope_parameters.{sliding}={given[sliding]!r}: scaling "
        "in layers with a window is not supported"
      )
    return {
      "rope_theta": base,
      "rope_scaling": scaling,
      "rope_theta_windowed": own,
    }

  def write(m: config_lib.ModelConfig) -> dict[str, Any]:
    own = m.rope_theta_windowed or m.rope_theta
    return {
      theta_key: m.rope_theta,
      "rope_scaling": _former(m, m.rope_scaling, False),
      "rope_parameters": {
        full: _today(m, m.rope_theta, m.rope_scaling),
        sliding: _today(m, own, None),
      },
      **({local_key: own} if local_key else {}),
    }

  keys = [theta_key, "rope_scaling", "rope_parameters", _FRACTION, _ORIGINAL]
  return parts.Part((*keys, *([local_key] if local_key else [])), read, write)


def _flat(
  c: parts.Content, default: float
) -> tuple[float, float, config_lib.RopeScaling | None]:
  """Returns (theta, rotary fraction, scaling) of one kind of layers.

  Raises ConfigError if the forms of transformers 4 and 5 contradict each other.
  """
  forms = [dict(c.get(k) or {}) for k in ("rope_scaling", "rope_parameters")]
  said = {}
  for key, value in ((_THETA, default), (_FRACTION, 1.0)):
    given = [f.pop(key, None) for f in forms] + [c.get(key)]
    values = {float(x) for x in given if x is not None}
    if len(values) > 1:
      raise schema.ConfigError(
        f"config.json: {key}: is given as {' and as '.join(map(str, values))}"
      )
    said[key] = values.pop() if values else value
  scalings = [_scaling(form, c) for form in forms if form]
  if len(scalings) == 2 and scalings[0] != scalings[1]:
    raise schema.ConfigError(
      f"config.json: rope_scaling={c['rope_scaling']!r} and rope_parameters="
      f"{c['rope_parameters']!r}: say different things; remove one of them"
    )
  return said[_THETA], said[_FRACTION], scalings[0] if scalings else None


def _scaling(
  form: dict[str, Any], c: parts.Content
) -> config_lib.RopeScaling | None:
  """Returns the scaling of one form; `c` is the whole config.json."""
  form = {k: v for k, v in form.items() if v is not None}
  named = {form.pop(key, None) for key in ("rope_type", "type")} - {None}
  name = " and ".join(map(str, named)) or "default"
  kind: Any = _FORMER_KINDS.get(name, name)
  parts.check("rope_type", kind, ("default", *_SCALINGS))
  if kind == "default":
    known: dict[str, str] = {}
    form.pop(_ORIGINAL, None)
  else:
    known = _SCALINGS[kind]
  mscales = [form.pop(key, None) for key in ("mscale", "mscale_all_dim")]
  if unknown := form.keys() - known.keys():
    raise schema.ConfigError(
      f"config.json: rope scaling {kind!r}: {unknown.pop()!r} is not supported"
    )
  if kind == "default":
    return None
  longest = parts.get(c, "max_position_embeddings")
  # Phi-3 has the original length at the top level of config.json, and this
  # value has precedence.
  original = c.get(_ORIGINAL) or form.get(_ORIGINAL) or longest
  if _ORIGINAL in known:
    form[_ORIGINAL] = original
  if kind in ("yarn", "longrope"):
    form.setdefault("factor", longest / original)
  elif "factor" not in form:
    raise schema.ConfigError(
      f"config.json: rope scaling {kind!r}: lacks 'factor', which says by how "
      "much; add it"
    )
  fields = {
    known[key]: parts.as_declared(config_lib.RopeScaling, known[key], value)
    for key, value in form.items()
  }
  if kind == "yarn" and all(mscales):
    over, under = (_mscale(fields["factor"], x) for x in mscales)
    fields.setdefault("attention_factor", over / under)
  return config_lib.RopeScaling(kind=kind, **fields)


def _mscale(factor: float, mscale: float) -> float:
  return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _today(
  m: config_lib.ModelConfig,
  theta: float,
  scaling: config_lib.RopeScaling | None,
) -> dict[str, Any]:
  """Returns rope_parameters, the form of transformers 5."""
  if scaling is None:
    return {"rope_type": "default", _THETA: theta}
  found: dict[str, Any] = {"rope_type": scaling.kind, _THETA: theta}
  for theirs, ours in _SCALINGS[scaling.kind].items():
    value = getattr(scaling, ours)
    if value is not None:
      found[theirs] = list(value) if isinstance(value, tuple) else value
  if scaling.kind == "longrope" and scaling.factor == (
    m.context_length / scaling.original_length
  ):
    del found["factor"]
  if scaling.kind == "yarn" and scaling.truncate:
    del found["truncate"]
  return found


def _former(
  m: config_lib.ModelConfig,
  scaling: config_lib.RopeScaling | None,
  outside: bool,
) -> dict[str, Any] | None:
  """Returns rope_scaling, the form of transformers 4. With `outside` (Phi-3)
  the original length is left to the top level of config.json.
  """
  if scaling is None:
    return None
  found = _today(m, m.rope_theta, scaling)
  del found[_THETA]
  if outside:
    found = {"type": found.pop("rope_type"), **found}
    del found[_ORIGINAL]
  return found


def _original(
  m: config_lib.ModelConfig, scaling: config_lib.RopeScaling | None
) -> int:
  return m.context_length if scaling is None else scaling.original_length
