"""lm.convert: folders of Hugging Face to runs and back, and what is refused."""

import json
import os
import shutil
import struct

import doors
import jax
import numpy as np
import pytest
import safetensors.numpy
import test_families
import tokenizers
import torch
import transformers

from lm import checkpoint, processes, schema
from lm import config as config_lib
from lm.convert import huggingface, recheck
from lm.data import chat
from lm.data import tokenizer as tokenizer_lib
from lm.huggingface import (
  config_json,
  expressible,
  families,
  folder,
  imported,
  tensors,
)
from lm.model import decoder
from lm.sample import load
from lm.train import loop

TEXTS = ["def main():\n  return 1\n", "the quick brown fox", "ünïcode ▁ 漢字"]

# Text that spells a special token stays text, as it does here.
PLAIN = {"add_special_tokens": False, "split_special_tokens": True}


def save_tokenizer(path, size=300):
  """A byte-level BPE with two special tokens, as transformers saves it."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=["<s>", "</s>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(TEXTS * 3, trainer)
  wrapped = transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, bos_token="<s>", eos_token="</s>"
  )
  wrapped.save_pretrained(path)
  return wrapped


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  """(folder of a Llama with a tokenizer, the model of transformers)."""
  path = tmp_path_factory.mktemp("llama") / "hf"
  model = test_families.reference("llama3", path, vocab_size=320)
  save_tokenizer(path)
  return path, model


@pytest.fixture
def copied(llama, tmp_path):
  shutil.copytree(llama[0], tmp_path / "hf")
  return tmp_path / "hf"


def convert(directory, *arguments):
  return doors.run("lm.convert", list(arguments), str(directory), timeout=120)


@pytest.mark.slow
def test_a_folder_becomes_a_run_and_a_run_a_folder(llama, tmp_path):
  """Which samples, and which transformers reads: same logits and same ids."""
  path, model = llama
  ended = convert(tmp_path, f"--from={path}", "--to=run")
  assert (ended.code, ended.err) == (0, ""), ended
  meta = checkpoint.load_meta(str(tmp_path / "run"))
  assert meta.config.model == config_json.read(str(path))[1]
  assert meta.trained_on == ()
  tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  for text in TEXTS:
    assert tokenizer.encode(text) == theirs.encode(text, **PLAIN)
  sampled = doors.run(
    "lm.sample",
    ["--workdir=run", "--prompt=def", "--max_new_tokens=5", "--temperature=0"],
    str(tmp_path),
  )
  assert sampled.code == 0, sampled
  cfg, params = load.model(str(tmp_path / "run"), meta)
  inputs = test_families.tokens()
  with torch.no_grad():
    want = model(torch.tensor(inputs, dtype=torch.int64)).logits.numpy()
  got = test_families.logits(cfg, params, inputs)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1, want.std()))

  ended = convert(tmp_path, "--from=run", "--to=back")
  assert (ended.code, ended.err) == (0, ""), ended
  back = tmp_path / "back"
  assert test_families.bits(back) == test_families.bits(path)
  again = transformers.AutoTokenizer.from_pretrained(back)
  assert again.model_max_length == meta.config.model.context_length
  for text in TEXTS:
    assert again.encode(text, **PLAIN) == tokenizer.encode(text)
  generation = transformers.GenerationConfig.from_pretrained(back)
  assert generation.eos_token_id == [tokenizer.eos]
  card = (back / "README.md").read_text()
  assert "A `llama` with" in card and '"vocab_size": 320' in card
  assert "Unknown: it was converted" in card and "- training" not in card
  again = convert(tmp_path, "--from=run", "--to=back")
  assert again.code == 2 and "exists already" in again.err
  assert sorted(os.listdir(tmp_path)) == ["back", "run"]


# --- what is refused ----------------------------------------------------------


def refused(tmp_path, path, *says):
  """Converting `path` fails in a line that has `says`, and leaves nothing."""
  before = sorted(os.listdir(tmp_path))
  ended = convert(tmp_path, f"--from={path}", "--to=run")
  assert ended.code == 2 and ended.err.count("\n") == 1, ended
  for text in says:
    assert text in ended.err
  assert sorted(os.listdir(tmp_path)) == before
  return ended.err


def edit(path, **fields):
  """Changes keys of config.json; ... removes one."""
  file = path / "config.json"
  content = json.loads(file.read_text()) | fields
  file.write_text(
    json.dumps({k: v for k, v in content.items() if v is not ...})
  )


def stored(path):
  return safetensors.torch.load_file(path / "model.safetensors")


def test_all_tensors_that_do_not_fit_are_listed_at_once(copied, tmp_path):
  state = stored(copied)
  del state["model.norm.weight"]
  state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 3)
  name = "model.layers.{}.mlp.down_proj.weight"
  state[name.format(0)] = state[name.format(0)].T.contiguous()
  state[name.format(1)] = state[name.format(1)].to(torch.int64)
  safetensors.torch.save_file(state, copied / "model.safetensors")
  refused(
    tmp_path,
    copied,
    "config.json does not fit 4 tensors: ",
    "model.norm.weight: missing, [24]",
    "model.layers.9.mlp.up_proj.weight: unknown, F32[2, 3]",
    "model.layers.0.mlp.down_proj.weight: shape [29, 24], must be [24, 29]",
    "model.layers.1.mlp.down_proj.weight: dtype I64, must be one of F32, F16",
  )


def sharded(path, files):
  """Replaces the single file by shards: name -> tensors."""
  (path / "model.safetensors").unlink(missing_ok=True)
  for name, state in files.items():
    safetensors.torch.save_file(state, path / name)
  places = {key: name for name, state in files.items() for key in state}
  index = {"metadata": {}, "weight_map": places}
  (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_tensor_in_two_shards_is_refused(copied, tmp_path):
  state = stored(copied)
  name = "model.norm.weight"
  sharded(
    copied, {"a.safetensors": state, "b.safetensors": {name: state[name]}}
  )
  refused(tmp_path, copied, "model.norm.weight: 2 times")


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda raw: raw[:-5], "truncated: download it again"),
    (lambda raw: raw + b"x", "it is corrupt"),
    (lambda raw: raw[:3], "not a safetensors file"),
    (lambda raw: raw[:30], "not a safetensors file"),
    (lambda raw: b"\xff" * 8 + raw[8:], "not a safetensors file"),
    (lambda raw: raw[:8] + b"[" + raw[9:], "not a safetensors file"),
    (lambda raw: raw.replace(b'"F32"', b'"F16"', 1), "comes next"),
    (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "not a safe"),
  ],
)
def test_corrupt_files_are_refused(change, says, copied, tmp_path):
  file = copied / "model.safetensors"
  file.write_bytes(change(file.read_bytes()))
  refused(tmp_path, copied, "model.safetensors", says)


def test_tensors_that_overlap_or_stand_twice_are_refused(tmp_path):
  def header(text):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    return tensors.find(str(tmp_path))

  one = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
  with pytest.raises(schema.ConfigError, match="comes next"):
    header(b"{%b,%b}" % (one % (0, 8), one.replace(b"a", b"b", 1) % (4, 12)))
  with pytest.raises(schema.ConfigError, match="comes next"):
    header(b"{%b}" % (one % (8, 16)))
  with pytest.raises(schema.ConfigError, match="not a safetensors file"):
    header(b"{%b}" % one.replace(b"%d,%d", b"0,1e999"))
  twice = header(b"{%b,%b}" % (one % (0, 8), one % (8, 16)))
  assert len(twice["a"]) == 2


def test_each_tensor_of_a_file_has_its_own_type(copied):
  """Offsets do not follow from the first tensor's item size."""
  state = stored(copied)
  types = [torch.bfloat16, torch.float32, torch.float16]
  mixed = {k: x.to(types[i % 3]) for i, (k, x) in enumerate(state.items())}
  safetensors.torch.save_file(mixed, copied / "model.safetensors")
  found = folder.find(str(copied))
  for name, x in mixed.items():
    got = found.stored[name][0].read().astype(np.float32)
    np.testing.assert_array_equal(got, x.float().numpy(), err_msg=name)


