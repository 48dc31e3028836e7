"""Bytes of parameters, gradients and optimizer state of a rank, as in Megatron Core 0.16.1.

The parameters of a rank come from the parameter map. A test compares them with the modules of a
rank. Megatron's rules:

* Gradients are in one fp32 buffer for all trained parameters of a rank. With expert parallelism,
  experts have a second buffer.
* With the distributed optimizer, parameters start at multiples of 64 elements in these buffers.
  Buckets end at multiples of 128 and of the ranks that share them. Parameters are views of a buffer
  of the same layout.
* AdamW has two moments in fp32, and main parameters in fp32 for bf16 parameters. With the
  distributed optimizer, a rank has those of its share of each bucket (param_and_grad_buffer.py,
  distrib_optimizer.py).
* In FP8, Transformer Engine keeps the FP8 copies of weights that it has made in the first
  micro-batch of a step (transformer-engine 2.11, pytorch/module/base.py, get_weight_workspace;
  Megatron's extensions/transformer_engine.py, is_first_microbatch). A copy has the weight in rows
  and in columns, because Hopper multiplies FP8 in one order only. Blackwell needs the columns with
  scales of blocks only.
"""

import math
import re
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
from megatron_twotower.plan.layout import ACCELERATORS, Layout

FP32 = 4
# Router biases are buffers of modules. They have no gradients and do not count as parameters.
_MODULE_BUFFERS = ("expert_bias",)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Parameter:
    """A trained parameter of a rank.

    Attributes:
        name: The name in the parameter map.
        elements: The number of elements on the rank.
        expert: Whether its gradient is summed over expert-data-parallel ranks.
    """

    name: str
    elements: int
    expert: bool


@dataclass(frozen=True)
class RankParameters:
    """The parameters of a rank.

    Attributes:
        context: The elements of the context tower.
        chunks: The trained parameters of each model chunk, in the order of the module. Each chunk
            has its own buffers.
        projections: The elements of the context tower that FP8 multiplies: (layer, elements).
    """

    context: int
    chunks: tuple[tuple[Parameter, ...], ...]
    projections: tuple[tuple[int, int], ...] = ()


def parameter_count(entries: Iterable[Entry]) -> int:
    """The number of elements of all parameters of some entries, over all ranks."""
    return sum(math.prod(entry.shape) for entry in entries if not entry.megatron_name.endswith(_MODULE_BUFFERS))


def tower_entries(config: RunConfig) -> tuple[list[Entry], list[Entry]]:
    """The entries of the context tower, which `ar` has not, and of the trained modules."""
    return _tower_entries(config.objective, config.model, config.conditioning.frequencies)


# A search asks for the same few entries, and their numbers of elements, for every layout.
@lru_cache(maxsize=4)
def _tower_entries(objective: str, model: ModelConfig, frequencies: int) -> tuple[list[Entry], list[Entry]]:
    if objective == "ar":
        return [], trained_backbone_entries(model)
    return context_entries(model), denoiser_entries(model, frequencies)


@lru_cache(maxsize=64)
def _stage_entries(
    objective: str, model: ModelConfig, frequencies: int, stage: PipelineStage
) -> tuple[list[Entry], list[Entry]]:
    """The entries of a stage: of the context tower, and the trained ones in module order."""
    context, trained = _tower_entries(objective, model, frequencies)
    return entries_of_stage(context, stage), _in_module_order(entries_of_stage(trained, stage))


@lru_cache(maxsize=4)
def _trained_elements(objective: str, model: ModelConfig, frequencies: int) -> int:
    return parameter_count(_tower_entries(objective, model, frequencies)[1])


@lru_cache(maxsize=64)
def _replicated_elements(objective: str, model: ModelConfig, frequencies: int, stage: PipelineStage) -> int:
    _, trained = _stage_entries(objective, model, frequencies, stage)
    return parameter_count(entry for entry in trained if entry.split_dim is None)


def replicated_elements(config: RunConfig, stages: Iterable[PipelineStage]) -> int:
    """The elements of the trained parameters of some stages that each tensor-parallel rank has."""
    key = config.objective, config.model, config.conditioning.frequencies
    return sum(_replicated_elements(*key, stage) for stage in stages)


def _in_module_order(entries: Iterable[Entry]) -> list[Entry]:
    """Entries in the order of a module's parameters, which the layout of a buffer depends on."""
    return sorted(entries, key=lambda entry: _module_order(entry.megatron_name))


