"""Every knob, once.

A config is a tree of dataclasses; `configs/NAME.py` has `get_config()`, a small
program that changes `Config()`. Nothing here imports JAX. Derived values are
properties, defaults live nowhere else, and `validate` refuses an impossible
tree before anything is compiled, with the value, the rule and the remedy.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from lm import schema
from lm.schema import (
  AtMost,
  BelowOne,
  Count,
  Natural,
  NotNegative,
  Positive,
  Seed,
)


@dataclasses.dataclass(unsafe_hash=True)
class RopeScaling:
  """Llama 3.1's stretch of low rotary frequencies (arXiv:2407.21783)."""

  factor: Positive = 8.0
  low_frequency_factor: Positive = 1.0
  high_frequency_factor: Positive = 4.0
  original_length: Count = 8192


# Hashable, so that a compiled program can be looked up by its model.
@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
  """One decoder; the fields select GPT-2, Llama, Qwen3, Gemma and others.

  Parameters are stored in float32. Norms, softmax and loss run in float32
  whatever `dtype` says.
  """

  vocab_size: Count = 2048
  n_layers: Annotated[
    Count, AtMost(10_000, "since decoding names each of them in its program")
  ] = 4
  d_model: Count = 192
  n_heads: Count = 6
  n_kv_heads: Count = 6
  d_head: Count = 32
  d_mlp: Count = 768
  # Longest sequence that the model may read, in tokens.
  context_length: Count = 256

  norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
  norm_epsilon: Positive = 1e-6
  # Gemma stores the scale's distance from one.
  norm_unit_offset: bool = False
  # Gemma 2 and 3 also normalise what each sub-layer adds to the residual.
  post_norm: bool = False
  # RMSNorm of queries and keys, per head (Qwen3, Gemma 3).
  qk_norm: bool = False
  mlp: Literal["gelu", "relu2", "swiglu", "geglu"] = "swiglu"
  bias: bool = False

  positions: Literal["rope", "learned"] = "rope"
  rope_theta: Positive = 10_000.0
  rope_scaling: RopeScaling | None = None
  # Base of the rotary frequencies in windowed layers (Gemma 3); None: the same.
  rope_theta_windowed: Positive | None = None
  # Layer i sees the last `windows[i % len(windows)]` positions; None: all.
  windows: tuple[int | None, ...] = (None,)
  # Queries are divided by its square root; None: d_head (Gemma 2 differs).
  query_scale_dim: Count | None = None
  attention_softcap: Positive | None = None
  logit_softcap: Positive | None = None

  tied_embedding: bool = True
  # Gemma multiplies embeddings by sqrt(d_model).
  scale_embedding: bool = False
  # Standard deviation of the normal initialiser; residual outputs use it
  # divided by sqrt(2 n_layers), as GPT-2 does.
  init_scale: NotNegative = 0.02
  embedding_dropout: BelowOne = 0.0
  residual_dropout: BelowOne = 0.0

  dtype: Literal["float32", "bfloat16"] = "float32"
  # `auto`: splash on TPU, cudnn on GPU, else reference.
  attention: Literal["auto", "reference", "cudnn", "splash"] = "auto"
  remat: Literal["none", "dots", "full"] = "none"
  # False runs the layers as a Python loop: slower to compile, same numbers.
  scan_layers: bool = True
  # Tokens on a device whose logits exist at one time in the loss.
  loss_chunk: Count = 512

  @property
  def gated(self) -> bool:
    return self.mlp in ("swiglu", "geglu")


@dataclasses.dataclass
class TokenizerConfig:
  """How text becomes ids; `model.vocab_size` is the size it must have.

  `sentencepiece` without a `path` is trained on the training sources; with
  one, that `.model` is used. `bytes` has an id per byte.
  """

  kind: Literal["sentencepiece", "bytes"] = "sentencepiece"
  path: str | None = None
  # File with a Jinja template that lays out a conversation, as chat needs it.
  # Its text goes into the checkpoint.
  chat_template: str | None = None
  # Text that the trainer reads at most, in bytes, spread over all documents.
  train_bytes: Annotated[
    Count, AtMost(10**12, "since they are held in memory")
  ] = 10_000_000