def test_nothing_is_unpickled(copied, tmp_path):
  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "run"),)

  (copied / "model.safetensors").unlink()
  torch.save({"x": Evil()}, copied / "pytorch_model.bin")
  refused(
    tmp_path, copied, "only pytorch_model.bin: a pickle runs code", "save_pre"
  )


@pytest.mark.parametrize(
  "name", ["../secret.safetensors", "/etc/passwd", "..", "a\0b"]
)
def test_no_file_outside_the_folder_is_read(name, copied, tmp_path):
  shutil.copy(copied / "model.safetensors", tmp_path / "secret.safetensors")
  sharded(copied, {})
  index = {"weight_map": {"model.norm.weight": name}}
  file = copied / "model.safetensors.index.json"
  file.write_text(json.dumps(index))
  refused(tmp_path, copied, "which is outside the folder")


def test_links_are_followed_within_the_folder_and_in_the_hubs_cache(
  copied, tmp_path
):
  file = copied / "model.safetensors"
  file.rename(tmp_path / "outside")
  file.symlink_to(tmp_path / "outside")
  refused(tmp_path, copied, "is a link to", "outside the folder")
  home = tmp_path / "models--x" / "snapshots" / "abc"
  shutil.copytree(copied, home, symlinks=True)
  blobs = tmp_path / "models--x" / "blobs"
  blobs.mkdir()
  (tmp_path / "outside").rename(blobs / "123")
  (home / "model.safetensors").unlink()
  (home / "model.safetensors").symlink_to("../../blobs/123")
  assert folder.find(str(home)).dtype == "float32"
  os.mkfifo(blobs / "pipe")
  (home / "model.safetensors").unlink()
  (home / "model.safetensors").symlink_to("../../blobs/pipe")
  with pytest.raises(schema.ConfigError, match="not a regular file"):
    folder.find(str(home))


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"hidden_act": "relu"}, "hidden_act='relu': not supported, only 'silu'"),
    ({"residual_scale": 2.0}, "residual_scale=2.0: unknown to the family"),
    ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ({"rope_theta": 7.0}, "rope_theta: is given as"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "say different things"),
    (
      {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
      "rope_type='dynamic': not supported",
    ),
    (
      {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "odd": 1}},
      "'odd' is not supported",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_fac"),
    ({"rope_parameters": {"rope_type": "linear"}}, "'linear': lacks 'factor'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3': lacks 'factor'"),
    ({"hidden_size": ...}, "lacks 'hidden_size'"),
    ({"hidden_size": "24"}, "d_model='24': must be of type int"),
    ({"num_key_value_heads": 4}, "n_heads=6: must be a multiple of n_kv_heads"),
    ({"vocab_size": 0}, "vocab_size=0"),
    ({"model_type": "mixtral"}, "is a mixture of experts"),
    ({"model_type": "qwen3_moe"}, "is a mixture of experts"),
    ({"model_type": "gpt_oss"}, "is a mixture of experts"),
    ({"model_type": "t5"}, "|span_corruption"),
    ({"model_type": "mamba"}, "supported are llama, gpt2, qwen3"),
    ({"model_type": ["llama"]}, "supported are llama"),
  ],
)
def test_configs_that_ask_for_something_else_are_refused(
  fields, says, copied, tmp_path
):
  edit(copied, **fields)
  refused(tmp_path, copied, "config.json", says)


