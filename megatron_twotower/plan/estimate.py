"""Estimates of memory, traffic and time of a run on a layout."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_twotower.config.phases import Phase, resolve_phases
from megatron_twotower.config.pipeline_stages import PipelineStage, stages_of_rank, whole_model
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.ops.cross_entropy import KERNEL_CHUNK
from megatron_twotower.plan.activations import (
    KeptTensor,
    MicroBatchShape,
    head_tensors,
    layer_tensors,
    micro_batch_shape,
)
from megatron_twotower.plan.flops import StepFlops, step_flops
from megatron_twotower.plan.layout import ACCELERATORS, GIB, Accelerator, Layout, expert_load, layout_of, micro_batches
from megatron_twotower.plan.traffic import SEAMS, Collective, collectives, crosses_nodes, group_sizes, sent_by_group
from megatron_twotower.plan.weights import WeightBytes, checkpoint_bytes, rank_parameters, weight_bytes


@dataclass(frozen=True)
class Assumptions:
    """Values that are not computed.

    Attributes:
        utilisation: The share of the accelerator's dense BF16 peak in the time of computation. It
            counts recomputed operations.
        link_share: The share of a link's speed that a collective reaches.
        expert_imbalance: The tokens of the busiest expert-parallel rank over the mean. All ranks
            wait for that rank.
        reserve_bytes: Memory for CUDA's context, NCCL's buffers and fragmentation.
    """

    utilisation: float = 0.25
    link_share: float = 0.7
    expert_imbalance: float = 1.0
    reserve_bytes: int = 4 * GIB


@dataclass(frozen=True)
class Memory:
    """The memory of the rank that needs most, in bytes.

    Attributes:
        context: The context tower.
        parameters: The trained parameters.
        gradients: Their gradients.
        optimizer: The optimizer shard.
        fp8_copies: The copies of the trained weights in FP8.
        kept: The activations of the denoiser between forward and backward pass.
        handoff: The handoff between the towers.
        working: Temporary tensors of a layer's backward pass, or of the loss.
        reserve: See `Assumptions.reserve_bytes`.
    """

    context: int
    parameters: int
    gradients: int
    optimizer: int
    fp8_copies: int
    kept: int
    handoff: int
    working: int
    reserve: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(dataclasses.asdict(self).values())


@dataclass(frozen=True)
class PhaseCost:
    """The cost of a phase of a run.

    Attributes:
        name: The name of the phase.
        block: Its block size.
        tokens: Its tokens.
        steps: Its steps.
        flops: The operations of a step per token.
        ar: The operations of an `ar` step per token.
        compute_seconds: The time of computation in a step.
        transfer_seconds: The time of communication in a step that computation does not hide.
        step_seconds: The time of a step.
        seconds: The time of the phase.
    """

    name: str
    block: int
    tokens: int
    steps: int
    flops: StepFlops
    ar: StepFlops
    compute_seconds: float
    transfer_seconds: float
    step_seconds: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a run needs on a layout.

    Attributes:
        config: The configuration of the run.
        layout: The layout.
        accelerator: The accelerators.
        assumptions: The values that are not computed.
        memory: The memory of the pipeline rank that needs most.
        collectives: The collectives of the pipeline rank whose communication takes longest.
        phases: The cost of each phase.
        checkpoint: The bytes of a checkpoint.
    """

    config: RunConfig
    layout: Layout
    accelerator: Accelerator
    assumptions: Assumptions
    memory: Memory
    collectives: list[Collective]
    phases: list[PhaseCost]
    checkpoint: int

    @property
    def fits(self) -> bool:
        """Whether the memory of an accelerator is enough."""
        return self.memory.total <= self.accelerator.memory_bytes

    @property
    def seconds(self) -> float:
        """The time of the run."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one accelerator."""
        return sum(phase.tokens for phase in self.phases) / self.seconds / self.layout.ranks

    @property
    def sent(self) -> dict[str, float]:
        """The bytes that a rank sends in a step, by kind of group."""
        return sent_by_group(self.collectives, self.layout)


class KeptBytes(NamedTuple):
    """What a rank keeps of a micro-batch between forward and backward pass, in bytes."""

    denoiser: int
    handoff: int


def _denoiser_bytes(tensors: Sequence[KeptTensor]) -> int:
    return sum(tensor.bytes for tensor in tensors if not tensor.handoff)


