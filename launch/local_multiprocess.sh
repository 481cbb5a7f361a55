#!/usr/bin/env bash
# N processes on this machine, as on N hosts: to try out a multi-host run, or one process for each GPU.
#
#   launch/local_multiprocess.sh N --config configs/quickstart.yaml [key=value ...]
#
# DEVICES=D    on a CPU: so many devices a process (default 1)
# PORT=P       of the coordinator on the loopback (default 8476)
# On a machine with GPUs each process sees the one of its own number.
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

# The first that fails decides; the others wait for it in vain.
code=0
for ((i = 0; i < number; i++)); do
    wait -n || { code=$?; stop; break; }
done
wait || true
exit "$code"
