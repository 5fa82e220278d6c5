#!/usr/bin/env bash
# A slurm cluster, by a batch job that goes on where it was stopped (docs/distributed.md):
#   GPUS=8 bash tools/slurm_train.sh PARTITION JOB CONFIG [args of tools/train_incremental.py]
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS as in mmseg; SBATCH_ARGS are more words for sbatch.
# SECONDS_TO_STOP (default 180): how long before the time limit the run is told to write and stop.
set -euo pipefail

submit() {
    if [ $# -lt 3 ]; then
        echo "usage: bash tools/slurm_train.sh PARTITION JOB CONFIG [args]" >&2
        exit 2
    fi
    if ! command -v sbatch > /dev/null; then
        echo "slurm_train.sh: there is no sbatch here: give the command on a slurm cluster's login node" >&2
        exit 2
    fi
    local partition=$1 job=$2 gpus=${GPUS:-4}
    shift 2
    local per_node=${GPUS_PER_NODE:-$gpus}
    # --signal without B: goes to the steps of the job, not to this script, of which sbatch runs a copy.
    # SBATCH_ARGS may hold several words.
    # shellcheck disable=SC2086
    sbatch --partition="$partition" --job-name="$job" --gres="gpu:$per_node" \
        --ntasks="$gpus" --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --requeue --open-mode=append --signal="TERM@${SECONDS_TO_STOP:-180}" \
        --export="ALL,MMSEG_SATS_TOOLS=$(cd "$(dirname "$0")" && pwd)" ${SBATCH_ARGS:-} "$0" "$@"
}

# In the job: CONFIG [args].
work() {
    local resume=() ended=0 code=0
    # Started again by the cluster, or by ourselves below.
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        resume=(--resume)
    fi
    # The whole job is ended (scancel, preemption): what becomes of it is slurm's affair.
    trap 'ended=1' TERM
    # Two jobs on a machine need two ports.
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    # SRUN_ARGS may hold several words.
    # shellcheck disable=SC2086
    srun --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        python -u "$MMSEG_SATS_TOOLS/train_incremental.py" "$@" --launcher slurm \
        ${resume[@]+"${resume[@]}"} || code=$?
    # 143: stopped by SIGTERM, its checkpoint written.
    if [ "$code" -eq 143 ] && [ "$ended" -eq 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}

if [ -n "${MMSEG_SATS_TOOLS:-}" ]; then
    work "$@"
else
    submit "$@"
fi
