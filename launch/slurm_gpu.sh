#!/usr/bin/env bash
# Distills on the GPU nodes of a SLURM cluster: one process for each GPU.
#
#   launch/slurm_gpu.sh [--dry_run] CONFIG WORKDIR [flags of diffusiongemma.distill]
#
# Environment, with defaults:
#   NODES=1  GPUS_PER_NODE=8  TIME=24:00:00  PARTITION=(the cluster's)  ACCOUNT=(yours)
#
# WORKDIR has to be one directory that all nodes see. SLURM sends SIGTERM two minutes before the time
# limit: the run saves its state and ends, and the same command continues it. SLURM requeues a job
# that was preempted.
#
# The default is one node with 8 GPUs. The docstring of a config says how much memory its training
# takes per device, and `python -m diffusiongemma.plan --topology=H100:8` estimates it.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_arguments "$@"
nodes=${NODES:-1}
gpus=${GPUS_PER_NODE:-8}
options=(--job-name=diffusiongemma "--nodes=$nodes" "--ntasks-per-node=$gpus"
  "--gpus-per-node=$gpus" "--time=${TIME:-24:00:00}" --requeue --signal=TERM@120
  "--output=$workdir/logs/slurm_%j.log" --open-mode=append)
if [[ -n "${PARTITION:-}" ]]; then
  options+=("--partition=$PARTITION")
fi
if [[ -n "${ACCOUNT:-}" ]]; then
  options+=("--account=$ACCOUNT")
fi
command=$(quoted srun --kill-on-bad-exit=1 \
  "--output=$workdir/logs/slurm_%j_%t.log" python -m diffusiongemma.distill "--config=$config" \
  "--workdir=$workdir" --distributed "${flags[@]}")
if [[ -z "$dry_run" ]]; then
  mkdir -p "$workdir/logs"
fi
run sbatch "${options[@]}" "--chdir=$root" "--wrap=$command"
