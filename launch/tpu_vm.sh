#!/usr/bin/env bash
# Distills on a TPU VM slice by running the same command on all workers over gcloud.
#
#   launch/tpu_vm.sh [--dry_run] CONFIG WORKDIR [flags of diffusiongemma.distill]
#
# Environment, with defaults:
#   TPU_NAME=diffusiongemma  ZONE=us-east5-a  PROJECT=(that of gcloud)
#   ACCELERATOR_TYPE=v5p-128 (64 chips, topology 4x4x4)  RUNTIME=v2-alpha-tpuv5
#   REPOSITORY=~/diffusiongemma  where the project's files are copied to on each worker
#   PYTHON=python3  the workers' Python, 3.11 or newer; the default of a runtime may be older
#   LIBTPU_INIT_ARGS=(none)  flags of the TPU compiler for all hosts; docs/launch.md has a set for slices
#     of more than 32 chips along one mesh axis
#   CREATE=yes  creates the slice first; otherwise it has to exist
#
# WORKDIR has to be one directory that all workers see (Filestore, a mounted bucket). When it is
# started again with the same arguments, the run continues from the last checkpoint.
# docs/scaling_plan.md tells whether a config fits a slice; the default is the slice of
# configs/gemma4_26b_a4b.py.
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
stage
run "${tpu[@]}" scp --recurse "$staged" "$name:$repository" "${where[@]}" --worker=all
python=${PYTHON:-python3}
command=$(on_tpu "$python" -m diffusiongemma.distill "--config=$config" "--workdir=$workdir" \
  --distributed "${flags[@]}")
old='error: the workers need Python 3.11 or newer: name one with PYTHON=python3.12, or take another RUNTIME'
check="{ $python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo '$old' >&2; exit 1; }; }"
install="$python -m pip install -q -e '.[train,tpu]'"
run "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all \
  "--command=$check && cd $(quoted "$repository") && $install && $command"
