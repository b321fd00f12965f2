# What the batch scripts have in common: settings, the command, how the nodes are set to work. Sourced by them.
# shellcheck shell=bash

: "${here:?the directory of these scripts}" "${step:?what the script that reads this does}"

say() { echo "$step: $*"; }
fail() {
    say "$*" >&2
    exit 2
}

# Leading words such as SFT_DIST_PROCESSES=2 are settings, stronger than the site's. As words they survive a queue that
# does not hand the environment on (--export=NONE).
given=()
while [[ ${1-} == SFT_DIST_*=* ]]; do
    given+=("$1")
    shift
done
(($#)) || fail "name a recipe: sbatch slurm/$step.sbatch RECIPE [key=value...]"
((${#given[@]})) && export "${given[@]}"
site=${SFT_DIST_SITE:-$SLURM_SUBMIT_DIR/slurm/site.sh}
[[ -r $site || -n ${SFT_DIST_SITE-} ]] || site=$here/site.sh
# shellcheck source=slurm/site.sh
source "$site" || fail "$site: the settings of the site cannot be read"
((${#given[@]})) && export "${given[@]}"

# What was meant for this job is no setting of jobs that it may submit.
unset "${!SBATCH_@}"

# Modules and conda use variables that are not set.
set +u
eval "${SFT_DIST_SETUP-}" || fail "SFT_DIST_SETUP failed: $SFT_DIST_SETUP"
set -u

container=() # options of srun
python=${SFT_DIST_PYTHON:-python}
if [[ -z ${SFT_DIST_PYTHON-}${SFT_DIST_SETUP-} && ${SFT_DIST_CONTAINER:-none} == none ]]; then
    if [[ -x $SLURM_SUBMIT_DIR/.venv/bin/python ]]; then python=$SLURM_SUBMIT_DIR/.venv/bin/python; fi
fi
sft_dist=("$python" -m sft_dist)
read -ra options <<<"${SFT_DIST_CONTAINER_OPTIONS-}"
mounts=$PWD:$PWD,$here:$here${SFT_DIST_BINDS:+,$SFT_DIST_BINDS}
case ${SFT_DIST_CONTAINER:-none} in
none) ;;
apptainer)
    sft_dist=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "${options[@]}" "${SFT_DIST_IMAGE:?}" "${sft_dist[@]}")
    ;;
pyxis)
    container=("--container-image=${SFT_DIST_IMAGE:?}" "--container-mounts=$mounts" "--container-workdir=$PWD" "${options[@]}")
    ;;
*) fail "SFT_DIST_CONTAINER=$SFT_DIST_CONTAINER: expected none, apptainer or pyxis" ;;
esac

if [[ -n ${SFT_DIST_INTERFACE-} ]]; then
    export GLOO_SOCKET_IFNAME=$SFT_DIST_INTERFACE NCCL_SOCKET_IFNAME=$SFT_DIST_INTERFACE
fi

# Runs a command once on each node. Node index: the word %n.
# --cpus-per-task: srun does not take it over from sbatch, and would leave one core to all ranks of a node.
# --export: under sbatch --export=NONE, srun hands nothing on either. --mpi: ranks find each other by themselves.
on_nodes() {
    exec srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --export=ALL --mpi=none \
        --kill-on-bad-exit=1 --wait=300 "${container[@]}" bash "$here/node.sh" "$@" </dev/null
}
