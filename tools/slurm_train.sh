#!/usr/bin/env bash
# A slurm cluster:
#   GPUS=8 bash tools/slurm_train.sh PARTITION JOB CONFIG [args of tools/train_incremental.py]
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS as in mmseg.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash tools/slurm_train.sh PARTITION JOB CONFIG [args]" >&2
    exit 2
fi
PARTITION=$1
JOB=$2
CONFIG=$3
shift 3
GPUS=${GPUS:-4}
GPUS_PER_NODE=${GPUS_PER_NODE:-$GPUS}
# SRUN_ARGS may hold several words.
# shellcheck disable=SC2086
srun -p "$PARTITION" --job-name="$JOB" --gres="gpu:$GPUS_PER_NODE" \
    --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train_incremental.py" "$CONFIG" --launcher slurm "$@"
