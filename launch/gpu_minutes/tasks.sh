#!/usr/bin/env bash
# Trains two students within 12 minutes on one GPU: a light student of the built-in teacher, on ten
# times as many word problems as the README's student, and a sudoku student. Each run prints its
# table.
#
#   launch/gpu_minutes/tasks.sh [--dry_run] OUTPUT
#
# It writes word_problems.txt, sudoku.txt and the two students to OUTPUT; when it is started again,
# both runs continue.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_output "$@"
seconds=360
record word_problems python -m diffusiongemma.distill --config=configs/tiny.py \
  "--workdir=$output/word_problems" --config.targets.source.size=30000 \
  --config.targets.batch_size=1024 --config.canvas_length=32 --config.data.batch_size=32 \
  --config.train.num_steps=2000 || true # each student has half of the time
seconds=720
record sudoku python -m diffusiongemma.distill --config=configs/sudoku.py \
  "--workdir=$output/sudoku"
