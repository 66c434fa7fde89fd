"""Config tree, JSON, mesh rules, command line, and the shipped configs."""

import copy
import dataclasses
import functools
import gzip
import json
import math
import pathlib
import subprocess
import sys
import types
import typing

import jax
import pytest

from lm import cli, schema, validation
from lm import config as config_lib
from lm import mesh as mesh_lib
from lm import objective as objective_lib
from lm.data import sources
from lm.model import counts, decoder

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.py"))


def full_config() -> config_lib.Config:
  """The default with the optional sub-configs on."""
  config = config_lib.Config()
  config.model.rope_scaling = config_lib.RopeScaling()
  config.model.lora = config_lib.LoraConfig()
  config.optimizer.name = "adamw"
  config.optimizer.skip = config_lib.SkipConfig()
  config.tasks = config_lib.TasksConfig()
  return validation.validate(config)


def nodes(node, path="config"):
  """(path, dataclass) of each part of the tree, the root first."""
  yield path, node
  for field in dataclasses.fields(node):
    value = getattr(node, field.name)
    if dataclasses.is_dataclass(value):
      yield from nodes(value, f"{path}.{field.name}")


FIELDS = [
  (path, field.name, typing.get_type_hints(type(node))[field.name])
  for path, node in nodes(full_config())
  for field in dataclasses.fields(node)
]


def field_id(case):
  return f"{case[0]}.{case[1]}"


def with_value(path: str, name: str, value) -> config_lib.Config:
  config = full_config()
  setattr(dict(nodes(config))[path], name, value)
  return config


def message(config: config_lib.Config) -> str:
  with pytest.raises(schema.ConfigError) as info:
    validation.validate(config)
  return str(info.value)


# --- types -------------------------------------------------------------------


@pytest.mark.parametrize("case", FIELDS, ids=field_id)
def test_wrong_type_is_refused_with_path_and_value(case):
  path, name, _ = case
  wrong = {"a": "set"}
  got = message(with_value(path, name, wrong))
  assert got.startswith(f"{path}.{name}={wrong!r}: ")


@pytest.mark.parametrize("case", FIELDS, ids=field_id)
def test_none_is_accepted_where_the_annotation_says_so_and_only_there(case):
  path, name, hint = case
  config = with_value(path, name, None)
  if types.NoneType in typing.get_args(hint):
    # The one rule between None fields: one mesh axis at most takes the rest.
    if path == "config.mesh":
      config.mesh.data = config.mesh.data if name == "data" else 1
    validation.validate(config)
  else:
    assert message(config).startswith(f"{path}.{name}=None: ")


@pytest.mark.parametrize(
  "path", [path for path, _ in nodes(full_config())], ids=str
)
def test_unknown_field_names_the_nearest(path):
  node = dict(nodes(full_config()))[path]
  near = dataclasses.fields(node)[0].name
  got = message(with_value(path, near + "x", 1))
  assert got.startswith(f"{path}.{near}x: unknown; did you mean {near!r}?")


@pytest.mark.parametrize(
  "case",
  [case for case in FIELDS if typing.get_origin(case[2]) is typing.Literal],
  ids=field_id,
)
def test_literal_takes_its_choices_and_names_the_nearest(case):
  path, name, hint = case
  for choice in typing.get_args(hint):
    schema.check_types(choice, hint, path)
    got = message(with_value(path, name, choice + "s"))
    assert got.startswith(
      f"{path}.{name}={choice + 's'!r}: unknown; did you mean {choice!r}?"
    )


@pytest.mark.parametrize(
  "changes, expected",
  [
    (
      {"model.scan_layers": 1},
      "config.model.scan_layers=1: must be of type bool, not int",
    ),
    (
      {"model.n_layers": True},
      "config.model.n_layers=True: must be of type int, not bool",
    ),
    (
      {"model.n_layers": 4.0},
      "config.model.n_layers=4.0: must be of type int, not float",
    ),
    (
      {"optimizer.peak_lr": float("nan")},
      "config.optimizer.peak_lr=nan: must be finite, also in float32",
    ),
    (
      {"data.train": ["text:a"]},
      "config.data.train=['text:a']: must be a tuple",
    ),
    (
      {"data.train": ("text:a", 7)},
      "config.data.train[1]=7: must be of type str, not int",
    ),
    (
      {"model.windows": (5, None, "7")},
      "config.model.windows[2]='7': must be of type int, not str",
    ),
  ],
  ids=str,
)
def test_subtle_types(changes, expected):
  assert message(changed(changes)) == expected


# --- rules -------------------------------------------------------------------


def changed(changes: dict) -> config_lib.Config:
  config = full_config()
  for field, value in changes.items():
    parent, _, name = f"config.{field}".rpartition(".")
    setattr(dict(nodes(config))[parent], name, copy.deepcopy(value))
  return config


def numeric(hint) -> bool:
  return bool({int, float} & {hint, *typing.get_args(hint)}) and (
    typing.get_origin(hint) is not tuple
  )


@pytest.mark.parametrize(
  "case", [case for case in FIELDS if numeric(case[2])], ids=field_id
)
def test_no_number_may_be_negative(case):
  """A sentinel of -1 means nothing here: absent is None."""
  path, name, _ = case
  got = message(with_value(path, name, -1))
  assert got.startswith(f"{path}.{name}=-1: must ")


