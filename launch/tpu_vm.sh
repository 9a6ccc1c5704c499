#!/usr/bin/env bash
# Distils on a TPU VM slice: the same command on all workers, over gcloud.
#
#   launch/tpu_vm.sh [--dry_run] CONFIG WORKDIR [flags of diffusiongemma.distill]
#
# Environment, with defaults:
#   TPU_NAME=diffusiongemma  ZONE=us-east5-a  PROJECT=(that of gcloud)
#   ACCELERATOR_TYPE=v5p-128 (64 chips, topology 4x4x4)  RUNTIME=v2-alpha-tpuv5
#   REPOSITORY=~/diffusiongemma  where this checkout is copied to on each worker
#   CREATE=yes  creates the slice first; otherwise it has to be there
#
# WORKDIR has to be one directory that all workers see (Filestore, a mounted bucket). Started again
# with the same arguments the run goes on from the last checkpoint. Whether a config fits a slice:
# docs/scaling_plan.md; the default is the slice of configs/gemma4_26b_a4b.py.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_arguments "$@"
name=${TPU_NAME:-diffusiongemma}
zone=${ZONE:-us-east5-a}
repository=${REPOSITORY:-diffusiongemma}
where=("--zone=$zone")
if [[ -n "${PROJECT:-}" ]]; then
  where+=("--project=$PROJECT")
fi
tpu=(gcloud compute tpus tpu-vm)

if [[ "${CREATE:-}" == yes ]]; then
  run "${tpu[@]}" create "$name" "${where[@]}" \
    "--accelerator-type=${ACCELERATOR_TYPE:-v5p-128}" "--version=${RUNTIME:-v2-alpha-tpuv5}"
fi
run "${tpu[@]}" scp --recurse "$root" "$name:$repository" "${where[@]}" --worker=all
command=$(quoted python3 -m diffusiongemma.distill "--config=$config" "--workdir=$workdir" \
  --distributed "${flags[@]}")
install="python3 -m pip install -q -e '.[tpu]'"
run "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all \
  "--command=cd $(quoted "$repository") && $install && $command"
