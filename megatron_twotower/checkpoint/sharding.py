"""This rank's shards of the tensors of a checkpoint: weights and optimizer state.

Every tensor in a checkpoint has the name and the shape that it has over all ranks. A rank describes
its shard of a tensor as boxes (an offset and a size per axis), so a checkpoint of any layout can be
read by any other: tensor, expert and data parallelism, and a distributed optimizer. The ranks of a
distributed optimizer have a range of each flattened parameter, which is a few boxes. Of what all
data-parallel ranks have, each stores an equal part (`pieces`), in the same form.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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


@dataclass(frozen=True)
class Piece:
    """A part of one of several flat tensors, which one rank stores.

    Attributes:
        rank: The rank.
        tensor: The index of the tensor.
        first: The index of the first element.
        last: The index after the last element.
    """

    rank: int
    tensor: int
    first: int
    last: int


def pieces(sizes: Sequence[int], *, ranks: int) -> Iterator[Piece]:
    """Divide tensors that several ranks have, so that each rank stores an equal part of them.

    The tensors are laid end to end and cut into equal parts. So there are fewer pieces than tensors
    and ranks together.

    Args:
        sizes: The number of elements of each tensor.
        ranks: The number of ranks.
    """
    total, start, rank = sum(sizes), 0, 0
    for tensor, size in enumerate(sizes):
        first = 0
        while first < size:
            while (end := total * (rank + 1) // ranks) <= start + first:
                rank += 1
            last = min(size, end - start)
            yield Piece(rank, tensor, first, last)
            first = last
        start += size


def sharded_tensors(
    key: str, data: Tensor, entry: Entry, groups: ProcessGroupCollection, *, shape: Sequence[int], first: int = 0
) -> Iterator[ShardedTensor]:
    """Describe this rank's shard of one tensor as views of `data`, read and written in place.

    Each section of a fused parameter is stored as its own tensor, so that any other number of ranks
    can split it.

    Args:
        key: The name of the tensor in the checkpoint.
        data: The elements of this rank's part of the tensor from the index `first` on, flat. Only
            this data-parallel rank stores them.
        entry: The parameter that the tensor belongs to.
        groups: The process groups of this rank.
        shape: The shape of this rank's part of the tensor.
        first: The index in the flattened part of the first element of `data`.
    """
    expert = entry.expert is not None
    group = groups.expt_tp if expert else groups.tp
    axis, split = entry.split_dim or 0, entry.split_dim is not None
    rank, ranks = (group.rank(), group.size()) if split else (0, 1)
    replica = (0, 0 if split else group.rank(), 0)
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


def _replicated(
    module: nn.Module, entries: Sequence[Entry], model: ModelConfig, groups: ProcessGroupCollection
) -> Iterator[tuple[Any, list[tuple[Entry, Tensor]]]]:
    """The tensors of this rank, and the group of the data-parallel ranks that have the same."""
    local = list(local_tensors(module, entries, model, groups))
    yield groups.dp_cp, [(entry, tensor) for entry, tensor in local if entry.expert is None]
    yield groups.expt_dp, [(entry, tensor) for entry, tensor in local if entry.expert is not None]


def _all_pieces(own: Sequence[tuple[Entry, Tensor]], group: Any) -> Iterator[Piece]:
    return pieces([tensor.numel() for _, tensor in own], ranks=group.size())


def sharded_weights(
    module: nn.Module, entries: Sequence[Entry], model: ModelConfig, groups: ProcessGroupCollection
) -> Iterator[ShardedTensor]:
    """This rank's share of its trained weights, under names that do not depend on the layout.

    After a load `complete` gets the other shares.
    """
    for group, own in _replicated(module, entries, model, groups):
        for piece in _all_pieces(own, group):
            if piece.rank == group.rank():
                entry, tensor = own[piece.tensor]
                data = tensor.detach().view(-1)[piece.first : piece.last]
                yield from sharded_tensors(
                    entry.megatron_name, data, entry, groups, shape=tensor.shape, first=piece.first
                )


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
        state = optimizer_shards.get(tensor)
        # None: a router bias, or a parameter whose optimizer state is on other ranks.
        if state is not None and state.distributed:
            yield from _sharded_state(state.tensors, tensor, entry, groups, first=state.first)
    for group, own in _replicated(module, entries, model, groups):
        for piece in _all_pieces(own, group):
            entry, tensor = own[piece.tensor]
            state = optimizer_shards.get(tensor)
            if state is not None and not state.distributed and piece.rank == group.rank():
                parts = _parts(state.tensors, piece)
                yield from _sharded_state(parts, tensor, entry, groups, first=piece.first)


def _sharded_state(
    state: Mapping[str, Tensor], parameter: Tensor, entry: Entry, groups: ProcessGroupCollection, *, first: int
) -> Iterator[ShardedTensor]:
    for name, data in state.items():
        key = f"{OPTIMIZER_PREFIX}{name}.{entry.megatron_name}"
        yield from sharded_tensors(key, data, entry, groups, shape=parameter.shape, first=first)


def _parts(tensors: Mapping[str, Tensor], piece: Piece) -> dict[str, Tensor]:
    return {name: tensor.detach().view(-1)[piece.first : piece.last] for name, tensor in tensors.items()}


@torch.no_grad()
def complete(
    module: nn.Module,
    entries: Sequence[Entry],
    model: ModelConfig,
    groups: ProcessGroupCollection,
    optimizer_shards: Mapping[Tensor, OptimizerShard],
) -> None:
    """Get the shares of other data-parallel ranks, after each has loaded its own.

    So all ranks together read a checkpoint once.

    Args:
        module: A model chunk.
        entries: The entries of the chunk.
        model: The architecture.
        groups: The process groups of this rank.
        optimizer_shards: The optimizer state to complete too, unless it is distributed.
    """
    for group, own in _replicated(module, entries, model, groups):
        if group.size() == 1:
            continue
        for piece in _all_pieces(own, group):
            _, tensor = own[piece.tensor]
            state = optimizer_shards.get(tensor)
            others = {} if state is None or state.distributed else state.tensors
            for part in _parts({"weight": tensor, **others}, piece).values():
                # As bytes, because not every backend sends every dtype.
                dist.broadcast(part.view(torch.uint8), group=group, group_src=piece.rank)


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
