# Environment of a training process. torchrun.sh and slurm.sbatch source this file before they start
# anything. A variable that is already set keeps its value, as in `NCCL_DEBUG=INFO sbatch ...`. Put
# the values of a cluster (such as network interfaces) into a file: TWOTOWER_ENV=my/cluster.sh.

# shellcheck source=/dev/null
if [[ -n ${TWOTOWER_ENV:-} ]]; then source "$TWOTOWER_ENV"; fi

# Grace period: the seconds that a run has after a signal to finish a step and to write a checkpoint.
# slurm.sbatch sends the signal this long before the time of a job ends; torchrun.sh waits this long
# before it ends the ranks by force.
export GRACE_SECONDS=${GRACE_SECONDS:-600}

# CPU threads of a rank; with a GPU they only prepare data.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# NCCL. A rank that fails must end the others: else they wait in a collective.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# CUDA_DEVICE_MAX_CONNECTIONS is not set here: the program sets it to 1 if parallel.tensor is above 1.
# Less fragmentation by buffers of changing sizes (experts).
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Each cluster has its own interfaces: set NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and NCCL_IB_HCA in
# the file of TWOTOWER_ENV.

# W&B writes into the run folder and sends nothing, unless logging.wandb is `online`. WANDB_MODE
# (online, offline or disabled), if it is set, decides instead. Online it needs WANDB_API_KEY, here
# or in ~/.netrc. Hugging Face folders are local.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}
