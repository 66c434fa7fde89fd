"""Families of Hugging Face against transformers: logits, gradients, tokens."""

import copy
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers

from lm import batch as batch_lib
from lm import sharding
from lm.data import tokenizer as tokenizer_lib
from lm.huggingface import config_json, families, folder, table
from lm.model import decoder
from lm.sample import request as request_lib
from lm.sample import sampler as sampler_lib

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
COMMON = SPECIAL | {
  "vocab_size": 37,
  "hidden_size": 24,
  "intermediate_size": 29,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "max_position_embeddings": 48,
  "initializer_range": 0.3,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 100.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 100.0,
  "factor": 4.0,
  "original_max_position_embeddings": 12,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}


def longrope(rotary):
  return {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0 + 0.1 * i for i in range(rotary // 2)],
    "long_factor": [2.0 + i for i in range(rotary // 2)],
    "original_max_position_embeddings": 16,
  }


def case(name, **fields):
  """A config of transformers: the class `name`, with `fields` over COMMON."""
  return name, {**COMMON, **fields}


CASES = {
  "gpt2": (
    "GPT2",
    SPECIAL
    | {
      "vocab_size": 37,
      "n_positions": 48,
      "n_embd": 21,
      "n_layer": 2,
      "n_head": 3,
      "n_inner": 29,
      "initializer_range": 0.3,
    },
  ),
  "llama1": case("Llama", num_key_value_heads=6),
  "llama3": case("Llama", rope_parameters=LLAMA3, head_dim=10),
  "llama_tied_biased": case(
    "Llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True
  ),
  "code_llama": case("Llama", rope_parameters=PLAIN | {"rope_theta": 1e6}),
  "llama_linear": case("Llama", rope_parameters=LINEAR),
  "llama_yarn": case("Llama", rope_parameters=YARN),
  "mistral": case("Mistral", sliding_window=7, head_dim=10),
  "mistral_full": case("Mistral", sliding_window=None),
  "qwen2": case("Qwen2", tie_word_embeddings=True),
  "qwen2_windows": case(
    "Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1
  ),
  "qwen3": case("Qwen3", head_dim=10, tie_word_embeddings=True),
  "qwen3_yarn": case("Qwen3", head_dim=10, rope_parameters=YARN),
  "gemma": case("Gemma", head_dim=10, num_key_value_heads=1),
  "gemma2": case(
    "Gemma2",
    head_dim=10,
    sliding_window=5,
    query_pre_attn_scalar=7,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
  ),
  "gemma3": case(
    "Gemma3Text",
    num_hidden_layers=8,
    head_dim=10,
    sliding_window=5,
    query_pre_attn_scalar=7,
    rope_parameters={
      "full_attention": LINEAR,
      "sliding_attention": PLAIN | {"rope_theta": 20.0},
    },
  ),
  "olmo2": case("Olmo2"),
  "olmo3": case(
    "Olmo3",
    num_hidden_layers=5,
    sliding_window=5,
    rope_parameters={"full_attention": YARN, "sliding_attention": PLAIN},
  ),
  "smollm3": case("SmolLM3", num_hidden_layers=5),
  "phi3": case("Phi3", sliding_window=9),
  "phi3_longrope": case(
    "Phi3",
    hidden_size=48,
    rope_parameters=longrope(8),
    original_max_position_embeddings=16,
  ),
  "phi4_mini": case(
    "Phi3",
    hidden_size=48,
    rope_parameters=longrope(6) | {"partial_rotary_factor": 0.75},
    original_max_position_embeddings=16,
    tie_word_embeddings=True,
  ),
  "starcoder2": case("Starcoder2", sliding_window=9),
  "bert": case("Bert", num_key_value_heads=None),
  "bert_untied": case(
    "Bert", num_key_value_heads=None, tie_word_embeddings=False
  ),
  "modernbert": case(
    "ModernBert",
    num_key_value_heads=None,
    num_hidden_layers=4,
    local_attention=8,
    rope_parameters={
      "full_attention": PLAIN,
      "sliding_attention": PLAIN | {"rope_theta": 20.0},
    },
  ),
  "modernbert_tanh": case(
    "ModernBert",
    num_key_value_heads=None,
    num_hidden_layers=2,
    hidden_activation="gelu_pytorch_tanh",
    classifier_activation="gelu_pytorch_tanh",
  ),
}


def auto(name):
  if CASES[name][0] in ("Bert", "ModernBert"):
    return transformers.AutoModelForMaskedLM
  return transformers.AutoModelForCausalLM


def reference(name, path, seed=0, dtype=torch.float32, **changed):
  """A random model of transformers, saved in `path`; every array matters."""
  kind, fields = CASES[name]
  config = getattr(transformers, f"{kind}Config")(
    **{**copy.deepcopy(fields), **changed}, attn_implementation="eager"
  )
  torch.manual_seed(seed)
  model = auto(name).from_config(config).eval()
  with torch.no_grad():
    for parameter_name, x in model.named_parameters():
      if x.ndim == 1:  # norms and biases, which start as constants
        x += 0.3 * torch.randn_like(x)
      if "embed" in parameter_name or "wte" in parameter_name:
        x *= 2
  model = model.to(dtype)
  model.save_pretrained(path)
  return model


@functools.lru_cache
def _forward(cfg):
  def forward(params, batch):
    x, _ = decoder.forward(cfg, params, batch)
    return decoder.bind(cfg, params).logits(x)

  return jax.jit(forward)


def logits(cfg, params, inputs):
  return np.asarray(_forward(cfg)(params, batch_lib.unscored(inputs)))


def ours(path, inputs):
  found = folder.find(str(path))
  return logits(found.model, folder.load_on(found), inputs)


def tokens(rows=2, length=40, seed=1):
  rng = np.random.default_rng(seed)
  return rng.integers(37, size=(rows, length), dtype=np.int32)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, tmp_path):
  """In float32, over more positions than the original length."""
  model = reference(name, tmp_path)
  inputs = tokens()
  with torch.no_grad():
    want = model(torch.tensor(inputs, dtype=torch.int64)).logits.numpy()
  assert want.std() > 0.3
  got = ours(tmp_path, inputs)
  scale = max(1.0, want.std())
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * scale)


# --- round trip ---------------------------------------------------------------


def bits(path):
  """name -> (dtype, shape, bytes) by the library's own reader."""
  found = {}
  for file in pathlib.Path(path).glob("*.safetensors"):
    for name, part in safetensors.deserialize(file.read_bytes()):
      found[name] = part["dtype"], part["shape"], bytes(part["data"])
  return found


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    *((name, "bfloat16") for name in CASES if not name.startswith("bert")),
    *(("llama3", "float32"), ("gpt2", "float32"), ("phi3", "float16")),
  ],
)
def test_round_trip_is_bit_identical(name, dtype, tmp_path):
  """Tensors, and the model that transformers makes of config.json."""
  theirs, back = tmp_path / "theirs", tmp_path / "back"
  reference(name, theirs, dtype=getattr(torch, dtype))
  back.mkdir()
  found = folder.find(str(theirs))
  assert found.dtype == dtype
  params = folder.load_on(found)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  family = found.family.model_type
  folder.write(str(back), found.model, params, dtype=dtype, family=family)
  assert bits(back) == bits(theirs)
  assert config_json.read(str(back))[1] == found.model
  models = [
    auto(name).from_pretrained(path, dtype="auto", attn_implementation="eager")
    for path in (theirs, back)
  ]
  assert type(models[0]) is type(models[1])
  inputs = torch.tensor(tokens(), dtype=torch.int64)
  with torch.no_grad():
    want, got = (model(inputs).logits for model in models)
  assert got.dtype == want.dtype and torch.equal(got, want)


