#!/usr/bin/env bash
# Compares each pass of DiffusionGemma 26B-A4B with the device's limits, within 12 minutes on one GPU
# with 80 GB. The weights are random, in bfloat16, int8 and fp8.
#
#   launch/gpu_minutes/roofline_26b_a4b.sh [--dry_run] OUTPUT
#
# DEVICE=H200 names the GPU; the default is H100. A table for each kind of weights is written to
# OUTPUT.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_output "$@"
command=(python benchmarks/roofline.py --preset=diffusiongemma_26b_a4b --random_weights
  "--device=${DEVICE:-H100}" --dtype=bfloat16 --prefix=1024)
record bfloat16 "${command[@]}"
record int8 "${command[@]}" --weights=int8
record fp8 "${command[@]}" --weights=fp8
