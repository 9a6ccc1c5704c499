#!/usr/bin/env bash
# Distils with N real processes on the CPU of this machine, over gloo: what a pod does, in small.
#
#   launch/local_multiprocess.sh [--dry_run] N CONFIG WORKDIR [flags of diffusiongemma.distill]
#
# PROGRAM=train (or generate_targets, whose WORKDIR is its --output) runs another entry point.
# Each process writes to WORKDIR/logs/process_I.log, the first one also to the terminal. The mesh of
# the config has to cover N devices: {'data': -1} does. When one process fails the others notice
# and fail too.
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
  if [[ -n "$signalled" ]]; then # that ended `wait`, not the process, which saves and then ends
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
