# shellcheck shell=bash
# Part of every script that launch renders for another machine.

# supervise COMMAND...: runs it, passes SIGTERM on to it and waits for its end.
# Returns 143 where SIGTERM came, whatever the command says: a run that is told
# to stop saves and exits 0, and is not complete.
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