def test_bert_comes_back_with_token_types_in_its_positions(tmp_path):
  """A text is of type 0 throughout; all else is bit-identical."""
  theirs, back = tmp_path / "theirs", tmp_path / "back"
  model = reference("bert", theirs)
  back.mkdir()
  found = folder.find(str(theirs))
  params = folder.load_on(found)
  folder.write(str(back), found.model, params, family="bert")
  want, got = bits(theirs), bits(back)
  names = [
    f"bert.embeddings.{x}_embeddings" for x in ("position", "token_type")
  ]
  table, kinds = (
    [
      np.frombuffer(b[f"{n}.weight"][2], np.float32).reshape(-1, 24)
      for n in names
    ]
    for b in (want, got)
  )
  np.testing.assert_array_equal(kinds[0], table[0] + table[1][0])
  assert not kinds[1].any()
  for name in names:
    del want[f"{name}.weight"], got[f"{name}.weight"]
  assert got == want
  inputs = torch.tensor(tokens(), dtype=torch.int64)
  again = auto("bert").from_pretrained(back).eval()
  with torch.no_grad():
    difference = again(inputs).logits - model(inputs).logits
  assert difference.abs().max() < 1e-4


@pytest.mark.parametrize(
  ("name", "shape"),
  [
    *((name, (2, 2, 2)) for name in ("llama3", "gpt2", "phi4_mini", "gemma3")),
    *(("llama3", shape) for shape in ((1, 4, 1), (8, 1, 1))),
    *(
      pytest.param(name, shape, marks=pytest.mark.slow)
      for name in ("gpt2", "phi4_mini", "gemma3")
      for shape in ((1, 4, 1), (8, 1, 1))
    ),
  ],
)
def test_parameters_come_in_shards(name, shape, tmp_path):
  """The same numbers, each array laid out as training lays it out."""
  fields = {"hidden_size": 48, "intermediate_size": 28, "vocab_size": 38}
  if name == "gpt2":
    fields = {"n_embd": 24, "n_head": 4, "n_inner": 28, "vocab_size": 38}
  reference(name, tmp_path, **fields)
  found = folder.find(str(tmp_path))
  mesh = jax.make_mesh(shape, sharding.MESH_AXES, devices=jax.devices())
  want = folder.load_on(found)
  got = folder.load_on(found, mesh)
  make = functools.partial(decoder.init_params, found.model)
  like = sharding.abstract(make, jax.random.key(0), mesh=mesh)
  for x, y, z in zip(*map(jax.tree.leaves, (got, want, like)), strict=True):
    assert x.sharding == z.sharding
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
  written = tmp_path / "back"
  written.mkdir()
  folder.write(str(written), found.model, got, family=found.family.model_type)
  assert bits(written) == bits(tmp_path)


