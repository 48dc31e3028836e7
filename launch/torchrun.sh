#!/usr/bin/env bash
# Train with one process per GPU, or per CPU rank, on one node or several:
#
#   launch/torchrun.sh recipe=quickstart_ar data.folder=runs/quickstart/data output=runs/ar
#   RANKS_PER_NODE=2 launch/torchrun.sh recipe=...                    # two ranks, here
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh ...      # the same on each of four nodes, NODE_RANK 0 to 3
#
# RANKS_PER_NODE   the GPUs of this node, or 1 without any
# NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   1, 0, localhost, 29500
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

exec torchrun \
  --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" \
  --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
  -m megatron_twotower train "$@"
