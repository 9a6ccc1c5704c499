#!/usr/bin/env bash
# Distills on TPU slices of a GKE cluster, as a workload of XPK (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/gke_xpk.sh [--dry_run] CONFIG WORKDIR [flags of diffusiongemma.distill]
#
# Environment, with defaults:
#   CLUSTER=diffusiongemma  WORKLOAD=distill  ZONE=us-east5-a  PROJECT=(that of gcloud)
#   TPU_TYPE=v5p-128 (64 chips, topology 4x4x4)  IMAGE=python:3.12  base image of the container
#   LIBTPU_INIT_ARGS=(none)  flags of the TPU compiler for all hosts; docs/launch.md has a set for slices
#     of more than 32 chips along one mesh axis
#   CREATE=yes  creates the cluster first
#
# XPK puts the project's files into the image. WORKDIR has to be one directory that all pods see (a
# bucket or Filestore that the cluster mounts). When it is started again with the same arguments, as
# XPK does after a pod fails, the run continues from the last checkpoint. docs/scaling_plan.md tells
# whether a config fits a slice; the default is the slice of configs/gemma4_26b_a4b.py.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_arguments "$@"
cluster=${CLUSTER:-diffusiongemma}
type=${TPU_TYPE:-v5p-128}
where=("--cluster=$cluster" "--zone=${ZONE:-us-east5-a}")
if [[ -n "${PROJECT:-}" ]]; then
  where+=("--project=$PROJECT")
fi

if [[ "${CREATE:-}" == yes ]]; then
  run xpk cluster create "${where[@]}" "--tpu-type=$type" --num-slices=1
fi
stage
command=$(on_tpu python -m diffusiongemma.distill "--config=$config" "--workdir=$workdir" \
  --distributed "${flags[@]}")
run xpk workload create "${where[@]}" "--workload=${WORKLOAD:-distill}" "--tpu-type=$type" \
  --num-slices=1 "--base-docker-image=${IMAGE:-python:3.12}" "--script-dir=$staged" \
  --max-restarts=100 "--command=pip install -q -e '.[train,tpu]' && $command"
