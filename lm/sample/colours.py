"""The colour scale of surprisal, one for terminals, pages and HTML files."""

# Surprisal of the hottest colour, in bits; larger values are clipped.
HOT_BITS = 12.0
# Backgrounds at half of HOT_BITS and at HOT_BITS, on light and on dark paper;
# the pages' ink has a contrast of 4.5 to 1 on each. At 0 bits: the paper.
LIGHT = ("#ffb152", "#ef5a6c")
DARK = ("#935014", "#b02a44")
# What stands for the paper on a terminal, whose own colour is unknown.
PAPER = "#fffae1"
# Ink on LIGHT and PAPER on a terminal.
INK = "#000000"


def share(bits: float) -> float:
  """Place of a surprisal on the scale, in [0, 1]."""
  return min(max(bits / HOT_BITS, 0.0), 1.0)


def on_terminal(bits: float) -> str:
  """Style of rich for a token of so many bits: linear between the colours."""
  scale = [_rgb(colour) for colour in (PAPER, *LIGHT)]
  place = share(bits) * (len(scale) - 1)
  low = min(int(place), len(scale) - 2)
  red, green, blue = (
    round(a + (b - a) * (place - low))
    for a, b in zip(scale[low], scale[low + 1], strict=True)
  )
  return f"{INK} on rgb({red},{green},{blue})"


def css() -> str:
  """Style sheet: `.heat` colours an element by its --heat, its place on the
  scale; `.scale` is the whole scale, from left to right.
  """
  warm, hot = (
    f"light-dark({a}, {b})" for a, b in zip(LIGHT, DARK, strict=True)
  )
  return f""":root {{
  color-scheme: light dark; --hot-bits: {HOT_BITS:g};
  --warm: {warm}; --hot: {hot};
}}
.heat {{
  --mix: calc(min(var(--heat), .5) * 200%);
  --more: calc(max(var(--heat) - .5, 0) * 200%);
  background: color-mix(in oklab, var(--hot) var(--more),
    color-mix(in oklab, var(--warm) var(--mix), transparent));
}}
.scale {{
  background: linear-gradient(90deg in oklab,
    transparent, var(--warm), var(--hot));
}}
"""


def _rgb(colour: str) -> tuple[int, ...]:
  return tuple(bytes.fromhex(colour[1:]))