@pytest.mark.parametrize(
  ("name", "fields", "says"),
  [
    (
      "gemma3",
      {"attn_logit_softcapping": 2.0},
      "attn_logit_softcapping=2.0: not supported, only None",
    ),
    (
      "modernbert",
      {"hidden_activation": "gelu_pytorch_tanh"},
      "classifier_activation='gelu': not supported, only 'gelu_pytorch_tanh'",
    ),
    (
      "smollm3",
      {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
      },
      "has windows, which sliding_window or use_sliding_window turns off",
    ),
  ],
)
def test_what_transformers_would_compute_otherwise_is_refused(
  name, fields, says, tmp_path
):
  """transformers reads the first key and does not compute with it, a ModernBERT
  has an activation of its own in the head, and a SmolLM3 heeds layer_types.
  """
  test_families.reference(name, tmp_path, **fields)
  with pytest.raises(schema.ConfigError) as error:
    config_json.read(str(tmp_path))
  assert says in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "null"])
def test_a_config_that_is_none_is_refused(text, copied, tmp_path):
  (copied / "config.json").write_text(text)
  refused(tmp_path, copied, "config.json: not a config")


def test_a_phi3_without_its_original_length_has_the_usual_one(tmp_path):
  """4096, also where rope_scaling has another: transformers takes that of the
  top level, which has a default.
  """
  test_families.reference("phi3_longrope", tmp_path)
  edit(tmp_path, original_max_position_embeddings=...)
  auto = transformers.AutoModelForCausalLM
  model = auto.from_pretrained(tmp_path, attn_implementation="eager").eval()
  inputs = test_families.tokens()
  with torch.no_grad():
    want = model(torch.tensor(inputs, dtype=torch.int64)).logits.numpy()
  got = test_families.ours(tmp_path, inputs)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * want.std())


