# Environment of a training process, in one place: sourced by torchrun.sh and slurm.sbatch before anything starts.
# What is set already is left as it is, so `NCCL_DEBUG=INFO sbatch ...` has its way. To give a cluster its own values
# (network interfaces above all), put them in a file and name it: TWOTOWER_ENV=my/cluster.sh.

# shellcheck source=/dev/null
if [[ -n ${TWOTOWER_ENV:-} ]]; then source "$TWOTOWER_ENV"; fi

# Threads of a CPU rank; with a GPU they only prepare data.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# NCCL. One rank that fails must end the others, rather than leave them waiting in a collective.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Megatron's overlap of tensor-parallel collectives with products needs one queue to the GPU (not on Blackwell).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Buffers of changing sizes (experts) fragment less.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# The interfaces are the cluster's own: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_HCA belong into TWOTOWER_ENV.

# W&B writes into the run folder and sends nothing, unless this or logging.wandb=online says so; then WANDB_API_KEY is
# needed, here or in ~/.netrc. Hugging Face folders are local.
export WANDB_MODE=${WANDB_MODE:-offline}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}
