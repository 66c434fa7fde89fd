#!/usr/bin/env bash
# Format, lint, types and tests in the project's own environment, .venv, which
# is made first where there is none. Arguments go to pytest, such as -k config
# or -m "" (also the slow tests). PYTHON=... names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

environment test
say "Format (ruff format --check)"
python -m ruff format --check .
say "Lint (ruff check)"
python -m ruff check .
say "Types (pyright)"
python -m pyright
say "Tests (pytest $*)"
# A worker more than cores, up to five: tests wait for child processes, files
# and ports. Bytecode is kept: assertions and annotations that pytest and
# jaxtyping rewrite take each worker seven seconds without.
workers="$(python -c 'import os; print(min(5, 1 + (os.cpu_count() or 1)))')"
PYTHONDONTWRITEBYTECODE="" JAX_PLATFORMS=cpu python -m pytest -n "$workers" \
  --dist=loadfile --no-loadscope-reorder "$@"
