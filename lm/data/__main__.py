"""`python -m lm.data --config=FILE`: tokenizer and token stores of a config."""

import rich.console
import rich.markup
import rich.table

from lm import cli
from lm import config as config_lib
from lm.data import store


def main(config: config_lib.Config) -> None:
  prepared = store.prepare(config)
  table = rich.table.Table(title=f"{prepared.tokenizer.size} ids")
  table.add_column("source", overflow="fold")
  for column in ("documents", "bytes", "tokens", "bytes/token"):
    table.add_column(column, justify="right")
  table.add_column("path", overflow="fold")
  sources = [*config.data.train, *config.data.validation]
  stores = [*prepared.train, *prepared.validation]
  for source, tokens in zip(sources, stores, strict=True):
    table.add_row(
      rich.markup.escape(source),
      f"{tokens.n_documents:,}",
      f"{tokens.n_bytes:,}",
      f"{tokens.n_tokens:,}",
      f"{tokens.n_bytes / tokens.n_tokens:.3f}",
      rich.markup.escape(tokens.path),
    )
  rich.console.Console().print(table)


if __name__ == "__main__":
  cli.run(main)
