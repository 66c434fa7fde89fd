"""Bits per byte of xz and gzip on a config's validation documents, each alone.

  python benchmarks/compressors.py --config=configs/quickstart.py

What a language model must beat: both predict a document from itself alone.
"""

import gzip
import lzma

from lm import cli, schema
from lm import config as config_lib


def bits_per_byte(config: config_lib.Config) -> dict[str, float]:
  """Compressor -> bits per byte over the config's validation documents."""
  from lm.data import sources

  n_bytes, compressed = 0, {"xz -9e": 0, "gzip -9": 0}
  for spec in config.data.validation:
    source = sources.open_source(spec, config.data)
    for i in range(len(source)):
      document = source[i]
      if document is None:
        continue
      raw = document.text.encode()
      n_bytes += len(raw)
      strongest = 9 | lzma.PRESET_EXTREME
      compressed["xz -9e"] += len(lzma.compress(raw, preset=strongest))
      compressed["gzip -9"] += len(gzip.compress(raw, compresslevel=9))
  if not n_bytes:
    raise schema.ConfigError(
      f"config.data.validation={config.data.validation}: no text to compress; "
      "name a source"
    )
  return {name: 8 * size / n_bytes for name, size in compressed.items()}


def main(config: config_lib.Config) -> None:
  for name, bits in bits_per_byte(config).items():
    print(f"{name:8} {bits:.4f} bits per byte")


if __name__ == "__main__":
  cli.run(main)
