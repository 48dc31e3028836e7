"""The towers: one stack of layers, and two of them in lockstep.

`Tower` is a NemotronH backbone. `TwoTower` is what is trained: the denoiser with its time
conditioning, beside a frozen context tower that it does not own. The context tower is deliberately
not a submodule: no wrapper, optimizer, router-bias update or checkpoint that walks over modules can
reach it.

Each may hold a stretch of the layers only, a pipeline stage. Then both streams travel to the next
stage, and with them the time conditioning, which is made once, on the first: its gradient comes
back with that of the noisy stream, so that no parameter stands on two stages and none has to be
summed, counted or stored over them. It adds 3 / S of a stream to what travels, where every block
has its own time.
"""

from collections.abc import Callable

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
from megatron_twotower.config.pipeline_stages import PipelineStage, whole_model
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.mcore import modules
from megatron_twotower.model.adaln import TimeConditioning
from megatron_twotower.model.layers import HANDING_ON, DenoiserLayer, Layer
from megatron_twotower.ops.attention import block_mask
from megatron_twotower.types import Blocks, Handoff, NoisyBatch


class Head(ColumnParallelLinear):
    """This rank's slice of the head. Its logits are made with the loss, a few at a time (`ops.cross_entropy`)."""

    def forward(self) -> Tensor:
        """Its weight (v / ranks, h), as a call: hooks on modules gather parameters just before use."""
        return self.weight


class Tower(MegatronModule):
    """A NemotronH backbone: embedding, layers, final norm, head. Hidden states are (l, b, h).

    Of a stage, its part: layers keep their numbers in the whole model, in `layers` and in the names
    of parameters.
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
            self.final_norm = modules.of(config).norm(config)
            self.output_layer = Head(
                model.hidden_size,
                model.vocab_size,
                config=modules.unfused(config),
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=groups.tp,
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l) -> (l, b, h), this rank's part of l under sequence parallelism."""
        hidden = self.embedding(tokens).transpose(0, 1).contiguous()
        return scatter_to_sequence_parallel_region(hidden, self.groups.tp) if self._sequence_parallel else hidden

    def final(self, hidden: Tensor) -> Tensor:
        """Normed hidden states of all of l, for a loss whose gradient every tensor-parallel rank computes in full."""
        hidden = self.final_norm(hidden)
        if not self._sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.groups.tp)

    @property
    def _sequence_parallel(self) -> bool:
        return bool(self.config.sequence_parallel)

    def vocabulary_start(self) -> int:
        """First vocabulary entry of this rank's slice of the head."""
        return int(self.output_layer.output_size_per_partition) * self.groups.tp.rank()


class PipelineModel(MegatronModule):
    """What Megatron's schedules expect of a stage: a place for what the stage before sent."""

    def __init__(self, config: TransformerConfig, stage: PipelineStage) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        # Megatron asks these when it sums the gradients of tied embeddings over stages: there are
        # none.
        self.pre_process, self.post_process = stage.first, stage.last
        self.share_embeddings_and_output_weights = False
        self._received: Tensor | None = None

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Called before each forward pass; None on the first stage."""
        self._received = input_tensor[0]

    def received(self) -> Tensor:
        """The rows (n, h) that the stage before sent for this forward pass. The schedule keeps them, not the module."""
        received, self._received = self._received, None
        assert received is not None, "only the first stage starts without"
        return received.squeeze(1)


def _to_send(hidden: Tensor, *others: Tensor) -> Tensor:
    """Tensors of whole rows of h, the first (..., h), as the one tensor (n, 1, h) that Megatron's schedules send on."""
    width = hidden.shape[-1]
    return torch.cat([stream.reshape(-1, 1, width) for stream in (hidden, *others)])


