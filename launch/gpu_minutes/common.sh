# shellcheck shell=bash
# Functions and variables of the scripts of this folder, which source this file.

# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

seconds=720 # time limit of a script; an unfinished run continues from its checkpoint later

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

# Prints the seconds that this script may still use.
remaining() {
  echo $((seconds > SECONDS ? seconds - SECONDS : 1))
}

# Runs a command within the remaining time and writes its output to OUTPUT/NAME.txt.
record() {
  local name=$1
  shift
  quoted "$@"
  if [[ -z "$dry_run" ]]; then
    timeout --signal=TERM --kill-after=30 "$(remaining)" "$@" 2>&1 | tee "$output/$name.txt"
  fi
}