RULES = [
  ({"model.n_layers": 0}, "config.model.n_layers=0: must be at least 1"),
  ({"optimizer.peak_lr": 0}, "config.optimizer.peak_lr=0: must be positive"),
  ({"optimizer.b2": 1}, "config.optimizer.b2=1: must be in [0, 1)"),
  (
    {"model.n_heads": 7, "model.n_kv_heads": 3},
    "config.model.n_heads=7: must be a multiple of n_kv_heads=3",
  ),
  (
    {"model.d_head": 5},
    "config.model.d_head=5: must be even, since rotary positions turn pairs",
  ),
  (
    {
      "model.rope_scaling": config_lib.RopeScaling(
        low_frequency_factor=4.0, high_frequency_factor=4.0
      )
    },
    "config.model.rope_scaling=RopeScaling(kind='llama3', factor=8.0,"
    " original_length=8192, low_frequency_factor=4.0,"
    " high_frequency_factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=True,"
    " short_factors=(), long_factors=(), attention_factor=None):"
    " low_frequency_factor must be below high_frequency_factor",
  ),
  (
    {"model.rope_scaling.kind": "yarn", "model.rope_scaling.beta_slow": 32.0},
    "config.model.rope_scaling=RopeScaling(kind='yarn', factor=8.0,"
    " original_length=8192, low_frequency_factor=1.0,"
    " high_frequency_factor=4.0, beta_fast=32.0, beta_slow=32.0,"
    " truncate=True, short_factors=(), long_factors=(), attention_factor=None):"
    " beta_slow must be below beta_fast",
  ),
  (
    {"model.rope_scaling.kind": "yarn", "model.rope_theta": 1.0},
    "config.model.rope_theta=1.0: must be above 1 with"
    " rope_scaling.kind='yarn', which divides by its log",
  ),
  (
    {
      "model.rope_scaling.kind": "longrope",
      "model.rope_scaling.short_factors": (1.0,) * 12,
      "model.rope_scaling.long_factors": (2.0, 3.0),
      "model.rotary_fraction": 0.75,
    },
    "config.model.rope_scaling.long_factors=(2.0, 3.0): must be 12 numbers, one"
    " per pair of the 24 dimensions that rotate",
  ),
  (
    {
      "model.rope_scaling": config_lib.RopeScaling(
        kind="longrope",
        short_factors=(1.0,) * 16,
        long_factors=(1.0,) * 16,
        original_length=1,
      )
    },
    "config.model.rope_scaling.original_length=1: must be above 1, since the"
    " attention factor divides by its log; or set attention_factor",
  ),
  (
    {"model.rotary_fraction": 0.1},
    "config.model.rotary_fraction=0.1: times d_head=32 must be an even number"
    " of dimensions, at least 2, since rotary positions turn pairs",
  ),
  (
    {"model.rotary_fraction": 1.5},
    "config.model.rotary_fraction=1.5: must be in (0, 1]; 1 rotates whole"
    " heads",
  ),
  (
    {"model.rope_layers": ()},
    "config.model.rope_layers=(): needs at least one entry",
  ),
  (
    {"model.biases": ("qkv", "o", "qkv")},
    "config.model.biases=('qkv', 'o', 'qkv'): must name each part at most once",
  ),
  (
    {"model.biases": ("norm",)},
    "config.model.biases=('norm',): only norm='layernorm' has biases; leave"
    " 'norm' out",
  ),
  (
    {"model.biases": ("kv",)},
    "config.model.biases[0]='kv': unknown; did you mean 'qkv'? Known: qkv, o,"
    " mlp, norm",
  ),
  (
    {
      "model.causal": False,
      "data.train": ("text:a|masked",),
      "data.validation": ("text:b|masked", "text:c|prefix"),
    },
    "config.model.causal=False: every token sees the one that it should"
    " predict in source 'text:c|prefix'; write SOURCE|masked",
  ),
  (
    {"model.windows": ()},
    "config.model.windows=(): needs at least one entry, each None or at"
    " least 1",
  ),
  (
    {"model.windows": (0, None)},
    "config.model.windows=(0, None): needs at least one entry, each None or at"
    " least 1",
  ),
  (
    {"train.sequence_length": 257},
    "config.train.sequence_length=257: must be at most"
    " model.context_length=256",
  ),
  (
    {"train.steps": 9, "train.profile": (8, 3)},
    "config.train.profile=(8, 3): must be (first step, number of steps),"
    " within train.steps=9",
  ),
  (
    {"train.profile": (8,)},
    "config.train.profile=(8,): must be (first step, number of steps),"
    " within train.steps=1000",
  ),
  (
    {"train.batch_size": 7, "train.microbatches": 2},
    "config.train.batch_size=7: must be a multiple of train.microbatches=2",
  ),
  ({"data.train": ()}, "config.data.train=(): names no source"),
  (
    {"data.train_weights": (0.5, 0.5)},
    "config.data.train_weights=(0.5, 0.5): must be () or 1 positive numbers,"
    " one per training source",
  ),
  (
    {"data.train_weights": (0.0,)},
    "config.data.train_weights=(0.0,): must be () or 1 positive numbers, one"
    " per training source",
  ),
  (
    {"optimizer.decay_fraction": 0.0},
    "config.optimizer.decay_fraction=0.0: must be in (0, 1]",
  ),
  (
    {"optimizer.final_lr_fraction": 1.1},
    "config.optimizer.final_lr_fraction=1.1: must be in [0, 1]",
  ),
  (
    {"mesh.data": None, "mesh.tensor": None},
    "config.mesh={'data': None, 'fsdp': 1, 'tensor': None}: at most one axis "
    "may be None",
  ),
  (
    {"mesh.mode": "pmap", "mesh.tensor": 2},
    "config.mesh={'data': None, 'fsdp': 1, 'tensor': 2}: mode pmap is pure "
    "data parallel: set fsdp=1 and tensor=1",
  ),
  (
    {
      "optimizer.schedule": "wsd",
      "optimizer.warmup_steps": 801,
    },
    "config.optimizer.warmup_steps=801: must be at most 800: schedule='wsd'"
    " decays from that step on, the last decay_fraction=0.2 of"
    " train.steps=1000",
  ),
]