class BackboneModel(PipelineModel):
    """A single backbone, or a stage of one, for the `ar` objective."""

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

    def forward(self, tokens: Tensor, documents: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """Tokens (b, l), and documents and padding (b, l) where they count -> final hidden states (l, b, h).

        A stage that is not the last gives what the next one receives.
        """
        blocks, stage = Blocks(documents=documents, padding=padding), self.tower.stage
        hidden = self.tower.embed(tokens) if stage.first else self.received().unflatten(0, (-1, len(tokens)))
        with modules.model_computing(self.config):
            for layer in self.tower.layers.values():
                hidden, _ = layer(hidden, blocks)
        return self.tower.final(hidden) if stage.last else _to_send(hidden)


class TwoTower(PipelineModel):
    """Context tower and denoiser in lockstep: layer i of one, then layer i of the other."""

    def __init__(
        self, config: RunConfig, megatron: TransformerConfig, groups: ProcessGroupCollection, context: Tower
    ) -> None:
        super().__init__(megatron, context.stage)
        if context.stage.first:  # before the tower: parameters are gathered in the order in which they are used
            self.conditioning = TimeConditioning(
                config.model.hidden_size, config.conditioning, dtype=megatron.params_dtype, device=device()
            )
            for parameter in self.conditioning.parameters():
                parameter.sequence_parallel = megatron.sequence_parallel  # type: ignore[attr-defined]
        self.tower = Tower(config.model, megatron, groups, layer=DenoiserLayer, stage=context.stage)
        self.recompute = frozenset(config.train.recompute_layers)
        self._frozen = (context,)  # in a tuple: not a submodule
        # The context tower goes no further than the last layer that hands something on.
        handing_on = [i for i, kind in enumerate(config.model.hybrid_override_pattern) if kind in HANDING_ON]
        self.context_layers = max(handing_on, default=-1) + 1
        self.has_attention = any(config.model.hybrid_override_pattern[i] == "*" for i in context.stage.layers)

    @property
    def context(self) -> Tower:
        return self._frozen[0]

    def forward(self, batch: NoisyBatch) -> Tensor:
        """Final hidden states (l, r b, h) of the noisy stream of every block.

        A stage that is not the last gives what the next one receives.
        """
        # Built once for all attention layers.
        mask = block_mask(batch.tokens, block=batch.block, documents=batch.documents) if self.has_attention else None
        blocks = Blocks(batch.block, batch.documents, batch.padding, batch.sequence_weights, mask)
        stage = self.tower.stage
        clean, noisy, conditioning = self._start(batch) if stage.first else self._continue(batch)
        with modules.model_computing(self.config):
            for number in stage.layers:
                handoff = None
                if number < self.context_layers:
                    with torch.no_grad():
                        clean, handoff = self.context.layers[str(number)](clean, blocks)
                noisy = self._denoise(number, noisy, conditioning, handoff, blocks)
        return self.tower.final(noisy) if stage.last else _to_send(clean, noisy, conditioning)

    def _start(self, batch: NoisyBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Clean (l, b, h), noisy (l, r b, h) and conditioning (r b, n, 3h) before the first layer."""
        with torch.no_grad():
            clean = self.context.embed(batch.tokens)
        return clean, self.tower.embed(batch.noisy), self.conditioning(batch.times)

    def _continue(self, batch: NoisyBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the stage before. Gradients go back into the noisy stream and the conditioning alone."""
        received, sequences, copies = self.received(), len(batch.tokens), len(batch.noisy)
        rows = 3 * batch.times.numel()
        streams, conditioning = received[:-rows], received[-rows:]
        clean, noisy = streams.split([len(streams) * part // (sequences + copies) for part in (sequences, copies)])
        return (
            clean.detach().unflatten(0, (-1, sequences)),
            noisy.unflatten(0, (-1, copies)),
            conditioning.reshape(*batch.times.shape, -1),
        )

    def _denoise(self, number: int, noisy: Tensor, conditioning: Tensor, handoff: Handoff, blocks: Blocks) -> Tensor:
        layer, context = self.tower.layers[str(number)], self.context.layers[str(number)]
        assert isinstance(layer, DenoiserLayer) and isinstance(context, Layer)
        if layer.kind not in self.recompute or not torch.is_grad_enabled():
            return layer(noisy, conditioning, handoff, blocks)
        # The forward pass reads the hand-off as it came; the backward pass makes it again from what
        # is held.
        at_hand, again = [handoff], context.recompute_source(handoff, blocks)

        def run(noisy: Tensor, conditioning: Tensor) -> Tensor:
            ready = at_hand.pop() if at_hand else again()
            return layer(noisy, conditioning, ready, blocks)

        return modules.recomputed(run, noisy, conditioning, config=self.config, groups=self.tower.groups)


def build_context_tower(
    config: RunConfig, megatron: TransformerConfig, groups: ProcessGroupCollection, stage: PipelineStage | None = None
) -> Tower:
    """A tower without gradients, in evaluation mode for good: its weights are the caller's to load."""
    with torch.no_grad():  # what is held in FP8 is then made for the forward pass alone
        tower = Tower(config.model, modules.frozen(config, megatron), groups, stage=stage)
    return tower.requires_grad_(False).eval()


def rows_between_stages(config: RunConfig, *, sequences: int, times: Tensor | None, ranks: int) -> int:
    """Rows of h that one stage sends to the next for a micro-batch of b sequences.

    Args:
        times: the noise levels where they are given, as in `corrupt`.
        ranks: that split a sequence between them (sequence parallelism).
    """
    noise, length = config.noise, config.data.sequence_length_tokens
    if config.objective == "ar":
        return sequences * length // ranks
    blocks = length // noise.block_size_tokens if noise.time_per == "block" else 1
    draws, levels = (noise.draws_per_context, blocks) if times is None else (1, times.shape[1])
    return sequences * ((1 + draws) * length // ranks + 3 * draws * levels)
