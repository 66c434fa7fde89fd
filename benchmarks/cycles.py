"""Cycles of a program compiled for a TPU, as its compiler estimates them.

libtpu writes `estimated_cycles` beside fusions, copies and broadcasts of the
scheduled HLO. `estimate` sums them, a loop's body as often as it runs. Without
an estimate, and so counted apart, are:
- collectives (all-gather, all-reduce, ...), whose bytes are given. They are
  results in a chip's memory, not bytes on the wires; an all-reduce sends about
  twice what an all-gather of that result does;
- Pallas kernels (splash attention); lm/model/kernels.py says how theirs are
  judged;
- copies that run beside the computation (copy-start to copy-done).
The sum is of a chip whose operations run one after the other: a bound of no
sort, and no time was measured on a chip. The field is libtpu's own and is not
documented; 0.0.42.1 was read.
"""

import collections
import dataclasses
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# (name without its number, result and the rest)
_OPERATION = re.compile(r"^\s+(?:ROOT )?%([\w\-]+)[\w.\-]* = (.*)$")
_KIND = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"\b(condition|body|to_apply|calls)=%([\w.\-]+)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_COLLECTIVES = (
  *("all-gather", "all-reduce", "reduce-scatter"),
  *("all-to-all", "collective-permute"),
)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one step on one chip."""

  cycles: int
  # Of `cycles`: what computes values of the forward pass again (remat).
  again: int
  # Collective -> bytes of its results, over all its runs.
  collectives: dict[str, int]
  # Pallas kernel -> runs.
  kernels: dict[str, int]


def estimate(text: str) -> Estimate:
  """Reads the optimized HLO, `text` of `compiled.as_text()`.

  Raises ValueError if there is no estimate in it, or a loop whose number of
  rounds is not the constant of its condition.
  """
  computations, entry = _computations(text)
  cycles, collectives, kernels = (collections.Counter() for _ in range(3))
  channels = set()  # one that runs beside fusions is named in each of them

  def add(computation: str, runs: int, fused: bool) -> None:
    for name, operation in computations[computation]:
      found = _KIND.search(f" {operation}")
      kind = "" if found is None else found[1]
      called = dict(_CALLED.findall(operation))
      if kind == "while":
        rounds = _rounds(computations[called["condition"]])
        add(called["body"], runs * rounds, fused)
      elif kind.removesuffix("-done") in _COLLECTIVES:
        channel = _CHANNEL.search(operation)
        size = _bytes(operation[: operation.index(f" {kind}(")])
        if channel is None or channel[1] not in channels:
          collectives[kind.removesuffix("-done")] += runs * size
        channels.add(channel and channel[1])
      elif '"tpu_custom_call"' in operation:
        kernels[name] += runs
      elif kind in ("call", "fusion", "async-start"):
        add(called.get("calls") or called["to_apply"], runs, kind == "fusion")
      if not fused and (estimated := _CYCLES.search(operation)):
        again = "rematted_computation" in operation
        cycles[again] += runs * int(estimated[1])

  add(entry, 1, False)
  if not cycles:
    raise ValueError("no operation has estimated_cycles: not libtpu's HLO")
  total, again = cycles[False] + cycles[True], cycles[True]
  return Estimate(total, again, dict(collectives), dict(kernels))


def _computations(text):
  """(computation -> its operations, (name, rest of the line); the entry)."""
  found, entry, operations = {}, "", []
  for line in text.splitlines():
    if opened := _COMPUTATION.match(line):
      operations = found[opened[2]] = []
      entry = opened[2] if opened[1] else entry
    elif operation := _OPERATION.match(line):
      operations.append(operation.groups())
  return found, entry


def _rounds(condition) -> int:
  """Rounds of a loop that counts from 0 up to the constant of `condition`."""
  bounds = [
    int(bound)
    for _, operation in condition
    for bound in re.findall(r" constant\((\d+)\)", f" {operation}")
  ]
  if len(bounds) != 1:
    raise ValueError(f"a loop has {len(bounds)} constants in its condition")
  return bounds[0]


def _bytes(types: str) -> int:
  """Bytes of an array type, or of a tuple of them."""
  return sum(
    int(bits or 8) * math.prod(int(n) for n in shape.split(",") if n) // 8
    for bits, shape in _ARRAY.findall(types)
  )
