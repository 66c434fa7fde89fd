mkdir -p runs

# the task
tee runs/llama-1b.sky.yaml <<'EOF'
name: llama-1b
num_nodes: 1
resources:
  accelerators: tpu-v5litepod-8
  use_spot: true
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes:
    - 143
  accelerator_args:
    runtime_version: v2-alpha-tpuv5-lite
  infra: gcp/*/us-west4-a
  image_id: docker:my/image:1
setup: |-
  set -e
  pip install next-token
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
  [ ! -f .venv/bin/activate ] || . .venv/bin/activate
  retry 10 10 python -m lm.train --config=configs/tiny.py --workdir=gs://my-bucket/runs/llama-1b
EOF

# submit
sky jobs launch --yes --detach-run runs/llama-1b.sky.yaml