def test_a_token_for_images_may_lie_beyond_a_text_model(copied):
  """As in Gemma 3 of 1B. Of a token that a text can have, a row must be there;
  so must one of a token with a role.
  """
  path = copied / "tokenizer.json"
  tree = json.loads(path.read_text())
  image = {"id": 320, "content": "<image_soft_token>", "special": True}
  for key in ("single_word", "lstrip", "rstrip", "normalized"):
    image[key] = False
  before = imported.meta(folder.find(str(copied)))
  tree["added_tokens"].append(image)
  path.write_text(json.dumps(tree))
  meta = imported.meta(folder.find(str(copied)))
  plain, t = (
    tokenizer_lib.Tokenizer.from_json(m.tokenizer) for m in (before, meta)
  )
  assert t.size == plain.size and "<image_soft_token>" not in t.named
  texts = ["a <image_soft_token> b", "def f(x):\n  return x"]
  assert [t.encode(x) for x in texts] == [plain.encode(x) for x in texts]
  for change in ({"special": False}, {"content": "</s>"}):
    tree["added_tokens"][-1] = image | change
    path.write_text(json.dumps(tree))
    with pytest.raises(schema.ConfigError, match="the tokenizer has 321 ids"):
      imported.meta(folder.find(str(copied)))


def test_folders_that_lack_something_are_refused(copied, tmp_path):
  for name in ("tokenizer.json", "model.safetensors", "config.json"):
    (copied / name).chmod(0)
    refused(tmp_path, copied, name, "Permission denied")
    (copied / name).unlink()
    refused(tmp_path, copied, name)
  refused(tmp_path, "absent", "neither a run with a checkpoint nor a folder")


def test_the_flags_are_one_pair_or_the_other(copied, tmp_path):
  for arguments, says in (
    (["--from=hf"], "--to: missing"),
    (["--to=run"], "--workdir: missing"),
    (["--from=hf", "--to=run", "--output=x"], "leave --output out"),
    (["--workdir=run", "--to=bert", "--output=x"], "'bert'"),
    ([f"--from={copied}", "--to=run", "--dtype=float16"], "leave it out"),
    ([f"--from={copied}", "--to=run", "--step=0"], "leave it out"),
    (["--workdir=run", "--to=merged", "--output=x", "--nocheck"], "leave it"),
  ):
    ended = convert(tmp_path, *arguments)
    assert ended.code == 2 and says in ended.err, ended


# --- what real folders look like ----------------------------------------------


def test_what_a_killed_export_left_is_named(tmp_path):
  """In a container, the next process often has the same id."""
  left = tmp_path / f"new.{os.getpid()}.partial"
  left.mkdir()
  with (
    pytest.raises(schema.ConfigError, match=f"{left.name}: .*remove it"),
    huggingface.made(str(tmp_path / "new")),
  ):
    pass
  assert [*tmp_path.iterdir()] == [left]


def test_one_process_converts(tmp_path, monkeypatch):
  """By whatever the others are named; what a job has alone may convert."""
  asked = ("--from=none", f"--to={tmp_path}/run")
  for by_hand in ("--coordinator_address=host:1", "--process_count=2"):
    asked += (by_hand,)
  ended = convert(tmp_path, *asked)
  assert (
    ended.code == 2 and "2 processes: lm.convert is one process" in ended.err
  )
  for names, said in (
    ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a"}, "4 processes: "),
    ({"OMPI_COMM_WORLD_SIZE": "3"}, "3 processes: "),
    ({"SLURM_NTASKS": "4"}, None),  # sbatch alone
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, None),
    ({"COORDINATOR_ADDRESS": "a:1", "PROCESS_COUNT": "1"}, None),
  ):
    with monkeypatch.context() as patch:
      for name, value in names.items():
        patch.setenv(name, value)
      if said is None:
        processes.refuse_several("no")
      else:
        with pytest.raises(schema.ConfigError, match=f"^{said}no$"):
          processes.refuse_several("no")


def test_a_tied_head_may_stand_there_if_it_is_the_embedding(tmp_path):
  test_families.reference("qwen3", tmp_path)
  state = stored(tmp_path)
  embed = state["model.embed_tokens.weight"]
  file = tmp_path / "model.safetensors"
  safetensors.torch.save_file(state | {"lm_head.weight": embed.clone()}, file)
  assert "lm_head.weight" not in folder.find(str(tmp_path)).stored
  safetensors.torch.save_file(state | {"lm_head.weight": embed + 1}, file)
  with pytest.raises(
    schema.ConfigError, match="lm_head.weight is not model.em"
  ):
    folder.find(str(tmp_path))


