"""Time and host memory of reading a large Hugging Face checkpoint.

  python benchmarks/convert.py [--layers=2] [--devices=8] [--run]

Makes a sparse file of zeros in bfloat16 with the shapes of Llama 3 8B (16 GB,
no space on disk), reads it onto the CPU devices in float32 (32 GB), and prints
the time, the peak of resident memory, and the part of it beyond the parameters,
which the design bounds by twice the largest tensor. `--run` then writes a run
directory, as python -m lm.convert does. The files lie in a temporary directory,
which is removed. Without --run it needs numpy, jax, flax and jaxtyping alone.
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import tempfile
import time

import turns

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

CONFIG = {
  "model_type": "llama",
  "vocab_size": 128256,
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "max_position_embeddings": 8192,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0,
  "tie_word_embeddings": False,
}


def make(folder: str, layers: int) -> None:
  """Writes config.json and a sparse model.safetensors."""
  from lm.huggingface import config_json, table

  path = pathlib.Path(folder)
  content = CONFIG | {"num_hidden_layers": layers}
  (path / "config.json").write_text(json.dumps(content))
  family, model = config_json.read(folder)
  header, end = {}, 0
  for name, place in table.places(family.rows, model).items():
    start, size = end, 2
    for n in place.shape:
      size *= n
    end += size
    header[name] = {
      "dtype": "BF16",
      "shape": list(place.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header).encode()
  with open(path / "model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)


def peak() -> float:
  """Peak resident memory of this process so far, in GB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--layers", type=turns.at_least(1), default=32)
  parser.add_argument("--devices", type=turns.at_least(1), default=1)
  parser.add_argument("--run", action="store_true")
  asked = parser.parse_args()
  if (width := CONFIG["hidden_size"]) % asked.devices:
    parser.error(f"--devices={asked.devices}: must divide the width, {width}")
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax
  import numpy as np

  jax.config.update("jax_num_cpu_devices", asked.devices)
  from lm import sharding
  from lm.huggingface import folder as folder_lib

  mesh = None
  if asked.devices > 1:
    mesh = jax.make_mesh((1, asked.devices, 1), sharding.MESH_AXES)
  with tempfile.TemporaryDirectory() as folder:
    make(folder, asked.layers)
    size = os.path.getsize(os.path.join(folder, "model.safetensors")) / 1e9
    before, started = peak(), time.perf_counter()
    found = folder_lib.find(folder)
    params = folder_lib.load_on(found, mesh)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - started
    held = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9
    largest = max(4 * np.prod(p.shape) for p in found.places.values()) / 1e9
    print(
      f"read {size:.2f} GB onto {asked.devices} device(s) in {seconds:.1f} s; "
      f"parameters {held:.2f} GB, largest tensor {largest:.2f} GB in float32"
    )
    beyond = before + held
    print(f"peak resident memory {peak():.2f} GB: {peak() - beyond:.2f} beyond")
    if asked.run:
      started = time.perf_counter()
      write_run(os.path.join(folder, "run"), found.model, params)
      seconds = time.perf_counter() - started
      print(f"wrote a run in {seconds:.1f} s; {peak() - beyond:.2f} GB beyond")


def write_run(path: str, model, params) -> None:
  """Writes a run directory with the parameters and a tokenizer of bytes."""
  from lm import checkpoint
  from lm import config as config_lib
  from lm.convert import huggingface
  from lm.data import tokenizer as tokenizer_lib

  config = config_lib.Config(model=model)
  tokenizer = tokenizer_lib.Tokenizer().to_json()
  meta = checkpoint.Meta(0, config, tokenizer, checkpoint.CONVERTED)
  huggingface.save_run(path, params, meta)


if __name__ == "__main__":
  main()