# A size that nothing could hold is refused before anything is made of it.
INT32 = "must be at most 2147483647, the largest int32"
SIZES = [
  ("seed", 2**32, "must be at most 4294967295, what 32 bits hold"),
  ("seed", 2**63, "must be at most 4294967295"),
  ("optimizer.skip.window", 10**13, "must be at most 1000000, since the state"),
  ("model.n_layers", 10**9, "must be at most 10000, since decoding"),
  ("model.d_model", 10**12, INT32),
  ("model.d_model", 10**9, "times vocab_size must be at most 1e+12"),
  ("model.vocab_size", 2**31 - 1, None),
  ("model.windows", (5, 10**12), INT32),
  ("train.steps", 10**30, INT32),
  ("train.batch_size", 10**12, INT32),
  ("train.batch_size", 10**7, "times sequence_length=256 must be at most"),
  ("data.prefetch_rows", 10**9, "must be at most 1000000"),
  ("mesh.data", 10**100, INT32),
  ("optimizer.peak_lr", 10**400, "must be finite, also in float32"),
  ("optimizer.peak_lr", 1e39, "must be finite, also in float32"),
  ("optimizer.peak_lr", 1e-39, "counts as 0 in float32"),
  ("optimizer.epsilon", 1e-300, "counts as 0 in float32"),
  ("optimizer.b2", 1 - 2**-26, "is 1 in float32; lower it"),
  ("data.train_weights", (1e300,), "must be finite, also in float32"),
  ("model.rope_scaling.factor", 1e39, "must be finite, also in float32"),
  ("data.cache_dir", "a\0b", "must not hold a NUL"),
]


@pytest.mark.parametrize("field, value, expected", SIZES, ids=str)
def test_size_beyond_reason_is_refused_in_stored_configs_too(
  field, value, expected
):
  config = changed({field: value})
  if expected is None:
    validation.validate(config)
    return
  got = message(config)
  assert got.startswith(f"config.{field}") and expected in got
  assert len(got) < 500
  with pytest.raises(schema.ConfigError) as info:
    validation.from_json(config_lib.to_json(config))
  assert str(info.value) == got


def test_number_with_too_many_digits_to_print_is_refused():
  for field in ("seed", "optimizer.b1", "model.norm"):
    got = message(changed({field: 16**5000}))
    assert got.startswith(f"config.{field}")


# Set, and read by nothing: (what makes it so, the field, who would read it).
LEARNED = {"model.positions": "learned", "model.rope_scaling": None}
NOPE = (False, False)
ROTARY = "model.positions='rope' in a layer of model.rope_layers"
BYTES = {"tokenizer.kind": "bytes"}
UNREAD = [
  (LEARNED, "model.rope_layers", (True, False), "model.positions='rope'"),
  (
    {"model.norm_placement": "post"},
    "model.first_attention_norm",
    False,
    "model.norm_placement='pre' or 'both'",
  ),
  *(
    (also, f"model.{name}", value, ROTARY)
    for also in (
      LEARNED,
      {"model.rope_scaling": None, "model.rope_layers": NOPE},
    )
    for name, value in (
      ("rope_theta", 5e5),
      ("rope_scaling", config_lib.RopeScaling()),
      ("rotary_fraction", 0.5),
    )
  ),
  *(
    ({}, f"model.rope_scaling.{name}", value, f"model.rope_scaling.{reader}")
    for name, value, reader in (
      ("beta_fast", 7.0, "kind='yarn'"),
      ("truncate", False, "kind='yarn'"),
      ("short_factors", (2.0,), "kind='longrope'"),
      (
        "attention_factor",
        1.5,
        "kind='yarn' or model.rope_scaling.kind='longrope'",
      ),
    )
  ),
  (
    {"model.rope_scaling": config_lib.RopeScaling(kind="linear")},
    "model.rope_scaling.high_frequency_factor",
    5.0,
    "model.rope_scaling.kind='llama3'",
  ),
  (
    {},
    "model.rope_theta_windowed",
    5e5,
    "model.positions='rope' in a layer with one of model.windows",
  ),
  (
    {**LEARNED, "model.windows": (5,)},
    "model.rope_theta_windowed",
    5e5,
    "model.positions='rope' in a layer with one of model.windows",
  ),
  (
    BYTES,
    "tokenizer.path",
    "a.model",
    "tokenizer.kind='sentencepiece' or 'huggingface'",
  ),
  (
    BYTES,
    "tokenizer.train_bytes",
    7,
    "tokenizer.kind='bpe', or 'sentencepiece' without tokenizer.path",
  ),
  (
    {"tokenizer.path": "a.model"},
    "tokenizer.train_bytes",
    7,
    "tokenizer.kind='bpe', or 'sentencepiece' without tokenizer.path",
  ),
  (
    {"data.train": ("jsonl:a#text",)},
    "data.text_unit",
    "line",
    "a source text:GLOB",
  ),
  (
    {"data.train": ("text:a|fim",), "data.validation": ()},
    "data.packing",
    "best_fit",
    "a source of the objective 'causal', 'prefix' or 'masked'",
  ),
  (
    {"data.train": ("text:a",)},
    "data.invalid_documents",
    "skip",
    "a source jsonl:GLOB, parquet:GLOB, csv:GLOB or instruct:NAME:SPLIT",
  ),
]


