"""This rank's shards of the tensors of a checkpoint: weights and optimizer state.

Every tensor in a checkpoint has the name and the shape that it has over all ranks. A rank describes
its shard of a tensor as boxes (an offset and a size per axis), so a checkpoint of any layout can be
read by any other: tensor, expert and data parallelism, and a distributed optimizer. The ranks of a
distributed optimizer have a range of each flattened parameter, which is a few boxes.
"""

import math
from collections.abc import Container, Iterable, Iterator, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.mcore.optimizer_state import OptimizerShard
from megatron_twotower.model.parameter_map import Entry, canonical_tensors, name_on_rank

# For each axis: the index of the first element, and the number of elements.
Box = tuple[tuple[int, int], ...]
# The prefix of the optimizer's tensors in a checkpoint.
OPTIMIZER_PREFIX = "optimizer."
# The prefix of the fp32 main weights of parameters that are not fp32.
MAIN_PREFIX = f"{OPTIMIZER_PREFIX}main."


def boxes(shape: Sequence[int], first: int, last: int) -> list[Box]:
    """Divide a range of a flattened tensor into boxes, in the order of its elements.

    Args:
        shape: The shape of the tensor, with n axes.
        first: The index of the first element of the range.
        last: The index after its last element.

    Returns:
        At most 2 n - 1 boxes.
    """
    if first >= last:
        return []
    if len(shape) == 1:
        return [((first, last - first),)]
    inner = math.prod(shape[1:])
    (top, start), (bottom, end) = divmod(first, inner), divmod(last, inner)
    if top == bottom:
        return [((top, 1), *rest) for rest in boxes(shape[1:], start, end)]
    found: list[Box] = []
    if start:
        found += [((top, 1), *rest) for rest in boxes(shape[1:], start, inner)]
        top += 1
    if bottom > top:
        found.append(((top, bottom - top), *((0, size) for size in shape[1:])))
    return found + [((bottom, 1), *rest) for rest in boxes(shape[1:], 0, end)]


def sharded_tensors(
    key: str,
    data: Tensor,
    entry: Entry,
    groups: ProcessGroupCollection,
    *,
    shape: Sequence[int],
    first: int = 0,
    replicated: bool = True,
) -> Iterator[ShardedTensor]:
    """Describe this rank's shard of one tensor as views of `data`, read and written in place.

    Each section of a fused parameter is stored as its own tensor, so that any other number of ranks
    can split it.

    Args:
        key: The name of the tensor in the checkpoint.
        data: The elements of this rank's part of the tensor from the index `first` on, flat.
        entry: The parameter that the tensor belongs to.
        groups: The process groups of this rank.
        shape: The shape of this rank's part of the tensor.
        first: The index in the flattened part of the first element of `data`.
        replicated: Whether all data-parallel ranks have the same elements.
    """
    expert = entry.expert is not None
    group, copies = (groups.expt_tp, groups.expt_dp) if expert else (groups.tp, groups.dp_cp)
    axis, split = entry.split_dim or 0, entry.split_dim is not None
    rank, ranks = (group.rank(), group.size()) if split else (0, 1)
    replica = (0, 0 if split else group.rank(), copies.rank() if replicated else 0)
    section_sizes = [size // ranks for size in entry.section_sizes] or [shape[axis]]
    flat, position = data.detach().view(-1), 0
    for box in boxes(shape, first, first + flat.numel()):
        count = math.prod(size for _, size in box)
        view = flat[position : position + count].view([size for _, size in box])
        position += count
        box_start, box_end = box[axis][0], sum(box[axis])
        section_start = 0
        for number, size in enumerate(section_sizes):
            low, high = max(box_start, section_start), min(box_end, section_start + size)
            if low < high:
                part = view.narrow(axis, low - box_start, high - low)
                offset = [begin for begin, _ in box]
                offset[axis] = rank * size + low - section_start
                global_shape = list(shape)
                global_shape[axis] = size * ranks
                name = f"{key}.part{number}" if entry.section_sizes else key
                yield ShardedTensor(
                    name, part, part.dtype, tuple(part.shape), tuple(global_shape), tuple(offset), None, replica
                )
            section_start += size


def local_tensors(
    module: nn.Module, entries: Sequence[Entry], model: ModelConfig, groups: ProcessGroupCollection
) -> Iterator[tuple[Entry, Tensor]]:
    """The parameters and router biases of this rank, each with its entry."""
    tensors = canonical_tensors(module)
    for entry in entries:
        name = name_on_rank(entry, experts=model.n_routed_experts, rank=groups.ep.rank(), ranks=groups.ep.size())
        if name is not None:
            yield entry, tensors[name]


def sharded_weights(
    module: nn.Module, entries: Sequence[Entry], model: ModelConfig, groups: ProcessGroupCollection
) -> Iterator[ShardedTensor]:
    """This rank's shards of the trained weights, under names that do not depend on the layout."""
    for entry, tensor in local_tensors(module, entries, model, groups):
        yield from sharded_tensors(entry.megatron_name, tensor, entry, groups, shape=tensor.shape)


def sharded_optimizer(
    module: nn.Module,
    entries: Sequence[Entry],
    model: ModelConfig,
    groups: ProcessGroupCollection,
    optimizer_shards: dict[Tensor, OptimizerShard],
) -> Iterator[ShardedTensor]:
    """This rank's shards of the optimizer state. They are named and split like the parameters.

    Args:
        module: A model chunk.
        entries: The entries of the chunk.
        model: The architecture.
        groups: The process groups of this rank.
        optimizer_shards: What `mcore.optimizer_state.optimizer_shards` returns.
    """
    for entry, tensor in local_tensors(module, entries, model, groups):
        if tensor not in optimizer_shards:
            continue  # a router bias, or a parameter whose optimizer state is on other ranks
        state = optimizer_shards[tensor]
        for name, data in state.tensors.items():
            yield from sharded_tensors(
                f"{OPTIMIZER_PREFIX}{name}.{entry.megatron_name}",
                data,
                entry,
                groups,
                shape=tensor.shape,
                first=state.first,
                replicated=not state.distributed,
            )


def read_as_fp32(
    shards: Iterable[ShardedTensor | ShardedObject], stored: Container[str]
) -> tuple[list[ShardedTensor | ShardedObject], list[ShardedTensor | ShardedObject]]:
    """Name shards as a checkpoint of another precision stores the same fp32 weights.

    A checkpoint of a bf16 run has main weights, which a run in fp32 has as its weights. One of an
    fp32 run has only weights, which a run in bf16 has as main weights and, rounded, as weights.

    Args:
        shards: The shards of this rank.
        stored: The names of the tensors in the checkpoint.

    Returns:
        The shards to read; and main weights to read after that, under names that the first ones
        have too.
    """
    first, main = [], []
    for shard in shards:
        if shard.key.startswith(MAIN_PREFIX) and shard.key not in stored:
            shard.key = shard.key.removeprefix(MAIN_PREFIX)
            main.append(shard)
            continue
        if isinstance(shard, ShardedTensor) and shard.dtype == torch.float32 and MAIN_PREFIX + shard.key in stored:
            shard.key = MAIN_PREFIX + shard.key
        first.append(shard)
    return first, main
