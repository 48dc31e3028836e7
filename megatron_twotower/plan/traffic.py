"""Bytes that one rank sends to others in a training step, collective by collective.

A collective over g ranks is reckoned as a ring: of n bytes in all, an all-gather, a reduce-scatter
or an all-to-all sends n (g - 1) / g from each rank, an all-reduce twice that. Counts of a few
numbers (gradient norms, tokens of each expert, logged sums) are left out, and experts are taken to
be equally busy.

What a pass sends, with T positions of h values of w bytes (of the noisy stream, or the clean one
for the context):

* tensor parallel with sequence parallelism, for each M, *, - and shared expert: gather in, scatter
  out; backward the same and the input once more, for the gradient of the weight. Without: an
  all-reduce forward and one backward;
* experts: k rows of h values for each position to their experts and back (all-to-all), or all rows
  to all ranks and back (all-gather), with their probabilities; backward the same;
* the loss: the gradient of the scored positions summed over vocabulary slices;
* pipeline: both streams and the time conditioning to the next stretch of layers, and as much
  gradient back;
* data parallel, once a step: gradients in fp32 scattered (reduced, without the distributed
  optimizer), and parameters gathered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_twotower.config.pipeline_stages import PipelineStage, whole_model
from megatron_twotower.config.precision import PRECISIONS
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.model.parameter_map import entries_of_stage
from megatron_twotower.plan.activations import StepSize, step_size
from megatron_twotower.plan.flops import context_layers
from megatron_twotower.plan.layout import Card, Layout, micro_batches
from megatron_twotower.plan.weights import FP32, WeightBytes, parameters, tables

# Of a ring: what a rank sends of n bytes over g ranks is so many times n (g - 1) / g.
FACTORS = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "all_reduce": 2}


@dataclass(frozen=True)
class Transfer:
    """So many collectives of one kind in a step. bytes: in all of one collective, as `FACTORS` takes them."""

    group: str
    what: str
    operation: str
    bytes: float
    times: int

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends in a step."""
        if self.operation == "send":
            return self.bytes * self.times
        return FACTORS[self.operation] * self.bytes * (ranks - 1) / ranks * self.times


def group_sizes(layout: Layout) -> dict[str, int]:
    return {
        "tensor": layout.tensor,
        "expert": layout.expert,
        "expert tensor": layout.expert_tensor,
        "tensor x expert": layout.expert * layout.expert_tensor,
        "data": layout.data,
        "expert data": layout.expert_data,
        "pipeline": layout.pipeline,
    }


def crosses_nodes(group: str, layout: Layout, card: Card) -> bool:
    """Whether a group of this kind reaches beyond one node. Megatron lays tensor-parallel ranks beside each other, then
    expert-parallel ones; ranks of data-parallel groups and of a pipeline stand apart."""
    sizes = group_sizes(layout)
    spans = sizes | {"expert": layout.expert * layout.expert_tensor}
    spans |= dict.fromkeys(("data", "expert data", "pipeline"), layout.ranks)
    return sizes[group] > 1 and spans[group] > card.per_node


def _passes(config: RunConfig, kind: str) -> int:
    """Forward passes of a trained layer for each backward one."""
    return 2 if kind in config.train.recompute_layers and config.objective == "two_tower" else 1


def _mixer(config: RunConfig, positions: int, *, forward: int, backward: int) -> Iterator[Transfer]:
    """What the ranks of a mixer or a shared expert exchange, in so many passes."""
    whole = positions * config.model.hidden_size * PRECISIONS[config.train.precision].bytes
    if not config.parallel.sequence:
        yield Transfer("tensor", "mixers", "all_reduce", whole, forward + backward)
        return
    yield Transfer("tensor", "mixers", "all_gather", whole, forward + 2 * backward)
    yield Transfer("tensor", "mixers", "reduce_scatter", whole, forward + backward)


def _routed(config: RunConfig, size: StepSize, positions: int, *, forward: int, backward: int) -> Iterator[Transfer]:
    """What routed experts exchange, in so many passes."""
    model, layout = config.model, config.parallel
    row, k = model.hidden_size * size.activation_bytes, model.num_experts_per_tok
    wide = 8 if config.train.router_dtype == "fp64" else FP32
    own, experts = positions // size.sequence, model.n_routed_experts
    if layout.moe_dispatcher == "allgather":
        all_own = own * layout.expert * layout.expert_tensor_ranks
        # Every rank gets every row, with its probabilities for all experts, and where it goes. The
        # sums go back in the precision of the probabilities (megatron-core 0.16.1,
        # token_dispatcher.py, token_combine).
        back = all_own * model.hidden_size * wide
        yield Transfer("tensor x expert", "tokens", "all_gather", all_own * row, forward)
        yield Transfer("tensor x expert", "tokens", "reduce_scatter", all_own * row, backward)
        yield Transfer("tensor x expert", "tokens", "reduce_scatter", back, forward)
        yield Transfer("tensor x expert", "tokens", "all_gather", back, backward)
        yield Transfer("tensor x expert", "routes", "all_gather", all_own * experts * (wide + 1), forward)
        yield Transfer("tensor x expert", "routes", "reduce_scatter", all_own * experts * wide, backward)
        return
    sent = k * own
    yield Transfer("expert", "tokens", "all_to_all", sent * row, 2 * (forward + backward))
    yield Transfer("expert", "routes", "all_to_all", sent * wide, forward + backward)
    gathered = sent * layout.expert_tensor_ranks
    yield Transfer("expert tensor", "tokens", "all_gather", gathered * row, forward + backward)
    yield Transfer("expert tensor", "tokens", "reduce_scatter", gathered * row, forward + backward)
    yield Transfer("expert tensor", "routes", "all_gather", gathered * wide, forward)
    yield Transfer("expert tensor", "routes", "reduce_scatter", gathered * wide, backward)


