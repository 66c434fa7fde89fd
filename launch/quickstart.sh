#!/usr/bin/env bash
# Trains a small model on the Python standard library's source, evaluates it
# and lets it write. Needs a python3 (>= 3.11), two CPU cores and five minutes.
# Arguments go to lm.train, such as --config.train.steps=200. A second run
# resumes: it ends at once where the first was complete.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

# Each step allocates its memory anew: with huge pages (glibc 2.35) it has far
# fewer page faults, and takes a fifth less time (docs/figures.md).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
workdir=runs/quickstart
# Where the processor multiplies bfloat16, a step takes 0.7 of its time in float32,
# and seeds differ more than the two (docs/figures.md). A run keeps its dtype.
chosen="$workdir/config.json"
[ -e "$chosen" ] || chosen=/proc/cpuinfo
if grep -qsE '"dtype": "bfloat16"|avx512_bf16' "$chosen"; then
  set -- --config.model.dtype=bfloat16 "$@"
fi
prompt='class Error'
environment
say "Training in $workdir"
python -m lm.train --config=configs/quickstart.py --workdir="$workdir" "$@"
say "Evaluating on the validation files"
python -m lm.evaluate --workdir="$workdir"
say "What compressors make of the same files, each alone"
PYTHONPATH=. python benchmarks/compressors.py --config=configs/quickstart.py
say "What may follow '$prompt'"
python -m lm.explain --workdir="$workdir" --prompt="$prompt"
say "Greedy continuation of '$prompt'"
python -m lm.sample --workdir="$workdir" --prompt="$prompt" \
  --temperature=0 --max_new_tokens=120
say "Sampled continuation of '$prompt'"
python -m lm.sample --workdir="$workdir" --prompt="$prompt" \
  --temperature=0.8 --top_k=40 --top_p=0.95 --max_new_tokens=120 --seed=1
say "Curves of loss and learning rate: $workdir/curves.png"
