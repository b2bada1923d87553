#!/usr/bin/env bash
# Two processes of two CPU devices each, on this machine, as one run: bash local.sh FOLDER [OPTIONS]
# The options are those of `fomaml-jax train sinusoid`; `--resume FOLDER` for a run that stopped.
#
# Tested: this script, by the test suite, on every change. The two processes give the numbers of one
# with four devices; one of them killed, both end, and started again they go on.
set -euo pipefail
folder=$1
shift
new=(sinusoid --out "$folder")
[ "${1:-}" = --resume ] && new=(--resume "$folder") && shift 2

export JAX_NUM_CPU_DEVICES=2
coordinator=127.0.0.1:$((20000 + RANDOM % 20000))
processes=()
for process in 0 1; do
  fomaml-jax train "${new[@]}" "$@" \
    --distributed --coordinator "$coordinator" --processes 2 --process "$process" &
  processes+=($!)
done
code=0
for process in "${processes[@]}"; do
  wait "$process" || code=$?
done
exit "$code"
