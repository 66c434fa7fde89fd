"""Adapters in PEFT's files, merged runs, and the commands that read them.

The layout is checked against matrices written out by hand from PEFT's source:
lora_A.weight is [rank, inputs], lora_B.weight [outputs, rank], and an update is
scale * B A of a weight [outputs, inputs].
"""

import dataclasses
import json

import doors
import families
import jax
import jax.numpy as jnp
import numpy as np
import peft as library
import pytest
import reference
import safetensors.numpy
import test_families
import test_lora
import torch
import transformers

from lm import checkpoint, schema
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.huggingface import folder, peft
from lm.model import decoder, lora, weights
from lm.sample import load
from lm.verify.checks import harness

CFG = test_lora.adapted(families.LLAMA3, targets=("q", "o", "down"))


def tensors_of(folder):
  return safetensors.numpy.load((folder / peft.TENSORS).read_bytes())


def test_the_files_are_pefts(tmp_path):
  """By keys, shapes and the update of each matrix; and they come back."""
  params = test_lora.random_params(CFG)
  adapters = params["layers"]["lora"]
  peft.save(str(tmp_path / "a"), CFG, params, "runs/base")
  content = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
  assert content["peft_type"] == "LORA" and content["use_rslora"] is False
  assert (content["r"], content["lora_alpha"]) == (3, 5)
  assert content["target_modules"] == ["q_proj", "o_proj", "down_proj"]
  found = tensors_of(tmp_path / "a")
  assert len(found) == 2 * 3 * CFG.n_layers
  want = test_lora.merged_by_numpy(CFG, params, 1.0)["layers"]
  base = params["layers"]
  for module, room, name, n in (
    ("self_attn.q_proj", "attention", "q", 18),
    ("self_attn.o_proj", "attention", "o", 60),
    ("mlp.down_proj", "mlp", "down", 29),
  ):
    for i in range(CFG.n_layers):
      key = f"base_model.model.model.layers.{i}.{module}"
      a, b = (found[f"{key}.lora_{x}.weight"] for x in "AB")
      assert a.shape == (3, n) and a.dtype == b.dtype == np.float32
      update = (want[room][name][i] - base[room][name][i]).reshape(n, -1)
      np.testing.assert_allclose((b @ a).T, update, atol=1e-5)
  config, back = peft.load(str(tmp_path / "a"), lora.base(CFG))
  assert config == CFG.lora
  same = jax.tree.map(np.array_equal, back, {"layers": {"lora": adapters}})
  assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_other_dtypes_are_read_as_what_they_are(dtype, tmp_path):
  params = test_lora.random_params(CFG)
  peft.save(str(tmp_path), CFG, params, None)
  found = {k: v.astype(dtype) for k, v in tensors_of(tmp_path).items()}
  (tmp_path / peft.TENSORS).write_bytes(safetensors.numpy.save(found))
  _, back = peft.load(str(tmp_path), lora.base(CFG))
  for name, factors in back["layers"]["lora"].items():
    for key, got in factors.items():
      want = params["layers"]["lora"][name][key].astype(dtype)
      np.testing.assert_array_equal(got, want.astype(np.float32))


def test_a_layer_without_an_adapter_keeps_its_matrix(tmp_path):
  params = test_lora.random_params(CFG)
  peft.save(str(tmp_path), CFG, params, None)
  found = tensors_of(tmp_path)
  some = {k: v for k, v in found.items() if ".0.self_attn.q_proj" not in k}
  (tmp_path / peft.TENSORS).write_bytes(safetensors.numpy.save(some))
  _, back = peft.load(str(tmp_path), lora.base(CFG))
  q = back["layers"]["lora"]["q"]["a"]
  assert not np.any(q[0]) and np.any(q[1])


