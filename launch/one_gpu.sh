#!/usr/bin/env bash
# Train on one GPU, the first visible one: launch/one_gpu.sh RECIPE [key=value ...] [flags of sft-dist train]
# Too little memory: add train.engine=zero2_offload, which reads configs/deepspeed/zero2_offload.json.
# PYTHON: the interpreter (default: python, that of the active environment).
set -euo pipefail
if [[ $# -eq 0 ]]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi

configs=$(cd "$(dirname "${BASH_SOURCE[0]}")/../configs" && pwd)
# accelerate says 1 thread where nothing is set.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

exec "${PYTHON:-python}" -m accelerate.commands.launch --config_file "$configs/accelerate/gpu-1.yaml" \
    -m sft_dist train "$@"