class Shards(jax.sharding.Sharding):
  """Of two devices of a process: random shards of each array."""

  def __init__(self, seed):
    self.seed = seed

  def addressable_devices_indices_map(self, global_shape):
    rng = np.random.default_rng(self.seed)

    def cut(n):
      first = int(rng.integers(n))
      return slice(first, int(rng.integers(first, n)) + 1)

    return {device: tuple(map(cut, global_shape)) for device in range(2)}


@pytest.mark.parametrize("name", CASES)
def test_rows_hold_the_shards(name):
  """Of each tensor, for random shards: the first row needed, to the last."""
  kind, fields = CASES[name]
  content = getattr(transformers, f"{kind}Config")(**fields).to_dict()
  family = families.find(content["model_type"])
  model = family.read(content)
  for seed, place in enumerate(table.places(family.rows, model).values()):
    if place.row.folded:
      continue
    where = {path: Shards(seed + i) for i, path in enumerate(place.row.ours)}
    first, last = place.rows(where)
    numbers = np.arange(place.shape[0])
    whole = np.empty(place.shape, np.int32)
    whole[...] = numbers.reshape(-1, *[1] * (whole.ndim - 1))
    needed = set()
    for path, x in place.ours(whole).items():
      for index in (
        where[path].addressable_devices_indices_map(x.shape).values()
      ):
        needed |= {*x[index].ravel().tolist()}
    assert (first, last) == (min(needed), max(needed) + 1), place.name


