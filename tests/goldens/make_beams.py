"""Writes hf_beams.npz: what Hugging Face's beam search finds.

  python tests/goldens/make_beams.py            (from the root of the checkout)

It needs torch and transformers, which the tests do not. Remake the file only
when cases are added; never because a test disagrees with it. Last made with
transformers 5.23.0. All is computed in float64, see make_reference.py.

A case is a prompt, ids that end (the first is the tokenizer's eos), and the
settings of the search; the answer is token ids, filled up with -1, and scores.
"""

import itertools
import json
import pathlib

import make_reference  # first: it makes torch's float32 float64
import numpy as np
import torch

import test_beam  # isort: skip

N_NEW = test_beam.N_NEW
PROMPTS = ([5], [17, 99, 3], [201, 7, 7, 64])
# Of few and of many ids that end.
N_STOP_IDS = (0, 3)


def main() -> None:
  cfg, params = test_beam.CFG, test_beam.weights()
  model = make_reference.gpt2(cfg).eval()
  state = {
    name: torch.tensor(np.ascontiguousarray(value), dtype=torch.float64)
    for name, value in make_reference.gpt2_state(params, cfg).items()
  }
  model.load_state_dict(state, strict=True)
  bos, eos = test_beam.TOKENIZER.bos, test_beam.TOKENIZER.eos
  cases, ids, scores = [], [], []
  for prompt, n_stop, n_beams, length_penalty, early in itertools.product(
    PROMPTS, N_STOP_IDS, (2, 5), (-1.0, 0.0, 1.0, 2.0), (False, True, "never")
  ):
    inputs = torch.tensor([[bos, *prompt]])
    # Ids that are likely somewhere, but not at once.
    with torch.no_grad():
      usual = model.generate(
        inputs, max_new_tokens=7, do_sample=False, eos_token_id=None,
        pad_token_id=0, num_beams=n_beams,
      )[0, -4:]  # fmt: skip
    stop_ids = list(dict.fromkeys(usual.tolist()))[:n_stop]
    with torch.no_grad():
      out = model.generate(
        inputs,
        max_new_tokens=N_NEW,
        do_sample=False,
        num_beams=n_beams,
        num_return_sequences=n_beams,
        length_penalty=length_penalty,
        early_stopping=early,
        eos_token_id=[eos, *stop_ids],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
      )
    found = np.full((5, N_NEW), -1, np.int16)
    for row, sequence in enumerate(out.sequences[:, inputs.shape[1] :]):
      drawn = sequence.tolist()
      ends = [i for i, x in enumerate(drawn) if x in (eos, *stop_ids)]
      drawn = drawn[: ends[0] + 1] if ends else drawn
      found[row, : len(drawn)] = drawn
    worth = np.full(5, np.nan)
    worth[:n_beams] = out.sequences_scores.numpy()
    cases.append([prompt, stop_ids, n_beams, length_penalty, early])
    ids.append(found)
    scores.append(worth)
  np.savez_compressed(
    pathlib.Path(__file__).with_name("hf_beams.npz"),
    cases=np.array(json.dumps(cases)),
    ids=np.stack(ids),
    scores=np.stack(scores),
  )


if __name__ == "__main__":
  main()
