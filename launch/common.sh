# shellcheck shell=bash
# What the launch scripts share; they source it.

# shellcheck disable=SC2034  # read by the scripts that source this file
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=''
config=''
workdir=''
flags=()

# Reads [--dry_run] CONFIG WORKDIR [flags].
parse_arguments() {
  if [[ "${1:-}" == '--dry_run' ]]; then
    dry_run=yes
    shift
  fi
  if (($# < 2)); then
    echo "usage: $0 [--dry_run] CONFIG WORKDIR [flags of diffusiongemma.distill]" >&2
    exit 2
  fi
  config=$1
  # shellcheck disable=SC2034
  workdir=$2
  shift 2
  # shellcheck disable=SC2034
  flags=("$@")
  if [[ ! -f "$config" ]]; then
    echo "error: no config file $config" >&2
    exit 1
  fi
}

# The arguments as one line that a shell reads as these arguments.
quoted() {
  local line
  line=$(printf '%q ' "$@")
  echo "${line% }"
}

# Shows a command and runs it, or only shows it.
run() {
  quoted "$@"
  if [[ -z "$dry_run" ]]; then
    "$@"
  fi
}
