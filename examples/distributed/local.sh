#!/usr/bin/env bash
# Two processes of two CPU devices each, on this machine, as one run: bash local.sh FOLDER [OPTIONS]
# The options are those of `fomaml-jax train sinusoid`. A run that stopped: bash local.sh FOLDER --resume
#
# Tested by the test suite: this script, for a short run.
set -euo pipefail
folder=$1
shift
new=(sinusoid --out "$folder")
[ "${1:-}" = --resume ] && new=(--resume "$folder") && shift

export JAX_NUM_CPU_DEVICES=2
coordinator=127.0.0.1:$((20000 + RANDOM % 20000))
processes=()
for process in 0 1; do
  fomaml-jax train "${new[@]}" "$@" \
    --distributed --coordinator "$coordinator" --processes 2 --process "$process" &
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}"' INT TERM  # saves every step
code=0
for process in "${processes[@]}"; do
  wait "$process" || code=$?
done
exit "$code"