@dataclasses.dataclass
class DataConfig:
  """What is read. A source is `tfds:NAME[/CONFIG]:SPLIT[#FEATURE]`,
  `text:GLOB` or `jsonl:GLOB#FIELD`.
  """

  train: tuple[str, ...] = ("tfds:python_stdlib:train",)
  # Share of each training source in the batches; () is by size.
  train_weights: tuple[float, ...] = ()
  validation: tuple[str, ...] = ("tfds:python_stdlib:validation",)
  # What a document of a `text:` source is.
  text_unit: Literal["file", "line", "block"] = "file"
  # Bytes that are not UTF-8: stop, put U+FFFD, or leave the document out.
  invalid_utf8: Literal["error", "replace", "skip"] = "error"
  # Token stores and TFDS builds live here; a store is named by its contents.
  cache_dir: str = "data"
  # Passes over the training sources; None is endless.
  epochs: (
    Annotated[Count, AtMost(10**6, "since an int64 must count their windows")]
    | None
  ) = None
  # Threads that tokenize; None is one per core.
  workers: Annotated[Count, AtMost(10_000, "since each is a thread")] | None = (
    None
  )
  # Rows of a batch that are prepared ahead of the device.
  prefetch_rows: Annotated[
    Count, AtMost(10**6, "since they are held in memory")
  ] = 256


@dataclasses.dataclass
class SkipConfig:
  """Leave out steps that are not finite or whose loss or gradient norm stands
  more than `sigma` deviations above the mean of the last `window` steps.
  """

  window: Annotated[
    Count, AtMost(10**6, "since the state holds as many numbers")
  ] = 128
  sigma: Positive = 6.0


@dataclasses.dataclass
class OptimizerConfig:
  """Optimizer and schedule. Weight decay reaches matrices only."""

  name: Literal["adamw", "lion", "adafactor", "muon"] = "muon"
  peak_lr: Positive = 2e-2
  # Muon gives embeddings, head and vectors to NAdamW, at this peak.
  adam_peak_lr: Positive = 3e-3
  b1: BelowOne = 0.9
  b2: BelowOne = 0.95
  epsilon: Positive = 1e-8
  momentum: BelowOne = 0.95
  weight_decay: NotNegative = 0.0
  # Global-norm clip of the gradient; None leaves it alone.
  clip_norm: Positive | None = 1.0
  schedule: Literal["constant", "linear", "cosine", "rsqrt", "wsd"] = "linear"
  warmup_steps: Natural = 50
  # Last part of the run, warm-up included, in which `wsd` decays.
  decay_fraction: float = 0.2
  # Where the decay ends, as a fraction of the peak.
  final_lr_fraction: float = 0.0
  # Decay of the parameters' moving average; None keeps no average.
  ema_decay: BelowOne | None = None
  skip: SkipConfig | None = None


def mesh_axis(default: int | None) -> Any:
  return dataclasses.field(default=default, metadata={"axis": True})


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
  """Devices along each axis. The product must be the number of devices; one
  axis may be None, which takes what the others leave.
  """

  # `jit` shards by the table in lm/sharding.py; `pmap` is pure data parallel.
  mode: Literal["jit", "pmap"] = "jit"
  data: Count | None = mesh_axis(None)
  fsdp: Count | None = mesh_axis(1)
  tensor: Count | None = mesh_axis(1)
  # Silence after which a process of the run is taken for lost, in seconds.
  heartbeat_seconds: Count = 100

  def sizes(self) -> dict[str, int | None]:
    """Devices along each mesh axis, outermost first."""
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if "axis" in field.metadata
    }


@dataclasses.dataclass
class TrainConfig:
  """Length and shape of a run."""

  steps: Count = 1000
  # Sequences in one optimizer step, over all devices.
  batch_size: Count = 8
  # Tokens in one sequence.
  sequence_length: Count = 256
  # Parts that a batch is computed in, one after another.
  microbatches: Count = 1
  # Weight of the squared log of the softmax's sum (arXiv:2204.02311).
  z_loss: NotNegative = 0.0
  log_every: Count = 10
  eval_every: Count = 250
  # Batches of the validation sources in one evaluation; None is all.
  eval_batches: Count | None = None
  # A step that lasts this many medians is reported, with stacks; None is never.
  slow_step_factor: Positive | None = 20.0