# --- gradients and tokens -----------------------------------------------------


# One layer of each kind, where the logits have had the whole pattern.
SHORTER = {
  "gemma3": {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
  },
  "smollm3": {"num_hidden_layers": 2, "no_rope_layers": [1, 0]},
  "llama3": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma3"])
def test_gradients_equal_those_of_transformers(name, tmp_path):
  """Of the mean loss per token, over every parameter."""
  model = reference(name, tmp_path, **SHORTER.get(name, {}))
  inputs = torch.tensor(tokens(2, 24), dtype=torch.int64)
  model(inputs, labels=inputs).loss.backward()
  grads = tmp_path / "grads"
  grads.mkdir()
  state = {
    k: p.grad.contiguous() for k, p in model.named_parameters() if k != "x"
  }
  safetensors.torch.save_file(state, grads / "model.safetensors")
  (grads / "config.json").write_text((tmp_path / "config.json").read_text())
  found = folder.find(str(tmp_path))
  want = folder.load_on(folder.find(str(grads)))

  def loss(params, batch):
    x, _ = decoder.forward(found.model, params, batch)
    logits = decoder.bind(found.model, params).logits(x)[:, :-1]
    picked = jax.nn.log_softmax(logits)
    targets = jax.nn.one_hot(batch.inputs[:, 1:], logits.shape[-1])
    return -jnp.sum(picked * targets) / targets[..., 0].size

  got = jax.jit(jax.grad(loss))(
    folder.load_on(found), batch_lib.unscored(tokens(2, 24))
  )
  for path, x in jax.tree_util.tree_leaves_with_path(got):
    y = functools.reduce(lambda node, key: node[key.key], path, want)
    scale = max(1.0, float(np.abs(y).max()))
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * scale, err_msg=path)


@pytest.mark.parametrize(
  "name",
  [
    "gpt2",
    pytest.param("llama3", marks=pytest.mark.slow),
    "gemma3",
    pytest.param("smollm3", marks=pytest.mark.slow),
  ],
)
def test_greedy_tokens_equal_those_of_transformers(name, tmp_path, monkeypatch):
  """64 tokens, by the KV cache and past every window, unpadded and padded; and
  up to another token of which generation_config.json says that it ends a text.
  """
  tokenizer = tokenizer_lib.Tokenizer()
  longer = {"n_positions" if name == "gpt2" else "max_position_embeddings": 96}
  fields = {"vocab_size": tokenizer.size, **longer, **SHORTER.get(name, {})}
  model = reference(name, tmp_path, **fields)
  found = folder.find(str(tmp_path))
  loaded = sampler_lib.Sampler(found.model, folder.load_on(found), tokenizer)
  prompts = tokens(3, 13)
  model.generation_config.eos_token_id = tokenizer.eos
  prompts = [prompts[0], prompts[1][:5], prompts[2][:1]]
  requests = [
    request_lib.Request(prompt=p.tolist(), max_new_tokens=64, temperature=0.0)
    for p in prompts
  ]
  for _ in range(2):
    results = loaded.generate(requests)
    for prompt, got in zip(prompts, results, strict=True):
      want = model.generate(
        torch.tensor(prompt[None], dtype=torch.int64),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=64,
        do_sample=False,
      )[0, len(prompt) :].numpy()
      assert got.token_ids == want.tolist()
    end = results[0].token_ids[:4][-1]
    monkeypatch.setattr(tokenizer_lib.Tokenizer, "stops", (end,))
    model.generation_config.eos_token_id = [tokenizer.eos, end]
  assert results[0].finish_reason == "eos" and len(results[0].token_ids) <= 4
