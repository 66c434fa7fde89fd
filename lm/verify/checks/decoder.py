"""Checks of the decoder: causality, packing, padding, decode, loss, dtypes.

B batch, T length, S position attended to, D model, V vocabulary.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import batch as batch_lib
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.model import counts, decoder
from lm.sample import sampler as sampler_lib
from lm.train import programs
from lm.train import step as step_lib
from lm.verify import result
from lm.verify.checks import harness
from lm.verify.result import Result

# Limit of `harness.relative_error` in bfloat16, which has 8 bits, 4e-3: each
# layer rounds several times.
_BFLOAT16 = 5e-2


def causality(config: config_lib.Config) -> Iterator[Result]:
  """By its gradients, a position must depend on all inputs within reach of the
  attention mask and on no other inputs: those before it and, if a training
  source looks ahead, those of its document's prefix. The check covers one layer
  per window, then the whole model, in the config's dtype and attention kernel.
  """
  model, length = config.model, config.train.sequence_length
  # A distinct token per position: an embedding row then stands for a position.
  length = min(length, model.vocab_size)
  first = 2 * length // 3
  lengths = [[first, length - first - length // 8]]
  row = harness.packed_batch(config, lengths, length)
  row.inputs[:] = np.arange(length)
  for windows in (*((w,) for w in dict.fromkeys(model.windows)), None):
    if windows is None:
      what, part = f"{model.n_layers} layers", model
      each = [part.windows[i % len(part.windows)] for i in range(part.n_layers)]
    else:
      what, each = f"one layer, window {windows[0]}", windows
      part = dataclasses.replace(model, n_layers=1, windows=windows)
    part = dataclasses.replace(part, init_scale=model.d_model**-0.5)
    found = _influence(part, harness.random_params(part), row)
    reachable, read = _reachable(row, each, part.causal), row.segments[0] > 0
    yield result.judge(
      "causality",
      f"{what}: |gradient| by what comes after, is in another document or "
      "beyond the window",
      float(np.max(np.where(reachable, 0, found)[read])),
      0,
    )
    yield result.judge(
      "causality",
      f"{what}: places within reach whose gradient is 0",
      int(np.sum(reachable[read] & ~(found[read] > 0))),
      0,
    )


def _influence(model, params, row) -> np.ndarray:
  """[T, S]: largest |d (hidden[t] @ direction) / d embedding of token s|."""
  row = jax.tree.map(jnp.asarray, row)
  n = row.inputs.shape[1]
  direction = jax.random.normal(jax.random.key(3), (model.d_model,))

  def at(t, params):
    def project(embed):
      everything = {**params, "embed": embed}
      hidden, _ = decoder.forward(model, everything, row)
      return hidden[0, t].astype(jnp.float32) @ direction

    slope = jax.grad(project)(params["embed"])
    return jnp.max(jnp.abs(slope[:n]), axis=-1)

  run = jax.jit(lambda p: jax.lax.map(lambda t: at(t, p), jnp.arange(n)))
  return np.asarray(run(params))


def _reachable(row, windows, causal) -> np.ndarray:
  """[T, S]: whether layers of the given windows can pass token s on to t."""
  segments, place = row.segments[0], np.arange(row.inputs.shape[1])
  distance = place[:, None] - place[None]
  reach = math.inf
  if None not in windows:
    reach = sum(window - 1 for window in windows)
  same = segments[:, None] == segments[None]
  seen = (distance >= 0) | (not causal)
  if row.prefix is not None:
    seen = seen | row.prefix[0]
  return same & seen & (abs(distance) <= reach)


def packing(config: config_lib.Config) -> Iterator[Result]:
  """Packed documents must give the same numbers as a row per document."""
  config = harness.without_dropout(harness.exact(config))
  config.train.microbatches = 1
  model, T = config.model, config.train.sequence_length
  first, second = T // 2, T // 3
  lengths = [first, second, T - 3 - first - second]
  packed = harness.packed_batch(config, [lengths, [], []], T)
  alone = harness.packed_batch(config, [[n] for n in lengths], T, seed=1)
  ends = np.cumsum(lengths)
  for row, (n, end) in enumerate(zip(lengths, ends, strict=True)):
    document = packed.inputs[0, end - n : end]
    alone.inputs[row, :n] = document
    alone.targets[row, : n - 1] = document[1:]  # the last target is outside
    alone.weights[row, :n] = packed.weights[0, end - n : end]
    if alone.prefix is not None:
      alone.prefix[row, :n] = packed.prefix[0, end - n : end]
  everything = jax.tree.map(lambda *x: np.concatenate(x), packed, alone)
  logits = harness.logits(model, harness.random_params(model), everything)
  apart = [logits[3 + row, :n] for row, n in enumerate(lengths)]
  yield result.judge(
    "packing",
    "float32 logits of three documents in one row, and in a row each",
    harness.relative_error(logits[0, : ends[-1]], np.concatenate(apart)),
    harness.FLOAT32_SUMS,
  )
  yield result.judge(
    "packing",
    "float32 loss and gradients of the same",
    harness.relative_error(*harness.gradients(config, [packed, alone])),
    harness.FLOAT32_SUMS,
  )


def padding(config: config_lib.Config) -> Iterator[Result]:
  """The ids and the amount of padding must not change logits or gradients."""
  config = harness.without_dropout(harness.exact(config))
  config.train.microbatches = 1
  model, T = config.model, config.train.sequence_length
  base = harness.packed_batch(config, [[T // 2, T // 4], [T // 3]], T)
  inputs = np.where(base.segments > 0, base.inputs, 0)
  other = dataclasses.replace(base, inputs=inputs)
  wider = jax.tree.map(lambda a: np.pad(a, ((0, 1), (0, T))), base)
  params = harness.random_params(model)

  def read(batch):
    return harness.logits(model, params, batch)[batch.segments > 0]

  plain = read(base)
  slopes, of_other = harness.gradients(config, [base, other])
  (of_wider,) = harness.gradients(config, [wider])
  content = "other ids in the padding"
  amount = "twice the length and a row more, all padding"
  for what, found, wanted, limit in (
    (f"logits: {content}", read(other), plain, 0),
    (f"loss and gradients: {content}", of_other, slopes, 0),
    (f"logits: {amount}", read(wider), plain, harness.FLOAT32_SUMS),
    (f"loss and gradients: {amount}", of_wider, slopes, harness.FLOAT32_SUMS),
  ):
    error = harness.relative_error(found, wanted)
    yield result.judge("padding", f"float32 {what}", error, limit)


def decode(config: config_lib.Config) -> Iterator[Result]:
  """Log-probabilities of prefill and decode (KV cache) must match a forward
  pass over the sampled tokens, for prompts of unequal length.
  """
  if not config.model.causal:
    note = "an encoder (model.causal=False) does not decode"
    yield Result("decode", "nothing to decode", None, None, True, note)
    return
  exact = harness.exact(config).model
  yield result.judge(
    "decode",
    "float32 log-probabilities of what was drawn: prefill and decode, and "
    "forward",
    _decode_error(exact),
    harness.FLOAT32_SUMS,
  )
  own = harness.sensitive(config).model
  if own.dtype != "float32":
    yield result.judge(
      "decode",
      f"the same in {own.dtype}, forward by the run's own kernel",
      _decode_error(own),
      _BFLOAT16,
    )


def _decode_error(model: config_lib.ModelConfig) -> float:
  # At least the vocabulary of the bytes tokenizer that the sampler gets.
  size = max(model.vocab_size, tokenizer_lib.BYTES_SIZE)
  model = dataclasses.replace(model, vocab_size=size)
  T = min(model.context_length, 256)
  n_new = min(24, T // 2)
  lengths = np.array([T - n_new, 1, (T - n_new) // 2, 2])
  n_rows = len(lengths)
  ids = np.random.default_rng(5).integers(
    tokenizer_lib.BYTES_SIZE, size=(n_rows, T)
  )
  tokenizer = tokenizer_lib.Tokenizer()
  ids[:, 0] = tokenizer.bos
  params = harness.random_params(model)
  sampler = sampler_lib.Sampler(model, params, tokenizer)
  results = sampler.generate(
    [
      sampler_lib.Request(
        row[:n].tolist(),
        temperature=2.0,
        max_new_tokens=n_new,
        min_tokens=n_new,  # no row ends early
        seed=i,
      )
      for i, (row, n) in enumerate(zip(ids, lengths, strict=True))
    ]
  )
  drawn = np.array([result.token_ids for result in results])
  found = np.array([result.log_probabilities for result in results])
  at = lengths[:, None] + np.arange(n_new)
  np.put_along_axis(ids, at, drawn, axis=1)
  logits = harness.logits(model, params, batch_lib.unscored(ids)).astype(
    np.float64
  )
  logs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  row = np.arange(n_rows)[:, None]
  return harness.relative_error(found, logs[row, at - 1, drawn])


def initial_loss(config: config_lib.Config) -> Iterator[Result]:
  """The first loss of the real step must be near ln V, the loss of a model for
  which all ids are equally likely. The variance of the logits adds to the loss
  and grows with the width: a shrunk config tests only the initialisers.
  """
  batch = harness.random_batch(config, 0)
  config = harness.with_mesh(config, (1, 1, 1))
  config.optimizer.name = "adamw"  # no effect here, and compiles fastest
  loss = harness.train_steps(config, [batch], fresh=True).numbers[0, 0]
  uniform = math.log(config.model.vocab_size)
  yield result.judge(
    "initial_loss",
    f"first loss {loss:.4f}, and ln V {uniform:.4f}, as a share of it",
    abs(loss - uniform) / uniform,
    0.02,  # logits of variance v add v / 2
  )


# Primitives of the softmax, the norms and the loss, which lose digits in
# bfloat16. Tanh and logistic are left out, since activations use them too.
_PRECISE = {"exp", "exp2", "expm1", "log", "log1p", "rsqrt", "sqrt"}


def dtypes(config: config_lib.Config) -> Iterator[Result]:
  """The real step (traced, not run) must use the config's dtype in matrix
  products, and float32 in softmax, norms, loss, state and metrics.

  AdamW replaces the optimizer: AdamW has no matrix product, hence all
  products found are the model's. Muon's products run in float32 on purpose.
  """
  config = harness.with_mesh(config, (1, 1, 1))
  config.optimizer = dataclasses.replace(config.optimizer, name="adamw")
  mesh = harness.make_mesh(config)
  state = programs.abstract_state(config, mesh)
  batch = batch_lib.abstract(config, programs.batch_sharding(config, mesh))
  with jax.set_mesh(mesh):
    step = step_lib.train_step(config)
    traced, out = jax.make_jaxpr(step, return_shape=True)(state, batch)
  wanted, products, precise = config.model.dtype, [], []
  for equation in _equations(traced):
    kinds = {str(v.aval.dtype) for v in equation.invars}
    if equation.primitive.name == "dot_general" and kinds != {wanted}:
      products.append(_source_line(equation))
    if equation.primitive.name in _PRECISE and "bfloat16" in kinds:
      precise.append(f"{equation.primitive.name} in {_source_line(equation)}")
  yield result.judge(
    "dtypes",
    f"matrix products of the step with an operand that is not {wanted}",
    len(products),
    0,
    _counted(products),
  )
  yield result.judge(
    "dtypes",
    "exponentials, logarithms and roots (softmax, norms, loss) in bfloat16",
    len(precise),
    0,
    _counted(precise),
  )
  rounded = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, out))
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32
  ]
  yield result.judge(
    "dtypes",
    "arrays of the state, and metrics, that are not float32",
    len(rounded),
    0,
    _counted(rounded),
  )


def _equations(jaxpr: Any) -> Iterator[Any]:
  """All equations of a jaxpr, inside scans, remat and maps too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        if hasattr(inner, "eqns"):
          yield from _equations(inner)


def _source_line(equation: Any) -> str:
  """Innermost source line in lm/ of an equation: `file:line function`."""
  traceback = equation.source_info.traceback
  for frame in traceback.frames if traceback else ():
    folder, file = os.path.split(frame.file_name)
    if f"{os.sep}lm{os.sep}" in folder + os.sep:
      return f"{file}:{frame.line_num} {frame.function_name}"
  return "an unknown place"


def _counted(names: list[str]) -> str:
  """Distinct names, each with its count."""
  return ", ".join(
    f"{name} ({names.count(name)}x)" for name in dict.fromkeys(names)
  )


def parameters(config: config_lib.Config) -> Iterator[Result]:
  """The closed-form parameter count must match the shapes; computes nothing."""
  make = functools.partial(decoder.init_params, config.model)
  shapes = jax.eval_shape(make, jax.random.key(0))
  counted = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  formula = counts.parameter_count(config.model)
  yield result.judge(
    "parameters",
    f"{counted:,} parameters, and {formula:,} by the closed form",
    abs(counted - formula),
    0,
  )