def _module_order(name: str) -> tuple[float, int]:
    """A sort key. It keeps the order of names with the same key."""
    found = _LAYER.search(name)
    if found is None:
        module = name.removeprefix("tower.").partition(".")[0]
        return {"conditioning": -2.0, "embedding": -1.0}.get(module, math.inf), 0
    inside = {"scale_shift_table": 0, "mixer.in_proj.weight": 2, "mixer.out_proj.weight": 3}
    return float(found[1]), inside.get(found[2], 1)


def _parameters_on_rank(entries: Iterable[Entry], layout: Layout) -> Iterable[Parameter]:
    for entry in entries:
        is_expert = entry.expert is not None
        # All ranks have the same number of experts of the same sizes. So every n-th of all experts,
        # with n expert-parallel ranks, has the sizes of those of a rank.
        if entry.megatron_name.endswith(_MODULE_BUFFERS) or (entry.expert or 0) % layout.expert:
            continue
        ranks = layout.expert_tensor if is_expert else layout.tensor
        elements = math.prod(entry.shape) // (1 if entry.split_dim is None else ranks)
        yield Parameter(entry.megatron_name, elements, is_expert and layout.expert > 1)


def rank_parameters(config: RunConfig, layout: Layout, *, pipeline_rank: int = 0) -> RankParameters:
    """The parameters of a rank with this pipeline rank, by the parameter map."""
    stages = stages_of_rank(config.model, config.parallel, pipeline_rank)
    return _rank_parameters(config.objective, config.model, config.conditioning.frequencies, layout, stages)


@lru_cache(maxsize=256)
def _rank_parameters(
    objective: str, model: ModelConfig, frequencies: int, layout: Layout, stages: tuple[PipelineStage, ...]
) -> RankParameters:
    of_stages = [_stage_entries(objective, model, frequencies, stage) for stage in stages]
    chunks = tuple(tuple(_parameters_on_rank(trained, layout)) for _, trained in of_stages)
    frozen = list(_parameters_on_rank([entry for context, _ in of_stages for entry in context], layout))
    return RankParameters(
        context=sum(parameter.elements for parameter in frozen),
        chunks=chunks,
        projections=projections_by_layer((parameter.name, parameter.elements) for parameter in frozen),
    )


def projections_by_layer(elements: Iterable[tuple[str, int]]) -> tuple[tuple[int, int], ...]:
    """The elements of the matrices that FP8 multiplies, as (layer, elements) in order of layers.

    Args:
        elements: Pairs of a parameter's name and its number of elements.
    """
    sums: dict[int, int] = {}
    for name, count in elements:
        layer = layer_of_projection(name)
        if layer is not None:
            sums[layer] = sums.get(layer, 0) + count
    return tuple(sorted(sums.items()))


def _fp8_elements(config: RunConfig, projections: Iterable[tuple[int, int]]) -> int:
    """The elements of a tower's matrices that are in FP8, without their few scales."""
    layers = range(config.fp8.first_layers_bf16, config.model.num_layers - config.fp8.last_layers_bf16)
    return sum(elements for layer, elements in projections if layer in layers)


def _fp8_context_elements(config: RunConfig, parameters: RankParameters) -> int:
    """The elements of the context tower that are stored in FP8, with 1 byte each."""
    stored = CONTEXT_PRECISIONS[config.train.context_precision] is not None
    return _fp8_elements(config, parameters.projections) if stored else 0


def _fp8_copies(config: RunConfig, parameters: RankParameters) -> int:
    """The bytes of the FP8 copies of the trained weights."""
    recipe = PRECISIONS[config.train.precision].recipe
    if recipe is None:
        return 0
    trained = projections_by_layer((each.name, each.elements) for chunk in parameters.chunks for each in chunk)
    rows_only = ACCELERATORS[config.parallel.card].fp8_in_any_order and recipe != "blockwise"
    return _fp8_elements(config, trained) * (1 if rows_only else 2)


@dataclass(frozen=True)
class Buffer:
    """A buffer of Megatron.

    Attributes:
        elements: Its elements with padding.
        owned: The elements of parameters in the optimizer shard of each data-parallel rank.
    """

    elements: int
    owned: tuple[int, ...]


def _round_up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