@dataclasses.dataclass
class CheckpointConfig:
  """When to save, and what is kept: the last, every n-th and the best."""

  save_every: Count = 250
  keep_last: Count = 2
  # Keep each step divisible by it; None keeps none on that ground.
  keep_every: Count | None = None
  # Best by validation loss.
  keep_best: Natural = 1
  # Where a checkpoint has other arrays than the run wants: stop, or take the
  # parameters and start what does not fit (optimizer state, average) afresh.
  # With the latter, fields of the optimizer may change on a restart.
  on_mismatch: Literal["refuse", "fresh_optimizer"] = "refuse"
  # Damaged checkpoints that one start may move to damaged/, going back to the
  # one before; one more ends the start.
  set_aside: Natural = 1


@dataclasses.dataclass
class Config:
  seed: Seed = 0
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  tokenizer: TokenizerConfig = dataclasses.field(
    default_factory=TokenizerConfig
  )
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )

  @property
  def tokens_per_step(self) -> int:
    return self.train.batch_size * self.train.sequence_length


# --- validation --------------------------------------------------------------


def validate(config: Config) -> Config:
  """Returns `config`, which is about to be run; raises ConfigError naming the
  first broken rule, or the first field that is set and that nothing reads.
  """
  check(config)
  o, steps = config.optimizer, config.train.steps
  flat = (1 - o.decay_fraction) * steps
  schema.require(
    o.schedule != "wsd" or o.warmup_steps <= flat + 1e-6,  # of its rounding
    "config.optimizer.warmup_steps",
    o.warmup_steps,
    f"must be at most {flat:.0f}: schedule='wsd' decays from that step on, "
    f"the last decay_fraction={o.decay_fraction} of train.steps={steps}",
  )
  for path, value, default, reader in _without_effect(config):
    schema.require(
      value == default,
      path,
      value,
      f"has no effect: only {reader} reads it; leave it at {default!r}",
    )
  return config


def check(config: Config) -> Config:
  """Returns `config`, or raises ConfigError naming the first broken rule of
  those that a stored config keeps too.
  """
  schema.check_types(config, Config, "config")
  _validate_model(config.model)
  _validate_run(config)
  return config


def _validate_model(m: ModelConfig) -> None:
  for others, size in (
    ("vocab_size", m.vocab_size),
    ("context_length", m.context_length if m.positions == "learned" else 0),
    ("n_layers * n_heads * d_head", m.n_layers * m.n_heads * m.d_head),
    ("n_layers * d_mlp", m.n_layers * m.d_mlp),
  ):
    schema.require(
      m.d_model * size <= _MOST_WEIGHTS,
      "config.model.d_model",
      m.d_model,
      f"times {others} must be at most {_MOST_WEIGHTS:.0e}, more than any "
      "machine holds; make one of them smaller",
    )
  schema.require(
    m.n_heads % m.n_kv_heads == 0,
    "config.model.n_heads",
    m.n_heads,
    f"must be a multiple of n_kv_heads={m.n_kv_heads}",
  )
  schema.require(
    m.positions != "rope" or m.d_head % 2 == 0,
    "config.model.d_head",
    m.d_head,
    "must be even, since rotary positions turn pairs",
  )
  r = m.rope_scaling
  schema.require(
    r is None or r.low_frequency_factor < r.high_frequency_factor,
    "config.model.rope_scaling",
    r,
    "low_frequency_factor must be below high_frequency_factor",
  )
  schema.require(
    len(m.windows) > 0 and all(w is None or w >= 1 for w in m.windows),
    "config.model.windows",
    m.windows,
    "needs at least one entry, each None or at least 1",
  )


def _validate_run(config: Config) -> None:
  m, t, o, d = config.model, config.train, config.optimizer, config.data
  schema.require(
    t.sequence_length <= m.context_length,
    "config.train.sequence_length",
    t.sequence_length,
    f"must be at most model.context_length={m.context_length}",
  )
  schema.require(
    t.batch_size % t.microbatches == 0,
    "config.train.batch_size",
    t.batch_size,
    f"must be a multiple of train.microbatches={t.microbatches}",
  )
  schema.require(
    config.tokens_per_step <= 2**31 - 1,
    "config.train.batch_size",
    t.batch_size,
    f"times sequence_length={t.sequence_length} must be at most {2**31 - 1}, "
    "the largest int32: it counts the tokens of a step",
  )
  schema.require(
    len(d.train) > 0, "config.data.train", d.train, "names no source"
  )
  schema.require(
    len(d.train_weights) in (0, len(d.train))
    and all(w > 0 for w in d.train_weights),
    "config.data.train_weights",
    d.train_weights,
    f"must be () or {len(d.train)} positive numbers, one per training source",
  )
  schema.require(
    0 < o.decay_fraction <= 1,
    "config.optimizer.decay_fraction",
    o.decay_fraction,
    "must be in (0, 1]",
  )
  schema.require(
    0 <= o.final_lr_fraction <= 1,
    "config.optimizer.final_lr_fraction",
    o.final_lr_fraction,
    "must be in [0, 1]",
  )
  axes = config.mesh.sizes()
  schema.require(
    sum(a is None for a in axes.values()) <= 1,
    "config.mesh",
    axes,
    "at most one axis may be None",
  )
  others = [name for name in axes if name != "data"]
  remedy = " and ".join(f"{name}=1" for name in others)
  schema.require(
    config.mesh.mode == "jit" or all(axes[name] == 1 for name in others),
    "config.mesh",
    axes,
    f"mode pmap is pure data parallel: set {remedy}",
  )