def kept_bytes(
    config: RunConfig,
    *,
    block: int,
    stages: Sequence[PipelineStage] | None = None,
    scored: int | None = None,
    imbalance: float = 1.0,
) -> KeptBytes:
    """What a rank keeps of a micro-batch between forward and backward pass.

    Args:
        config: The configuration.
        block: The block size.
        stages: The pipeline stages of the rank; `None` for the whole model.
        scored: The scored positions; `None` for all positions, the largest number.
        imbalance: As in `expert_load`.
    """
    stages = stages if stages is not None else (whole_model(config.model),)
    shape, recomputed = micro_batch_shape(config, block=block, imbalance=imbalance), config.train.recompute_layers
    kinds = [config.model.hybrid_override_pattern[layer] for stage in stages for layer in stage.layers]
    layers = [layer_tensors(config.model, kind, shape, recompute=kind in recomputed) for kind in kinds]
    row = config.model.hidden_size * shape.activation_bytes
    denoiser = sum(map(_denoiser_bytes, layers))
    for stage in stages:
        # The first stage computes the time conditioning. The others keep what they received: the
        # conditioning and the clean stream. The noisy stream is the input of their first layer.
        denoiser += row * (8 * shape.levels if stage.first else shape.clean // shape.sequence + 3 * shape.levels)
        if stage.last:
            positions = shape.noisy if scored is None else scored
            denoiser += _denoiser_bytes(head_tensors(config.model, shape, scored=positions))
    return KeptBytes(denoiser, sum(tensor.bytes for layer in layers for tensor in layer if tensor.handoff))


def in_flight(layout: Layout, *, pipeline_rank: int, micro_batches: int) -> float:
    """The number of micro-batches that a pipeline rank keeps at a time.

    The schedule is 1F1B, or with several model chunks Megatron's interleaved one. A micro-batch in
    one of n chunks counts 1 / n.
    """
    later_ranks = layout.pipeline - pipeline_rank - 1
    if layout.chunks == 1:
        return min(micro_batches, later_ranks + 1)
    warm_up = 2 * later_ranks + (layout.chunks - 1) * layout.pipeline + 1
    return min(micro_batches * layout.chunks, warm_up) / layout.chunks


def _working_bytes(config: RunConfig, shape: MicroBatchShape) -> int:
    """The bytes of temporary tensors.

    In the backward pass of a layer these are recomputed activations, and gradients of the same
    size. In the loss they are a chunk of logits, and the gradient of the head in the precision of
    the parameters.
    """
    model, recomputed = config.model, config.train.recompute_layers
    layers = [
        (2 if kind in recomputed else 1) * _denoiser_bytes(layer_tensors(model, kind, shape))
        for kind in set(model.hybrid_override_pattern)
    ]
    vocabulary = model.vocab_size // shape.tensor
    logits = min(KERNEL_CHUNK, shape.noisy) * vocabulary * shape.activation_bytes
    return max(*layers, logits + vocabulary * model.hidden_size * shape.activation_bytes)


class TransferSeconds(NamedTuple):
    """The time of a rank's collectives in a step, one after the other."""

    gradients: float
    parameters: float
    seams: float
    others: float


# The field of `TransferSeconds` for each purpose that computation can hide.
_HIDDEN = {"gradients": 0, "parameters": 1, **dict.fromkeys(SEAMS, 2)}


def _transfer_seconds(
    config: RunConfig, layout: Layout, found: Sequence[Collective], assumptions: Assumptions
) -> TransferSeconds:
    accelerator, sizes, totals = ACCELERATORS[config.parallel.card], group_sizes(layout), [0.0] * 4
    for each in found:
        far = crosses_nodes(each.group, layout, accelerator)
        speed = accelerator.network_bytes_per_second if far else accelerator.link_bytes_per_second
        seconds = each.sent_bytes(sizes[each.group]) / (speed * assumptions.link_share)
        totals[_HIDDEN.get(each.purpose, 3)] += seconds
    return TransferSeconds(*totals)


def _exposed_seconds(
    config: RunConfig, transfer: TransferSeconds, flops: StepFlops, micro_batch: float, number: int
) -> float:
    """The time of communication that computation does not hide.

    Gradients are reduced during the backward pass of the last micro-batch, and parameters gathered
    during the forward pass of the first one, if the configuration says so. What the clean stream
    tells context-parallel ranks travels during the forward passes of the denoiser.

    Args:
        config: The configuration.
        transfer: The time of the collectives.
        flops: The operations of a step.
        micro_batch: The time to compute one micro-batch.
        number: Of micro-batches in a step.
    """
    denoiser = (flops.model - flops.context) / 3
    during_forward = micro_batch * (flops.context + denoiser) / flops.executed
    gradients, parameters, seams, others = transfer
    if config.parallel.overlap_grad_reduce:
        gradients = max(0.0, gradients - (micro_batch - during_forward))
    if config.parallel.overlap_param_gather:
        parameters = max(0.0, parameters - during_forward)
    if config.objective == "two_tower":
        seams = max(0.0, seams - number * micro_batch * denoiser / flops.executed)
    return gradients + parameters + seams + others


def _compute_seconds(config: RunConfig, layout: Layout, assumptions: Assumptions, *, block: int) -> float:
    """The time of the operations of a step, with the bubble of the pipeline.

    The pipeline rank with the most operations determines it, and of its expert-parallel ranks the
    busiest.
    """
    load = expert_load(config.parallel, assumptions.expert_imbalance)
    most = max(
        step_flops(config, block=block, stages=stages_of_rank(config.model, config.parallel, rank), load=load).executed
        for rank in range(layout.pipeline)
    )
    tokens = config.data.global_batch_size * config.data.sequence_length_tokens
    bubble = (layout.pipeline - 1) / (micro_batches(config, layout) * layout.chunks)
    ranks, peak = layout.ranks // layout.pipeline, ACCELERATORS[config.parallel.card].bf16_flops
    return tokens * most / (ranks * peak * assumptions.utilisation) * (1 + bubble)


def _phase_cost(
    config: RunConfig, phase: Phase, *, layout: Layout, assumptions: Assumptions, transfer: TransferSeconds
) -> PhaseCost:
    block = phase.noise.block_size_tokens
    compute_seconds = _compute_seconds(config, layout, assumptions, block=block)
    flops, number = step_flops(config, block=block), micro_batches(config, layout)
    transfer_seconds = _exposed_seconds(config, transfer, flops, compute_seconds / number, number)
    step_seconds = compute_seconds + transfer_seconds
    return PhaseCost(
        name=phase.name,
        block=block,
        tokens=phase.sequences * config.data.sequence_length_tokens,
        steps=phase.steps,
        flops=flops,
        ar=step_flops(config, objective="ar"),
        compute_seconds=compute_seconds,
        transfer_seconds=transfer_seconds,
        step_seconds=step_seconds,
        seconds=phase.steps * step_seconds,
    )


def _memory(
    config: RunConfig,
    layout: Layout,
    weights: WeightBytes,
    *,
    pipeline_rank: int,
    blocks: Sequence[int],
    assumptions: Assumptions,
) -> Memory:
    """The memory of the busiest rank of a pipeline rank, with the block size that needs most."""
    imbalance = assumptions.expert_imbalance
    stages = stages_of_rank(config.model, config.parallel, pipeline_rank)
    count = in_flight(layout, pipeline_rank=pipeline_rank, micro_batches=micro_batches(config, layout))
    kept = max((kept_bytes(config, block=block, stages=stages, imbalance=imbalance) for block in blocks), key=sum)
    shapes = [micro_batch_shape(config, block=block, imbalance=imbalance) for block in blocks]
    return Memory(
        context=weights.context,
        parameters=weights.parameters,
        gradients=weights.gradients,
        optimizer=weights.optimizer,
        fp8_copies=weights.fp8_copies,
        kept=round(kept.denoiser * count),
        handoff=round(kept.handoff * count),
        working=max(_working_bytes(config, shape) for shape in shapes),
        reserve=assumptions.reserve_bytes,
    )


def estimate(config: RunConfig, *, ranks: int, assumptions: Assumptions | None = None) -> Estimate:
    """What a configuration needs on its layout.

    Args:
        config: A configuration that is valid for the number of ranks.
        ranks: The number of ranks.
        assumptions: The values that are not computed; `None` for the defaults.
    """
    assumptions = assumptions or Assumptions()
    layout, phases = layout_of(config, ranks=ranks), resolve_phases(config)
    blocks = sorted({phase.noise.block_size_tokens for phase in phases})
    memories, sent = [], []
    for rank in range(layout.pipeline):
        parameters = rank_parameters(config, layout, pipeline_rank=rank)
        weights = weight_bytes(config, layout, parameters, pipeline_rank=rank)
        memories.append(_memory(config, layout, weights, pipeline_rank=rank, blocks=blocks, assumptions=assumptions))
        stages = stages_of_rank(config.model, config.parallel, rank)
        sent.append(collectives(config, layout, weights, stages=stages, imbalance=assumptions.expert_imbalance))
    seconds = [_transfer_seconds(config, layout, found, assumptions) for found in sent]
    slowest = seconds.index(max(seconds, key=sum))
    return Estimate(
        config=config,
        layout=layout,
        accelerator=ACCELERATORS[config.parallel.card],
        assumptions=assumptions,
        memory=max(memories, key=lambda memory: memory.total),
        collectives=sent[slowest],
        phases=[
            _phase_cost(config, phase, layout=layout, assumptions=assumptions, transfer=seconds[slowest])
            for phase in phases
        ],
        checkpoint=checkpoint_bytes(config),
    )
