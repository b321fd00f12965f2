#!/usr/bin/env bash
# prepare -> train -> evaluate as three jobs, each after the one before: slurm/submit.sh RECIPE [key=value...] [flags]
# --dry-run prints the commands; --help lists the flags.
set -euo pipefail
python=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
[[ -x $python ]] || python=python
exec "${SFT_DIST_PYTHON:-$python}" -m sft_dist submit "$@"
