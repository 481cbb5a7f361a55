#!/usr/bin/env bash
# Runs one command on every host of a Cloud TPU slice.
#
#   TPU=NAME ZONE=us-central2-b launch/tpu_pod.sh --config configs/imdb_bert.yaml workdir=/mnt/runs/imdb
#
# TPU       name of the TPU VM (needed)
# ZONE      its zone (needed)
# PROJECT   Google Cloud project (default: gcloud's own)
# FOLDER    the repository on the hosts (default: ~/trbert_jax), installed with the extra `tpu`
#
# needs    gcloud with access to the TPU; a `workdir` that all hosts share (a mounted disk or bucket)
# run on   not yet run; follows Google's documentation
set -euo pipefail

: "${TPU:?set TPU to the name of the TPU VM}" "${ZONE:?set ZONE to its zone}"
project=(${PROJECT:+--project "$PROJECT"})
# Quoted once more for the shell on the hosts.
printf -v arguments ' %q' "$@"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" "${project[@]}" --worker=all \
    --command "cd ${FOLDER:-trbert_jax} && .venv/bin/trbert train --distributed$arguments"
