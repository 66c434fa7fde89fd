"""Milliseconds of each sampling rule at a vocabulary of 131072.

  python benchmarks/rules.py

Each line is a whole draw, noise and choice with it, when every row asks for
that rule. The last lines are what a plain sampler pays for less.
"""

import functools
import time

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from lm import cli
from lm.sample import rules

V = 131072
ROWS = (1, 8)
ROUNDS = 15
NEUTRAL = {
  "temperature": 1.0,
  "top_k": 0,
  "top_p": 1.0,
  "min_p": 0.0,
  "typical_p": 1.0,
  "repetition_penalty": 1.0,
  "frequency_penalty": 0.0,
  "presence_penalty": 0.0,
  "temperature_last": False,
  "seed": 0,
}
DTYPES = {"top_k": jnp.int32, "temperature_last": bool, "seed": jnp.uint32}
CUTS = {"min_p": 0.05, "top_k": 50, "top_p": 0.9, "typical_p": 0.9}
PENALTIES = {
  "repetition_penalty": 1.1,
  "frequency_penalty": 0.5,
  "presence_penalty": 0.5,
}
LINES = (
  {"temperature": 0.0},
  {},
  {"temperature": 0.8},
  *({name: value} for name, value in (CUTS | PENALTIES).items()),
  {"top_k": 50, "top_p": 0.9},
  CUTS | PENALTIES | {"temperature": 0.8},
)


def draws(n_rows: int) -> dict[str, functools.partial]:
  """By its name, a call for each line of the table."""
  logits = 3 * jax.random.normal(jax.random.key(0), (n_rows, V))
  ids = jnp.broadcast_to(jnp.arange(V)[None], logits.shape)
  past = rules.Past(ids < 500, jnp.where(ids % 300 == 0, 2, 0))
  positions = jnp.arange(n_rows, dtype=jnp.int32)
  sample = jax.jit(functools.partial(rules.sample, n_ids=V))
  calls = {}
  for line in LINES:
    columns = {
      name: jnp.full(n_rows, value, DTYPES.get(name, jnp.float32))
      for name, value in (NEUTRAL | line).items()
    }
    name = ", ".join(f"{k}={v}" for k, v in line.items())
    calls[name or "nothing but the draw"] = functools.partial(
      sample,
      logits,
      rules.Parameters(**columns, bias=jnp.zeros_like(logits)),
      past,
      positions,
    )
  key = jax.random.key(0)
  categorical = functools.partial(jax.jit(jax.random.categorical), key)
  calls["jax.random.categorical"] = functools.partial(categorical, logits)
  calls["jnp.sort"] = functools.partial(jax.jit(jnp.sort), logits)
  return calls


def milliseconds(call) -> float:
  """Best of some, since other work shares the machine."""
  jax.block_until_ready(call())
  times = []
  for _ in range(ROUNDS):
    started = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - started)
  return 1000 * min(times)


def main() -> None:
  table = rich.table.Table(title=f"V={V}, {jax.devices()[0].device_kind}")
  table.add_column("rules")
  for n_rows in ROWS:
    table.add_column(f"B={n_rows}, ms", justify="right")
  calls = [draws(n_rows) for n_rows in ROWS]
  for name in calls[0]:
    table.add_row(name, *(f"{milliseconds(c[name]):.2f}" for c in calls))
  rich.console.Console().print(table)


if __name__ == "__main__":
  cli.run(main, takes_config=False)
