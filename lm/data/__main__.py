"""`python -m lm.data --config=FILE`: tokenizer and token stores of a config.

python -m lm.data --config=configs/quickstart_objectives.py --show=3
python -m lm.data --config=configs/quickstart.py --overlap --output=overlap.json
"""

import numpy as np
import rich.console
from absl import flags

from lm import cli, files, schema, terminal
from lm import config as config_lib
from lm import objective as objective_lib
from lm.data import overlap, overlap_report, pipeline, show, sources, store
from lm.train import init_from

_SHOW = flags.DEFINE_integer(
  "show",
  0,
  "Rows to show of each training source: what is seen ahead, what is scored.",
  lower_bound=0,
  upper_bound=1000,
)
_DRAW = cli.define_path(
  "draw",
  "PNG file to write: the attention mask of a row of each training source.",
)


_OVERLAP = cli.define_optional_integer(
  "overlap",
  overlap.DEFAULT_N,
  "Contamination: finds what the validation sources share with the training "
  f"sources, in passages of N words ({overlap.DEFAULT_N} without a value).",
  least=2,
  most=1000,
)
_OVERLAP_SOURCE = flags.DEFINE_multi_string(
  "overlap_source",
  [],
  "With --overlap: a further source to look for, such as the texts of a task; "
  "repeatable.",
)
_OUTPUT = cli.define_path("output", "With --overlap: JSON file to write.")


def main(config: config_lib.Config) -> None:
  read = (*config.data.train, *config.data.validation, *_OVERLAP_SOURCE.value)
  for flag in (_DRAW, _OUTPUT):
    name = f"--{flag.name}"
    if flag.value is not None:
      files.check_apart([("--config", flags.FLAGS.config), (name, flag.value)])
      sources.check_unread(flag.value, name, read)
  if _OVERLAP.value is not None:
    for flag in (_SHOW, _DRAW):
      if flag.value:
        raise schema.ConfigError(
          f"--{flag.name}={flag.value}: is about rows; leave it out beside "
          "--overlap"
        )
    overlap_report.report(
      config, _OVERLAP.value, _OVERLAP_SOURCE.value, _OUTPUT.value
    )
    return
  for flag in (_OVERLAP_SOURCE, _OUTPUT):
    if flag.value:
      raise schema.ConfigError(
        f"--{flag.name}={flag.value}: is about overlaps; add --overlap"
      )
  describe(config, _SHOW.value, _DRAW.value)


def describe(
  config: config_lib.Config, n_shown: int = 0, picture: str | None = None
) -> None:
  """Prints a config's token stores and rows; shows `n_shown` rows of each
  training source, and draws a row of each into the PNG file `picture`.
  """
  if picture is not None:
    files.check_output(picture, "--draw")
  prepared = store.prepare(config, init_from.tokenizer(config))
  window = config.train.sequence_length
  table = terminal.table(
    *("source", "documents", "bytes", "tokens", "bytes/token"),
    f"over {window} tokens",
    title=f"{prepared.tokenizer.size} ids",
  )
  # Sources that differ in their objective share a store.
  stores = {t.path: t for t in (*prepared.train, *prepared.validation)}
  console = terminal.console()
  lines = []
  for tokens in stores.values():
    source, _ = objective_lib.split_source(tokens.spec)
    lengths = np.diff(tokens.ends, prepend=0)
    table.add_row(
      terminal.cell(source),
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
  terminal.print_table(console, table)
  lines += ["", *_rows(config, prepared)]
  terminal.print_lines(console, lines)
  if n_shown:
    _show_rows(config, prepared, console, n_shown)
  if picture is not None:
    rows = [
      (tokens, next(pipeline.sample(config, prepared, s, 1)))
      for s, tokens in enumerate(prepared.train)
    ]
    show.draw(picture, rows, prepared.tokenizer)


def _rows(config: config_lib.Config, prepared: store.Prepared) -> list[str]:
  """How each training source fills rows: a line each."""
  found = []
  for s, windows in enumerate(pipeline.training_windows(config, prepared)):
    scored, padding = pipeline.shares(config, prepared, s)
    found.append(
      f"{prepared.train[s].spec}: {schema.counted(len(windows), 'row')}; "
      f"{scored:.1%} of the positions are scored, {padding:.1%} are padding; "
      f"{1 - windows.cut_share:.1%} of the documents are whole in a row"
    )
  return found


def _show_rows(
  config: config_lib.Config,
  prepared: store.Prepared,
  console: rich.console.Console,
  n_shown: int,
) -> None:
  for s, tokens in enumerate(prepared.train):
    console.print()
    console.print(tokens.spec, style="bold underline", markup=False)
    for row in pipeline.sample(config, prepared, s, n_shown):
      console.print(show.text(row, tokens, prepared.tokenizer), soft_wrap=True)
      console.print()
  console.print(show.legend())


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