BAD_CONFIGS = [
  ({"use_dora": True}, "has more than plain LoRA (use_dora)"),
  ({"bias": "all"}, "another peft_type or bias"),
  ({"modules_to_save": ["lm_head"]}, "['lm_head'], and the file has []"),
  ({"rank_pattern": {"q_proj": 4}}, "(rank_pattern)"),
  ({"alpha_pattern": {"q_proj": 4}}, "(alpha_pattern)"),
  ({"init_lora_weights": "pissa"}, "(init_lora_weights)"),
  ({"use_something_new": True}, "(use_something_new)"),
  ({"peft_type": "LOHA"}, "another peft_type or bias"),
  ({"r": 2}, "lora_A of self_attn.q_proj, layer 0, is [3, 18], and of this"),
  ({"r": "3"}, "rank='3': must be of type int"),
  ({"lora_alpha": None}, "not a config of PEFT"),
  ({"lora_alpha": 10**400}, "not a config of PEFT"),
  ({"lora_dropout": "x"}, "not a config of PEFT"),
]


@pytest.mark.parametrize("changes, says", BAD_CONFIGS, ids=str)
def test_more_than_plain_lora_is_refused(changes, says, tmp_path):
  params = test_lora.random_params(CFG)
  peft.save(str(tmp_path), CFG, params, None)
  path = tmp_path / peft.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(schema.ConfigError) as error:
    peft.load(str(tmp_path), lora.base(CFG))
  assert says in str(error.value)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
  params = test_lora.random_params(CFG)
  peft.save(str(tmp_path), CFG, params, None)
  found, path = tensors_of(tmp_path), tmp_path / peft.TENSORS
  first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
  embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
  for change, says in (
    (
      {embedding: np.ones((3, 37), np.float32)},
      "fits no matrix of the 2",
    ),
    (
      {first.replace("s.0.", "s.2."): found[first]},
      "layers.2.self_attn.",
    ),
    (
      {first: found[first][:, :-1].copy()},
      "is [3, 17], and of this",
    ),
    (
      {first: found[first].astype(np.int32)},
      "of dtype I32; must be one",
    ),
  ):
    path.write_bytes(safetensors.numpy.save(found | change))
    with pytest.raises(schema.ConfigError) as error:
      peft.load(str(tmp_path), lora.base(CFG))
    assert says in str(error.value)
  path.write_bytes(safetensors.numpy.save(found))
  other = dataclasses.replace(lora.base(CFG), mlp="relu2")
  with pytest.raises(schema.ConfigError, match="^adapter .*lacks config.model"):
    peft.load(str(tmp_path), other)
  del found[first]
  path.write_bytes(safetensors.numpy.save(found))
  with pytest.raises(schema.ConfigError, match="layer 0 has only lora_B"):
    peft.load(str(tmp_path), lora.base(CFG))
  for content in (b"", b"\x00\xff" * 50):
    path.write_bytes(content)
    with pytest.raises(schema.ConfigError, match="adapter_model.safetensors: "):
      peft.load(str(tmp_path), lora.base(CFG))
  with pytest.raises(schema.ConfigError, match="'gpt2' of transformers has q"):
    peft.save(str(tmp_path), test_lora.adapted(families.GPT2), {}, None)


def test_adapters_are_for_the_family_of_the_base(tmp_path):
  """Phi-3's model is a Llama's as well, with other matrices in its files."""
  changed = {"rotary_fraction": 1.0, "rope_scaling": None, "windows": (None,)}
  base = dataclasses.replace(families.PHI3, **changed)
  phi3 = str(tmp_path / "phi3")
  (tmp_path / "phi3").mkdir()
  folder.write(phi3, base, reference.random_params(base), family="phi3")
  cfg = test_lora.adapted(base)
  with pytest.raises(schema.ConfigError, match="'phi3' of transformers has q"):
    peft.save(str(tmp_path / "a"), cfg, test_lora.random_params(cfg), phi3)
  cfg = test_lora.adapted(base, targets=("o", "down"))
  peft.save(str(tmp_path / "a"), cfg, test_lora.random_params(cfg), phi3)
  assert peft.load(str(tmp_path / "a"), base)[0] == cfg.lora