@pytest.mark.parametrize("also, field, value, reader", UNREAD, ids=str)
def test_field_that_nothing_reads_is_refused(also, field, value, reader):
  plain = validation.validate(changed(also))
  default = functools.reduce(getattr, field.split("."), plain)
  config = changed({**also, field: value})
  assert message(config) == (
    f"config.{field}={value!r}: has no effect: only {reader} reads it; leave"
    f" it at {default!r}"
  )
  # A run that was stored with it loads, and goes on without it.
  stored = validation.from_json(config_lib.to_json(config))
  assert stored == config
  assert validation.differences(stored, plain) == {}


@pytest.mark.parametrize(
  "source, objective",
  [
    ("text:a", objective_lib.Causal()),
    ("text:a|causal", objective_lib.Causal()),
    ("text:a|b.txt", objective_lib.Causal()),  # a path
    ("text:a|b|prefix", objective_lib.Prefix()),
    ("jsonl:a#t|fim(rate=1, cut='line')", objective_lib.Fim(1.0, 0.5, "line")),
    ("text:a|masked(rate=None)", objective_lib.Masked(None)),
    (
      "a|span_corruption( mean_span=8 )",
      objective_lib.SpanCorruption(0.15, 8.0),
    ),
  ],
)
def test_a_source_names_its_objective(source, objective):
  spec, found = objective_lib.split_source(source)
  assert found == objective
  assert spec == (
    source if "b.txt" in source else source.rpartition("|")[0] or source
  )
  assert config_lib.DataConfig(train=(source,)).looks_ahead == found.looks_ahead


@pytest.mark.parametrize(
  "suffix, said",
  [
    ("fin", "unknown; did you mean 'fim'? Known: causal, prefix"),
    ("fin", "write '?' for a '|' that is in a path"),
    ("fim(rats=1)", ": rats: unknown; did you mean 'rate'?"),
    ("fim(rate=2)", ".rate=2.0: must be in [0, 1]"),
    ("fim(rate=10**400)", "is not NAME(FIELD=VALUE, ...)"),
    (f"fim(rate={10**400})", "must be"),
    ("masked(rate=0)", ".rate=0.0: must be in (0, 1)"),
    ("masked(rate=0.99999999999)", "is 1 in float32"),
    ("masked(rate='x')", ".rate='x': must be of type float"),
    ("fim(cut='word')", ".cut='word': unknown"),
    ("span_corruption(mean_span=0.5)", ".mean_span=0.5: must be at least 1"),
    ("prefix(rate=1)", ": rate: unknown"),
    ("fim(1)", "is not NAME(FIELD=VALUE, ...)"),
    ("fim(**{'rate': 1})", ": None: unknown"),
    ("fim(rate=open('a'))", "is not NAME(FIELD=VALUE, ...)"),
    ("fim(" + "(" * 300 + ")" * 301, "is not NAME(FIELD=VALUE, ...)"),
  ],
)
@pytest.mark.parametrize("field", ["train", "validation"])
def test_a_wrong_objective_is_refused(field, suffix, said):
  text = message(changed({f"data.{field}": (f"text:a|{suffix}",)}))
  assert said in text and "\n" not in text


@pytest.mark.parametrize("changes, expected", RULES, ids=str)
def test_rule(changes, expected):
  assert message(changed(changes)) == expected


@pytest.mark.parametrize(
  "changes",
  [
    {
      "model.positions": "learned",
      "model.d_head": 5,
      "model.rope_scaling": None,
    },
    {"model.n_heads": 6, "model.n_kv_heads": 3},
    {"model.windows": (1, None)},
    {"train.sequence_length": 256},
    {"data.train_weights": (0.1,)},
    {
      "optimizer.schedule": "wsd",
      "optimizer.warmup_steps": 0,
      "optimizer.decay_fraction": 1.0,
      "optimizer.final_lr_fraction": 1.0,
    },
    # 1 - 0.9 is less than 0.1.
    {
      "optimizer.schedule": "wsd",
      "optimizer.decay_fraction": 0.9,
      "optimizer.warmup_steps": 100,
    },
    {"data.validation": ()},
    {"seed": 2**32 - 1, "optimizer.warmup_steps": 2**31 - 1},
    {"model.rope_theta": 10**30, "optimizer.epsilon": 2**-126},
    {"model.init_scale": 0, "optimizer.b2": 1 - 2**-24},
    {"mesh.mode": "pmap", "mesh.data": 8},
    {"optimizer.weight_decay": 0.0, "model.init_scale": 0.0},
  ],
  ids=str,
)
def test_edge_of_a_rule_is_allowed(changes):
  validation.validate(changed(changes))


