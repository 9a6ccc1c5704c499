# shellcheck shell=bash
# What the scripts of this folder share; they source it.

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

seconds=720 # of each script; what is unfinished then goes on from its checkpoint

# Reads [--dry_run] OUTPUT and makes that directory.
parse_output() {
  if [[ "${1:-}" == '--dry_run' ]]; then
    dry_run=yes
    shift
  fi
  if (($# != 1)); then
    echo "usage: $0 [--dry_run] OUTPUT" >&2
    exit 2
  fi
  output=$1
  if [[ -z "$dry_run" ]]; then
    mkdir -p "$output"
  fi
  cd "$root" || exit 1
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.9}
}

# Seconds that this script may still use.
remaining() {
  echo $((seconds > SECONDS ? seconds - SECONDS : 1))
}

# Runs a command within the time that is left and keeps what it prints in OUTPUT/NAME.txt.
record() {
  local name=$1
  shift
  quoted "$@"
  if [[ -z "$dry_run" ]]; then
    timeout --signal=TERM --kill-after=30 "$(remaining)" "$@" 2>&1 | tee "$output/$name.txt"
  fi
}