def test_a_whole_head_of_another_size_is_refused(tmp_path):
  cfg = test_lora.adapted(families.LLAMA3, full=("head",))
  peft.save(str(tmp_path), cfg, test_lora.random_params(cfg), None)
  found, path = tensors_of(tmp_path), tmp_path / peft.TENSORS
  key = "base_model.model.lm_head.weight"
  found[key] = found[key][1:].copy()
  path.write_bytes(safetensors.numpy.save(found))
  with pytest.raises(schema.ConfigError, match=r"is \[36, 18\], and of this"):
    peft.load(str(tmp_path), lora.base(cfg))


# The library itself -----------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("LLAMA3", {}),
    ("LLAMA3", {"full": ("embed", "head")}),
    ("GPT2", {"targets": ("o", "up", "down")}),
    ("GPT2", {"targets": ("o",)}),  # mlp.c_proj ends like attn.c_proj
    ("STARCODER2", {}),
    ("BERT", {}),
    ("MODERNBERT", {"targets": ("o",)}),
  ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_peft_reads_what_is_written_and_what_it_writes_is_read(
  name, fields, tmp_path
):
  """Logits of the library's adapted model are those of ours, both ways."""
  cfg = test_lora.adapted(getattr(families, name), **fields)
  whole = jax.tree.map(np.array, test_lora.random_params(cfg))
  trained, _ = weights.split(whole, decoder.declared(cfg))
  base = lora.base(cfg)
  params = reference.random_params(base)
  for other in cfg.lora.full:  # not what the adapter has
    params[other] = params[other][::-1].copy()
  folder.write(str(tmp_path), base, params)
  peft.save(str(tmp_path / "a"), cfg, whole, None)
  kind = "CausalLM" if cfg.causal else "MaskedLM"
  auto = getattr(transformers, f"AutoModelFor{kind}")
  model = auto.from_pretrained(tmp_path)
  model = library.PeftModel.from_pretrained(model, tmp_path / "a").eval()
  inputs = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9))
  adapted = {name for name, _ in model.named_modules() if "lora_A." in name}
  assert len(adapted) == cfg.n_layers * len(lora.targets(cfg))
  with torch.no_grad():
    theirs = model(torch.tensor(inputs)).logits.numpy()
  ours = test_families.logits(cfg, whole, inputs.astype(np.int32))
  assert np.abs(theirs - ours).max() <= 1e-4 * max(1, ours.std())
  plain = test_families.logits(base, params, inputs.astype(np.int32))
  assert np.abs(plain - ours).max() > 1e-2
  model.save_pretrained(tmp_path / "b")
  config, back = peft.load(str(tmp_path / "b"), base)
  assert dataclasses.replace(config, targets=()) == dataclasses.replace(
    cfg.lora, targets=()
  )
  same = jax.tree.map(np.array_equal, back, trained)
  assert all(jax.tree.leaves(same))


# --- commands -----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(make, tmp_path_factory):
  """(folder, LoRA config): checkpoints `tuned` of it and `base` of its base."""
  folder = tmp_path_factory.mktemp("saved")
  config = make(model__lora=test_lora.LORA, model__residual_dropout=0.0)
  config.init_from = str(folder / "base")
  params = jax.tree.map(jnp.asarray, test_lora.random_params(config.model))
  adapters = {"layers": {"lora": params["layers"]["lora"]}}
  rest = {**params, "layers": dict(params["layers"])}
  del rest["layers"]["lora"]
  base = make(model__residual_dropout=0.0)
  template = tokenizer_lib.Tokenizer().to_json()
  for name, c, trees in (
    ("tuned", config, {"params": adapters, "frozen": rest}),
    ("base", base, {"params": rest}),
  ):
    checkpoints = checkpoint.Checkpoints(str(folder / name), c.checkpoint)
    checkpoints.save(trees, checkpoint.Meta(7, c, template, "none"))
    checkpoints.close()
  return folder, config