# --- mesh --------------------------------------------------------------------


@pytest.mark.parametrize(
  "axes, n_devices, shape",
  [
    ((None, 1, 1), 8, (8, 1, 1)),
    ((1, None, 1), 8, (1, 8, 1)),
    ((2, None, 2), 8, (2, 2, 2)),
    ((2, 2, None), 4, (2, 2, 1)),
    ((1, 1, 1), 1, (1, 1, 1)),
  ],
  ids=str,
)
def test_mesh_shape_fills_the_open_axis(axes, n_devices, shape):
  config = config_lib.Config()
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = axes
  assert mesh_lib.shape_of(config, n_devices) == shape


@pytest.mark.parametrize(
  "changes, n_devices, expected",
  [
    ({"mesh.data": 3}, 8, "config.mesh={'data': 3, 'fsdp': 1, 'tensor': 1}"),
    (
      {"mesh.tensor": 3},
      8,
      "config.mesh={'data': None, 'fsdp': 1, 'tensor': 3}",
    ),
    (
      {"train.batch_size": 12},
      8,
      "config.train.batch_size / train.microbatches=12: must be a multiple of"
      " mesh data * fsdp=8",
    ),
    (
      {"train.microbatches": 2, "mesh.fsdp": 2, "mesh.data": 4},
      8,
      "config.train.batch_size / train.microbatches=4: must be a multiple of"
      " mesh data * fsdp=8",
    ),
    (
      {"model.d_model": 193, "mesh.fsdp": 2},
      4,
      "config.model.d_model=193: must be a multiple of mesh fsdp=2",
    ),
    *(
      (
        {f"model.{name}": value, "mesh.tensor": 2, **also},
        4,
        f"config.model.{name}={value}: must be a multiple of mesh tensor=2",
      )
      for name, value, also in (
        ("n_heads", 5, {"model.n_kv_heads": 5}),
        ("n_kv_heads", 3, {}),
        ("d_mlp", 767, {}),
        ("vocab_size", 2047, {}),
      )
    ),
  ],
  ids=str,
)
def test_mesh_that_does_not_fit_is_refused(changes, n_devices, expected):
  with pytest.raises(schema.ConfigError) as info:
    mesh_lib.shape_of(changed(changes), n_devices)
  assert str(info.value).startswith(expected)


# --- JSON --------------------------------------------------------------------


def test_json_round_trip_keeps_every_field():
  config = full_config()
  config.model.windows = (5, None)
  config.data.train = ("text:a", "jsonl:b#c")
  config.data.train_weights = (0.3, 0.7)
  config.optimizer.ema_decay = 0.1
  back = validation.from_json(config_lib.to_json(config))
  assert back == config
  assert validation.differences(back, config) == {}


# The model of a config as stored before biases, norm_placement and a kind of
# qk_norm, in part: (stored, today).
FORMER = [
  (
    '{"norm": "layernorm", "post_norm": false, "qk_norm": false, "bias": true}',
    {"norm": "layernorm", "biases": ("qkv", "o", "mlp", "norm")},
  ),
  ('{"bias": true}', {"biases": ("qkv", "o", "mlp")}),
  ('{"bias": false, "norm": "layernorm"}', {"norm": "layernorm"}),
  ('{"post_norm": true}', {"norm_placement": "both"}),
  ('{"qk_norm": true}', {"qk_norm": "head"}),
  ('{"qk_norm": false}', {}),
  (
    '{"norm_unit_offset": true, "post_norm": true, "qk_norm": true, "mlp": '
    '"geglu", "bias": false, "positions": "rope", "rope_theta": 1000000.0, '
    '"rope_scaling": {"factor": 8.0, "low_frequency_factor": 1.0, '
    '"high_frequency_factor": 4.0, "original_length": 8192}, '
    '"rope_theta_windowed": 10000.0, "windows": [512, null]}',
    {
      "norm_unit_offset": True,
      "norm_placement": "both",
      "qk_norm": "head",
      "mlp": "geglu",
      "rope_theta": 1e6,
      "rope_scaling": config_lib.RopeScaling(kind="llama3"),
      "rope_theta_windowed": 1e4,
      "windows": (512, None),
    },
  ),
]


@pytest.mark.parametrize("stored, today", FORMER, ids=str)
def test_config_of_an_earlier_version_is_translated(stored, today):
  found = validation.from_json(f'{{"seed": 5, "model": {stored}}}')
  assert found == config_lib.Config(
    seed=5, model=config_lib.ModelConfig(**today)
  )
  assert validation.from_json(config_lib.to_json(found)) == found


@pytest.mark.parametrize(
  "model, expected",
  [
    ('{"bias": 1}', "config.model.bias: unknown; did you mean 'biases'?"),
    ('{"bias": true, "biases": []}', "config.model.bias: unknown"),
    ('{"post_norm": "yes"}', "config.model.post_norm: unknown"),
    ('{"qk_norm": 1}', "config.model.qk_norm=1: unknown"),
  ],
)
def test_other_values_of_former_fields_are_refused(model, expected):
  with pytest.raises(schema.ConfigError) as info:
    validation.from_json(f'{{"model": {model}}}')
  assert str(info.value).startswith(expected)


