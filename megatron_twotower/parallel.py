"""Process groups, wrapping, and Megatron's schedules: the only room that knows how ranks are laid out."""

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_twotower import host
from megatron_twotower.config import RunConfig


def world_size() -> int:
    """Ranks of this job, before or after the process group exists (torchrun and srun set WORLD_SIZE)."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one rank that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def initialise(config: RunConfig) -> ProcessGroupCollection:
    """Start the process group, if it is not there yet, and lay Megatron's groups over it."""
    threads = config.parallel.threads_per_rank
    if threads:
        torch.set_num_threads(threads)
    if not host.is_host():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(host.backend(), timeout=timedelta(minutes=30))
        else:
            dist.init_process_group(host.backend(), store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        expert_model_parallel_size=config.parallel.expert,
        expert_tensor_parallel_size=config.parallel.expert_tensor_ranks,
    )
    # No layer draws random numbers; Megatron's trackers still want their states to exist.
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def shutdown() -> None:
    """Take the groups down again, so that a later run in this process can lay out its own."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: MegatronModule, config: RunConfig, groups: ProcessGroupCollection) -> DistributedDataParallel:
    """Megatron's DDP around the trained modules, gradients in fp32. Unused gradients stay zero."""
    megatron = model.config
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        use_distributed_optimizer=config.optimizer.distributed,
    )
    wrapped = DistributedDataParallel(megatron, settings, model, pg_collection=groups)

    def finalise(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        # Megatron forgets these counts once it has updated the selection biases with them.
        wrapped.expert_tokens = _expert_tokens(model)
        finalize_model_grads(chunks, *args, **kwargs)

    wrapped.expert_tokens = None
    megatron.finalize_model_grads_func = finalise
    megatron.no_sync_func = wrapped.no_sync if config.parallel.overlap_grad_reduce else None
    return wrapped


def _expert_tokens(model: MegatronModule) -> torch.Tensor | None:
    """Tokens that this rank sent to each expert in this step: (MoE layers, experts)."""
    counts = [buffer for name, buffer in model.named_buffers() if name.endswith("local_tokens_per_expert")]
    return torch.stack(counts) if counts else None


def run_schedule(
    step: Callable[[Iterator[Any], Any], tuple[torch.Tensor, Callable[..., Any]]],
    micro_batches: Sequence[Any],
    model: torch.nn.Module,
    *,
    groups: ProcessGroupCollection,
    forward_only: bool,
) -> list[Any]:
    """Run Megatron's forward-backward schedule over the micro-batches of one step.

    Args:
        step: Megatron's forward step function: (iterator, model) -> (output, loss function).

    Returns:
        what the loss function reports, one item per micro-batch.
    """
    schedule = get_forward_backward_func()
    return schedule(
        forward_step_func=step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=0,
        micro_batch_size=0,
        forward_only=forward_only,
        pg_collection=groups,
    )


def sum_over_data(tensor: torch.Tensor, groups: ProcessGroupCollection) -> torch.Tensor:
    """The sum over data-parallel ranks."""
    total = tensor.clone()
    dist.all_reduce(total, group=groups.dp_cp)
    return total


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    if world_size() == 1:
        return flag
    raised = torch.tensor([int(flag)], device=host.device())
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())
