"""The rival of two towers: one network over clean and noisy positions together, as block diffusion is usually trained.

It costs two autoregressive steps, because both halves go forward and backward through the trained
network. Used by `bench.step` alone.
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
from megatron_twotower.types import Blocks, NoisyBatch

# Queries per call of its attention on a CPU.
QUERIES = 256


class ConcatenatedAttention(SelfAttention):
    """Attention over [clean; noisy] of 2 l: clean positions causal, noisy ones by block. Gradients flow everywhere."""

    def causal(self, hidden: Tensor, blocks: Blocks) -> tuple[Tensor, None]:
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
    """`block_attention` with gradients into the clean keys and values too: FlexAttention on CUDA; elsewhere torch's
    attention, some queries at a time, against the keys that they may need."""
    clean = {"clean_key": clean_key, "clean_value": clean_value}
    if query.is_cuda:
        return flex_block_attention(query, key, value, **clean, block=block)
    length, step, outs = query.shape[2], max(1, QUERIES // block) * block, []
    of_block = torch.arange(length) // block
    for start in range(0, length, step):
        stop = min(start + step, length)
        own, past = of_block[start:stop].unsqueeze(-1), stop - block
        mask = torch.cat([of_block[:past] < own, of_block[start:stop] == own], dim=-1)
        keys, values = (
            torch.cat([clean[:, :, :past], noisy[:, :, start:stop]], dim=2)
            for clean, noisy in ((clean_key, key), (clean_value, value))
        )
        outs.append(
            F.scaled_dot_product_attention(query[:, :, start:stop], keys, values, attn_mask=mask, enable_gqa=True)
        )
    return torch.cat(outs, dim=2)


class ConcatenatedLayer(Layer):
    """A backbone's layer over both streams at once."""

    def __init__(
        self, kind: str, number: int, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        assert kind != "M", "a concatenated stream would run the clean state on into the noisy half"
        super().__init__(kind, number, model, config, groups)
        if kind == "*":
            self.mixer = ConcatenatedAttention(model, config, groups)


class ConcatenatedModel(PipelineModel):
    """One trained network over clean and noisy positions together, as block diffusion trains without two towers.

    Without time conditioning, which costs the denoiser a little.
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
