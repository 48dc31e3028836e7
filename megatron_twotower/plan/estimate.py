"""Memory, traffic and time of a run on a layout, put together from the formulas."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_twotower.config.phases import Phase, resolve_phases
from megatron_twotower.config.pipeline_stages import PipelineStage, stages_of_rank, whole_model
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.ops.cross_entropy import KERNEL_CHUNK
from megatron_twotower.plan.activations import Part, StepSize, head_parts, layer_parts, step_size
from megatron_twotower.plan.flops import StepFlops, step_flops
from megatron_twotower.plan.layout import CARDS, GIB, Card, Layout, layout_of, micro_batches
from megatron_twotower.plan.traffic import Transfer, crosses_nodes, group_sizes, sent_by_group, transfers
from megatron_twotower.plan.weights import RankParameters, WeightBytes, checkpoint_bytes, rank_parameters, weight_bytes


@dataclass(frozen=True)
class Assumptions:
    """What is not reckoned but taken.

    utilisation: floating-point operations a second while computing, as a share of the card's dense
        BF16 peak, with recomputation and without the time for communication.
    link_share: of a link's speed that a collective reaches.
    reserve_bytes: CUDA's context, NCCL's buffers, fragmentation.
    """

    utilisation: float = 0.25
    link_share: float = 0.7
    reserve_bytes: int = 4 * GIB


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most. kept: between forward and backward; working: while one layer is at work."""

    context: int
    parameters: int
    gradients: int
    optimizer: int
    kept: int
    handoff: int
    working: int
    reserve: int

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


@dataclass(frozen=True)
class PhaseCost:
    """A phase of the run: its length, and what its steps cost. ar: of an `ar` step on the same tokens."""

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
    """What a run needs on a layout."""

    config: RunConfig
    layout: Layout
    card: Card
    assumptions: Assumptions
    memory: Memory
    transfers: list[Transfer]
    phases: list[PhaseCost]
    checkpoint: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.card.memory_bytes

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def sent(self) -> dict[str, float]:
        return sent_by_group(self.transfers, self.layout)


def _own(parts: list[Part]) -> int:
    return sum(part.bytes for part in parts if not part.handoff)


