"""Parameters, gradients and optimizer state of one rank, in bytes, as Megatron Core 0.16.1 lays them out.

The elements of a rank come from the table of names (`held`), or from modules that were built
without memory (`built.py`): the two must agree. Megatron's rules:

* gradients: one fp32 buffer of all trained parameters of a rank, and one of its experts where
  experts are parallel;
* with the distributed optimizer parameters start at multiples of 64 elements in these buffers,
  buckets end at multiples of 128 and of the ranks that share them, and parameters are views of a
  buffer cut alike;
* AdamW's two moments in fp32, and main parameters in fp32 beside bf16 ones; of a bucket's share
  with the distributed optimizer (param_and_grad_buffer.py, distrib_optimizer.py).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from megatron_twotower.config.pipeline_stages import PipelineStage, stages_of_rank
from megatron_twotower.config.precision import CONTEXT_PRECISIONS, PRECISIONS
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.model.parameter_map import (
    Entry,
    context_entries,
    denoiser_entries,
    entries_of_stage,
    layer_of_projection,
    trained_backbone_entries,
)
from megatron_twotower.plan.layout import Layout

FP32 = 4
# Router biases are buffers: they are neither trained by gradient nor counted among parameters.
_BUFFERS = ("expert_bias",)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rank. expert: its gradient is summed over the ranks that hold the same experts."""

    name: str
    elements: int
    expert: bool


@dataclass(frozen=True)
class RankParameters:
    """What one rank holds: the frozen context tower, and what trains, in the order in which modules have them.

    chunks: one for each stretch of layers of a pipeline rank, each in buffers of its own.
    projections: of the context tower's elements, those of matrices that FP8 multiplies, by layer.
    """

    context: int
    chunks: tuple[tuple[Parameter, ...], ...]
    projections: tuple[tuple[int, int], ...] = ()


def parameters(entries: Iterable[Entry]) -> int:
    """Elements of all parameters of a table, over all ranks."""
    return sum(math.prod(entry.shape) for entry in entries if not entry.megatron_name.endswith(_BUFFERS))


def tables(config: RunConfig) -> tuple[list[Entry], list[Entry]]:
    """The tables of the context tower (none for `ar`) and of what trains."""
    return _tables(config.objective, config.model, config.conditioning.frequencies)


# A search asks for the same few again and again.
@lru_cache(maxsize=4)
def _tables(objective: str, model: ModelConfig, frequencies: int) -> tuple[list[Entry], list[Entry]]:
    if objective == "ar":
        return [], trained_backbone_entries(model)
    return context_entries(model), denoiser_entries(model, frequencies)


def _on_a_rank(entries: Iterable[Entry], layout: Layout) -> Iterable[Parameter]:
    for entry in entries:
        expert = entry.expert is not None
        # Ranks hold equally many experts: so many of all stand for those of any.
        if entry.megatron_name.endswith(_BUFFERS) or (entry.expert or 0) % layout.expert:
            continue
        ranks = layout.expert_tensor if expert else layout.tensor
        elements = math.prod(entry.shape) // (1 if entry.split_dim is None else ranks)
        yield Parameter(entry.megatron_name, elements, expert and layout.expert > 1)


def rank_parameters(config: RunConfig, layout: Layout, *, pipeline_rank: int = 0) -> RankParameters:
    """What each rank of a pipeline stage holds, by the table of names."""
    own = stages_of_rank(config.model, config.parallel, pipeline_rank)
    return _held(config.objective, config.model, config.conditioning.frequencies, layout, own)


@lru_cache(maxsize=256)
def _held(
    objective: str, model: ModelConfig, frequencies: int, layout: Layout, own: tuple[PipelineStage, ...]
) -> RankParameters:
    context, trained = _tables(objective, model, frequencies)
    frozen = [entry for stage in own for entry in entries_of_stage(context, stage)]
    chunks = tuple(tuple(_on_a_rank(entries_of_stage(trained, stage), layout)) for stage in own)
    on_a_rank = list(_on_a_rank(frozen, layout))
    return RankParameters(sum(p.elements for p in on_a_rank), chunks, by_layer((p.name, p.elements) for p in on_a_rank))


def by_layer(sizes: Iterable[tuple[str, int]]) -> tuple[tuple[int, int], ...]:
    """Elements of the matrices among named parameters that FP8 multiplies: (layer, elements), in order of layers."""
    sums: dict[int, int] = {}
    for name, elements in sizes:
        layer = layer_of_projection(name)
        if layer is not None:
            sums[layer] = sums.get(layer, 0) + elements
    return tuple(sorted(sums.items()))


