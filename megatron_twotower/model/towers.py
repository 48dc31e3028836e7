"""The towers: one stack of layers (`Tower`), and two of them together (`TwoTower`).

`Tower` is a NemotronH backbone. `TwoTower` is the model that is trained: the denoiser with its time
conditioning, and a reference to a frozen context tower. The context tower is deliberately not a
submodule. No DDP wrapper, optimizer, router-bias update or checkpoint that iterates over modules
can reach it.

Each of them may have only the layers of a pipeline stage. A stage then sends both streams to the
next stage, together with the time conditioning, which the first stage computes. The gradient of the
conditioning comes back with that of the noisy stream. So each parameter is on one stage only, and
no gradient has to be summed over stages. With one noise level per block of s tokens, the
conditioning is 3 / s of the size of a stream.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_twotower.common.device import device
from megatron_twotower.config.context_split import stretches_per_rank
from megatron_twotower.config.pipeline_stages import PipelineStage, whole_model
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.mcore import modules
from megatron_twotower.mcore.router import BALANCED_RANGES
from megatron_twotower.model.ablations import seen_handoffs, seen_times
from megatron_twotower.model.adaln import TimeConditioning
from megatron_twotower.model.layers import DenoiserLayer, Layer
from megatron_twotower.model.mixers import HANDOFF_KINDS
from megatron_twotower.ops.attention import block_mask
from megatron_twotower.ops.context_parallel import ContextRanks, context_ranks, steps_under
from megatron_twotower.types import Blocks, Handoff, NoisyBatch, TargetBatch, noise_buckets

# How far the clean stream may run ahead of the denoiser while messages are under way.
LAYERS_AHEAD = 2


class Head(ColumnParallelLinear):
    """This rank's slice of the head.

    The loss computes the logits, for a few positions at a time (`ops.cross_entropy`).
    """

    def forward(self) -> Tensor:
        """Return the weight (v / ranks, h).

        The loss gets the weight by this call, because hooks on modules gather parameters just
        before `forward`.
        """
        return self.weight


class Tower(MegatronModule):
    """A NemotronH backbone: embedding, layers, final norm and head. Hidden states are (l, b, h).

    If it is a pipeline stage, it has only the parts of the stage. Layers keep their index in the
    model, in `layers` and in the names of parameters.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        layer: Callable[..., Layer] = Layer,
        stage: PipelineStage | None = None,
    ) -> None:
        super().__init__(config)
        self.groups, self.stage = groups, stage or whole_model(model)
        if self.stage.first:
            self.embedding = VocabParallelEmbedding(
                model.vocab_size, model.hidden_size, init_method=config.init_method, config=config, tp_group=groups.tp
            )
        kinds = model.hybrid_override_pattern
        self.layers = nn.ModuleDict({str(i): layer(kinds[i], i, model, config, groups) for i in self.stage.layers})
        if self.stage.last:
            self.final_norm = modules.layer_modules(config).norm(config)
            self.output_layer = Head(
                model.hidden_size,
                model.vocab_size,
                config=modules.without_gradient_fusion(config),
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=groups.tp,
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (b, l) as (l, b, h), or this rank's part of l under sequence parallelism."""
        hidden = self.embedding(tokens).transpose(0, 1).contiguous()
        return scatter_to_sequence_parallel_region(hidden, self.groups.tp) if self._sequence_parallel else hidden

    def final(self, hidden: Tensor) -> Tensor:
        """Apply the final norm, and gather all l positions under sequence parallelism.

        Every tensor-parallel rank must compute the complete gradient of the loss.
        """
        hidden = self.final_norm(hidden)
        if not self._sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.groups.tp)

    @property
    def _sequence_parallel(self) -> bool:
        return bool(self.config.sequence_parallel)

    def vocabulary_start(self) -> int:
        """The index of the first vocabulary entry in this rank's slice of the head."""
        return int(self.output_layer.output_size_per_partition) * self.groups.tp.rank()


