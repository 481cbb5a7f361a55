#!/usr/bin/env bash
# Runs N processes on this machine: a trial of a multi-host run, or one process for each GPU.
#
#   launch/local_multiprocess.sh N --config configs/quickstart.yaml [key=value ...]
#
# DEVICES=D    devices of each process on a CPU (default 1)
# PORT=P       port of the coordinator on the loopback (default 8476)
# With GPUs, process I uses GPU I.
#
# needs    trbert on the PATH
# run on   2 CPU cores: 2 processes x 2 devices. Not yet run on GPUs.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 N --config FILE [key=value ...]" >&2
    exit 2
fi
number=$1
shift

if [[ ! -e /dev/nvidia0 ]]; then
    export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
fi

pids=()
stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop INT TERM

for ((i = 0; i < number; i++)); do
    if [[ -e /dev/nvidia0 ]]; then
        export CUDA_VISIBLE_DEVICES=$i
    fi
    trbert train "$@" --coordinator "127.0.0.1:${PORT:-8476}" --num-processes "$number" --process-id "$i" &
    pids+=($!)
done

# The first failure ends all: the other processes would wait for it forever.
code=0
for ((i = 0; i < number; i++)); do
    wait -n || { code=$?; stop; break; }
done
wait || true
exit "$code"
