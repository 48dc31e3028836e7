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
#   MASTER_PORT      the port where they meet: a free one, or on several nodes one that is computed
#                    from the arguments, which are the same on each
#   JOB_ID           a name computed from the arguments: only nodes with the same name meet
#   RESTARTS         0: how often all ranks start again when one fails, or a node joins or leaves
#   GRACE_SECONDS    600: see env.sh
#   LOGS             folder for the output of each rank, in a folder that begins with JOB_ID; rank 0
#                    of a node is printed too
#
# Environment for NCCL and W&B: env.sh. SIGTERM and SIGUSR1 reach every rank, which saves and ends.
# The same command then resumes.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}

nodes=${NODES:-1} host=${MASTER_ADDR:-localhost}
sum=$(cksum <<< "$*")
job=${JOB_ID:-twotower-${sum%% *}}
if [[ $nodes == 1 ]]; then
  port=${MASTER_PORT:-0} # 0: torchrun finds a free one
  # torchrun would join the job that listens there, and wait for it in silence.
  if [[ $port != 0 ]] && (exec 3<> "/dev/tcp/$host/$port") 2>/dev/null; then
    echo "torchrun.sh: MASTER_PORT: found $port in use on $host, expected a free port, or none" >&2
    exit 2
  fi
else
  port=${MASTER_PORT:-$((20000 + ${sum%% *} % 10000))}
fi

logs=()
if [[ -n ${LOGS:-} ]]; then
  mkdir -p "$LOGS"
  logs=(--log-dir "$LOGS" --redirects 3 --tee 0:3)
fi

# Ranks that start again must meet on a store of their own: torchrun's store, which they would share,
# still has the addresses of the ranks that ended.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec python -m megatron_twotower.common.torchrun \
  --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-0}" \
  --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$job" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  "${logs[@]}" -m megatron_twotower train "$@"