def kept_bytes(
    config: RunConfig, *, block: int, own: Sequence[PipelineStage] | None = None, scored: int | None = None
) -> tuple[int, int]:
    """What one micro-batch keeps between forward and backward on a rank: the denoiser's own, and what is handed over.

    Args:
        own: the rank's stretches of layers; None for the whole model.
        scored: positions that the loss looks at; None for all, the most there can be.
    """
    held = own if own is not None else (whole_model(config.model),)
    size, recomputed = step_size(config, block=block), config.train.recompute_layers
    parts = [
        layer_parts(config.model, kind, size, recompute=kind in recomputed)
        for kind in (config.model.hybrid_override_pattern[number] for stage in held for number in stage.layers)
    ]
    row = config.model.hidden_size * size.activation_bytes
    kept = sum(map(_own, parts))
    for stage in held:
        # The time conditioning is made on the first; the others keep what they received, of which
        # the noisy stream is the input of their first layer.
        kept += row * (8 * size.rows if stage.first else size.clean // size.sequence + 3 * size.rows)
        if stage.last:
            kept += _own(head_parts(config.model, size, scored=size.noisy if scored is None else scored))
    return kept, sum(part.bytes for layer in parts for part in layer if part.handoff)


def in_flight(layout: Layout, *, pipeline_rank: int, micro_batches: int) -> float:
    """Micro-batches of all its stretches that a pipeline rank keeps at a time: 1F1B, or Megatron's interleaving."""
    after = layout.pipeline - pipeline_rank - 1
    if layout.chunks == 1:
        return min(micro_batches, after + 1)
    warm_up = 2 * after + (layout.chunks - 1) * layout.pipeline + 1
    return min(micro_batches * layout.chunks, warm_up) / layout.chunks


def _working_bytes(config: RunConfig, size: StepSize) -> int:
    """While one layer's backward pass runs: what it makes again, and gradients as large as that; or, in the loss, a
    chunk of logits, and the cast gradient of the head."""
    model, recomputed = config.model, config.train.recompute_layers
    layers = [
        (2 if kind in recomputed else 1) * _own(layer_parts(model, kind, size))
        for kind in set(model.hybrid_override_pattern)
    ]
    vocabulary = model.vocab_size // size.tensor
    logits = min(KERNEL_CHUNK, size.noisy) * vocabulary * size.activation_bytes
    return max(*layers, logits + vocabulary * model.hidden_size * size.activation_bytes)


def _transfer_seconds(found: list[Transfer], layout: Layout, card: Card, taken: Assumptions, hidden: bool) -> float:
    """Time of all transfers one after the other. hidden: gradients travel while the backward pass runs."""
    sizes, total = group_sizes(layout), 0.0
    for transfer in found:
        if hidden and transfer.what == "gradients":
            continue
        far = crosses_nodes(transfer.group, layout, card)
        speed = card.network_bytes_per_second if far else card.link_bytes_per_second
        total += transfer.sent(sizes[transfer.group]) / (speed * taken.link_share)
    return total


def _compute_seconds(config: RunConfig, layout: Layout, card: Card, taken: Assumptions, *, block: int) -> float:
    """Time of a step's operations: of the stage that has most to do, and of the bubble while the pipeline fills."""
    most = max(
        step_flops(config, block=block, own=stages_of_rank(config.model, config.parallel, rank)).executed
        for rank in range(layout.pipeline)
    )
    a_step = config.data.global_batch_size * config.data.sequence_length_tokens
    bubble = (layout.pipeline - 1) / (micro_batches(config, layout) * layout.chunks)
    ranks = layout.ranks // layout.pipeline
    return a_step * most / (ranks * card.bf16_flops * taken.utilisation) * (1 + bubble)


def _phase_cost(
    config: RunConfig, phase: Phase, *, layout: Layout, card: Card, taken: Assumptions, transfer: float
) -> PhaseCost:
    block, length = phase.noise.block_size_tokens, config.data.sequence_length_tokens
    compute = _compute_seconds(config, layout, card, taken, block=block)
    step = compute + transfer
    return PhaseCost(
        name=phase.name,
        block=block,
        tokens=phase.sequences * length,
        steps=phase.steps,
        flops=step_flops(config, block=block),
        ar=step_flops(config, objective="ar"),
        compute_seconds=compute,
        transfer_seconds=transfer,
        step_seconds=step,
        seconds=phase.steps * step,
    )


def _memory(
    config: RunConfig, layout: Layout, weights: WeightBytes, *, pipeline_rank: int, blocks: Sequence[int], reserve: int
) -> Memory:
    """Of one pipeline rank, with the block size that takes most."""
    own = stages_of_rank(config.model, config.parallel, pipeline_rank)
    times = in_flight(layout, pipeline_rank=pipeline_rank, micro_batches=micro_batches(config, layout))
    kept, handoff = max((kept_bytes(config, block=block, own=own) for block in blocks), key=sum)
    working = max(_working_bytes(config, step_size(config, block=block)) for block in blocks)
    return Memory(
        context=weights.context,
        parameters=weights.parameters,
        gradients=weights.gradients,
        optimizer=weights.optimizer,
        kept=round(kept * times),
        handoff=round(handoff * times),
        working=working,
        reserve=reserve,
    )


def estimate(
    config: RunConfig, *, ranks: int, assumptions: Assumptions | None = None, of: Sequence[RankParameters] | None = None
) -> Estimate:
    """What a validated configuration needs on so many ranks, each phase with its block size; memory, and bytes sent, of
    the pipeline ranks that need and send most.

    Args:
        of: parameters of each pipeline rank as modules have them; None for the table of names.
    """
    taken, card = assumptions or Assumptions(), CARDS[config.parallel.card]
    layout, phases = layout_of(config, ranks=ranks), resolve_phases(config)
    blocks = sorted({phase.noise.block_size_tokens for phase in phases})
    memories, sent = [], []
    for rank in range(layout.pipeline):
        has = of[rank] if of else rank_parameters(config, layout, pipeline_rank=rank)
        weights = weight_bytes(config, layout, has, pipeline_rank=rank)
        memories.append(
            _memory(config, layout, weights, pipeline_rank=rank, blocks=blocks, reserve=taken.reserve_bytes)
        )
        sent.append(transfers(config, layout, weights, own=stages_of_rank(config.model, config.parallel, rank)))

    def seconds(found: list[Transfer]) -> float:
        return _transfer_seconds(found, layout, card, taken, config.parallel.overlap_grad_reduce)

    found = max(sent, key=seconds)
    costs = [
        _phase_cost(config, phase, layout=layout, card=card, taken=taken, transfer=seconds(found)) for phase in phases
    ]
    memory = max(memories, key=lambda each: each.total)
    return Estimate(config, layout, card, taken, memory, found, costs, checkpoint_bytes(config))
