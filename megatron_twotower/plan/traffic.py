"""Bytes that a rank sends to other ranks in a training step, collective by collective.

The formulas assume rings of g ranks. With n bytes over all ranks, an all-gather, a reduce-scatter
or an all-to-all sends n (g - 1) / g bytes from each rank. An all-reduce sends twice that.
Collectives of a few numbers (gradient norms, tokens of each expert, logged sums) are not counted.
With an imbalance of experts, what the busiest rank receives counts.

A pass has T positions on a rank: those of the noisy stream, or in the context tower of the clean
stream. Each has h values of w bytes. It sends:

* Tensor parallelism with sequence parallelism: each M, *, - and shared expert gathers its input
  and reduce-scatters its output. The backward pass does the same, and gathers the input once more
  for the gradient of the weight. Without sequence parallelism: an all-reduce forward and one
  backward.
* Experts: k rows of h values per position to their experts and back (all-to-all), or all rows to
  all ranks and back (all-gather), with their probabilities. The backward pass does the same.
* The loss: the gradient of the scored positions, summed over the slices of the vocabulary.
* Context parallelism: each * of the clean stream gathers keys and values. Each M gathers the last
  inputs of the convolution of every stretch, and the state after it with its decay, in fp32. The
  denoiser sends nothing, forward or backward. With the objective `ar` gradients of the same size go
  back: reduce-scatters, and for the states an all-gather.
* Pipeline: both streams and the time conditioning to the next stage, and gradients of the same size
  back.
* Data parallelism, over context-parallel ranks too, once per step, with the distributed optimizer:
  a reduce-scatter of gradients in fp32, and an all-gather of parameters. Without it: an all-reduce
  of gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_twotower.config.pipeline_stages import PipelineStage, whole_model
from megatron_twotower.config.precision import PRECISIONS
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.plan.activations import MicroBatchShape, convolution_channels, key_value_width, micro_batch_shape
from megatron_twotower.plan.flops import context_layers
from megatron_twotower.plan.layout import Accelerator, Layout, micro_batches
from megatron_twotower.plan.weights import FP32, WeightBytes, replicated_elements

# A rank sends this many times n (g - 1) / g bytes.
_RING_FACTORS = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "all_reduce": 2}


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a step, or equal messages to one rank.

    Attributes:
        group: The kind of its group, a key of `group_sizes`.
        purpose: What is sent.
        operation: A key of `_RING_FACTORS`, or "send" for a message to one rank.
        bytes: The bytes of one collective over all ranks of the group, or of one message.
        count: The number of collectives or messages in a step.
    """

    group: str
    purpose: str
    operation: str
    bytes: float
    count: int

    def sent_bytes(self, ranks: int) -> float:
        """The bytes that one of the ranks of the group sends in a step."""
        if self.operation == "send":
            return self.bytes * self.count
        return _RING_FACTORS[self.operation] * self.bytes * (ranks - 1) / ranks * self.count


def group_sizes(layout: Layout) -> dict[str, int]:
    """The number of ranks in each kind of group."""
    return {
        "tensor": layout.tensor,
        "expert": layout.expert,
        "expert tensor": layout.expert_tensor,
        "tensor x expert": layout.expert * layout.expert_tensor,
        "data": layout.copies,
        "context": layout.context,
        "expert data": layout.expert_data,
        "pipeline": layout.pipeline,
    }


def crosses_nodes(group: str, layout: Layout, accelerator: Accelerator) -> bool:
    """Whether a group of this kind has ranks on several nodes.

    Megatron numbers tensor-parallel ranks consecutively, then context-parallel ranks. For experts
    it numbers those that split an expert, then expert-parallel ranks. The ranks of data-parallel
    groups and of a pipeline are far apart.
    """
    sizes = group_sizes(layout)
    spans = sizes | {"expert": layout.expert * layout.expert_tensor, "context": layout.context * layout.tensor}
    spans |= dict.fromkeys(("data", "expert data", "pipeline"), layout.ranks)
    return sizes[group] > 1 and spans[group] > accelerator.per_node


def _forward_passes(config: RunConfig, kind: str) -> int:
    """The forward passes of a trained layer per backward pass."""
    return 2 if kind in config.train.recompute_layers and config.objective == "two_tower" else 1


def _mixer(config: RunConfig, positions: int, *, forward: int, backward: int) -> Iterator[Collective]:
    """The collectives of a mixer or a shared expert.

    Args:
        config: The configuration.
        positions: The positions of the stream, all tensor-parallel ranks together.
        forward: The number of forward passes.
        backward: The number of backward passes.
    """
    size = positions * config.model.hidden_size * PRECISIONS[config.train.precision].bytes
    if not config.parallel.sequence:
        yield Collective("tensor", "mixers", "all_reduce", size, forward + backward)
        return
    yield Collective("tensor", "mixers", "all_gather", size, forward + 2 * backward)
    yield Collective("tensor", "mixers", "reduce_scatter", size, forward + backward)