def test_bert_as_it_was_published(tmp_path):
  """With other names of the norms, a pooler, and token types of two kinds."""
  test_families.reference("bert", tmp_path)
  want = folder.load_on(folder.find(str(tmp_path)))
  state = stored(tmp_path)
  for name in [name for name in state if "LayerNorm" in name]:
    former = name.replace("weight", "gamma").replace("bias", "beta")
    state[former] = state.pop(name)
  state["bert.pooler.dense.weight"] = torch.ones(24, 24)
  state["cls.seq_relationship.bias"] = torch.ones(2)
  safetensors.torch.save_file(state, tmp_path / "model.safetensors")
  got = folder.load_on(folder.find(str(tmp_path)))
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, got, want)))


def test_gpt2_as_it_was_published(tmp_path):
  """Without the prefix and with masks among the tensors."""
  test_families.reference("gpt2", tmp_path)
  want = folder.load_on(folder.find(str(tmp_path)))
  state = {
    name.removeprefix("transformer."): x for name, x in stored(tmp_path).items()
  }
  for i in range(2):
    state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.uint8)
  safetensors.torch.save_file(state, tmp_path / "model.safetensors")
  edit(tmp_path, n_ctx=48, task_specific_params={"text-generation": {}})
  got = folder.load_on(folder.find(str(tmp_path)))
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, got, want)))


# Keys that decide sizes, and have no default here.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "n_embd", "n_layer")
_SIZES += ("num_hidden_layers", "num_attention_heads", "n_head", "n_positions")
_SIZES += ("max_position_embeddings",)


@pytest.mark.parametrize(
  "family", families.FAMILIES, ids=lambda f: f.model_type
)
def test_missing_keys_have_the_defaults_of_transformers(family):
  kind = transformers.CONFIG_MAPPING[family.model_type]
  whole = kind().to_dict()
  sizes = {key: whole[key] for key in _SIZES if key in whole}
  assert family.read(sizes) == family.read(whole)


@pytest.mark.parametrize("name", test_families.CASES)
def test_rope_is_written_for_transformers_4_and_5(name, tmp_path):
  """Each form alone says all; transformers 4 has no rope_parameters."""
  test_families.reference(name, tmp_path)
  family, model = config_json.read(str(tmp_path))
  written = family.write(model)
  former = {k: v for k, v in written.items() if k != "rope_parameters"}
  assert family.read(former) == model
  if model.positions == "rope":
    assert model.rope_theta in (
      former.get("rope_theta"),
      former.get("global_rope_theta"),  # ModernBERT's name of it
    )
    today = {k: v for k, v in written.items() if k not in _FORMER}
    assert family.read(today) == model
    if name.startswith("phi") and model.rope_scaling is not None:
      assert former["rope_scaling"].keys() == {
        *("type", "short_factor", "long_factor")
      }  # transformers 4 refuses any other


_FORMER = ("rope_theta", "rope_scaling", "rope_local_base_freq")
_FORMER += ("partial_rotary_factor", "global_rope_theta", "local_rope_theta")


# --- export -------------------------------------------------------------------


def test_shards_have_an_index_that_transformers_reads(llama, tmp_path):
  found = folder.find(str(llama[0]))
  params = folder.load_on(found)
  folder.write(str(tmp_path), found.model, params, shard_bytes=32_000)
  names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}" + (
    ".safetensors"
  )
  assert max((tmp_path / name).stat().st_size for name in names) < 34_000
  assert test_families.bits(tmp_path) == test_families.bits(llama[0])
  assert recheck.compare(str(tmp_path), found.model, params, "float32") < 1e-4
  again = folder.load_on(folder.find(str(tmp_path)))
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))


def test_an_export_with_other_logits_is_refused(
  llama, tmp_path, monkeypatch, capsys
):
  path = str(tmp_path / "run")
  huggingface.to_run(str(llama[0]), path)
  meta = checkpoint.load_meta(path)
  plan = folder.table.planned

  def shifted(*args):
    """A map with a mistake: norms as if they were stored without their 1."""
    return [
      tensors.Planned(p.name, p.shape, lambda p=p: p.read() - 1)
      if "layernorm" in p.name
      else p
      for p in plan(*args)
    ]

  monkeypatch.setattr(folder.table, "planned", shifted)
  with pytest.raises(schema.RunError, match="has other logits: they differ by"):
    huggingface.from_run(path, meta, str(tmp_path / "out"))
  assert os.listdir(tmp_path) == ["run"]
  monkeypatch.setattr(folder.table, "planned", plan)
  monkeypatch.setattr(recheck, "missing", lambda: "torch")
  huggingface.from_run(path, meta, str(tmp_path / "out"), dtype="bfloat16")
  assert "was not read again: torch is not installed" in capsys.readouterr().err
  assert folder.find(str(tmp_path / "out")).dtype == "bfloat16"


