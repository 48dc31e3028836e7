#!/usr/bin/env bash
# Train with one process per GPU, or per CPU rank, on one node or several:
#
#   launch/torchrun.sh recipe=quickstart_ar data.folder=runs/quickstart/data output=runs/ar
#   RANKS_PER_NODE=2 launch/torchrun.sh recipe=...                    # two ranks, here
#   NODES=4 MASTER_ADDR=node0 launch/torchrun.sh recipe=...           # the same on each of four nodes, in any order
#
# RANKS_PER_NODE               the GPUs of this node, or 1 without any
# NODES, MASTER_ADDR, MASTER_PORT, JOB_ID   1, localhost, 29500, twotower: where the nodes meet; their ranks are dealt
#                              out there. NODES=2:4 begins with two and takes in up to four (see RESTARTS)
# RESTARTS                     how often all ranks are started again when one fails, or a node comes or goes (0)
# LOGS                         folder for the output of each rank, below JOB_ID; rank 0 of a node is printed as well
# Environment for NCCL and W&B: env.sh. SIGTERM and SIGUSR1 reach every rank, which saves and ends; the same command
# goes on from there.
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
