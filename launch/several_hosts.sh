#!/usr/bin/env bash
# Train on several hosts without a scheduler. Run it on each of them, with a HOST_INDEX of its own:
#     HOSTS=2 HOST_INDEX=0 MAIN_HOST=10.0.0.1 PORT=29500 launch/several_hosts.sh RECIPE [key=value ...] [flags]
# MAIN_HOST: the address of the host with HOST_INDEX=0, as all others reach it. PORT: free there.
# PROCESSES: on each host (default: one per visible GPU, or one). PYTHON: the interpreter (default: python).
# GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: the interface that reaches MAIN_HOST. Set them where a host's own name does
# not resolve to an address that the others reach; `sft-dist launch` finds them by itself.
# run.dir, data and code have to be the same on all hosts: a shared file system.
set -euo pipefail
if [[ $# -eq 0 || -z ${HOSTS:-} || -z ${HOST_INDEX:-} || -z ${MAIN_HOST:-} || -z ${PORT:-} ]]; then
    sed -n '2,8s/^# //p' "$0" >&2
    exit 2
fi

configs=$(cd "$(dirname "${BASH_SOURCE[0]}")/../configs" && pwd)
processes=${PROCESSES:-$("${PYTHON:-python}" -c 'import torch; print(torch.cuda.device_count() or 1)')}
cores=$(nproc)
# accelerate says 1 thread where nothing is set.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
# After a signal ranks may take longer than torchrun's 30 s to save.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-3600}

exec "${PYTHON:-python}" -m accelerate.commands.launch --config_file "$configs/accelerate/hosts.yaml" \
    --num_machines "$HOSTS" --machine_rank "$HOST_INDEX" --num_processes "$((HOSTS * processes))" \
    --main_process_ip "$MAIN_HOST" --main_process_port "$PORT" -m sft_dist train "$@"