def test_a_model_of_no_family_names_the_field(make):
  for fields, says in (
    ({"mlp": "relu2"}, "config.model.mlp='relu2'"),
    ({"positions": "learned"}, "config.model."),
    ({"windows": (3, 5), "n_layers": 4}, "config.model.windows=(3, 5)"),
    ({"attention_softcap": 3.0, "n_layers": 3}, "config.model."),
  ):
    model = make(**{f"model__{k}": v for k, v in fields.items()}).model
    with pytest.raises(schema.ConfigError) as error:
      expressible.of(model)
    assert says in str(error.value)
  with pytest.raises(schema.ConfigError, match="'gpt2' .* cannot express"):
    expressible.of(make().model, "gpt2")
  scaling = config_lib.RopeScaling()
  scaled = make(model__rope_scaling=scaling).model
  with pytest.raises(schema.ConfigError) as error:
    expressible.of(scaled, "gpt2")
  assert str(error.value).count("rope_scaling") == 1  # not each field of None
  assert expressible.of(make().model).model_type == "llama"


@pytest.mark.parametrize(
  ("name", "family"),
  [("gpt2", "gpt2"), ("llama3", "llama"), ("qwen3", "qwen3")]
  + [("gemma2", "gemma2")],
)
def test_trained_models_are_exported_as_their_family(name, family):
  import families as tiny

  assert expressible.of(tiny.PUBLISHED[name]).model_type == family
  assert decoder.declared(tiny.PUBLISHED[name])


HOSTILE = [
  "",
  " ",
  "\u2581x",
  "<bos><eos><fim_prefix>",
  "e\u0301 \u00e9 \u202e",
  "\0\t\r\n",
]


@pytest.mark.parametrize(
  "objective",
  [
    "causal",
    pytest.param("fim", marks=pytest.mark.slow),
    "prefix",
    pytest.param("chat", marks=pytest.mark.slow),
  ],
)
def test_a_model_trained_here_has_the_same_losses_in_transformers(
  objective, make, tmp_path
):
  """Per token, to 1e-5, on the ids that both make of the same text."""
  config = make(train__steps=3, optimizer__ema_decay=None)
  config.data.train = tuple(f"{s}|{objective}" for s in config.data.train)
  if objective == "chat":
    config.tokenizer.chat_template = f"{doors.ROOT}/configs/chat.jinja"
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "Say a", "completion": "a"}\n' * 40)
    config.data.train = (f"jsonl:{path}|chat",)
  run, out = str(tmp_path / "run"), str(tmp_path / "out")
  assert loop.train(config, run) == 0
  meta = checkpoint.load_meta(run)
  huggingface.from_run(run, meta, out)
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  model = transformers.AutoModelForCausalLM.from_pretrained(out)
  ours = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  for text in (*HOSTILE, *TEXTS):
    ids = ours.encode(text)
    assert theirs.encode(text, **PLAIN) == ids
  cfg, params = load.model(run, meta)
  ids = ours.encode("def f(x): return 'x\u00fc' + x[1:]")
  if objective == "chat":
    said = [("user", "f(x)?"), ("assistant", "x \u00fc")]
    messages = [{"role": role, "content": text} for role, text in said]
    ids = chat.encode(ours, messages)[0].tolist()
    laid_out = theirs.apply_chat_template(messages, return_dict=False)
    assert laid_out == ids
  ids = np.array([ids[:30]])
  scores = torch.log_softmax(
    torch.tensor(test_families.logits(cfg, params, ids)), -1
  )
  with torch.no_grad():
    got = torch.log_softmax(model.eval()(torch.tensor(ids)).logits, -1)
  picked = torch.tensor(ids[:, 1:, None])
  np.testing.assert_allclose(
    got[:, :-1].gather(2, picked),
    scores[:, :-1].gather(2, picked),
    rtol=0,
    atol=1e-5,
  )
  losses = (tmp_path / "out" / "README.md").read_text()
  assert "- train/loss: " in losses and config.data.train[0] in losses
