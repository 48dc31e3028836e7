"""The layers of both towers: a norm, a mixer, and in the denoiser a modulation."""

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_twotower.common.device import device
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.mcore.modules import fp8_init_context, fp8_layer_context, layer_modules
from megatron_twotower.model.adaln import rows_of_rank, split_modulation
from megatron_twotower.model.mixers import MIXERS, MixtureOfExperts
from megatron_twotower.ops.context_parallel import Steps, steps_under
from megatron_twotower.ops.modulation import add_gated, modulate
from megatron_twotower.types import Blocks, Handoff

# Kinds of layers in which modulation precedes the norm. In these layers Megatron can fuse the norm
# with the projection after it.
MODULATED_BEFORE_NORM = frozenset("M*")


def _norm(kind: str, config: TransformerConfig) -> nn.Module:
    """The norm of a layer; the identity if its first projection includes the norm."""
    modules = layer_modules(config)
    fused = modules.norm_column_linear and kind in MODULATED_BEFORE_NORM
    return nn.Identity() if fused else modules.norm(config)


class Layer(MegatronModule):
    """One layer of a tower: `x + mixer(norm(x))`.

    Attributes:
        kind: The kind of its mixer, a key of `MIXERS`.
        number: The index of the layer in the model, from 0.
    """

    def __init__(
        self, kind: str, number: int, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.kind, self.number = kind, number
        self.norm = _norm(kind, config)
        with fp8_init_context(config, number):
            self.mixer = MIXERS[kind](model, config, groups)
        if isinstance(self.mixer, MixtureOfExperts):
            self.mixer.moe.set_layer_number(number + 1)

    def forward(self, hidden: Tensor, blocks: Blocks) -> tuple[Tensor, Handoff]:
        """Apply the layer to a causal stream (l, b, h); return the output and the handoff."""
        with fp8_layer_context(self.config, self.number):
            out, handoff = self.mixer(self.norm(hidden), blocks, mode="causal")
        return hidden + out, handoff

    def steps(self, hidden: Tensor, blocks: Blocks) -> Steps[tuple[Tensor, Handoff]]:
        """`forward` of a frozen layer, with pauses while messages to other ranks are under way.

        Hooks of this layer and its mixer do not run.
        """
        mixing = self.mixer.causal(self.norm(hidden), blocks)
        out, handoff = yield from steps_under(lambda: fp8_layer_context(self.config, self.number), mixing)
        return hidden + out, handoff

    def handoff_recompute_fn(self, handoff: Handoff, blocks: Blocks) -> Callable[[], Handoff]:
        """A function that returns the handoff again, as in `Mixer.handoff_recompute_fn`."""
        return self.mixer.handoff_recompute_fn(handoff, blocks)


class DenoiserLayer(Layer):
    """One layer of the denoiser: `x + gate * mixer(...)`.

    The modulation is before or after the norm, as the kind of the layer asks.
    """

    def __init__(
        self, kind: str, number: int, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(kind, number, model, config, groups)
        table = torch.empty(3, config.hidden_size, dtype=config.params_dtype, device=device())
        self.scale_shift_table = nn.Parameter(table)
        self.scale_shift_table.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.sequence_ranks = groups.tp if config.sequence_parallel else None

    def forward(  # type: ignore[override]
        self, hidden: Tensor, conditioning: Tensor, handoff: Handoff, blocks: Blocks
    ) -> Tensor:
        """Apply the layer to a noisy stream.

        Args:
            hidden: (l, r b, h), with this rank's part of l under sequence parallelism.
            conditioning: (r b, n, 3h), or (r b, 1, 3h) if a sequence has one noise level.
            handoff: The handoff of the context layer of the same index; `None` in layers E and -.
            blocks: How the sequences are divided.

        Returns:
            The output, shaped like `hidden`.
        """
        rows = split_modulation(conditioning, self.scale_shift_table)
        shift, scale, gate = (self._rows_of_rank(row, hidden.shape[0]) for row in rows)
        if self.kind in MODULATED_BEFORE_NORM:
            normed = self.norm(modulate(hidden, shift, scale))
        else:
            normed = modulate(self.norm(hidden), shift, scale)
        with fp8_layer_context(self.config, self.number):
            out, _ = self.mixer(normed, blocks, mode="denoise", handoff=handoff)
        return add_gated(hidden, gate, out)

    def _rows_of_rank(self, rows: Tensor, length: int) -> Tensor:
        if self.sequence_ranks is None:
            return rows
        return rows_of_rank(rows, length=length, rank=self.sequence_ranks.rank(), ranks=self.sequence_ranks.size())
