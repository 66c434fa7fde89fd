"""Writes hf_rules.npz: what Hugging Face's logits processors leave of logits.

  python tests/goldens/make_rules.py            (from the root of the checkout)

It needs torch and transformers, which the tests do not. Remake the file only
when cases are added; never because a test disagrees with it. Last made with
transformers 5.23.0.

Each case is a row of random logits, a prompt and a choice of rules: each alone,
all pairs, and random combinations of any number, in the order of
lm/sample/rules.py and once more with the temperature last. The processors run
in float64, as log-probabilities: only a difference in meaning can show.
"""

import itertools
import pathlib

import numpy as np
import torch
import transformers

V, T = 53, 7
VALUES = {
  "bias": (True,),
  "repetition_penalty": (1.3, 0.6, 2.0),
  "temperature": (0.3, 0.8, 1.7),
  "min_p": (0.02, 0.1, 0.5),
  "top_k": (1, 4, 20, 52),
  "top_p": (0.1, 0.5, 0.95),
  "typical_p": (0.1, 0.5, 0.95),
}
PROCESSORS = {
  "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
  "temperature": transformers.TemperatureLogitsWarper,
  "min_p": transformers.MinPLogitsWarper,
  "top_k": transformers.TopKLogitsWarper,
  "top_p": transformers.TopPLogitsWarper,
  "typical_p": transformers.TypicalLogitsWarper,
}
NEUTRAL = {
  "bias": False,
  "repetition_penalty": 1.0,
  "temperature": 1.0,
  "min_p": 0.0,
  "top_k": 0,
  "top_p": 1.0,
  "typical_p": 1.0,
}


def choices(rng: np.random.Generator) -> list[dict]:
  sets = [c for n in (1, 2) for c in itertools.combinations(VALUES, n)]
  for _ in range(150):
    n = rng.integers(3, len(VALUES) + 1)
    sets.append(tuple(rng.choice(list(VALUES), n, replace=False)))
  return [
    {name: VALUES[name][rng.integers(len(VALUES[name]))] for name in names}
    for names in sets
    for _ in range(3 if len(names) < 3 else 1)
  ]


def processors(rules: dict, bias: np.ndarray, last: bool):
  names = [name for name in PROCESSORS if name in rules]
  if last and "temperature" in names:
    names.remove("temperature")
    names.append("temperature")
  chosen = [PROCESSORS[name](rules[name]) for name in names]
  if "bias" in rules:
    finite = np.flatnonzero(np.isfinite(bias) & (bias != 0)).tolist()
    shift = {(i,): float(bias[i]) for i in finite}
    chosen = [
      transformers.SequenceBiasLogitsProcessor(shift),
      transformers.SuppressTokensLogitsProcessor(
        np.flatnonzero(np.isinf(bias)).tolist(), device="cpu"
      ),
      *chosen,
    ]
  return transformers.LogitsProcessorList(chosen)


def main() -> None:
  rng = np.random.default_rng(0)
  cases = list(itertools.product((False, True), choices(rng)))
  n = len(cases)
  logits = rng.normal(0, 2, (n, V)).astype(np.float32)
  prompts = rng.integers(V, size=(n, T), dtype=np.int32)
  bias = rng.normal(0, 2, (n, V)).astype(np.float32)
  bias[rng.random((n, V)) < 0.7] = 0
  bias[rng.random((n, V)) < 0.1] = -np.inf
  expected = np.empty((n, V))
  for row, (last, rules) in enumerate(cases):
    chain = processors(rules, bias[row], last)
    ids = torch.tensor(prompts[row : row + 1], dtype=torch.int64)
    scores = torch.tensor(logits[row : row + 1], dtype=torch.float64)
    expected[row] = torch.log_softmax(chain(ids, scores), dim=-1)[0].numpy()
    if "bias" not in rules:
      bias[row] = 0
  np.savez_compressed(
    pathlib.Path(__file__).parent / "hf_rules.npz",
    logits=logits,
    prompts=prompts,
    bias=bias,
    expected=expected.astype(np.float32),
    temperature_last=np.array([last for last, _ in cases]),
    **{
      name: np.array([rules.get(name, value) for _, rules in cases])
      for name, value in NEUTRAL.items()
      if name != "bias"
    },
  )


if __name__ == "__main__":
  main()
