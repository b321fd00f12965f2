#!/usr/bin/env bash
# The part of one node, started by srun: node.sh JOB_DIR COMMAND...
# Caches go to the node's own disk, and away at the end. JOB_DIR, on a disk that all nodes share, gets `asked` when SLURM
# asks this node to stop, and the command's exit code: of several, srun returns the highest, not the first. None: `-`.
set -euo pipefail

job_dir=$1
shift
command=()
for word in "$@"; do
    [[ $word != %n ]] || word=$SLURM_NODEID # only here does it say which node this is
    command+=("$word")
done

base=${SFT_DIST_LOCAL_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}
local_dir=$(mktemp -d "$base/sft-dist-$SLURM_JOB_ID-XXXXXX")
trap 'rm -rf "$local_dir"' EXIT
export TRITON_CACHE_DIR=$local_dir/triton TORCHINDUCTOR_CACHE_DIR=$local_dir/inductor
export TORCH_EXTENSIONS_DIR=$local_dir/extensions CUDA_CACHE_PATH=$local_dir/cuda

# A preempted job's steps get this, and its batch script nothing.
trap 'note asked yes' TERM USR1 INT
note() { [[ $job_dir == - ]] || echo "$2" >"$job_dir/$1"; }

"${command[@]}" &
# Not `wait`: it returns at a signal, before the command has ended.
while [[ -n $(jobs -pr) ]]; do sleep 0.5; done
code=0
wait $! || code=$?
note "code-$SLURM_NODEID" "$code"
exit "$code"
