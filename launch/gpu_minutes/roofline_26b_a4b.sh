#!/usr/bin/env bash
# Within 12 minutes on one GPU with 80 GB: each pass of DiffusionGemma 26B-A4B with random weights
# against the device's limits, with bfloat16, int8 and fp8 weights.
#
#   launch/gpu_minutes/roofline_26b_a4b.sh [--dry_run] OUTPUT
#
# DEVICE=H200 names the card, H100 by default. OUTPUT gets a table for each kind of weights.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_output "$@"
command=(python benchmarks/roofline.py --preset=diffusiongemma_26b_a4b --random_weights
  "--device=${DEVICE:-H100}" --dtype=bfloat16 --prefix=1024)
record bfloat16 "${command[@]}"
record int8 "${command[@]}" --weights=int8
record fp8 "${command[@]}" --weights=fp8