@pytest.mark.parametrize(
  "text, expected",
  [
    ("not json", "config='not json'...: not JSON: "),
    ("[]", "config=[]: must be an object of fields"),
    ('{"model": 3}', "config.model=3: must be an object of fields"),
    ('{"model": null}', "config.model=None: must be a ModelConfig"),
    ('{"sead": 3}', "config.sead: unknown; did you mean 'seed'?"),
    ('{"data": {"train": "ab"}}', "config.data.train='ab': must be a tuple"),
    ('{"train": {"steps": 0}}', "config.train.steps=0: must be at least 1"),
    ("null", "config=None: must be a Config"),
    ("", "config=''...: not JSON: "),
    (b"\x93\xff\x00\x01", "config=b'\\x93\\xff\\x00\\x01'...: not JSON: "),
    (b"\xef\xbb\xbf[]", "config=[]: must be an object of fields"),
    ("[" * 10**5, "config='[[[[[[[["),
    ('{"a":' * 10**5, "config='{"),
    ('{"seed": ' + "1" * 5000 + "}", 'config=\'{"seed": 111'),
    ('{"seed": NaN}', "config.seed=nan: must be of type int, not float"),
    ('{"optimizer": {"b1": NaN}}', "config.optimizer.b1=nan: must be finite"),
    ('{"optimizer": {"b1": 1e400}}', "config.optimizer.b1=inf: must be finite"),
    (
      '{"data": {"train": {"a": 1}}}',
      "config.data.train={'a': 1}: must be a t",
    ),
    (
      '{"data": {"train": [null]}}',
      "config.data.train[0]=None: must be of type str",
    ),
    ('{"model": {"n_layers": 1000000000}}', "config.model.n_layers=1000000000"),
  ],
)
def test_from_json_refuses_what_is_not_a_config(text, expected):
  with pytest.raises(schema.ConfigError) as info:
    validation.from_json(text)
  assert str(info.value).startswith(expected)


def test_differences_names_changed_and_added_fields():
  a, b = config_lib.Config(), config_lib.Config()
  b.train.steps = 7
  b.optimizer.skip = config_lib.SkipConfig()
  assert validation.differences(a, b) == {
    "config.train.steps": (1000, 7),
    "config.optimizer.skip.window": (None, 128),
    "config.optimizer.skip.sigma": (None, 6.0),
  }


# --- command line ------------------------------------------------------------


@pytest.fixture
def plain(tmp_path) -> str:
  path = tmp_path / "plain.py"
  path.write_text("from lm.config import Config as get_config\n")
  return str(path)


@pytest.mark.parametrize(
  "override, expected",
  [
    ("mesh.data=2", 2),
    ("seed=1_000", 1000),
    ("optimizer.peak_lr=1e-3", 1e-3),
    ("optimizer.peak_lr=1", 1.0),
    ("optimizer.clip_norm=None", None),
    ("optimizer.clip_norm=0.5", 0.5),
    ("optimizer.name=lion", "lion"),
    ("model.scale_embedding=true", True),
    ("model.scan_layers=False", False),
    ("model.windows=(64,None)", (64, None)),
    ("model.windows=64", (64,)),
    ('data.train=("text:a","text:b")', ("text:a", "text:b")),
    ("data.train=text:a/*.txt", ("text:a/*.txt",)),
    ("data.train_weights=[0.25]", (0.25,)),
    ("data.train_weights=()", ()),
    ("tokenizer.path=a=b.model", "a=b.model"),
    ("tokenizer.path=None", None),
    ("data.cache_dir=None", "None"),
    ("data.cache_dir=7", "7"),
    ("optimizer.skip.sigma=3", 3.0),
    ("model.rope_scaling.original_length=4096", 4096),
  ],
)
def test_override_is_read_by_the_annotation(plain, override, expected):
  config = cli.load(plain, [f"--config.{override}"])
  value = config
  for name in override.partition("=")[0].split("."):
    value = getattr(value, name)
  assert value == expected
  assert type(value) is type(expected)


def test_overrides_apply_in_order(plain):
  skip = "--config.optimizer.skip"
  config = cli.load(plain, [f"{skip}.sigma=3", f"{skip}.window=5"])
  assert config.optimizer.skip == config_lib.SkipConfig(window=5, sigma=3.0)
  config = cli.load(plain, [f"{skip}.sigma=3", f"{skip}=None"])
  assert config.optimizer.skip is None


