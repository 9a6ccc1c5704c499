#!/usr/bin/env bash
# Trains a light student of Gemma 3 270M within 12 minutes on one GPU with 80 GB, and measures its
# accepted length and its speed on HumanEval prompts.
#
#   launch/gpu_minutes/gemma3_270m_student.sh [--dry_run] OUTPUT
#
# It needs pip install -e '.[train,gemma]' and a JAX for the GPU. It writes the student
# (workdir/model) and its table (student.txt) to OUTPUT; when it is started again, it continues from
# the last checkpoint.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_output "$@"
record student python -m diffusiongemma.distill --config=configs/gemma3_270m_light_gpu.py \
  "--workdir=$output/workdir"
