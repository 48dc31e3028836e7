"""Process groups, Megatron's DDP and its forward-backward schedules: how ranks share the work."""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

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
from megatron_twotower.common.errors import UserError, require
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.mcore import meeting
from megatron_twotower.mcore.router import Router

T = TypeVar("T")

# The wrapped models of the current process groups, which `shutdown` frees.
_wrapped: "weakref.WeakSet[ModelChunks]" = weakref.WeakSet()


def world_size() -> int:
    """The number of ranks of this job.

    Before the process group exists it is read from WORLD_SIZE, which torchrun and srun set.

    Raises:
        UserError: The variables of a launcher are not complete, or are no numbers.
    """
    return dist.get_world_size() if dist.is_initialized() else _launched_ranks(os.environ)


def _launched_ranks(environment: Mapping[str, str]) -> int:
    """The number of ranks that a launcher has set; 1 without a launcher.

    A shell keeps what was exported by hand, or by a job that it was started from: ranks that do not
    exist would be waited for.
    """
    if "WORLD_SIZE" not in environment:
        return 1
    ranks = environment["WORLD_SIZE"]
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    require(
        not missing,
        f"WORLD_SIZE: found {ranks} in the environment without {', '.join(missing)}, expected all of them, as torchrun "
        "sets them, or none (unset WORLD_SIZE)",
    )
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        require(
            environment[name].isdecimal(), f"{name}: found {environment[name]!r} in the environment, expected a number"
        )
    require(
        int(environment["RANK"]) < int(ranks),
        f"RANK: found {environment['RANK']} in the environment, expected less than WORLD_SIZE {ranks}",
    )
    return int(ranks)


def rank() -> int:
    """The rank of this process among all ranks."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0, which writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def connect(config: RunConfig) -> None:
    """Start the process group of all ranks, unless it exists already."""
    threads = config.parallel.threads_per_rank
    if threads:
        torch.set_num_threads(threads)
    if not device.is_cpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        _start_process_group(config)


def initialise(config: RunConfig) -> ProcessGroupCollection:
    """Create Megatron's parallel groups, and before them the process group unless it exists.

    Raises:
        UserError: torchrun was started in a way in which ranks that start again do not meet.
    """
    connect(config)
    parallel_state.destroy_model_parallel()
    with _without_splitting():
        _create_groups(config)
    # No layer draws random numbers, but Megatron's random trackers require their states.
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def _create_groups(config: RunConfig) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        context_parallel_size=config.parallel.context,
        virtual_pipeline_model_parallel_size=_virtual_stages(config.parallel.pipeline_chunks),
        expert_model_parallel_size=config.parallel.expert,
        expert_tensor_parallel_size=config.parallel.expert_tensor_ranks,
        distributed_timeout_minutes=config.parallel.collective_timeout_minutes,
        # Megatron uses them for its own format of optimizer state only. Each is a full mesh of
        # sockets between its ranks.
        create_gloo_process_groups=False,
    )


def _start_process_group(config: RunConfig) -> None:
    """Start the process group of all ranks, or of this process alone if no launcher started it."""
    timeout = timedelta(minutes=config.parallel.collective_timeout_minutes)
    if "WORLD_SIZE" not in os.environ:
        dist.init_process_group(device.backend(), timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        return
    # With a device NCCL connects all ranks here, not in their first collective: what is wrong with
    # the network or with two ranks on one GPU shows at once, and `barrier` knows its device.
    gpu = None if device.is_cpu() else device.device()
    dist.init_process_group(device.backend(), timeout=timeout, device_id=gpu, **meeting.place())


@contextlib.contextmanager
def _without_splitting() -> Iterator[None]:
    """Let subgroups connect when they are first used, although the process group has its device.

    With a device, torch creates each subgroup by splitting the communicator of all ranks, and all
    ranks take part in each split (torch 2.13, distributed_c10d.py, `_new_process_group_helper`).
    Megatron creates thousands of groups at a thousand ranks, of which a rank uses a few.
    """
    world: Any = dist.group.WORLD
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = bound


@contextlib.contextmanager
def pretend_rank(config: RunConfig, *, ranks: int, rank: int) -> Iterator[ProcessGroupCollection]:
    """The process groups of one rank of a larger world, created in this single process.

    The groups have the sizes and ranks of that world. They do not communicate.

    Raises:
        RuntimeError: Process groups exist already.
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
    """Free the wrapped models and destroy all groups, with their threads and sockets.

    A later run in this process can create its own.
    """
    for model in list(_wrapped):
        model.release()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _virtual_stages(chunks: int) -> int | None:
    """Megatron's virtual pipeline size for the model chunks of a rank: `None` for one chunk."""
    return chunks if chunks > 1 else None