@pytest.mark.slow
def test_adapters_are_written_read_and_merged_by_commands(saved):
  """The same model, as a LoRA run, a base with PEFT's files, a base with the
  run as its adapter, and a merged run.
  """
  folder, config = saved
  for to in ("peft", "merged"):
    arguments = [f"--workdir={folder}/tuned", f"--to={to}"]
    arguments += [f"--output={folder}/{to}"]
    ended = doors.run("lm.convert", arguments, str(folder))
    assert (ended.code, ended.err) == (0, ""), ended
    ended = doors.run("lm.convert", arguments, str(folder))
    assert ended.code == 2 and "exists already" in ended.err

  def read(name, adapter=None):
    meta = checkpoint.load_meta(str(folder / name))
    where = None if adapter is None else str(folder / adapter)
    return load.model(str(folder / name), meta, adapter=where)

  cfg, want = read("tuned")
  assert cfg == lora.base(config.model)
  for name, adapter in (
    ("base", "peft"),
    ("base", "tuned"),
    ("merged", None),
  ):
    got_cfg, got = read(name, adapter)
    assert got_cfg == cfg
    same = jax.tree.map(np.array_equal, got, want)
    assert all(jax.tree.leaves(same)), (name, adapter)
  sampled = set()
  for arguments in (
    ["tuned"],
    ["base", f"--adapter={folder}/peft"],
    ["base", f"--adapter={folder}/tuned"],
    ["merged"],
  ):
    given = [f"--workdir={folder}/{arguments[0]}", *arguments[1:]]
    given += ["--prompt=def", "--max_new_tokens=9"]
    ended = doors.run("lm.sample", given, str(folder))
    assert ended.code == 0, ended
    sampled.add(ended.out)
  plain = doors.run(
    "lm.sample",
    [f"--workdir={folder}/base", "--prompt=def", "--max_new_tokens=9"],
    str(folder),
  )
  assert len(sampled) == 1 and plain.code == 0 and plain.out not in sampled


@pytest.mark.parametrize(
  "arguments, says",
  [
    (
      ["--adapter=absent"],
      "--adapter=absent: neither a folder with",
    ),
    (["--adapter=base"], "nor a run that was trained with model.lora"),
    (
      ["--adapter=other"],
      "q_proj, layer 0, is [3, 18], and of this",
    ),
  ],
)
def test_an_adapter_that_does_not_fit_is_one_line(arguments, says, saved):
  folder, _ = saved
  other = folder / "other"
  if not other.exists():
    params = test_lora.random_params(CFG)
    peft.save(str(other), CFG, params, None)
  for door in ("lm.sample", "lm.evaluate"):
    given = [f"--workdir={folder}/base", *arguments]
    ended = doors.run(door, given, str(folder))
    assert ended.code == 2 and says in ended.err, ended
    assert ended.err.count("\n") == 1


def test_a_model_with_pefts_files_is_the_updated_model(saved, tmp_path):
  """On a mesh, too; rsLoRA's scale comes from the file."""
  cfg = test_lora.adapted(families.QWEN3, rank_stabilized=True)
  params = test_lora.random_params(cfg)
  peft.save(str(tmp_path), cfg, params, None)
  config, adapters = peft.load(str(tmp_path), lora.base(cfg))
  assert config.rank_stabilized
  want = test_lora.merged_by_numpy(cfg, params, 5 / 3**0.5)
  again = dataclasses.replace(cfg, lora=config)
  params["layers"]["lora"] = adapters["layers"]["lora"]
  batch = families.packed_batch(test_lora.LENGTHS, 19, cfg.vocab_size)
  logits = harness.logits(again, params, batch)
  expected = reference.forward(want, lora.base(cfg), batch)
  read = batch.segments != 0
  np.testing.assert_allclose(logits[read], expected[read], rtol=0, atol=1e-4)
  folder, config = saved
  mesh = jax.make_mesh((2, 2, 2), config_lib.MeshConfig().sizes().keys())
  meta = checkpoint.load_meta(str(folder / "base"))
  peft.save(
    str(tmp_path / "files"),
    config.model,
    test_lora.random_params(config.model),
    None,
  )
  for adapter in (folder / "tuned", tmp_path / "files"):
    _, got = load.model(str(folder / "base"), meta, mesh, str(adapter))
    _, one = load.model(str(folder / "base"), meta, None, str(adapter))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
