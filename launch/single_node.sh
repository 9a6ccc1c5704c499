#!/usr/bin/env bash
# Distills on every accelerator of this machine (or on its CPU), in one process.
#
#   launch/single_node.sh [--dry_run] CONFIG WORKDIR [flags of diffusiongemma.distill]
#
# When it is started again with the same arguments, it continues from the last checkpoint. The
# docstring of a config says which hardware it is meant for.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_arguments "$@"
command=(python -m diffusiongemma.distill "--config=$config" "--workdir=$workdir" "${flags[@]}")
quoted "${command[@]}"
if [[ -z "$dry_run" ]]; then
  exec "${command[@]}" # so that the process itself receives signals
fi
