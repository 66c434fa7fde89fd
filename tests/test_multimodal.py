"""Text parts of checkpoints that read images, too, against transformers."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import test_convert
import test_families
import test_init_from
import torch
import transformers

from lm import checkpoint, schema
from lm.huggingface import config_json, families, folder
from lm.model import counts
from lm.sample import load

TEXT = dict(
  test_families.CASES["gemma3"][1],
  vocab_size=320,
  hidden_size=48,
  intermediate_size=28,
)
VISION = {
  "hidden_size": 16,
  "intermediate_size": 20,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "image_size": 8,
  "patch_size": 4,
}
# Of the embeddings 3, of two layers 16 each, of the last norm 2, of the head
# 11, and of the projection 2.
N_VISION = 3 + 2 * 16 + 2 + 11 + 2
# huggingface.co/google/gemma-3-4b-it: what its config.json has.
PUBLISHED = {
  "architectures": ["Gemma3ForConditionalGeneration"],
  "boi_token_index": 255999,
  "eoi_token_index": 256000,
  "eos_token_id": [1, 106],
  "image_token_index": 262144,
  "initializer_range": 0.02,
  "mm_tokens_per_image": 256,
  "model_type": "gemma3",
  "text_config": {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  },
  "torch_dtype": "bfloat16",
  "transformers_version": "4.50.0.dev0",
  "vision_config": {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
  },
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
  """(folder of a Gemma 3 that reads images, with a tokenizer; the model)."""
  path = tmp_path_factory.mktemp("gemma") / "hf"
  config = transformers.Gemma3Config(
    text_config=TEXT,
    vision_config=VISION,
    mm_tokens_per_image=4,
    image_token_index=319,
    attn_implementation="eager",
  )
  torch.manual_seed(0)
  model = transformers.Gemma3ForConditionalGeneration(config).eval()
  with torch.no_grad():
    for x in model.parameters():
      if x.ndim == 1:
        x += 0.3 * torch.randn_like(x)
  model.save_pretrained(path)
  test_convert.save_tokenizer(path)
  return path, model


@pytest.fixture
def copied(gemma, tmp_path):
  shutil.copytree(gemma[0], tmp_path / "hf")
  return tmp_path / "hf"


def published(name):
  """As the files of Google have it."""
  return name.replace("vision_tower.", "vision_tower.vision_model.")


def today(name):
  """As the modules of transformers 5."""
  if name.startswith("language_model.model."):
    return name.replace("language_model.model.", "model.language_model.")
  return f"model.{name}"


def renamed(path, name):
  file = path / "model.safetensors"
  state = {name(key): x for key, x in test_convert.stored(path).items()}
  safetensors.torch.save_file(state, file)


@pytest.mark.parametrize("name", [str, published, today])
def test_logits_equal_those_of_transformers(name, gemma, copied):
  """Of text alone, where the layers without a window scale their rotation."""
  renamed(copied, name)
  found = folder.find(str(copied))
  assert found.model.rope_scaling.kind == "linear"
  assert found.notes == (f"vision tower left out: {N_VISION} tensors",)
  inputs = test_families.tokens()
  with torch.no_grad():
    want = gemma[1](torch.tensor(inputs, dtype=torch.int64)).logits.numpy()
  assert want.std() > 0.3
  got = test_families.ours(copied, inputs)
  scale = max(1.0, want.std())
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * scale)


def test_a_head_of_its_own(copied, gemma):
  """Which config.json says outside the text part alone."""
  state = test_convert.stored(copied)
  head = torch.randn(320, 48)
  state["language_model.lm_head.weight"] = head
  safetensors.torch.save_file(state, copied / "model.safetensors")
  with pytest.raises(schema.ConfigError, match="lm_head.weight is not model.e"):
    folder.find(str(copied))
  test_convert.edit(copied, tie_word_embeddings=False)
  with pytest.raises(schema.ConfigError, match="say different things"):
    folder.find(str(copied))
  text = json.loads((copied / "config.json").read_text())["text_config"]
  del text["tie_word_embeddings"]
  test_convert.edit(copied, text_config=text)
  found = folder.load_on(folder.find(str(copied)))
  np.testing.assert_array_equal(found["head"], head.T.numpy())


def test_missing_keys_have_the_defaults_of_transformers(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
  family, model = config_json.read(str(tmp_path))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  assert family is families.BY_NAME["gemma3_text"]
  assert family.read(theirs.text_config.to_dict()) == model
  assert (model.n_layers, model.d_model, model.d_head) == (34, 2560, 256)
  assert (model.rope_scaling.kind, model.rope_scaling.factor) == ("linear", 8)
  with torch.device("meta"):
    text = transformers.AutoModelForCausalLM.from_config(theirs.text_config)
  assert counts.parameter_count(model) == text.num_parameters()
  assert text.num_parameters() == 3_880_263_168
  bare = PUBLISHED | {"text_config": {}}
  (tmp_path / "config.json").write_text(json.dumps(bare))
  whole = transformers.Gemma3TextConfig().to_dict()
  assert config_json.read(str(tmp_path))[1] == family.read(whole)


@pytest.mark.slow
def test_the_folder_becomes_a_run_and_the_run_a_text_model(gemma, tmp_path):
  path, model = gemma
  ended = test_convert.convert(tmp_path, f"--from={path}", "--to=run")
  assert (ended.code, ended.err) == (0, ""), ended
  assert f"{path}: vision tower left out: {N_VISION} tensors\n" in ended.out
  meta = checkpoint.load_meta(str(tmp_path / "run"))
  cfg, params = load.model(str(tmp_path / "run"), meta)
  inputs = test_families.tokens()
  with torch.no_grad():
    want = model(torch.tensor(inputs, dtype=torch.int64)).logits.numpy()
  got = test_families.logits(cfg, params, inputs)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1, want.std()))
  ended = test_convert.convert(tmp_path, "--from=run", "--to=back")
  assert (ended.code, ended.err) == (0, ""), ended
  written = json.loads((tmp_path / "back/config.json").read_text())
  assert written["model_type"] == "gemma3_text"
  again = folder.find(str(tmp_path / "back"))
  assert (again.model, again.notes) == (cfg, ())
  text = {
    name.removeprefix("language_model."): x
    for name, x in test_families.bits(path).items()
    if name.startswith("language_model.")
  }
  assert test_families.bits(tmp_path / "back") == text


def test_a_run_starts_from_the_folder(gemma, make):
  config = test_init_from.from_hub(make, gemma[0])
  state, said = test_init_from.started(config, gemma[0])
  want = folder.load_on(folder.find(str(gemma[0])))
  test_init_from.assert_same(state.params, want)
  assert said.count(f"vision tower left out: {N_VISION} tensors") == 1
  assert len(jax.tree.leaves(want)) > 9


def test_tensors_that_do_not_fit_are_refused(copied, tmp_path):
  """Of the vision tower only those are left out that it has."""
  state = test_convert.stored(copied)
  layer = "language_model.model.layers.1"
  del state[f"{layer}.mlp.up_proj.weight"]
  state["model.language_model.norm.weight"] = torch.zeros(48)
  unknown = (
    "vision_tower.encoder.layers.0.self_attn.qkv.weight",
    "vision_tower.encoder.layers.0.adapter.weight",
    "multi_modal_projector.linear_1.weight",
    "audio_tower.conv.weight",
  )
  state |= {name: torch.zeros(2) for name in unknown}
  safetensors.torch.save_file(state, copied / "model.safetensors")
  test_convert.refused(
    tmp_path,
    copied,
    "config.json does not fit 6 tensors: ",
    "model.layers.1.mlp.up_proj.weight: missing, [28, 48]",
    "model.norm.weight: 2 times",
    *(f"{name}: unknown, F32[2]" for name in unknown),
  )


def test_a_text_model_has_no_vision_tower(tmp_path):
  test_families.reference("gemma3", tmp_path)
  state = test_convert.stored(tmp_path)
  name = "vision_tower.post_layernorm.bias"
  state[name] = torch.zeros(2)
  safetensors.torch.save_file(state, tmp_path / "model.safetensors")
  with pytest.raises(schema.ConfigError, match=f"{name}: unknown"):
    folder.find(str(tmp_path))


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"text_config": ...}, "lacks 'text_config'"),
    ({"text_config": 3}, "text_config=3: must be an object"),
    ({"text_config": {"model_type": "llama"}}, "only 'gemma3_text'"),
    ({"text_config": {"odd": 1}}, "odd=1: unknown to the family 'gemma3_text'"),
    ({"odd": 1}, "odd=1: unknown to the family 'gemma3'"),
    ({"hidden_size": 48}, "hidden_size=48: unknown to the family 'gemma3'"),
    (
      {"text_config": {"use_bidirectional_attention": True}},
      "use_bidirectional_attention=True: not supported",
    ),
    ({"model_type": "mistral3"}, "only of gemma3 is the text part read"),
  ],
)
def test_configs_that_ask_for_something_else_are_refused(
  fields, says, copied, tmp_path
):
  test_convert.edit(copied, **fields)
  test_convert.refused(tmp_path, copied, "config.json", says)
