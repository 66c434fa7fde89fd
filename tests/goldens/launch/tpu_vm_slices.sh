# the state, every half minute
gcloud compute tpus queued-resources describe llama-1b \
  '--format=value(state.state)' --zone=us-west4-a

# where there is none
gcloud compute tpus queued-resources create llama-1b --node-count=2 \
  --node-prefix=llama-1b --accelerator-type=v5p-128 \
  --runtime-version=v2-alpha-tpuv5 --zone=us-west4-a

# on all workers
gcloud compute tpus queued-resources ssh llama-1b --worker=all --node=all \
  --batch-size=all \
  '--command=bash -c '"'"'mkdir -p "$1" && cd "$1" || exit
beside=../$1
shift
flock --nonblock "$beside.lock" true || exit 0  # it is installed and runs
set -e
git clone https://example.com/next-token .
pip install .[tpu]
'"'"' launch llama-1b' \
  --zone=us-west4-a

# where it does not run yet
gcloud compute tpus queued-resources ssh llama-1b --worker=all --node=all \
  --batch-size=all \
  '--command=bash -c '"'"'mkdir -p "$1" && cd "$1" || exit
beside=../$1
shift
exec 9> "$beside.lock"
flock --nonblock 9 || exit 0  # it runs already
rm -f "$beside.status"
[ ! -f .venv/bin/activate ] || . .venv/bin/activate
setsid bash -c "$@" > "$beside.log" 2>&1 < /dev/null &
echo "$!" > "$beside.pid"
'"'"' launch llama-1b '"'"'stopped=
child=
trap '"'"'"'"'"'"'"'"'stopped=1; [ -z "$child" ] || tell'"'"'"'"'"'"'"'"' TERM
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
status=$1
shift
supervise "$@"
echo "$?" > "$status"
'"'"' launch ../llama-1b.status python -m lm.train --config=configs/tiny.py --workdir=gs://my-bucket/runs/llama-1b' \
  --zone=us-west4-a

# the output, then the exit code
gcloud compute tpus queued-resources ssh llama-1b --worker=all --node=all \
  --batch-size=all \
  '--command=bash -c '"'"'mkdir -p "$1" && cd "$1" || exit
beside=../$1
shift
flock "$beside.lock" true &
tail -n +1 -F --pid="$!" "$beside.log"
exit "$(cat "$beside.status" 2> /dev/null || echo 1)"
'"'"' launch llama-1b' \
  --zone=us-west4-a

# what is left of a run that failed
gcloud compute tpus queued-resources ssh llama-1b --worker=all --node=all \
  --batch-size=all \
  '--command=bash -c '"'"'mkdir -p "$1" && cd "$1" || exit
beside=../$1
shift
! flock --nonblock "$beside.lock" true || exit 0
pid=$(cat "$beside.pid")
kill -TERM -- "-$pid"
flock --wait 60 "$beside.lock" true || kill -KILL -- "-$pid"
'"'"' launch llama-1b' \
  --zone=us-west4-a

# when it was preempted, and after a complete run
gcloud compute tpus queued-resources delete llama-1b --force --quiet \
  --zone=us-west4-a
