"""README's fine-tuning, from a folder of Hugging Face to a served chat, on
small random weights in the same files.
"""

import json
import pathlib
import re

import doors
import numpy as np
import pytest
import serving
import torch
import transformers
import vocabularies

from lm import checkpoint, cli, schema
from lm.data import chat
from lm.data import tokenizer as tokenizer_lib
from lm.huggingface import config_json, published
from lm.sample import sampler
from lm.train import metrics as metrics_lib

ROOT = pathlib.Path(__file__).parent.parent
_SIZES = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
}
_GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
# A config's model -> sizes of config.json, and the vocabulary in its files.
SMALL = {
  "gpt2": (_GPT2_SIZES, "gpt_2"),
  "llama3.2-1b": (_SIZES, "llama_3"),
  "qwen3-0.6b": (_SIZES, "qwen"),
}
CONFIGS = {
  "finetune_gpt2": "gpt2",
  "finetune_llama3_1b": "llama3.2-1b",
  "finetune_qwen3_0_6b": "qwen3-0.6b",
}


def download(name: str, folder: pathlib.Path) -> list[str]:
  """Writes a small model of the same kind; returns the flags that say so."""
  sizes, vocabulary = SMALL[name]
  folder.mkdir(parents=True)
  for file, content in vocabularies.files(vocabulary).items():
    (folder / file).write_text(content)
  n_ids = len(transformers.AutoTokenizer.from_pretrained(folder))
  content = {**published.CONFIGS[name], **sizes, "vocab_size": n_ids}
  kind = content.pop("model_type")
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(kind, **content)
  generation = folder / "generation_config.json"
  kept = generation.read_text() if generation.exists() else None
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
  if kept is not None:
    generation.write_text(kept)
  small = config_json.read(str(folder))[1]
  whole = dict(schema.leaves(published.model(name), "config.model"))
  return [
    f"--{path}={value}"
    for path, value in schema.leaves(small, "config.model")
    if whole[path] != value
  ]


def conversations(folder: pathlib.Path) -> list[str]:
  """Writes chats; returns the flags that name them."""
  flags = []
  for part, n in (("train", 12), ("validation", 3)):
    lines = [
      {"instruction": f"Say {'ab'[i % 2]} {i}.", "output": "ab"[i % 2] * 3}
      for i in range(n)
    ]
    path = folder / f"{part}.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    flags.append(f"--config.data.{part}=('jsonl:{path}|chat',)")
  return flags


# One device; little work.
SHORT = (
  "--config.train.batch_size=4 --config.train.sequence_length=64"
  " --config.train.eval_every=2 --config.checkpoint.save_every=100"
  " --config.data.epochs=1 --config.mesh.data=1 --config.train.log_every=1"
).split()


def ran(module, arguments, directory):
  ended = doors.run(module, arguments, str(directory), timeout=300)
  assert ended.code == 0, ended
  return ended


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_from_a_folder_to_a_served_chat(config, tmp_path):
  name = CONFIGS[config]
  text = (ROOT / "README.md").read_text()
  if config != "finetune_gpt2":
    text = (ROOT / f"configs/{config}.py").read_text().replace("\\\\\n", "")
  commands = re.findall(
    r"^ *(?:hf|python -m) (download|lm\.\w+) +(.*models/.*|.*runs/\w+_chat)$",
    text,
    re.MULTILINE,
  )
  modules = [module for module, _ in commands]
  assert modules == ["download", "lm.train", "lm.serve", "lm.convert"]
  arguments = [line.split() for _, line in commands]

  assert arguments[0][1] == "--local-dir"
  sizes = download(name, tmp_path / arguments[0][2])
  train = [x.replace("configs/", f"{ROOT}/configs/") for x in arguments[1]]
  # A virtual mesh of eight devices is what the tests have; this uses one.
  more = [*conversations(tmp_path), *sizes, *SHORT]
  said = ran("lm.train", [*train, *more], tmp_path).err
  assert "the data end at step" in said
  run = tmp_path / arguments[2][0].removeprefix("--workdir=")
  reports = metrics_lib.read(str(run))
  assert np.isfinite(
    [r["eval/loss"] for r in reports if "eval/loss" in r]
  ).all()
  meta = checkpoint.load_meta(str(run))
  assert (meta.config.model.lora is None) == (config == "finetune_gpt2")

  with serving.serve(sampler.Sampler.from_checkpoint(str(run))) as running:
    messages = [{"role": "user", "content": "Say a 1."}]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0}
    answer = serving.post(running, "chat/completions", body)
    assert answer.status_code == 200, answer.text

  ran("lm.convert", arguments[3], tmp_path)
  folder = tmp_path / arguments[3][1].removeprefix("--to=")
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  tokenizer = tokenizer_lib.Tokenizer.from_json(meta.tokenizer)
  prompt = chat.chat_ids(tokenizer, messages)
  wanted = theirs.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=False
  )
  assert list(prompt) == wanted
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  made = model.generate(
    torch.tensor([wanted]), max_new_tokens=4, do_sample=False
  )
  new = [
    i
    for i in made[0, len(wanted) :].tolist()
    if i not in tokenizer.named.values()
  ]
  said = answer.json()["choices"][0]["message"]["content"]
  assert said == tokenizer.decode(new)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_config_names_the_folder_and_the_model(config):
  found = cli.load(str(ROOT / f"configs/{config}.py"))
  text = (ROOT / f"configs/{config}.py").read_text()
  assert f"--local-dir {found.init_from}\n" in text
