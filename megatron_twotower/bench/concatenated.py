"""The baseline of two towers: one network over concatenated clean and noisy positions.

Block diffusion is usually trained this way. A step costs as much as two autoregressive steps,
because both halves go forward and backward through the trained network. Used only by `bench.step`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_twotower.config.pipeline_stages import whole_model
from megatron_twotower.config.schema import ModelConfig, RunConfig
from megatron_twotower.mcore.parallel import ProcessGroupCollection, TransformerConfig
from megatron_twotower.model.layers import Layer
from megatron_twotower.model.mixers import SelfAttention
from megatron_twotower.model.towers import PipelineModel, Tower
from megatron_twotower.ops.attention import causal_attention, flex_block_attention
from megatron_twotower.ops.context_parallel import Steps
from megatron_twotower.types import Blocks, NoisyBatch

# Queries per call of the attention on a CPU.
QUERIES = 256


class ConcatenatedAttention(SelfAttention):
    """Attention over [clean; noisy] of length 2 l, with gradients into both halves.

    Clean positions attend causally. Noisy positions attend to the clean blocks before theirs and to
    their own noisy block.
    """

    def causal(self, hidden: Tensor, blocks: Blocks) -> Steps[tuple[Tensor, None]]:
        """The output of the layer for both halves (2 l, b, h)."""
        yield from ()
        assert blocks.size is not None and blocks.documents is None
        halves = [tensor.chunk(2, dim=2) for tensor in self._project(hidden)]
        (clean_query, query), (clean_key, key), (clean_value, value) = halves
        clean = causal_attention(clean_query, clean_key, clean_value)
        noisy = concatenated_block_attention(
            query, key, value, clean_key=clean_key, clean_value=clean_value, block=blocks.size
        )
        return self._output(torch.cat([clean, noisy], dim=2)), None


def concatenated_block_attention(
    query: Tensor, key: Tensor, value: Tensor, *, clean_key: Tensor, clean_value: Tensor, block: int
) -> Tensor:
    """`block_attention` that also has gradients into the clean keys and values.

    On CUDA this is FlexAttention. On a CPU it is torch's attention, `QUERIES` queries at a time,
    over only those keys that these queries may see.
    """
    clean = {"clean_key": clean_key, "clean_value": clean_value}
    if query.is_cuda:
        return flex_block_attention(query, key, value, **clean, block=block)
    length, step, outputs = query.shape[2], max(1, QUERIES // block) * block, []
    block_numbers = torch.arange(length) // block
    for start in range(0, length, step):
        stop = min(start + step, length)
        own, past = block_numbers[start:stop].unsqueeze(-1), stop - block
        mask = torch.cat([block_numbers[:past] < own, block_numbers[start:stop] == own], dim=-1)
        keys, values = (
            torch.cat([clean[:, :, :past], noisy[:, :, start:stop]], dim=2)
            for clean, noisy in ((clean_key, key), (clean_value, value))
        )
        outputs.append(
            F.scaled_dot_product_attention(query[:, :, start:stop], keys, values, attn_mask=mask, enable_gqa=True)
        )
    return torch.cat(outputs, dim=2)


class ConcatenatedLayer(Layer):
    """A layer of a backbone, over the clean and the noisy stream together."""

    def __init__(
        self, kind: str, number: int, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        assert kind != "M", "a Mamba layer would carry the clean state into the noisy half"
        super().__init__(kind, number, model, config, groups)
        if kind == "*":
            self.mixer = ConcatenatedAttention(model, config, groups)


class ConcatenatedModel(PipelineModel):
    """One trained network over concatenated clean and noisy positions.

    It has no time conditioning, which costs the denoiser a little.
    """

    def __init__(self, config: RunConfig, megatron: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(megatron, whole_model(config.model))
        self.tower = Tower(config.model, megatron, groups, layer=ConcatenatedLayer)

    def forward(self, batch: NoisyBatch) -> Tensor:
        """Final hidden states (l, b, h) of the noisy positions."""
        blocks, length = Blocks(batch.block), batch.tokens.shape[1]
        hidden = self.tower.embed(torch.cat([batch.tokens, batch.noisy], dim=1))
        for layer in self.tower.layers.values():
            hidden, _ = layer(hidden, blocks)
        return self.tower.final_norm(hidden[length:])
