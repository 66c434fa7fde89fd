"""The config: every hyperparameter and option of a run, with its default.

A config is a tree of dataclasses; `configs/NAME.py` has `get_config()`, a small
program that changes `Config()`. The fields of a part that is None by default
(RoPE scaling, LoRA, skipped steps, tasks) are in lm/config_optional.py, and no
default is anywhere else. Derived values are properties. lm/validation.py
refuses an impossible config before compilation. None of the three imports JAX.
"""

import dataclasses
import json
import math
from typing import Annotated, Any, Literal

from lm import objective
from lm.config_optional import (
  LoraConfig,
  RopeScaling,
  SkipConfig,
  TasksConfig,
)
from lm.schema import (
  AtMost,
  BelowOne,
  Count,
  Natural,
  NotNegative,
  Positive,
  Seed,
  Within,
)


# Hashable: the model config is a key in lookups of compiled programs.
@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
  """A decoder; the fields select GPT-2, Llama, Qwen3, Gemma and more, and by
  `causal=False` encoders: BERT, ModernBERT.

  Parameters are stored in float32. Norms, softmax and loss run in float32
  for any `dtype`.
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
  # Longest sequence that the model reads, in tokens.
  context_length: Count = 256
  # False: every token sees its whole document (an encoder, as BERT). Only
  # sources of the objective `masked` train, and nothing can be generated.
  causal: bool = True

  norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
  norm_epsilon: Positive = 1e-6
  # Norms multiply by 1 + scale (Gemma) in place of scale.
  norm_unit_offset: bool = False
  # Norms of a sub-layer f: `pre` is x + f(norm(x)); `both` x + norm(f(norm(x)))
  # (Gemma 2, 3); `post` x + norm(f(x)) (OLMo 2, 3); `residual` norm(x + f(x)),
  # and no final norm (the Transformer of arXiv:1706.03762).
  norm_placement: Literal["pre", "both", "post", "residual"] = "pre"
  # Norm of the embeddings (BERT, ModernBERT).
  embedding_norm: bool = False
  # False: attention in the first layer reads the residual itself (ModernBERT);
  # the scale of its norm is there, and not read.
  first_attention_norm: bool = True
  # RMSNorm of queries and keys, for each `head` (Qwen3, Gemma 3) or over all of
  # them, the whole `projection` (OLMo 2, 3).
  qk_norm: Literal["head", "projection"] | None = None
  # `gelu` and `geglu` approximate GELU by tanh; the exact ones use erf.
  mlp: Literal[
    "gelu", "gelu_exact", "relu2", "swiglu", "geglu", "geglu_exact"
  ] = "swiglu"
  # Which parts have biases: queries, keys and values; the attention's output;
  # the MLP's matrices; LayerNorms.
  biases: tuple[Literal["qkv", "o", "mlp", "norm"], ...] = ()

  positions: Literal["rope", "learned"] = "rope"
  rope_theta: Positive = 10_000.0
  # Layer i has rotary positions if rope_layers[i % len(rope_layers)] (SmolLM3:
  # every fourth layer has none, arXiv:2501.18795).
  rope_layers: tuple[bool, ...] = (True,)
  # Share of each head that rotates, the first dimensions (Phi-4-mini).
  rotary_fraction: Annotated[
    float, Within(0, 1, "1 rotates whole heads", open_below=True)
  ] = 1.0
  rope_scaling: RopeScaling | None = None
  # RoPE base in layers with a window (Gemma 3), used without rope_scaling;
  # None: rope_theta and rope_scaling, as in layers without a window.
  rope_theta_windowed: Positive | None = None
  # Attention windows: layer i sees the last `windows[i % len(windows)]`
  # positions; an entry of None: all positions.
  windows: tuple[int | None, ...] = (None,)
  # Attention divides queries by sqrt(query_scale_dim); None: sqrt(d_head).
  # Gemma 2 uses another value than d_head.
  query_scale_dim: Count | None = None
  attention_softcap: Positive | None = None
  logit_softcap: Positive | None = None

  tied_embedding: bool = True
  # Before the head, norm(gelu(dense x)), and a bias per id of the vocabulary
  # (the masked-LM heads of BERT and ModernBERT). The dense layer has a bias if
  # the MLP has.
  head_transform: bool = False
  head_bias: bool = False
  # Gemma multiplies embeddings by sqrt(d_model).
  scale_embedding: bool = False
  # Standard deviation of the normal initialiser. Matrices that write to the
  # residual use init_scale / sqrt(2 n_layers), as GPT-2 does.
  init_scale: NotNegative = 0.02
  embedding_dropout: BelowOne = 0.0
  residual_dropout: BelowOne = 0.0
  # Fine-tuning of a run (init_from) by low-rank updates; None: all weights.
  lora: LoraConfig | None = None

  dtype: Literal["float32", "bfloat16"] = "float32"
  # `auto`: splash on TPU, mosaic or cudnn on GPU, else reference.
  attention: Literal["auto", "reference", "cudnn", "mosaic", "splash"] = "auto"
  # What a layer keeps for the backward pass; the rest is computed again, to the
  # same numbers. From least memory: `full` its input; `save_context` also the
  # attention's mixture of values, so that the kernel runs once (not on GPUs);
  # `save_out_proj` also the attention's result; `save_attention` also queries,
  # keys and values; `minimal_with_context` also the MLP's products; `none` all.
  # `dots` (MaxText's `minimal`) keeps products with weights, not the kernel's.
  remat: Literal[
    "none",
    "full",
    "save_context",
    "save_out_proj",
    "save_attention",
    "minimal_with_context",
    "dots",
  ] = "none"
  # `save_*` and `minimal_with_context` keep values in the host's memory. On
  # TPU and GPU: slower where the way there is too narrow to be hidden.
  remat_offload: bool = False
  # False runs the layers as a Python loop: slower to compile, same numbers.
  scan_layers: bool = True
  # The loss computes logits in chunks of at most this many tokens per device
  # (at least a token of each row).
  loss_chunk: Count = 512

  @property
  def gated(self) -> bool:
    return self.mlp in ("swiglu", "geglu", "geglu_exact")

  @property
  def layer_pattern(self) -> tuple[tuple[int | None, bool], ...]:
    """(window, whether positions are rotary) of the first layers; layer i has
    entry i % len(layer_pattern).
    """
    period = math.lcm(len(self.windows), len(self.rope_layers))
    rope = self.positions == "rope"
    return tuple(
      (
        self.windows[i % len(self.windows)],
        rope and self.rope_layers[i % len(self.rope_layers)],
      )
      for i in range(min(period, self.n_layers))
    )

  @property
  def d_rotary(self) -> int:
    """Dimensions of a head that rotate."""
    return int(self.d_head * self.rotary_fraction)


@dataclasses.dataclass
class TokenizerConfig:
  """The tokenizer; its size must be `model.vocab_size`.

  `sentencepiece` uses the `.model` file at `path`; without `path`, a tokenizer
  is trained on the training sources. So is `bpe`, a byte-level BPE.
  `huggingface` uses the tokenizer.json at `path`, or of the folder `path`, and
  the files beside it. `bytes` has an id per byte.
  """

  kind: Literal["sentencepiece", "bpe", "huggingface", "bytes"] = (
    "sentencepiece"
  )
  path: str | None = None
  # Chat template: file with a Jinja template that lays out a conversation. Chat
  # needs the template; the checkpoint stores the text of the template.
  chat_template: str | None = None
  # Further tokens with an id of their own, such as "<|im_start|>", which only
  # the chat template writes; in other text they are ordinary text.
  special_tokens: tuple[str, ...] = ()
  # Most text that the tokenizer is trained on, in bytes, sampled evenly from
  # all documents.
  train_bytes: Annotated[
    Count, AtMost(10**12, "since they are held in memory")
  ] = 10_000_000


@dataclasses.dataclass
class DataConfig:
  """Data sources and how their documents become rows of batches."""

  # Sources: tfds:NAME[/CONFIG]:SPLIT[#FEATURE], text:GLOB, jsonl:GLOB#FIELD,
  # parquet:GLOB#COLUMN or csv:GLOB#COLUMN. After a `|` comes the objective,
  # causal by default, with fields in brackets: prefix, span_corruption(rate,
  # mean_span), fim(rate, spm, cut), masked(rate) or chat(long), as in
  # 'text:*.py|fim(rate=0.9)'. Chats are jsonl:GLOB|chat (also parquet and csv),
  # a conversation a line, or instruct:python_stdlib:SPLIT|chat.
  train: tuple[str, ...] = ("tfds:python_stdlib:train",)
  # Mixture weight of each training source in the batches; (): by size.
  train_weights: tuple[float, ...] = ()
  validation: tuple[str, ...] = ("tfds:python_stdlib:validation",)
  # Packing of documents into rows: `chop` cuts the corpus every sequence_length
  # tokens; `best_fit` cuts no document that fits a row (arXiv:2404.10830), and
  # pads. Sources of `span_corruption`, `fim` and `chat` are packed best_fit.
  packing: Literal["chop", "best_fit"] = "chop"
  # A document of a `text:` source is a whole file, a line that is not blank, or
  # a block: a run of lines that are not blank.
  text_unit: Literal["file", "line", "block"] = "file"
  # On bytes that are not UTF-8: stop with an error, replace by U+FFFD, or skip
  # the document.
  invalid_utf8: Literal["error", "replace", "skip"] = "error"
  # On a line of a `jsonl:` source that is not JSON, lacks the field or is no
  # conversation to train on: stop with an error, or skip the document; the
  # number of skipped documents is printed.
  invalid_documents: Literal["error", "skip"] = "error"
  # Directory of token stores and TFDS builds. A token store's name is a hash of
  # the contents of its source and its tokenizer.
  cache_dir: str = "data"
  # Passes over the training sources, after which the run and its schedule end,
  # if before train.steps; None: endless.
  epochs: (
    Annotated[Count, AtMost(10**6, "since an int64 must count their windows")]
    | None
  ) = None
  # Tokenizer threads; None: a thread per core.
  workers: Annotated[Count, AtMost(10_000, "since each is a thread")] | None = (
    None
  )
  # Processes that make training batches, for objectives that tokenize again
  # (`fim`) and small models on fast devices; 0: two threads of the training
  # process, which share its interpreter lock.
  processes: Annotated[Natural, AtMost(1000, "since each takes memory")] = 0
  # Prefetch: rows of batches that are prepared ahead of the device.
  prefetch_rows: Annotated[
    Count, AtMost(10**6, "since they are held in memory")
  ] = 256

  @property
  def looks_ahead(self) -> bool:
    """Whether training batches have `prefix`."""
    return any(objective.of(source).looks_ahead for source in self.train)


@dataclasses.dataclass
class OptimizerConfig:
  """Optimizer and schedule. Biases and norm scales have no weight decay."""

  name: Literal["adamw", "lion", "adafactor", "muon"] = "muon"
  peak_lr: Positive = 2e-2
  # Peak learning rate of NAdamW, to which Muon gives embeddings, head, vectors.
  adam_peak_lr: Positive = 3e-3
  b1: BelowOne = 0.9
  b2: BelowOne = 0.95
  epsilon: Positive = 1e-8
  momentum: BelowOne = 0.95
  weight_decay: NotNegative = 0.0
  # Gradient clipping by global norm; None: no clipping.
  clip_norm: Positive | None = 1.0
  schedule: Literal["constant", "linear", "cosine", "rsqrt", "wsd"] = "linear"
  warmup_steps: Natural = 50
  # `wsd` decays over this last fraction of all steps, warm-up included.
  decay_fraction: float = 0.2
  # Learning rate at the end of the decay, as a fraction of the peak.
  final_lr_fraction: float = 0.0
  # EMA decay of the averaged parameters; None: no average is kept.
  ema_decay: BelowOne | None = None
  # Leaves out updates of steps whose loss or gradient norm is an outlier.
  skip: SkipConfig | None = None


def mesh_axis(default: int | None) -> Any:
  return dataclasses.field(default=default, metadata={"axis": True})


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
  """Devices along each mesh axis. The product must be the number of devices;
  at most a single axis may be None, and takes the remaining devices.
  """

  # `jit` shards by the table in lm/sharding.py; `pmap` is pure data parallel.
  mode: Literal["jit", "pmap"] = "jit"
  # Devices along `data`, `fsdp` and `tensor`; None, of one axis: those left.
  data: Count | None = mesh_axis(None)
  fsdp: Count | None = mesh_axis(1)
  tensor: Count | None = mesh_axis(1)
  # Seconds without a heartbeat after which a process of the run counts as lost.
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

  # Optimizer steps, over which the schedule runs; data.epochs may give fewer.
  steps: Count = 1000
  # Sequences in one optimizer step, over all devices.
  batch_size: Count = 8
  # Tokens in one sequence.
  sequence_length: Count = 256
  # Microbatches per batch, computed in sequence (gradient accumulation).
  microbatches: Count = 1
  # Weight of the z-loss: the squared log of the softmax's sum
  # (arXiv:2204.02311).
  z_loss: NotNegative = 0.0
  log_every: Count = 10
  eval_every: Count = 250
  # Most batches of each validation source in an evaluation; None: all.
  eval_batches: Count | None = None
  # Every so many steps, reports for each layer the root mean square of the
  # residual and of what attention and MLP add to it, and the norms of gradient
  # and update. Every step then computes them; None: no step does.
  statistics_every: Count | None = None
  # (first step, number of steps) traced into WORKDIR/profile; None: none.
  profile: tuple[Count, ...] | None = None
  # Watchdog: reports a step that lasts this many times the median step, with
  # the stacks of all threads; None: never.
  slow_step_factor: Positive | None = 20.0


@dataclasses.dataclass
class CheckpointConfig:
  """When to save checkpoints and how many to keep: last, every n-th, best."""

  save_every: Count = 250
  keep_last: Count = 2
  # Also keep checkpoints of steps divisible by keep_every; None: no such rule.
  keep_every: Count | None = None
  # Keep this many checkpoints of lowest validation loss.
  keep_best: Natural = 1
  # If a checkpoint's arrays differ from the run's: `refuse` stops;
  # `fresh_optimizer` restores the parameters and starts afresh each part that
  # does not fit (optimizer state, average). With `fresh_optimizer`, fields of
  # the optimizer may also change on a restart.
  on_mismatch: Literal["refuse", "fresh_optimizer"] = "refuse"
  # Most damaged checkpoints that a start moves to damaged/, each time falling
  # back to the previous checkpoint; one more ends the start.
  set_aside: Natural = 1


@dataclasses.dataclass
class Config:
  seed: Seed = 0
  # `RUN` or `RUN@STEP`, a run directory and one of its checkpoints (default:
  # the last), or a folder with a Hugging Face checkpoint: a fresh run starts
  # from the parameters there, with a fresh optimizer, schedule and order of
  # data. Where a tokenizer would be trained, the one from there is used. None:
  # parameters are drawn from `seed`.
  init_from: str | None = None
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
  # Tasks of lm-evaluation-harness (extra `eval`) during training; None: none.
  tasks: TasksConfig | None = None
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )

  @property
  def tokens_per_step(self) -> int:
    return self.train.batch_size * self.train.sequence_length


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2)
