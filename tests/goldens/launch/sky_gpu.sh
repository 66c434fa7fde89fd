mkdir -p runs

# the task
tee runs/llama-1b.sky.yaml <<'EOF'
name: llama-1b
num_nodes: 2
resources:
  accelerators: A100-80GB:8
  use_spot: true
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes:
    - 143
  infra: aws/us-east-1
workdir: .
setup: |
  set -e
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
  python3 -m uv pip install --quiet --python .venv '.[cuda12,gcs]'
run: |
  stopped=
  child=
  trap 'stopped=1; [ -z "$child" ] || tell' TERM
  tell() { kill -TERM "$child"; }
  supervise() {
    local code
    "$@" &
    child=$!
    [ -z "$stopped" ] || tell
    wait "$child"
    code=$?
    while kill -0 "$child" 2> /dev/null; do  # the signal ended wait, not the run
      wait "$child"
      code=$?
    done
    child=
    [ -z "$stopped" ] || code=143
    return "$code"
  }
  retry() {
    local times=$1 seconds=$2 code
    shift 2
    while :; do
      supervise "$@"
      code=$?
      case $code in 0 | 2 | 130 | 143) return "$code" ;; esac
      [ "$times" -gt 0 ] || return "$code"
      echo "launch: exit code $code; again in $seconds s, $times left" >&2
      sleep "$seconds" &
      wait "$!"
      [ -z "$stopped" ] || return 143
      times=$((times - 1))
      seconds=$((seconds < 150 ? seconds * 2 : 300))
    done
  }
  COORDINATOR_ADDRESS="$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):8476"
  export COORDINATOR_ADDRESS
  export PROCESS_COUNT="$SKYPILOT_NUM_NODES" PROCESS_INDEX="$SKYPILOT_NODE_RANK"
  [ ! -f .venv/bin/activate ] || . .venv/bin/activate
  retry 10 10 python -m lm.train --config=configs/tiny.py --workdir=gs://my-bucket/runs/llama-1b
EOF

# submit
sky jobs launch --yes --detach-run runs/llama-1b.sky.yaml