@pytest.mark.parametrize(
  "override, expected",
  [
    (
      "optimizer.peak_rl=1",
      "config.optimizer.peak_rl=1: unknown; did you mean 'peak_lr'?",
    ),
    ("optimiser.b1=1", "config.optimiser=1: unknown; did you mean 'optimizer'"),
    ("seed.a=1", "config.seed: has no field 'a'"),
    ("seed", "--config.seed: no value; write --config.seed=VALUE"),
    ("seed=x", "config.seed='x': must be of type int, not str"),
    ("seed=", "config.seed='': must be of type int, not str"),
    ("seed=-1", "config.seed=-1: must not be negative"),
    ("seed=None", "config.seed=None: must be of type int, not NoneType"),
    (
      "optimizer.peak_lr=nan",
      "config.optimizer.peak_lr='nan': must be of type float, not str",
    ),
    (
      "optimizer.skip=on",
      "config.optimizer.skip='on': set one of its fields or None: window,",
    ),
    (
      "optimizer.peak_lr=1" + "0" * 400,
      "config.optimizer.peak_lr=1" + "0" * 299 + "...: must be finite",
    ),
    ("optimizer.peak_lr=1" + "0" * 5000, "config.optimizer.peak_lr='100"),
    ("seed=0x1" + "0" * 5000, "config.seed=<int beyond what can be shown>: "),
    ("seed=4294967296", "config.seed=4294967296: must be at most 4294967295"),
    ("seed=" + "(" * 10**5, "config.seed='((("),
    ("seed=" + "-" * 10**5 + "1", "config.seed='---"),
    ("model=None", "config.model='None': set one of its fields: vocab_size,"),
    ("model.windows=(1,x)", "config.model.windows[0]='(1,x)': must be of type"),
  ],
)
def test_bad_override_is_refused(plain, override, expected):
  with pytest.raises(schema.ConfigError) as info:
    cli.load(plain, [f"--config.{override}"])
  assert str(info.value).startswith(expected)


@pytest.mark.parametrize(
  "source, expected",
  [
    ("def get_config(:", ": SyntaxError: invalid syntax"),
    ("\n\nraise KeyError('a')", ":3: KeyError: 'a'"),
    ("import lm.config\ndef get_config():\n  return 1 / 0", ":3: ZeroDiv"),
    ("from lm import nothing", ":1: ImportError: cannot import name 'nothing'"),
    ("def f():\n  return {}[1]\n\nget_config = f", ":2: KeyError: 1"),
    ("def f():\n  return {}[1]\n\nx = f()", ":2: KeyError: 1"),
    ("x = 1", ": needs a function get_config() that returns a Config"),
    ("get_config = dict", ": needs a function get_config() that returns"),
  ],
)
def test_bad_config_file_is_refused_with_its_line(tmp_path, source, expected):
  path = tmp_path / "bad.py"
  path.write_text(source)
  with pytest.raises(schema.ConfigError) as info:
    cli.load(str(path))
  assert str(info.value).startswith(f"--config={path}{expected}")


def test_override_of_a_tree_that_the_file_broke_is_refused(tmp_path):
  path = tmp_path / "bad.py"
  path.write_text(
    "from lm import config\ndef get_config():\n"
    "  c = config.Config()\n  c.optimizer = 'adamw'\n  return c\n"
  )
  with pytest.raises(schema.ConfigError) as info:
    cli.load(str(path), ["--config.optimizer.b1=0.5"])
  assert str(info.value) == (
    "config.optimizer='adamw': must be a OptimizerConfig"
  )


def test_unknown_field_set_in_a_config_file_is_refused(tmp_path):
  path = tmp_path / "bad.py"
  path.write_text(
    "from lm import config\ndef get_config():\n"
    "  c = config.Config()\n  c.model.n_layer = 3\n  return c\n"
  )
  with pytest.raises(schema.ConfigError, match="did you mean 'n_layers'"):
    cli.load(str(path))


DOOR = """
import sys
from absl import flags
from lm import config, cli, schema
WORKDIR = flags.DEFINE_string("workdir", None, "Where.", required=True)
def main(c):
  if c.seed == 13:
    raise schema.ConfigError("config.seed=13: is\\nunlucky")
  open(WORKDIR.value, "w").write(config.to_json(c))
  print("ran")
  return 5 if c.seed == 5 else None
cli.run(main)
"""


@pytest.fixture
def call(tmp_path, plain):
  """Runs a door in a process of its own, in an otherwise empty directory."""
  script = tmp_path / "a_door.py"
  script.write_text(DOOR)
  empty = tmp_path / "empty"
  empty.mkdir()

  def run(*arguments, config=plain):
    chosen = [] if config is None else [f"--config={config}"]
    command = [sys.executable, str(script), *chosen, *arguments]
    done = subprocess.run(
      command,
      cwd=empty,
      env={"PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
    )
    return done, [path.name for path in empty.iterdir()]

  return run


def test_door_hands_the_changed_config_to_main(call, tmp_path):
  done, written = call("--workdir=out", "--config.seed=5")
  assert (done.returncode, done.stdout, done.stderr) == (5, "ran\n", "")
  assert written == ["out"]
  config = json.loads((tmp_path / "empty" / "out").read_text())
  assert config["seed"] == 5


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (
      ["--config.sead=1"],
      "config.sead=1: unknown; did you mean 'seed'? Known:",
    ),
    (["--config.seed=x"], "config.seed='x': must be of type int, not str"),
    (["--config.seed"], "--config.seed: no value; write --config.seed=VAL"),
    (["--config.seed=13"], "config.seed=13: is unlucky"),
    (["--config.seed", "13"], "config.seed=13: is unlucky"),
    (["--config.seed", "-1"], "config.seed=-1: must not be negative"),
    (["--config.seed", "--v=0"], "--config.seed: no value; write --con"),
    (["stray"], "'stray': not a flag; write --FLAG=VALUE"),
    (["--workdr=a"], "Unknown command line flag 'workdr'. Did you mean:"),
    (["--config=plane.py"], "--config=plane.py: no such file"),
  ],
)
def test_door_refuses_in_one_line_and_writes_nothing(call, arguments, expected):
  done, written = call("--workdir=out", *arguments)
  assert done.stderr.startswith(f"error: {expected}")
  assert done.stderr.count("\n") == 1
  assert (done.returncode, done.stdout, written) == (2, "", [])