@lru_cache(maxsize=256)
def buffer(sizes: tuple[int, ...], *, ranks: int, distributed: bool, bucket_elements: int | None = None) -> Buffer:
    """The buffer that Megatron makes for parameters.

    Args:
        sizes: The elements of each parameter, in the order of the module. Megatron puts them into
            the buffer in reverse order.
        ranks: The ranks that share the buffer.
        distributed: Whether the optimizer is distributed. If not, every rank owns all elements.
        bucket_elements: A bucket ends when it has this number of elements; `None` for one bucket.
    """
    if not distributed:
        return Buffer(sum(sizes), (sum(sizes),) * ranks)
    divisor = math.lcm(ranks, 128)
    owned, start, bucket_start = [0] * ranks, 0, 0
    inside: list[tuple[int, int]] = []

    def close_bucket(end: int) -> int:
        bucket_end = _round_up(end, divisor)
        share = (bucket_end - bucket_start) // ranks
        for low, high in inside:
            first, last = (low - bucket_start) // share, (high - 1 - bucket_start) // share
            for rank in range(first, min(ranks, last + 1)):
                begin = bucket_start + rank * share
                owned[rank] += min(high, begin + share) - max(low, begin)
        return bucket_end

    for size in reversed(sizes):
        start = _round_up(start, 64)
        inside.append((start, start + size))
        start += size
        if bucket_elements is not None and start - bucket_start >= bucket_elements:
            start = bucket_start = close_bucket(start)
            inside = []
    if inside:
        start = close_bucket(start)
    return Buffer(start, tuple(owned))


def bucket_elements(config: RunConfig, layout: Layout) -> int | None:
    """The size of Megatron's buckets; `None` for one bucket.

    There are several only if the reduction of gradients overlaps with the backward pass.
    """
    if not config.parallel.overlap_grad_reduce:
        return None
    return config.parallel.bucket_parameters or max(40_000_000, 1_000_000 * layout.data)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights of a rank, and of what belongs to them.

    Attributes:
        context: The context tower.
        parameters: The trained parameters, with padding.
        gradients: Their gradients, with padding.
        optimizer: The optimizer shard. Padding makes it differ between data-parallel ranks.
        fp8_copies: The FP8 copies of the trained weights.
        dense_elements: The elements of the buffers of dense parameters, with padding.
        expert_elements: The elements of the buffers of experts, with padding.
    """

    context: int
    parameters: int
    gradients: int
    optimizer: int
    fp8_copies: int
    dense_elements: int
    expert_elements: int


def weight_bytes(
    config: RunConfig,
    layout: Layout,
    parameters: RankParameters,
    *,
    pipeline_rank: int = 0,
    data_ranks: tuple[int, int] | None = None,
) -> WeightBytes:
    """The bytes of weights, gradients and optimizer state of a rank.

    Args:
        config: The configuration.
        layout: Its layout.
        parameters: The parameters of the rank.
        pipeline_rank: The pipeline rank. Megatron makes several buckets only in the first model
            chunk of the first pipeline rank.
        data_ranks: The data-parallel and the expert-data-parallel rank, for its optimizer shard;
            `None` for the largest shard.
    """
    width, distributed = PRECISIONS[config.train.precision].bytes, config.optimizer.distributed
    # fp32 parameters need no main parameters.
    state_bytes = 2 * FP32 if width == FP32 else 3 * FP32
    elements, owned = [0, 0], 0
    for chunk, trained in enumerate(parameters.chunks):
        bucket = bucket_elements(config, layout) if chunk == pipeline_rank == 0 else None
        for i, ranks in enumerate((layout.copies, layout.expert_data)):
            sizes = tuple(parameter.elements for parameter in trained if parameter.expert == bool(i))
            laid_out = buffer(sizes, ranks=ranks, distributed=distributed, bucket_elements=bucket)
            elements[i] += laid_out.elements
            owned += max(laid_out.owned) if data_ranks is None else laid_out.owned[data_ranks[i]]
    return WeightBytes(
        context=parameters.context * width - _fp8_context_elements(config, parameters) * (width - 1),
        parameters=sum(elements) * width,
        gradients=sum(elements) * FP32,
        optimizer=owned * state_bytes,
        fp8_copies=_fp8_copies(config, parameters),
        dense_elements=elements[0],
        expert_elements=elements[1],
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """The bytes of a checkpoint, over all ranks.

    It has the trained parameters, their moments in fp32, and main parameters in fp32 of bf16
    parameters. The frozen tower is in no checkpoint.
    """
    width = PRECISIONS[config.train.precision].bytes
    each = 3 * FP32 if width == FP32 else width + 3 * FP32
    return _trained_elements(config.objective, config.model, config.conditioning.frequencies) * each