def _routed_experts(
    config: RunConfig, shape: MicroBatchShape, positions: int, *, forward: int, backward: int
) -> Iterator[Collective]:
    """The collectives of routed experts. Arguments as for `_mixer`."""
    model, parallel = config.model, config.parallel
    row, k = model.hidden_size * shape.activation_bytes, model.num_experts_per_tok
    probability = 8 if config.train.router_dtype == "fp64" else FP32
    on_rank, experts = positions // shape.sequence, model.n_routed_experts
    if parallel.moe_dispatcher == "allgather":
        group = "tensor x expert"
        gathered = on_rank * parallel.expert * parallel.expert_tensor_ranks
        # Every rank gets every row, with its probabilities for all experts and its routing map. The
        # sums go back in the precision of the probabilities (megatron-core 0.16.1,
        # token_dispatcher.py, token_combine).
        combined = gathered * model.hidden_size * probability
        yield Collective(group, "tokens", "all_gather", gathered * row, forward)
        yield Collective(group, "tokens", "reduce_scatter", gathered * row, backward)
        yield Collective(group, "tokens", "reduce_scatter", combined, forward)
        yield Collective(group, "tokens", "all_gather", combined, backward)
        yield Collective(group, "routes", "all_gather", gathered * experts * (probability + 1), forward)
        yield Collective(group, "routes", "reduce_scatter", gathered * experts * probability, backward)
        return
    rows = round(k * on_rank * shape.expert_load)
    yield Collective("expert", "tokens", "all_to_all", rows * row, 2 * (forward + backward))
    yield Collective("expert", "routes", "all_to_all", rows * probability, forward + backward)
    gathered = rows * parallel.expert_tensor_ranks
    yield Collective("expert tensor", "tokens", "all_gather", gathered * row, forward + backward)
    yield Collective("expert tensor", "tokens", "reduce_scatter", gathered * row, forward + backward)
    yield Collective("expert tensor", "routes", "all_gather", gathered * probability, forward)
    yield Collective("expert tensor", "routes", "reduce_scatter", gathered * probability, backward)


# What crosses the seams between stretches of a sequence.
SEAMS = ("keys and values", "inputs of convolutions", "states")


def _seams(config: RunConfig, shape: MicroBatchShape, kind: str, *, backward: int) -> Iterator[Collective]:
    """What a layer of the clean stream, or of `ar`, sends to other context-parallel ranks.

    Args:
        config: The configuration.
        shape: The micro-batch.
        kind: The letter of the layer.
        backward: The number of backward passes.
    """
    model, stretches = config.model, shape.rows * shape.context
    keys, inputs, states = SEAMS
    if kind == "*":
        size = shape.sequences * shape.length * key_value_width(model, shape) * shape.activation_bytes
        yield Collective("context", keys, "all_gather", size, 1)
        yield Collective("context", keys, "reduce_scatter", size, backward)
    if kind == "M":
        ends = stretches * (model.conv_kernel - 1) * convolution_channels(model, shape) * shape.activation_bytes
        yield Collective("context", inputs, "all_gather", ends, 1)
        yield Collective("context", inputs, "reduce_scatter", ends, backward)
        # Of each head its state, and the decay over the stretch.
        state = model.mamba_num_heads // shape.tensor * (model.mamba_head_dim * model.ssm_state_size + 1)
        yield Collective("context", states, "all_gather", stretches * state * FP32, 1 + backward)


def _tower(
    config: RunConfig, shape: MicroBatchShape, pattern: str, positions: int, *, trained: bool
) -> Iterator[Collective]:
    """The collectives of the layers of a tower."""
    for kind in pattern:
        if not trained or config.objective == "ar":
            yield from _seams(config, shape, kind, backward=int(trained))
        forward, backward = (_forward_passes(config, kind), 1) if trained else (1, 0)
        yield from _mixer(config, positions, forward=forward, backward=backward)
        if kind == "E":
            yield from _routed_experts(config, shape, positions, forward=forward, backward=backward)


