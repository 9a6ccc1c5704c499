#!/usr/bin/env bash
# Distils on every accelerator of this machine (or on its CPU).
#
#   launch/single_node.sh [--dry_run] CONFIG WORKDIR [--config.key=value ...]
#
# Started again with the same arguments it goes on from the last checkpoint.
set -euo pipefail

dry_run=''
if [[ "${1:-}" == '--dry_run' ]]; then
  dry_run=yes
  shift
fi
if (($# < 2)); then
  echo "usage: $0 [--dry_run] CONFIG WORKDIR [--config.key=value ...]" >&2
  exit 2
fi
config=$1
workdir=$2
shift 2
if [[ ! -f "$config" ]]; then
  echo "error: no config file $config" >&2
  exit 1
fi

command=(python -m diffusiongemma.distill "--config=$config" "--workdir=$workdir" "$@")
printf '%q ' "${command[@]}"
echo
if [[ -z "$dry_run" ]]; then
  exec "${command[@]}"
fi
