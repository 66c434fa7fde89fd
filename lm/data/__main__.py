"""`python -m lm.data --config=FILE`: tokenizer and token stores of a config."""

import numpy as np
import rich.console
import rich.markup
import rich.table

from lm import cli
from lm import config as config_lib
from lm.data import store


def main(config: config_lib.Config) -> None:
  prepared = store.prepare(config)
  window = config.train.sequence_length
  table = rich.table.Table(title=f"{prepared.tokenizer.size} ids")
  table.add_column("source", overflow="fold")
  for column in ("documents", "bytes", "tokens", "bytes/token"):
    table.add_column(column, justify="right")
  table.add_column(f"over {window} tokens", justify="right")
  sources = [*config.data.train, *config.data.validation]
  stores = [*prepared.train, *prepared.validation]
  console = rich.console.Console()
  lines = []
  for source, tokens in zip(sources, stores, strict=True):
    lengths = np.diff(tokens.ends, prepend=0)
    table.add_row(
      rich.markup.escape(source),
      f"{tokens.n_documents:,}",
      f"{tokens.n_bytes:,}",
      f"{tokens.n_tokens:,}",
      f"{tokens.n_bytes / tokens.n_tokens:.3f}",
      f"{np.mean(lengths > window):.0%}",
    )
    lines += [f"{source}: {tokens.path}", *_outliers(tokens, lengths)]
    if tokens.n_scored is not None:
      share = tokens.n_scored / tokens.n_tokens
      lines.append(f"  training targets: {tokens.n_scored:,} ({share:.0%})")
  console.print(table)
  for line in lines:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _outliers(tokens: store.TokenStore, lengths: np.ndarray) -> list[str]:
  """The longest document, and of the longer half the document with the fewest
  bytes per token, which is often not text: each as a line.
  """
  ratios = tokens.document_bytes / lengths
  long = lengths >= np.median(lengths)
  found = {
    "longest": np.argmax(lengths),
    "fewest bytes/token": np.argmin(np.where(long, ratios, np.inf)),
  }
  return [
    f"  {label}: {tokens.name(int(i))!r}, {lengths[i]:,} tokens, "
    f"{ratios[i]:.3f} bytes/token"
    for label, i in found.items()
  ]


if __name__ == "__main__":
  cli.run(main)
