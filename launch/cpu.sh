#!/usr/bin/env bash
# Train on the CPUs of this machine: launch/cpu.sh RECIPE [key=value ...] [flags of sft-dist train]
# PROCESSES: how many (default: 2), PYTHON: the interpreter (default: python, that of the active environment).
set -euo pipefail
if [[ $# -eq 0 ]]; then
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
fi

configs=$(cd "$(dirname "${BASH_SOURCE[0]}")/../configs" && pwd)
processes=${PROCESSES:-2}
cores=$(nproc)
# A process takes a GPU where it sees one.
export CUDA_VISIBLE_DEVICES=
# accelerate says 1 thread where nothing is set.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
# After a signal ranks may take longer than torchrun's 30 s to save.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-3600}

exec "${PYTHON:-python}" -m accelerate.commands.launch --config_file "$configs/accelerate/cpu-2.yaml" \
    --num_processes "$processes" -m sft_dist train "$@"