def _in_fp8(config: RunConfig, of: RankParameters) -> int:
    """Elements of the context tower that are held in FP8, a byte each. Their scales, few of them, are left out."""
    if CONTEXT_PRECISIONS[config.train.context_precision] is None:
        return 0
    layers = range(config.fp8.first_layers_bf16, config.model.num_layers - config.fp8.last_layers_bf16)
    return sum(elements for layer, elements in of.projections if layer in layers)


@dataclass(frozen=True)
class Buffer:
    """Megatron's buffer of some parameters: its elements, padding included, and those each data-parallel rank owns."""

    elements: int
    owned: tuple[int, ...]


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


@lru_cache(maxsize=256)
def buffer(sizes: tuple[int, ...], *, ranks: int, distributed: bool, bucket_elements: int | None = None) -> Buffer:
    """Lay parameters of these sizes out as Megatron does.

    Args:
        sizes: in the order of the module's parameters; Megatron goes through them backwards.
        ranks: that share the buffer.
        bucket_elements: a bucket is closed when it has so many; None for one bucket.

    Returns:
        the buffer. Without the distributed optimizer every rank owns all.
    """
    if not distributed:
        return Buffer(sum(sizes), (sum(sizes),) * ranks)
    divisor = math.lcm(ranks, 128)
    owned, start, first = [0] * ranks, 0, 0
    inside: list[tuple[int, int]] = []

    def close(end: int) -> int:
        last = _up(end, divisor)
        share = (last - first) // ranks
        for low, high in inside:
            for rank in range((low - first) // share, min(ranks, (high - 1 - first) // share + 1)):
                begin = first + rank * share
                owned[rank] += min(high, begin + share) - max(low, begin)
        return last

    for size in reversed(sizes):
        start = _up(start, 64)
        inside.append((start, start + size))
        start += size
        if bucket_elements is not None and start - first >= bucket_elements:
            start = first = close(start)
            inside = []
    if inside:
        start = close(start)
    return Buffer(start, tuple(owned))


def bucket_elements(config: RunConfig, layout: Layout) -> int | None:
    """Megatron's size of a bucket: there are several only where reduction overlaps with the backward pass."""
    if not config.parallel.overlap_grad_reduce:
        return None
    return config.parallel.bucket_parameters or max(40_000_000, 1_000_000 * layout.data)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes on a rank. optimizer: of each data-parallel rank, over dense and expert buffers; they differ by padding.

    dense, expert: elements of the two gradient buffers, padding included.
    """

    context: int
    parameters: int
    gradients: int
    optimizer: int
    dense: int
    expert: int


def weight_bytes(
    config: RunConfig,
    layout: Layout,
    of: RankParameters,
    *,
    pipeline_rank: int = 0,
    places: tuple[int, int] | None = None,
) -> WeightBytes:
    """Bytes of weights and what hangs on them.

    Args: pipeline_rank: of what is held; Megatron cuts only the first stretch of the first rank
        into buckets. places: of a rank in its data-parallel and its expert-data-parallel group, for
        its very share of the optimizer state; None for the largest.
    """
    width, distributed = PRECISIONS[config.train.precision].bytes, config.optimizer.distributed
    # fp32 parameters are their own main parameters.
    state = 2 * FP32 if width == FP32 else 3 * FP32
    buffers, owned = [0, 0], 0
    for chunk, trained in enumerate(of.chunks):
        bucket = bucket_elements(config, layout) if chunk == pipeline_rank == 0 else None
        for number, ranks in enumerate((layout.data, layout.expert_data)):
            sizes = tuple(p.elements for p in trained if p.expert == bool(number))
            laid = buffer(sizes, ranks=ranks, distributed=distributed, bucket_elements=bucket)
            buffers[number] += laid.elements
            owned += max(laid.owned) if places is None else laid.owned[places[number]]
    total = sum(buffers)
    return WeightBytes(
        context=of.context * width - _in_fp8(config, of) * (width - 1),
        parameters=total * width,
        gradients=total * FP32,
        optimizer=owned * state,
        dense=buffers[0],
        expert=buffers[1],
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """A checkpoint: parameters, and main parameters (bf16) and moments in fp32, of all that trains. Once, not per rank.

    The frozen tower is in no checkpoint.
    """
    _, trained = tables(config)
    width = PRECISIONS[config.train.precision].bytes
    each = 3 * FP32 if width == FP32 else width + 3 * FP32
    return parameters(trained) * each
