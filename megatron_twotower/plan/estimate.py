"""Memory, traffic and time of a run on a layout, put together from the formulas."""

import dataclasses
from dataclasses import dataclass

from megatron_twotower.config import RunConfig
from megatron_twotower.memory import Part, StepSize, head_parts, layer_parts, step_size
from megatron_twotower.ops.cross_entropy import POSITION_CHUNK
from megatron_twotower.phases import Phase, plan
from megatron_twotower.plan.flops import StepFlops, step_flops
from megatron_twotower.plan.layout import CARDS, GIB, Card, Layout, layout_of
from megatron_twotower.plan.traffic import Transfer, group_sizes, sent_by_group, transfers
from megatron_twotower.plan.weights import FP32, Held, WeightBytes, checkpoint_bytes, held, weight_bytes


@dataclass(frozen=True)
class Assumptions:
    """What is not reckoned but taken.

    utilisation: floating-point operations a second while computing, as a share of the card's dense BF16 peak, with
        recomputation and without the time for communication.
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
    weights: WeightBytes
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


def kept_bytes(config: RunConfig, *, block: int, scored: int | None = None) -> tuple[int, int]:
    """What one micro-batch keeps between forward and backward on a rank: the denoiser's own, and what is handed over.

    Args:
        scored: positions that the loss looks at; None for all, the most there can be.
    """
    size, recomputed = step_size(config, block=block), config.train.recompute_layers
    parts = [
        layer_parts(config.model, kind, size, recompute=kind in recomputed)
        for kind in config.model.hybrid_override_pattern
    ]
    head = head_parts(config.model, size, scored=size.noisy if scored is None else scored)
    conditioning = 8 * size.rows * config.model.hidden_size * size.activation_bytes
    handoff = sum(part.bytes for layer in parts for part in layer if part.handoff)
    return sum(map(_own, parts)) + _own(head) + conditioning, handoff


def _working_bytes(config: RunConfig, size: StepSize) -> int:
    """While one layer's backward pass runs: what it makes again, and gradients as large as that; or, in the loss, a
    chunk of logits with its exponentials and their cast, and the cast gradient of the head."""
    model, recomputed = config.model, config.train.recompute_layers
    layers = [
        (2 if kind in recomputed else 1) * _own(layer_parts(model, kind, size))
        for kind in set(model.hybrid_override_pattern)
    ]
    vocabulary = model.vocab_size // size.tensor
    logits = POSITION_CHUNK * vocabulary * (2 * FP32 + 2 * size.activation_bytes)
    return max(*layers, logits + vocabulary * model.hidden_size * size.activation_bytes)


def _transfer_seconds(found: list[Transfer], layout: Layout, card: Card, taken: Assumptions, hidden: bool) -> float:
    """Time of all transfers one after the other. hidden: gradients travel while the backward pass runs."""
    sizes = group_sizes(layout)
    # Megatron lays tensor-parallel ranks beside each other, then expert-parallel ones; data-parallel ranks are apart.
    spans = sizes | {"expert": layout.expert * layout.expert_tensor, "data": layout.ranks, "expert data": layout.ranks}
    total = 0.0
    for transfer in found:
        if hidden and transfer.what == "gradients":
            continue
        near = spans[transfer.group] <= card.per_node
        speed = card.link_bytes_per_second if near else card.network_bytes_per_second
        total += transfer.sent(sizes[transfer.group]) / (speed * taken.link_share)
    return total


def _phase_cost(
    config: RunConfig, phase: Phase, *, layout: Layout, card: Card, taken: Assumptions, transfer: float
) -> PhaseCost:  # fmt: skip
    block, length = phase.noise.block_size_tokens, config.data.sequence_length_tokens
    flops = step_flops(config, block=block)
    a_step = config.data.global_batch_size * length
    compute = a_step * flops.executed / (layout.ranks * card.bf16_flops * taken.utilisation)
    step = compute + transfer
    return PhaseCost(
        name=phase.name, block=block, tokens=phase.sequences * length, steps=phase.steps, flops=flops,
        ar=step_flops(config, objective="ar"), compute_seconds=compute, transfer_seconds=transfer, step_seconds=step,
        seconds=phase.steps * step,
    )  # fmt: skip


def estimate(
    config: RunConfig, *, ranks: int, assumptions: Assumptions | None = None, of: Held | None = None
) -> Estimate:  # fmt: skip
    """What a validated configuration needs on so many ranks, each phase with its block size, memory of the largest.

    Args:
        of: parameters of a rank as modules have them; None for the table of names.
    """
    taken, card = assumptions or Assumptions(), CARDS[config.parallel.card]
    layout = layout_of(config, ranks=ranks)
    weights = weight_bytes(config, layout, of or held(config, layout))
    phases = plan(config)
    blocks = sorted({phase.noise.block_size_tokens for phase in phases})
    kept, handoff = max((kept_bytes(config, block=block) for block in blocks), key=sum)
    working = max(_working_bytes(config, step_size(config, block=block)) for block in blocks)
    found = transfers(config, layout, weights)
    transfer = _transfer_seconds(found, layout, card, taken, config.parallel.overlap_grad_reduce)
    costs = [
        _phase_cost(config, phase, layout=layout, card=card, taken=taken, transfer=transfer)
        for phase in phases
    ]  # fmt: skip
    memory = Memory(
        context=weights.context, parameters=weights.parameters, gradients=weights.gradients,
        optimizer=weights.optimizer, kept=kept, handoff=handoff, working=working, reserve=taken.reserve_bytes,
    )  # fmt: skip
    return Estimate(config, layout, card, taken, weights, memory, found, costs, checkpoint_bytes(config))
