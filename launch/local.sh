#!/usr/bin/env bash
# Runs one process on all devices of this machine (CPU, GPUs or the TPU chips of one host).
#
#   launch/local.sh --config configs/imdb_bert.yaml [key=value ...]
#
# needs    trbert on the PATH; for GPUs the extra `cuda`, for TPUs `tpu`
# run on   2 CPU cores (Linux, one device; also eight forced host devices). Not yet run on GPU or TPU.
set -euo pipefail

# Huge pages for the buffers of XLA (glibc only).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec trbert train "$@"