def _tower(config: RunConfig, size: StepSize, pattern: str, positions: int, *, trained: bool) -> Iterator[Transfer]:
    for kind in pattern:
        forward, backward = (_passes(config, kind), 1) if trained else (1, 0)
        yield from _mixer(config, positions, forward=forward, backward=backward)
        if kind == "E":
            yield from _routed(config, size, positions, forward=forward, backward=backward)


def _ends(config: RunConfig, size: StepSize, scored: float, own: Sequence[PipelineStage]) -> Iterator[Transfer]:
    """Embeddings, the final gather, and the loss, where they are."""
    row = config.model.hidden_size * size.activation_bytes
    positions, frozen = (size.noisy, size.clean) if config.objective == "two_tower" else (size.clean, 0)
    if any(stage.first for stage in own):
        yield Transfer("tensor", "embeddings", "all_reduce", (positions + frozen) * row, 1)
        if config.parallel.sequence:
            yield Transfer("tensor", "embeddings", "all_gather", positions * row, 1)
    if any(stage.last for stage in own):
        if config.parallel.sequence:
            yield Transfer("tensor", "final states", "all_gather", positions * row, 1)
        yield Transfer("tensor", "loss", "all_reduce", scored * (row + 3 * FP32), 1)


def _between_stages(config: RunConfig, size: StepSize, own: Sequence[PipelineStage]) -> Iterator[Transfer]:
    """What goes to the next stretch of layers, and back to the one before."""
    row = config.model.hidden_size * size.activation_bytes
    rows = size.clean // size.sequence
    if config.objective == "two_tower":
        rows += size.own + 3 * size.rows
    times = sum((not stage.last) + (not stage.first) for stage in own)
    yield Transfer("pipeline", "streams", "send", rows * row, times)


def _step(config: RunConfig, weights: WeightBytes, own: Sequence[PipelineStage]) -> Iterator[Transfer]:
    """Once a step: gradients and parameters."""
    width = PRECISIONS[config.train.precision].bytes
    if config.parallel.sequence:
        _, trained = tables(config)
        shared = parameters(e for stage in own for e in entries_of_stage(trained, stage) if e.split_dim is None)
        yield Transfer("tensor", "gradients of what they share", "all_reduce", shared * FP32, 1)
    # Experts have an optimizer of their own, and each of the two gathers all buffers (megatron-core
    # 0.16.1, distrib_optimizer.py, step_with_ready_grads), unless they are gathered during the next
    # forward pass.
    gathers = 2 if weights.expert and not config.parallel.overlap_param_gather else 1
    for group, elements in (("data", weights.dense), ("expert data", weights.expert)):
        if config.optimizer.distributed:
            yield Transfer(group, "gradients", "reduce_scatter", elements * FP32, 1)
            yield Transfer(group, "parameters", "all_gather", elements * width, gathers)
        else:
            yield Transfer(group, "gradients", "all_reduce", elements * FP32, 1)


def transfers(
    config: RunConfig,
    layout: Layout,
    weights: WeightBytes,
    *,
    own: Sequence[PipelineStage] | None = None,
    scored: float | None = None,
) -> list[Transfer]:
    """All that a rank exchanges in a step.

    Args:
        own: the rank's stretches of layers; None for the whole model.
        scored: positions of a micro-batch that the loss looks at; None for what is expected.
    """
    size, kinds = step_size(config), config.model.hybrid_override_pattern
    held = own if own is not None else (whole_model(config.model),)
    numbers = [number for stage in held for number in stage.layers]
    two_tower = config.objective == "two_tower"
    if scored is None:
        share = (config.noise.time_min + config.noise.time_max) / 2
        scored = size.noisy * share if two_tower else size.clean - size.sequences
    positions = size.noisy if two_tower else size.clean
    pattern = "".join(kinds[number] for number in numbers)
    each = [*_tower(config, size, pattern, positions, trained=True), *_ends(config, size, scored, held)]
    each += _between_stages(config, size, held)
    if two_tower:
        frozen = "".join(kinds[number] for number in numbers if number < len(context_layers(config.model)))
        each += _tower(config, size, frozen, size.clean, trained=False)
    count = micro_batches(config, layout)
    step = [Transfer(t.group, t.what, t.operation, t.bytes, t.times * count) for t in each]
    ranks = group_sizes(layout)
    return [t for t in [*step, *_step(config, weights, held)] if ranks[t.group] > 1 and t.bytes and t.times]


def sent_by_group(found: list[Transfer], layout: Layout) -> dict[str, float]:
    """Bytes that one rank sends in a step within each kind of group."""
    ranks, sums = group_sizes(layout), dict[str, float]()
    for transfer in found:
        sums[transfer.group] = sums.get(transfer.group, 0.0) + transfer.sent(ranks[transfer.group])
    return sums
