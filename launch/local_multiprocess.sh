#!/usr/bin/env bash
# Distills with N processes on this machine's CPU that communicate over gloo, like a small pod.
#
#   launch/local_multiprocess.sh [--dry_run] N CONFIG WORKDIR [flags of diffusiongemma.distill]
#
# PROGRAM=train or PROGRAM=generate_targets runs that entry point; for generate_targets, WORKDIR is
# its --output.
# Each process writes to WORKDIR/logs/process_I.log, and the first one also to the terminal. The
# config's mesh has to cover N devices, as {'data': -1} does. When one process fails, the others
# detect it and fail too.
set -euo pipefail

dry_run=''
if [[ "${1:-}" == '--dry_run' ]]; then
  dry_run=yes
  shift
fi
if (($# < 3)) || ! [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 [--dry_run] N CONFIG WORKDIR [flags]" >&2
  exit 2
fi
count=$1
config=$2
workdir=$3
shift 3
if [[ ! -f "$config" ]]; then
  echo "error: no config file $config" >&2
  exit 1
fi
program=${PROGRAM:-distill}
output=--workdir
if [[ "$program" == generate_targets ]]; then
  output=--output
fi
port=${PORT:-$((20000 + RANDOM % 10000))}
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES_PER_PROCESS:-1}"

command=(python -m "diffusiongemma.$program" "--config=$config" "$output=$workdir" "$@"
  "--coordinator=localhost:$port" "--num_processes=$count")
if [[ -n "$dry_run" ]]; then
  for ((i = 0; i < count; i++)); do
    printf '%q ' "${command[@]}" "--process_id=$i"
    echo
  done
  exit
fi

mkdir -p "$workdir/logs"
pids=()
signalled=''
trap 'signalled=yes; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = count - 1; i > 0; i--)); do
  "${command[@]}" "--process_id=$i" >"$workdir/logs/process_$i.log" 2>&1 &
  pids+=("$!")
done
"${command[@]}" --process_id=0 > >(tee "$workdir/logs/process_0.log") 2>&1 &
pids+=("$!")

code=0
for pid in "${pids[@]}"; do
  ended=0
  wait "$pid" || ended=$?
  if [[ -n "$signalled" ]]; then # the signal ended `wait`; the process still saves its state
    signalled=''
    ended=0
    wait "$pid" || ended=$?
  fi
  if ((ended)); then
    echo "error: a process ended with $ended; see $workdir/logs" >&2
    code=$ended
  fi
done
exit "$code"