class PipelineModel(MegatronModule):
    """The interface that Megatron's schedules expect of a pipeline stage."""

    def __init__(self, config: TransformerConfig, stage: PipelineStage) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        # Megatron reads these attributes when it sums the gradients of tied embeddings over stages.
        # No embedding is tied here.
        self.pre_process, self.post_process = stage.first, stage.last
        self.share_embeddings_and_output_weights = False
        self._received: Tensor | None = None

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Set the tensor of the previous stage before a forward pass; `[None]` on the first."""
        self._received = input_tensor[0]

    def received(self) -> Tensor:
        """Take the rows (rows, h) that the previous stage sent for this forward pass.

        The module forgets them, because the schedule keeps them for the backward pass.
        """
        received, self._received = self._received, None
        assert received is not None, "only the first stage receives nothing"
        return received.squeeze(1)


def _pack_for_next_stage(hidden: Tensor, *others: Tensor) -> Tensor:
    """Pack tensors into the one tensor (rows, 1, h) that is sent to the next stage.

    Args:
        hidden: (..., h).
        others: Tensors whose number of elements is a multiple of h.
    """
    width = hidden.shape[-1]
    return torch.cat([stream.reshape(-1, 1, width) for stream in (hidden, *others)])


class BackboneModel(PipelineModel):
    """A single backbone, or one of its pipeline stages, for the `ar` objective."""

    def __init__(
        self,
        config: RunConfig,
        megatron: TransformerConfig,
        groups: ProcessGroupCollection,
        stage: PipelineStage | None = None,
    ) -> None:
        stage = stage or whole_model(config.model)
        super().__init__(megatron, stage)
        self.tower = Tower(config.model, megatron, groups, stage=stage)

    def forward(self, batch: TargetBatch) -> Tensor:
        """Compute the final hidden states (l, b, h).

        A stage that is not the last returns the tensor for the next stage instead.
        """
        tokens, stage = batch.tokens, self.tower.stage
        context = context_ranks(self.tower.groups.cp, batch.sequence_documents)
        blocks = Blocks(documents=batch.documents, padding=batch.padding, context=context)
        hidden = self.tower.embed(tokens) if stage.first else self.received().unflatten(0, (-1, len(tokens)))
        with modules.fp8_model_context(self.config):
            for layer in self.tower.layers.values():
                hidden, _ = layer(hidden, blocks)
        return self.tower.final(hidden) if stage.last else _pack_for_next_stage(hidden)


class CleanStream:
    """The clean stream through the frozen layers of a pipeline stage.

    Attributes:
        hidden: (l, b, h), after the layers that are done.
    """

    def __init__(self, layers: Sequence[nn.Module], hidden: Tensor, blocks: Blocks) -> None:
        self.hidden = hidden
        self._handoffs: deque[Handoff] = deque()
        self._pauses = self._run(layers, blocks)

    def _run(self, layers: Sequence[nn.Module], blocks: Blocks) -> Iterator[bool | None]:
        """Pause with True when a layer is done, and with None while a message is under way."""
        for layer in layers:
            assert isinstance(layer, Layer)
            self.hidden, handoff = yield from steps_under(torch.no_grad, layer.steps(self.hidden, blocks))
            self._handoffs.append(handoff)
            yield True

    def next_handoff(self) -> Handoff:
        """The handoff of the next layer, which is computed if it is not done."""
        while not self._handoffs:
            next(self._pauses)
        return self._handoffs.popleft()

    def run_ahead(self) -> None:
        """Run until a message to other ranks is under way, at most `LAYERS_AHEAD` layers.

        What the denoiser then computes hides the time that the message takes. A layer M sends two
        messages and the layer E after it none, so two layers ahead there is a message to each layer
        of the denoiser.
        """
        while len(self._handoffs) < LAYERS_AHEAD and next(self._pauses, None):
            pass


class TwoTower(PipelineModel):
    """Context tower and denoiser: layer i of the context tower, then layer i of the denoiser.

    Attributes:
        context_layers: The number of layers of the context tower up to the last handoff. Those
            after it run only if the context tower gives targets.
    """

    def __init__(
        self, config: RunConfig, megatron: TransformerConfig, groups: ProcessGroupCollection, context: Tower
    ) -> None:
        super().__init__(megatron, context.stage)
        # The conditioning is registered before the tower, because parameters are gathered in the
        # order of registration, and it is used first.
        if context.stage.first:
            self.conditioning = TimeConditioning(
                config.model.hidden_size, config.conditioning, dtype=megatron.params_dtype, device=device()
            )
            for parameter in self.conditioning.parameters():
                parameter.sequence_parallel = megatron.sequence_parallel  # type: ignore[attr-defined]
        self.tower = Tower(config.model, megatron, groups, layer=DenoiserLayer, stage=context.stage)
        self.recompute = frozenset(config.train.recompute_layers)
        self.without = config.conditioning.without
        self.report_buckets = config.noise.report_buckets
        self.balances_experts = config.train.sequence_aux_loss > 0
        self._context = (context,)  # a tuple, so that it does not become a submodule
        with_handoff = [i for i, kind in enumerate(config.model.hybrid_override_pattern) if kind in HANDOFF_KINDS]
        self.context_layers = max(with_handoff, default=-1) + 1
        self.has_attention = any(config.model.hybrid_override_pattern[i] == "*" for i in context.stage.layers)

    @property
    def context(self) -> Tower:
        """The frozen context tower."""
        return self._context[0]

    def forward(self, batch: NoisyBatch) -> Tensor:
        """Compute the final hidden states (l, r b, h) of the noisy stream.

        With `batch.teacher_shares` those of the clean stream follow: (l, r b + b, h). They need the
        layers of the context tower after the last handoff. A stage that is not the last returns the
        tensor for the next stage instead.
        """
        context, stage = context_ranks(self.tower.groups.cp, batch.sequence_documents), self.tower.stage
        masks = self._attention_masks(batch, context)
        blocks = Blocks(
            batch.block, batch.documents, batch.padding, batch.sequence_weights, masks, context, self._buckets(batch)
        )
        clean, noisy, conditioning = self._first_inputs(batch) if stage.first else self._received_inputs(batch)
        running = [n for n in stage.layers if n < self.context_layers or batch.teacher_shares is not None]
        stream = CleanStream([self.context.layers[str(number)] for number in running], clean, blocks)
        next_handoff = stream.next_handoff
        if self.without != "nothing":
            seen = seen_handoffs([next_handoff() for _ in running], self.without)
            next_handoff = iter(seen).__next__
        with modules.fp8_model_context(self.config):
            for number in stage.layers:
                handoff = next_handoff() if number in running else None
                if context is not None:
                    stream.run_ahead()
                noisy = self._denoiser_layer(number, noisy, conditioning, handoff, blocks)
        clean = stream.hidden
        if not stage.last:
            return _pack_for_next_stage(clean, noisy, conditioning)
        if batch.teacher_shares is None:
            return self.tower.final(noisy)
        with torch.no_grad():
            clean = self.context.final(clean)
        return torch.cat([self.tower.final(noisy), clean], dim=1)

    def _buckets(self, batch: NoisyBatch) -> Tensor | None:
        """The range of noise levels of each position (r b, l), to balance or count experts."""
        if not self.training:
            return noise_buckets(batch.position_times, self.report_buckets)
        return noise_buckets(batch.position_times, BALANCED_RANGES) if self.balances_experts else None

    def _attention_masks(self, batch: NoisyBatch, context: ContextRanks | None) -> tuple[Any, ...]:
        """The masks of all attention layers, which are built once."""
        if not self.has_attention:
            return ()
        if context is None:
            return (block_mask(batch.tokens, block=batch.block, documents=batch.documents),)
        length, masks = batch.tokens.shape[1], []
        for place, number in enumerate(context.numbers):
            known = None if context.documents is None else context.documents[:, : (number + 1) * length]
            tokens = batch.tokens[place :: len(context.numbers)]
            masks.append(block_mask(tokens, block=batch.block, documents=known, first=number * length))
        return tuple(masks)

    def _first_inputs(self, batch: NoisyBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The clean stream (l, b, h), noisy stream (l, r b, h) and conditioning (r b, n, 3h)."""
        with torch.no_grad():
            clean = self.context.embed(batch.tokens)
        return clean, self.tower.embed(batch.noisy), self.conditioning(seen_times(batch.times, self.without))

    def _received_inputs(self, batch: NoisyBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the previous stage, with gradients of all but the clean stream."""
        received, sequences, copies = self.received(), len(batch.tokens), len(batch.noisy)
        rows = 3 * batch.times.numel()
        streams, conditioning = received[:-rows], received[-rows:]
        clean, noisy = streams.split([len(streams) * part // (sequences + copies) for part in (sequences, copies)])
        return (
            clean.detach().unflatten(0, (-1, sequences)),
            noisy.unflatten(0, (-1, copies)),
            conditioning.reshape(*batch.times.shape, -1),
        )

    def _denoiser_layer(
        self, number: int, noisy: Tensor, conditioning: Tensor, handoff: Handoff, blocks: Blocks
    ) -> Tensor:
        layer, context = self.tower.layers[str(number)], self.context.layers[str(number)]
        assert isinstance(layer, DenoiserLayer) and isinstance(context, Layer)
        if layer.kind not in self.recompute or not torch.is_grad_enabled():
            return layer(noisy, conditioning, handoff, blocks)
        # The first call of `run`, in the forward pass, takes the handoff. The second call, in the
        # backward pass, recomputes it, so that the handoff need not stay in memory between them.
        computed_handoff, recompute_handoff = [handoff], context.handoff_recompute_fn(handoff, blocks)

        def run(noisy: Tensor, conditioning: Tensor) -> Tensor:
            current = computed_handoff.pop() if computed_handoff else recompute_handoff()
            return layer(noisy, conditioning, current, blocks)

        return modules.run_with_recompute(run, noisy, conditioning, config=self.config, groups=self.tower.groups)


def build_context_tower(
    config: RunConfig, megatron: TransformerConfig, groups: ProcessGroupCollection, stage: PipelineStage | None = None
) -> Tower:
    """Build a frozen tower in evaluation mode. The caller loads its weights."""
    with torch.no_grad():  # FP8 weights are then stored for the forward pass only
        tower = Tower(config.model, modules.context_tower_config(config, megatron), groups, stage=stage)
    return tower.requires_grad_(False).eval()


def rows_between_stages(config: RunConfig, *, sequences: int, times: Tensor | None, ranks: int) -> int:
    """The number of rows of h that one stage sends to the next for a micro-batch.

    Args:
        config: The configuration of the run.
        sequences: b, the number of sequences in the micro-batch.
        times: The noise levels, if they are given and not drawn.
        ranks: The number of tensor-parallel ranks that split a sequence (sequence parallelism).
    """
    noise, context = config.noise, config.parallel.context
    length = config.data.sequence_length_tokens // context
    if config.objective == "ar":
        return sequences * length // ranks
    per_block = (noise.time_per == "block") if times is None else times.shape[1] > 1
    levels = length // noise.block_size_tokens if per_block else stretches_per_rank(context)
    draws = noise.draws_per_context if times is None else 1
    return sequences * ((1 + draws) * length // ranks + 3 * draws * levels)
