# Sourced by tests/run.sh and launch/quickstart.sh from the top of the checkout.
# `environment` makes and fills .venv; `environment test` adds the test tools.
#
# PYTHON names the interpreter, by default the python3 on the path. A stamp, the
# hash of setup.py, interpreter and place, makes a second run start in seconds.
# The test installation holds the core, so either stamp serves the core.

say() { printf '\n== %s\n' "$*"; }

environment() {
  local extra="${1:-}" python="${PYTHON:-python3}" log=.venv/install.log
  local identity key stamp
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    2>/dev/null; then
    echo "error: $python: $("$python" --version 2>&1 || true); needs Python" \
      "3.11 or newer on the path, or named by PYTHON=/path/to/python3" >&2
    exit 1
  fi
  identity='import sys; print(sys.version)'
  if [ ! -x .venv/bin/pip ] || [ "$("$python" -c "$identity")" != \
    "$(.venv/bin/python -c "$identity" 2>&1)" ]; then
    say "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  key="$(.venv/bin/python -c 'import hashlib, os, sys
parts = open("setup.py").read(), sys.version, os.getcwd()
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())')"
  export PATH="$PWD/.venv/bin:$PATH"
  for stamp in test "${extra:-core}"; do
    [ "$(cat ".venv/installed-$stamp" 2>/dev/null)" != "$key" ] || return 0
  done
  say "Installing the project into .venv, minutes the first time ($log)"
  if ! python -m pip install --disable-pip-version-check --progress-bar off \
    --no-compile --editable ".${extra:+[$extra]}" 2>&1 | tee "$log" |
    awk '/^Collecting/ { printf "."; fflush() } END { print "" }'; then
    tail -n 20 "$log" >&2
    exit 1
  fi
  # To bytecode, on all cores: pip would use one. Some packages have files that
  # are no Python. What only tests use is compiled when they import it.
  local large='/(torch|transformers|sympy|pandas|sklearn|lm_eval|playwright|'
  large+='kubernetes_validate|openai|tests?)/'
  python -m compileall -qq -j 0 -x "$large" .venv/lib/python*/site-packages ||
    true
  echo "$key" > ".venv/installed-${extra:-core}"
}
