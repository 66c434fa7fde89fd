# shellcheck shell=bash
# Where no scheduler starts a failed run again; after supervise.sh.

# retry TIMES SECONDS COMMAND...: supervises it, and starts it again where it
# failed, after SECONDS, then twice that, up to five minutes. Not so after 0, 2
# (a mistake in config or flags: again would not help), 130 (Ctrl-C) or 143.
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
