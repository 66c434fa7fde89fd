mkdir -p runs

# submit
sbatch --job-name=tiny --nodes=4 --ntasks-per-node=8 --time=1440 \
  --signal=B:TERM@120 --requeue --open-mode=append --output=runs/tiny.slurm.log \
  --exclusive --mem=0 --dependency=singleton --gpus-per-node=8 <<'EOF'
#!/usr/bin/env bash
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

set -e
module load cuda
source .venv/bin/activate

set +e

# A task says 143 where SIGTERM reached it: from the time limit's notice, a
# preemption, or scancel. A job that still counts as running then goes back into
# the queue; one that was cancelled does not. Tasks are not ended by srun when
# another fails, which would look the same: they end when they miss their peer.
task='stopped=
child=
trap '"'"'stopped=1; [ -z "$child" ] || tell'"'"' TERM
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
supervise "$@"'
# SIGTERM would make srun kill its tasks at once.
tell() { scancel --signal=TERM "$SLURM_JOB_ID"; }
retry 10 30 srun --cpu-bind=none bash -c "$task" launch \
  python -m lm.train --config=configs/tiny.py --workdir=runs/tiny
code=$?
if [ "$code" = 143 ] &&
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  echo "launch: stopped before the end; back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
EOF