def _ends(
    config: RunConfig, shape: MicroBatchShape, scored: float, stages: Sequence[PipelineStage]
) -> Iterator[Collective]:
    """The collectives of the embeddings on the first stage, and of the loss on the last."""
    row = config.model.hidden_size * shape.activation_bytes
    positions, frozen = (shape.noisy, shape.clean) if config.objective == "two_tower" else (shape.clean, 0)
    if any(stage.first for stage in stages):
        yield Collective("tensor", "embeddings", "all_reduce", (positions + frozen) * row, 1)
        if config.parallel.sequence:
            yield Collective("tensor", "embeddings", "all_gather", positions * row, 1)
    if any(stage.last for stage in stages):
        distils = config.objective == "two_tower" and config.noise.distils
        if distils:
            # The distribution of the first token of a stretch follows from the stretch before it.
            yield Collective("context", "final states", "all_gather", shape.rows * shape.context * row, 1)
        if config.parallel.sequence:
            final = positions + frozen if distils else positions
            yield Collective("tensor", "final states", "all_gather", final * row, 1)
        # Of a position: the gradient, the highest logit, the sum, the logit of the target; and of
        # the targets of the context tower the highest logit and three sums.
        numbers = 7 if distils else 3
        yield Collective("tensor", "loss", "all_reduce", scored * (row + numbers * FP32), 1)


def _between_stages(config: RunConfig, shape: MicroBatchShape, stages: Sequence[PipelineStage]) -> Iterator[Collective]:
    """The activations for the next stage, and the gradients for the stage before."""
    row = config.model.hidden_size * shape.activation_bytes
    rows = shape.clean // shape.sequence
    if config.objective == "two_tower":
        rows += shape.noisy_on_rank + 3 * shape.levels
    count = sum((not stage.last) + (not stage.first) for stage in stages)
    yield Collective("pipeline", "streams", "send", rows * row, count)


def _once_per_step(config: RunConfig, weights: WeightBytes, stages: Sequence[PipelineStage]) -> Iterator[Collective]:
    """The collectives of gradients and parameters."""
    width = PRECISIONS[config.train.precision].bytes
    if config.parallel.sequence:
        shared = replicated_elements(config, stages)
        yield Collective("tensor", "gradients of shared parameters", "all_reduce", shared * FP32, 1)
    # Experts have their own optimizer. Each of the two optimizers gathers all buffers
    # (megatron-core 0.16.1, distrib_optimizer.py, step_with_ready_grads), unless they are gathered
    # during the next forward pass.
    gathers = 2 if weights.expert_elements and not config.parallel.overlap_param_gather else 1
    for group, elements in (("data", weights.dense_elements), ("expert data", weights.expert_elements)):
        if config.optimizer.distributed:
            yield Collective(group, "gradients", "reduce_scatter", elements * FP32, 1)
            yield Collective(group, "parameters", "all_gather", elements * width, gathers)
        else:
            yield Collective(group, "gradients", "all_reduce", elements * FP32, 1)


def collectives(
    config: RunConfig,
    layout: Layout,
    weights: WeightBytes,
    *,
    stages: Sequence[PipelineStage] | None = None,
    scored: float | None = None,
    imbalance: float = 1.0,
) -> list[Collective]:
    """All collectives of a rank in a step.

    Args:
        config: The configuration.
        layout: Its layout.
        weights: The weights of the rank.
        stages: The pipeline stages of the rank; `None` for the whole model.
        scored: The scored positions of a micro-batch; `None` for the expected number.
        imbalance: As in `expert_load`.
    """
    shape, kinds = micro_batch_shape(config, imbalance=imbalance), config.model.hybrid_override_pattern
    stages = stages if stages is not None else (whole_model(config.model),)
    layers = [layer for stage in stages for layer in stage.layers]
    two_tower = config.objective == "two_tower"
    if scored is None:
        share = (config.noise.time_min + config.noise.time_max) / 2
        scored = shape.noisy * share if two_tower else shape.clean - shape.sequences
    positions = shape.noisy if two_tower else shape.clean
    pattern = "".join(kinds[layer] for layer in layers)
    found = [*_tower(config, shape, pattern, positions, trained=True), *_ends(config, shape, scored, stages)]
    found += _between_stages(config, shape, stages)
    if two_tower:
        frozen = "".join(kinds[layer] for layer in layers if layer < len(context_layers(config)))
        found += _tower(config, shape, frozen, shape.clean, trained=False)
    per_step = micro_batches(config, layout)
    found = [replace(each, count=each.count * per_step) for each in found]
    ranks = group_sizes(layout)
    found += _once_per_step(config, weights, stages)
    return [each for each in found if ranks[each.group] > 1 and each.bytes and each.count]


def sent_by_group(found: list[Collective], layout: Layout) -> dict[str, float]:
    """The bytes that a rank sends in a step within each kind of group."""
    ranks, sums = group_sizes(layout), dict[str, float]()
    for each in found:
        sums[each.group] = sums.get(each.group, 0.0) + each.sent_bytes(ranks[each.group])
    return sums
