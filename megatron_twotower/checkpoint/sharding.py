"""Where what one rank holds lies in the tensors of the whole model: how weights and optimizer state are cut.

Every tensor in a checkpoint has the shape and the name it has on one rank. A rank describes what it
holds of it as boxes (an offset and a size per axis), so a checkpoint of any layout can be read into
any other: tensor, expert and data parallel, and a distributed optimizer, whose ranks hold a stretch
of each flattened parameter, a few boxes each.
"""

import math
from collections.abc import Iterator, Sequence

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_twotower.checkpoint.optimizer_state import OptimizerShard
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.model.parameter_map import Entry, canonical_tensors, local_expert_name

# Per axis: the first element, and how many.
Box = tuple[tuple[int, int], ...]
# What the names of an optimizer's tensors begin with.
OPTIMIZER_PREFIX = "optimizer."


def boxes(shape: Sequence[int], first: int, last: int) -> list[Box]:
    """Elements first .. last - 1 of a flattened tensor, as boxes in the same order: at most 2 n - 1 for n axes."""
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
    """What this rank holds of one tensor, as views of `data` that can be read and written in place.

    Parts of a parameter that are each split by themselves are stored each by itself, so that any
    other number of ranks can cut them again.

    Args:
        data: elements `first` and on of this rank's share, flattened.
        shape: of this rank's share.
        replicated: every data-parallel rank holds the same.
    """
    expert = entry.expert is not None
    group, copies = (groups.expt_tp, groups.expt_dp) if expert else (groups.tp, groups.dp_cp)
    axis, split = entry.split or 0, entry.split is not None
    rank, ranks = (group.rank(), group.size()) if split else (0, 1)
    replica = (0, 0 if split else group.rank(), copies.rank() if replicated else 0)
    sizes = [part // ranks for part in entry.sections] or [shape[axis]]
    flat, at = data.detach().view(-1), 0
    for box in boxes(shape, first, first + flat.numel()):
        count = math.prod(size for _, size in box)
        view = flat[at : at + count].view([size for _, size in box])
        at += count
        start = 0
        for number, size in enumerate(sizes):
            low, high = max(box[axis][0], start), min(sum(box[axis]), start + size)
            if low < high:
                part = view.narrow(axis, low - box[axis][0], high - low)
                offset = [begin for begin, _ in box]
                offset[axis] = rank * size + low - start
                whole = list(shape)
                whole[axis] = size * ranks
                name = f"{key}.part{number}" if entry.sections else key
                yield ShardedTensor(
                    name, part, part.dtype, tuple(part.shape), tuple(whole), tuple(offset), None, replica
                )
            start += size


def local_tensors(
    module: nn.Module, entries: Sequence[Entry], model: ModelConfig, groups: ProcessGroupCollection
) -> Iterator[tuple[Entry, Tensor]]:
    """The parameters and buffers of this rank, each with its entry."""
    held = canonical_tensors(module)
    for entry in entries:
        local = local_expert_name(entry, experts=model.n_routed_experts, rank=groups.ep.rank(), ranks=groups.ep.size())
        if local is not None:
            yield entry, held[local]


def sharded_weights(
    module: nn.Module, entries: Sequence[Entry], model: ModelConfig, groups: ProcessGroupCollection
) -> Iterator[ShardedTensor]:
    """All that trains, under names that do not depend on the layout."""
    for entry, tensor in local_tensors(module, entries, model, groups):
        yield from sharded_tensors(entry.megatron, tensor, entry, groups, shape=tensor.shape)


def sharded_optimizer(
    module: nn.Module,
    entries: Sequence[Entry],
    model: ModelConfig,
    groups: ProcessGroupCollection,
    held: dict[Tensor, OptimizerShard],
) -> Iterator[ShardedTensor]:
    """What the optimizer keeps for each parameter, named and cut like the parameter.

    Args:
        held: by parameter, as `optimizer.held_state` gives it.
    """
    for entry, tensor in local_tensors(module, entries, model, groups):
        if tensor not in held:
            continue  # a buffer, or none of a parameter that other ranks of a distributed optimizer hold
        state = held[tensor]
        for name, data in state.tensors.items():
            yield from sharded_tensors(
                f"{OPTIMIZER_PREFIX}{name}.{entry.megatron}",
                data,
                entry,
                groups,
                shape=tensor.shape,
                first=state.first,
                replicated=not state.distributed,
            )