@dataclass(eq=False)
class ModelChunks:
    """The model chunks of this rank, each in its own DDP wrapper.

    A rank has more than one chunk if pipeline stages are interleaved.

    Attributes:
        chunks: The wrapped chunks, in the order of their layers.
        expert_tokens: (MoE layers of the model, experts), the number of tokens that this rank sent
            to each expert in the last step. It is zero for the layers of other stages, and `None`
            without MoE layers.
    """

    chunks: list[DistributedDataParallel]
    expert_tokens: torch.Tensor | None = None

    def routers(self) -> Iterator[tuple[int, Router]]:
        """The routers of this rank's trained layers, each with the index of its layer."""
        for chunk in self.chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, Router):
                    yield int(name.partition("layers.")[2].partition(".")[0]), module

    @property
    def only(self) -> DistributedDataParallel:
        """The chunk of a rank that has exactly one."""
        (chunk,) = self.chunks
        return chunk

    @property
    def config(self) -> TransformerConfig:
        """Megatron's configuration of the chunks."""
        return self.chunks[0].config

    def train(self) -> None:
        """Set training mode."""
        for chunk in self.chunks:
            chunk.train()

    def eval(self) -> None:
        """Set evaluation mode."""
        for chunk in self.chunks:
            chunk.eval()

    def zero_grad_buffer(self) -> None:
        """Set all gradients to zero."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def release(self) -> None:
        """Free what the wrappers refer to; they are empty afterwards.

        Without this call the memory is not freed before the process ends. Autograd nodes have hooks
        that refer to the wrapper, and the wrapper refers to these nodes, also through what token
        dispatchers keep of the graph of the last step. Python's garbage collector does not see the
        cycle (megatron-core 0.16.1, distributed_data_parallel.py, grad_accs;
        moe/token_dispatcher.py, probs).
        """
        for chunk in self.chunks:
            vars(chunk).clear()
        self.chunks = []

    def gather_parameters(self) -> None:
        """Gather the updated parameters now, instead of during the next forward pass."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()


def wrap(modules: Sequence[MegatronModule], config: RunConfig, groups: ProcessGroupCollection) -> ModelChunks:
    """Wrap the trained modules in Megatron's DDP, with fp32 gradients.

    The gradients of parameters that a step does not use are zero.
    """
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
            # As in Megatron's own training loop, only the first chunk is divided into buckets.
            DistributedDataParallel(megatron, settings, module, disable_bucketing=i > 0, pg_collection=groups)
            for i, module in enumerate(modules)
        ]
    )
    _wrapped.add(wrapped)
    moe_layers = [i for i, kind in enumerate(config.model.hybrid_override_pattern) if kind == "E"]

    def finalise(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        # Megatron resets these counts when it has updated the selection biases with them.
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


def run_forward_backward(
    forward_step: Callable[[Iterator[Any], Any], tuple[torch.Tensor, Callable[..., Any]]],
    micro_batches: Sequence[Any],
    model: ModelChunks,
    *,
    rows_between_stages: int,
    groups: ProcessGroupCollection,
    forward_only: bool,
) -> list[Any]:
    """Run Megatron's forward-backward schedule on the micro-batches of one step.

    Args:
        forward_step: Megatron's forward step function: (iterator, model chunk) -> (output, loss
            function).
        micro_batches: The micro-batches of this rank.
        model: The model chunks of this rank.
        rows_between_stages: The number of rows of the hidden size that one stage sends to the next
            for a micro-batch.
        groups: The process groups of this rank.
        forward_only: Whether to skip the backward pass.

    Returns:
        What the loss function reports, one item per micro-batch; empty on ranks without the last
        stage.
    """
    stages, config = groups.pp.size(), model.config
    schedule = get_forward_backward_func(stages, _virtual_stages(len(model.chunks)))
    return schedule(
        forward_step_func=forward_step,
        # Each chunk of an interleaved stage reads all micro-batches.
        data_iterator=[iter(micro_batches) for _ in model.chunks],
        model=model.chunks,
        num_microbatches=len(micro_batches),
        # Megatron divides this number by the context-parallel ranks, and under sequence parallelism
        # by the tensor-parallel ranks.
        seq_length=rows_between_stages * groups.cp.size() * (groups.tp.size() if config.sequence_parallel else 1),
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=groups,
        p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=config) if stages > 1 else None,
    )


def sum_over_stages(tensor: torch.Tensor, groups: ProcessGroupCollection) -> torch.Tensor:
    """The sum over data-parallel and context-parallel ranks and pipeline stages.

    Only the last stage has values to report.
    """
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
    """The sum over data-parallel ranks, of what context-parallel ranks have in common."""
    total = tensor.clone()
    dist.all_reduce(total, group=groups.dp)
    return total


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    return bool(any_rank_flag(torch.tensor(flag, device=device.device()))) if world_size() > 1 else flag


def any_rank_flag(flag: torch.Tensor) -> torch.Tensor:
    """A flag () bool, true on every rank if it is true on one.

    The host does not wait for the GPU.
    """
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
    """The value of rank 0, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_main(function: Callable[[], T]) -> T:
    """What a function returns on rank 0, on every rank. The other ranks do not call it.

    Raises:
        UserError: The function raised it on rank 0. Every rank raises it.
    """
    result, problem = _tried(function) if is_main() else (None, None)
    result, problem = broadcast_from_main((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result


def checked_by_main(function: Callable[[bool], T]) -> T:
    """`function(True)` on rank 0, which examines what it opens; `function(False)` on the others.

    Raises:
        UserError: The function raised it on rank 0. Every rank raises it, and the others do not
            call the function.
    """
    result, problem = _tried(lambda: function(True)) if is_main() else (None, None)
    if problem := broadcast_from_main(problem):
        raise UserError(problem)
    return function(False) if result is None else result


def _tried(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of a function, or the text of its `UserError`."""
    try:
        return function(), None
    except UserError as error:
        return None, str(error)
