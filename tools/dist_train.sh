#!/usr/bin/env bash
# Several GPUs (or, without any, CPU processes) on one or more machines:
#   bash tools/dist_train.sh CONFIG GPUS [args of tools/train_incremental.py]
# Over machines, set NNODES, NODE_RANK, MASTER_ADDR and PORT as in mmseg.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash tools/dist_train.sh CONFIG GPUS [args]" >&2
    exit 2
fi
CONFIG=$1
GPUS=$2
shift 2
python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$GPUS" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train_incremental.py" "$CONFIG" --launcher pytorch "$@"