# Of one weight, over all layers.
_MOST_WEIGHTS = 10**12

# Fields that have an effect in some configs only: whether they have one in
# this config, and what reads them where they have.
_READERS: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
  (
    "model.rope_theta model.rope_scaling",
    lambda c: c.model.positions == "rope",
    "model.positions='rope'",
  ),
  (
    "model.rope_theta_windowed",
    lambda c: c.model.positions == "rope" and any(c.model.windows),
    "model.positions='rope' in a layer with one of model.windows",
  ),
  (
    "tokenizer.path",
    lambda c: c.tokenizer.kind == "sentencepiece",
    "tokenizer.kind='sentencepiece'",
  ),
  (
    "tokenizer.train_bytes",
    lambda c: c.tokenizer.kind == "sentencepiece" and c.tokenizer.path is None,
    "tokenizer.kind='sentencepiece' without tokenizer.path",
  ),
  (
    "data.text_unit",
    lambda c: any(
      source.startswith("text:") for source in c.data.train + c.data.validation
    ),
    "a source text:GLOB",
  ),
  (
    "optimizer.adam_peak_lr optimizer.momentum",
    lambda c: c.optimizer.name == "muon",
    "optimizer.name='muon'",
  ),
  (
    "optimizer.b1 optimizer.b2",
    lambda c: c.optimizer.name != "adafactor",
    "optimizer.name='adamw', 'lion' or 'muon'",
  ),
  (
    "optimizer.epsilon",
    lambda c: c.optimizer.name in ("adamw", "muon"),
    "optimizer.name='adamw' or 'muon'",
  ),
  (
    "optimizer.decay_fraction",
    lambda c: c.optimizer.schedule == "wsd",
    "optimizer.schedule='wsd'",
  ),
  (
    "optimizer.final_lr_fraction",
    lambda c: c.optimizer.schedule in ("linear", "cosine", "wsd"),
    "optimizer.schedule='linear', 'cosine' or 'wsd'",
  ),
)


def _without_effect(config: Config) -> Iterator[tuple[str, Any, Any, str]]:
  """(path, value, default, what would read it) of fields that nothing reads."""
  for paths, has_effect, reader in _READERS:
    if has_effect(config):
      continue
    for room, field in (path.split(".") for path in paths.split()):
      nodes = (getattr(tree, room) for tree in (config, Config()))
      value, default = (getattr(node, field) for node in nodes)
      yield f"config.{room}.{field}", value, default, reader


# --- JSON --------------------------------------------------------------------


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str | bytes) -> Config:
  """Inverse of `to_json`, for a config that was stored: it may hold fields
  without effect. Raises ConfigError on what is not a config.
  """
  try:
    tree = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise schema.ConfigError(
      f"config={text[:40]!r}...: not JSON: {error}"
    ) from error
  return check(schema.from_dict(Config, tree, "config"))


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
  """Fields whose values differ: path -> (value in a, value in b); without
  those that have no effect in either.
  """
  left, right = (
    dict(schema.leaves(a, "config")),
    dict(schema.leaves(b, "config")),
  )
  dead = [{path for path, *_ in _without_effect(tree)} for tree in (a, b)]

  def has_effect(path: str) -> bool:
    return not any(f"{path}.".startswith(f"{x}.") for x in dead[0] & dead[1])

  return {
    path: (left.get(path), right.get(path))
    for path in sorted(left.keys() | right.keys())
    if left.get(path) != right.get(path) and has_effect(path)
  }
