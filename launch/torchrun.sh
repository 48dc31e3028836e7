#!/usr/bin/env bash
# Train with one process per GPU, or per CPU rank, on one node or several:
#
#   launch/torchrun.sh recipe=quickstart_ar data.folder=runs/quickstart/data output=runs/ar
#   RANKS_PER_NODE=2 launch/torchrun.sh recipe=...                    # two ranks, here
#   NODES=4 MASTER_ADDR=node0 launch/torchrun.sh recipe=...           # the same on each of four nodes, in any order
#
# Variables, and their defaults:
#
#   RANKS_PER_NODE   processes on this node: its GPUs, or 1 without a GPU
#   NODES            1. NODES=2:4 starts with two nodes and accepts up to four (see RESTARTS)
#   MASTER_ADDR      localhost: the node where all nodes meet, and which assigns the ranks
#   MASTER_PORT      29500
#   JOB_ID           twotower
#   RESTARTS         0: how often all ranks start again when one fails, or a node joins or leaves
#   LOGS             folder for the output of each rank, in a folder JOB_ID; rank 0 of a node is
#                    printed too
#
# Environment for NCCL and W&B: env.sh. SIGTERM and SIGUSR1 reach every rank, which saves and ends.
# The same command then resumes.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}

logs=()
if [[ -n ${LOGS:-} ]]; then
  mkdir -p "$LOGS"
  logs=(--log-dir "$LOGS" --redirects 3 --tee 0:3)
fi

exec torchrun \
  --nnodes "${NODES:-1}" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-0}" \
  --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}" --rdzv-id "${JOB_ID:-twotower}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  "${logs[@]}" -m megatron_twotower train "$@"
