# Settings of your site, read by `sft-dist submit` and by each job. All of it is optional: take the # away in front of what
# you need. What stands here is stronger than the environment and than #SBATCH lines; what stands on the command line of
# sbatch or submit is stronger than this. Before a plain `sbatch slurm/train.sbatch ...`: source slurm/site.sh
# shellcheck shell=bash

# Who pays and where it runs; sbatch itself reads these, and any other SBATCH_... of its manual.
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100
# export SBATCH_RESERVATION=course

# More options of sbatch for one of the three jobs of `sft-dist submit`.
# export SFT_DIST_PREPARE_OPTIONS="--partition=cpu --time=02:00:00"
# export SFT_DIST_TRAIN_OPTIONS="--exclusive --mem=0"
# export SFT_DIST_EVALUATE_OPTIONS="--time=00:30:00"

# Where sft_dist is: a command that each job runs first, after which `python` has it. Without any of these three, it is the
# Python that ran `sft-dist submit`, or .venv/bin/python of the directory from which sbatch was called.
# export SFT_DIST_SETUP="module load cuda/12.8 && source $HOME/sft/.venv/bin/activate"
# export SFT_DIST_SETUP="source $HOME/miniforge3/bin/activate sft"
# export SFT_DIST_PYTHON=$HOME/sft/.venv/bin/python

# Or in a container. The directory from which sbatch was called is mounted; name others, as source:target,...
# export SFT_DIST_CONTAINER=apptainer SFT_DIST_IMAGE=$HOME/sft.sif
# export SFT_DIST_CONTAINER=pyxis SFT_DIST_IMAGE=$HOME/sft.sqsh
# export SFT_DIST_BINDS=/scratch:/scratch
# export SFT_DIST_CONTAINER_OPTIONS="--writable-tmpfs"

# Models and data of the hub, on a disk that all nodes see. Jobs but prepare stay offline; HF_HUB_OFFLINE=0 lets them out.
# export HF_HOME=/scratch/$USER/huggingface
# export HF_HUB_OFFLINE=0

# Compiled kernels, on each node's own disk and gone with the job. Default: $SLURM_TMPDIR, $TMPDIR or /tmp.
# export SFT_DIST_LOCAL_DIR=/local/scratch

# How often a job that was stopped by its time limit or for another job is queued again (20).
# export SFT_DIST_MAX_REQUEUES=50

# Processes on each node; default: one per GPU that SLURM gave, or one. Needed where there are no GPUs.
# export SFT_DIST_PROCESSES=2

# The network between nodes, where the default of `sft-dist launch` is not the fast one.
# export SFT_DIST_INTERFACE=ib0