def test_help_lists_every_field_with_what_sets_it(call):
  """Each line, given as an argument, gives the field its default."""
  done, written = call("--help", config=None)
  assert (done.returncode, done.stderr, written) == (0, "", [])
  assert "--workdir: " in done.stdout and "--logtostderr" not in done.stdout
  lines = done.stdout.splitlines()
  whole = config_lib.Config()
  whole.model.rope_scaling = config_lib.RopeScaling()
  whole.model.lora = config_lib.LoraConfig()
  whole.optimizer.skip = config_lib.SkipConfig()
  whole.tasks = config_lib.TasksConfig()
  found = []
  for line in lines:
    if not line.startswith("  --config."):
      continue
    path, _, text = line.split()[0].removeprefix("--").partition("=")
    names = path.split(".")[1:]
    config = config_lib.Config()
    schema.override(config, "config", names, text)
    got, default = (
      functools.reduce(getattr, names, c) for c in (config, whole)
    )
    assert got == (None if dataclasses.is_dataclass(default) else default), line
    found.append(path)
  want = [path for path, _ in schema.leaves(config_lib.Config(), "config")]
  assert set(want) < set(found) and len(set(found)) == len(found)
  assert "config.optimizer.skip.sigma" in found
  at = lines.index("  --config.model.norm_unit_offset=False")
  assert "Norms multiply by 1 + scale" in lines[at + 1]


def test_door_names_what_is_missing(call):
  done, _ = call("--workdir=out", config=None)
  expected = "error: --config: missing; write --config=FILE.py\n"
  assert (done.returncode, done.stderr) == (2, expected)
  done, _ = call()
  assert done.stderr.startswith("error: flag --workdir=None: ")


def test_missing_config_file_names_the_nearest(plain):
  with pytest.raises(schema.ConfigError) as info:
    cli.load(plain.replace("plain", "plane"))
  assert str(info.value).endswith(f"no such file; did you mean {plain!r}?")


# --- shipped configs ---------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads_and_round_trips(path):
  config = cli.load(str(path))
  assert validation.from_json(config_lib.to_json(config)) == config
  header = path.read_text().split('"""')[1]
  assert f"--config=configs/{path.name}" in header or "quickstart.sh" in header
  assert "\nHardware: " in header and "\nEvidence: " in header


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_reads_what_its_header_names(
  path, tmp_path, monkeypatch
):
  """Without TensorFlow; C4 as the Hugging Face hub has it."""
  folder = tmp_path / "c4" / "en"
  folder.mkdir(parents=True)
  for name in ("train.00001-of-01024", "validation.00007-of-00008"):
    row = {"text": "a", "timestamp": "2019-04-25T12:57:54Z", "url": "b"}
    with gzip.open(folder / f"c4-{name}.json.gz", "wt") as file:
      file.write(json.dumps(row) + "\n")
  monkeypatch.chdir(tmp_path)
  data = cli.load(str(path)).data
  for source in (*data.train, *data.validation):
    if ":python_stdlib:" in source:
      continue  # this interpreter's own, as every test run has it
    assert len(sources.open_source(source, data)) == 1
    assert "hf download allenai/c4" in path.read_text()


PARAMETERS = {
  # As on the hub; then adapters of rank 16, for each layer of q, k, v, o, gate,
  # up and down the inputs and outputs.
  "finetune_gpt2": 124_439_808,
  "finetune_llama3_1b": 1_235_814_400
  + 16 * 16 * (4096 + 2560 + 2560 + 4096 + 3 * 10240),
  "finetune_qwen3_0_6b": 596_049_920
  + 28 * 16 * (3072 + 2048 + 2048 + 3072 + 3 * 4096),
  "gpt2_124m": 124_439_808,  # GPT-2 small on the Hugging Face hub
  "llama3_70b": 70_553_706_496,
  "llama3_8b": 8_030_261_248,
  "llama_1b": 1_235_814_400,
  # By hand: 2 * 2048 * 192 + 192 + 4 * (6 * 32 * 192 * 4 + 2 * 192 * 768
  # + 2 * 192 + 2 * 32), the head apart.
  "quickstart": 2_558_144,
  "quickstart_chat": 2_558_144,
  "quickstart_objectives": 2_558_144,
  # 384 * 32 + 32 + 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 64 + 2 * 32).
  "tiny": 30_880,
}


def test_every_shipped_config_has_its_count():
  assert [path.stem for path in SHIPPED] == list(PARAMETERS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_parameter_counts_equal_the_published(path):
  cfg = cli.load(str(path)).model
  assert counts.parameter_count(cfg) == PARAMETERS[path.stem]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_initialised_parameters_equal_the_count(path):
  """Of real sizes, without memory."""
  cfg = cli.load(str(path)).model
  key = jax.random.key(0)
  shapes = jax.eval_shape(lambda: decoder.init_params(cfg, key))
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == PARAMETERS[path.stem]


def test_a_count_agrees_with_its_noun():
  found = [schema.counted(n, "document") for n in (0, 1, 2, 1234)]
  assert found == [
    "0 documents",
    "1 document",
    "2 documents",
    "1,234 documents",
  ]
