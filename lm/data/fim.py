"""Fill-in-the-middle (FIM): the prompt whose continuation fills a gap."""

from lm import schema
from lm.data import tokenizer as tokenizer_lib

# Prefix, suffix, middle; or suffix, prefix, middle.
ORDERS = ("psm", "spm")


def fim_ids(
  tokenizer: tokenizer_lib.Tokenizer,
  prefix: str,
  suffix: str,
  order: str = "psm",
) -> list[int]:
  """Fill-in-the-middle (FIM) prompt: bos, then prefix and suffix ("psm") or
  suffix and prefix ("spm"). The model continues with the text in between, then
  eos (arXiv:2207.14255).

  Every tokenizer here has the three FIM tokens, but output of a model trained
  without FIM is worthless. Raises ConfigError on any other `order`.
  """
  if order not in ORDERS:
    raise schema.ConfigError(
      f"order={order!r}: must be 'psm' (prefix first) or 'spm'"
    )
  before, after = tokenizer.encode(prefix), tokenizer.encode(suffix)
  start, hole, end = (
    [tokenizer.bos, tokenizer.fim_prefix],
    [tokenizer.fim_suffix],
    [tokenizer.fim_middle],
  )
  if order == "psm":
    return start + before + hole + after + end
  return start + hole + after + end + before
