#!/usr/bin/env bash
# Train on all visible GPUs of this machine: launch/all_gpus.sh RECIPE [key=value ...] [flags of sft-dist train]
# train.engine=zero2 spreads gradients and optimizer over them, zero3 the weights too (configs/deepspeed/*.json).
# PYTHON: the interpreter (default: python, that of the active environment). CUDA_VISIBLE_DEVICES: which GPUs.
set -euo pipefail
if [[ $# -eq 0 ]]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi

configs=$(cd "$(dirname "${BASH_SOURCE[0]}")/../configs" && pwd)
gpus=$("${PYTHON:-python}" -c 'import torch; print(torch.cuda.device_count())')
if [[ $gpus -eq 0 ]]; then
    echo "no GPU is visible here; launch/cpu.sh trains on the CPU" >&2
    exit 2
fi
cores=$(nproc)
# accelerate says 1 thread where nothing is set.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > gpus ? cores / gpus : 1))}
# After a signal ranks may take longer than torchrun's 30 s to save.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-3600}

exec "${PYTHON:-python}" -m accelerate.commands.launch --config_file "$configs/accelerate/gpu-8.yaml" \
    --num_processes "$gpus" -m sft_dist train "$@"
