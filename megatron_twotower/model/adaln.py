"""adaLN-single time conditioning: one network for all layers, and one small table per layer."""

import math

import torch
from torch import Tensor, nn

from megatron_twotower.config.schema import ConditioningConfig


def sinusoid(times: Tensor, config: ConditioningConfig) -> Tensor:
    """[cos, sin] features of `time_scale * t`, with frequencies in a geometric series.

    Args:
        times: Noise levels of any shape, float32.
        config: The scale, the period and the width of the features (`frequencies`).

    Returns:
        (*times.shape, frequencies) float32.
    """
    if config.round_time_to_bf16:
        times = times.bfloat16().float()
    half = config.frequencies // 2
    exponents = torch.arange(half, dtype=torch.float32, device=times.device) / half
    angles = (times * config.time_scale).unsqueeze(-1) * torch.exp(-math.log(config.period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeConditioning(nn.Module):
    """The network that turns noise levels into shift, scale and gate. Each layer adds a table.

    The parameters are named as in the released checkpoint: `t_embedder.mlp.{0,2}`, `t_block.1`.
    """

    def __init__(self, hidden: int, config: ConditioningConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, dtype=dtype, device=device)

        mlp = nn.Sequential(linear(config.frequencies, hidden), nn.SiLU(), linear(hidden, hidden))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.t_block = nn.Sequential(nn.SiLU(), linear(hidden, 3 * hidden))

    def forward(self, times: Tensor) -> Tensor:
        """Map noise levels (b, n) to the conditioning (b, n, 3h)."""
        features = sinusoid(times, self.config).to(next(self.parameters()).dtype)
        return self.t_block(self.t_embedder["mlp"](features))


def split_modulation(conditioning: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the shift, scale and gate of one layer, each (n, b, h).

    Args:
        conditioning: (b, n, 3h), the output of `TimeConditioning`.
        table: (3, h), the table of the layer.
    """
    rows = (conditioning + table.flatten()).transpose(0, 1).contiguous()
    shift, scale, gate = rows.chunk(3, dim=-1)
    return shift, scale, gate


def rows_of_rank(rows: Tensor, *, length: int, rank: int, ranks: int) -> Tensor:
    """Select the rows for the part of the sequence that a sequence-parallel rank has.

    Args:
        rows: (n, b, h), one row for each block, or (1, b, h) for the complete sequence.
        length: The number of positions of this rank; all positions if `ranks` is 1.
        rank: The rank among those that split the sequence.
        ranks: The number of ranks that split the sequence.

    Returns:
        (k, b, h), one row for each of k windows of equal length in this rank's part.
    """
    n, sequence = len(rows), length * ranks
    if n == 1 or ranks == 1:
        return rows
    block = sequence // n
    if length % block == 0:
        return rows[rank * length // block : (rank + 1) * length // block]
    return rows.repeat_interleave(block, dim=0)[rank * length : (rank + 1) * length]


def identity_state(hidden: int, layers: int, config: ConditioningConfig) -> dict[str, Tensor]:
    """The start values with which the denoiser is the backbone: gate 1, shift and scale 0."""
    table = torch.zeros(3, hidden)
    table[2] = 1.0
    state = {f"scale_shift_tables.{i}": table for i in range(layers)}
    return state | {"t_block.1.weight": torch.zeros(3 * hidden, hidden), "t_block.1.bias": torch.zeros(3 * hidden)}
