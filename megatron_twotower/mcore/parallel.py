"""Process groups, wrapping, and Megatron's schedules: the only room that knows how ranks are laid out."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_twotower.common import device
from megatron_twotower.config.schema import RunConfig


def world_size() -> int:
    """Ranks of this job, before or after the process group exists (torchrun and srun set WORLD_SIZE)."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among all ranks."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """True on the one rank that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def initialise(config: RunConfig) -> ProcessGroupCollection:
    """Start the process group, if it is not there yet, and lay Megatron's groups over it."""
    threads = config.parallel.threads_per_rank
    if threads:
        torch.set_num_threads(threads)
    if not device.is_cpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(device.backend(), timeout=timedelta(minutes=30))
        else:
            dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=_interleaved(config.parallel.pipeline_chunks),
        expert_model_parallel_size=config.parallel.expert,
        expert_tensor_parallel_size=config.parallel.expert_tensor_ranks,
        # What stands in for a world of ranks (`pretend`) has no Gloo groups beside it.
        create_gloo_process_groups=dist.get_backend() != "fake",
    )
    # No layer draws random numbers; Megatron's trackers still want their states to exist.
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


@contextlib.contextmanager
def pretend_rank(config: RunConfig, *, ranks: int, rank: int) -> Iterator[ProcessGroupCollection]:
    """Groups as one rank of a larger world sees them, in this one process: sizes and places, no communication.

    Raises:
        RuntimeError: this process is one of a real world.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise RuntimeError("process groups exist already, expected none")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield initialise(config)
    finally:
        shutdown()


def shutdown() -> None:
    """Take the groups down again, so that a later run in this process can lay out its own."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _interleaved(chunks: int) -> int | None:
    """Megatron's word for the chunks of a stage: None for one."""
    return chunks if chunks > 1 else None


@dataclass
class ModelChunks:
    """The model chunks of this rank, each wrapped by itself; more than one where stages are interleaved.

    expert_tokens: (MoE layers of the whole model, experts), what this rank sent to each expert in
    the last step; zero for the layers of other stages, None without MoE layers.
    """

    chunks: list[DistributedDataParallel]
    expert_tokens: torch.Tensor | None = None

    @property
    def only(self) -> DistributedDataParallel:
        """The chunk of a rank that has one."""
        (chunk,) = self.chunks
        return chunk

    @property
    def config(self) -> TransformerConfig:
        return self.chunks[0].config

    def train(self) -> None:
        for chunk in self.chunks:
            chunk.train()

    def eval(self) -> None:
        for chunk in self.chunks:
            chunk.eval()

    def zero_grad_buffer(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def release(self) -> None:
        """Let go of all that the wrappers hold, which else stays for the life of the process: they are empty then.

        Nodes of autograd have hooks that hold the wrapper, and Python's collector does not see it:
        the nodes are held by the wrapper itself, and by what token dispatchers keep of the last
        step's graph (megatron-core 0.16.1, distributed_data_parallel.py, grad_accs;
        moe/token_dispatcher.py, probs).
        """
        for chunk in self.chunks:
            vars(chunk).clear()
        self.chunks = []

    def gather_parameters(self) -> None:
        """Wait for, or make, the gathering of updated parameters that would else run beside the next forward pass."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()


def wrap(modules: Sequence[MegatronModule], config: RunConfig, groups: ProcessGroupCollection) -> ModelChunks:
    """Megatron's DDP around the trained modules, gradients in fp32. Unused gradients stay zero."""
    parallel, megatron = config.parallel, modules[0].config
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=config.optimizer.distributed,
        bucket_size=parallel.bucket_parameters or None,
    )
    wrapped = ModelChunks(
        [
            # Megatron's own training loop cuts only the first chunk into buckets.
            DistributedDataParallel(megatron, settings, module, disable_bucketing=i > 0, pg_collection=groups)
            for i, module in enumerate(modules)
        ]
    )
    moe_layers = [i for i, kind in enumerate(config.model.hybrid_override_pattern) if kind == "E"]

    def finalise(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        # Megatron forgets these counts once it has updated the selection biases with them.
        wrapped.expert_tokens = _expert_tokens(modules, moe_layers, config.model.n_routed_experts)
        finalize_model_grads(chunks, *args, **kwargs)

    megatron.finalize_model_grads_func = finalise
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped.chunks]
        megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def _expert_tokens(modules: Sequence[MegatronModule], moe_layers: list[int], experts: int) -> torch.Tensor | None:
    if not moe_layers:
        return None
    counts = torch.zeros(len(moe_layers), experts, device=device.device())
    for module in modules:
        for name, buffer in module.named_buffers():
            if name.endswith("local_tokens_per_expert"):
                layer = int(name.partition("layers.")[2].partition(".")[0])
                counts[moe_layers.index(layer)] = buffer
    return counts


def run_schedule(
    step: Callable[[Iterator[Any], Any], tuple[torch.Tensor, Callable[..., Any]]],
    micro_batches: Sequence[Any],
    model: ModelChunks,
    *,
    rows: int,
    groups: ProcessGroupCollection,
    forward_only: bool,
) -> list[Any]:
    """Run Megatron's forward-backward schedule over the micro-batches of one step.

    Args:
        step: Megatron's forward step function: (iterator, model chunk) -> (output, loss function).
        rows: of hidden size that travel from stage to stage for one micro-batch.

    Returns: what the loss function reports, one item per micro-batch; nothing on ranks that do not
        hold the last stage.
    """
    stages, config = groups.pp.size(), model.config
    schedule = get_forward_backward_func(stages, _interleaved(len(model.chunks)))
    return schedule(
        forward_step_func=step,
        # Each chunk of an interleaved stage reads all micro-batches.
        data_iterator=[iter(micro_batches) for _ in model.chunks],
        model=model.chunks,
        num_microbatches=len(micro_batches),
        # Megatron divides what it takes for a sequence by the ranks that split it.
        seq_length=rows * (groups.tp.size() if config.sequence_parallel else 1),
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=groups,
        p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=config) if stages > 1 else None,
    )


def sum_over_stages(tensor: torch.Tensor, groups: ProcessGroupCollection) -> torch.Tensor:
    """The sum over data-parallel ranks and pipeline stages, of which only the last has anything to report."""
    total = tensor.clone()
    dist.all_reduce(total, group=groups.dp_cp)
    dist.all_reduce(total, group=groups.pp)
    return total


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def sum_over_data_parallel(tensor: torch.Tensor, groups: ProcessGroupCollection) -> torch.Tensor:
    """The sum over data-parallel ranks."""
    total = tensor.clone()
    dist.all_reduce(total, group=groups.dp_cp)
    return total


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    return bool(any_rank_flag(torch.tensor(flag, device=device.device()))) if world_size() > 1 else flag


def any_rank_flag(flag: torch.Tensor) -> torch.Tensor:
    """A flag () bool, up on every rank if it is up on one; the host waits for nothing."""
    if world_size() == 1:
        return flag
    total = flag.int()
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return total.bool()


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_main(value: Any) -> Any:
    """The first rank's value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
