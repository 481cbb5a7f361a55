#!/usr/bin/env bash
# Repeats a row of the results table, from the data to the number:
#
#   launch/reproduce.sh                          list the names, their time and command
#   launch/reproduce.sh imdb_minilm_plus_seed1   train, measure and compare with results/NAME.json
#
# needs bash, and the data and the pretrained model that the header of the configuration names
# PYTHON names the interpreter of an environment with this package, by default that of `make install`
# run on 2 CPU cores: the list and the comparison; the commands that it runs are those of the committed files
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "reproduce.sh: no $python; run \`make install\`, or set PYTHON" >&2; exit 2; }
exec "$python" benchmarks/reproduce.py "$@"
