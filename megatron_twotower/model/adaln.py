"""adaLN-single time conditioning: one small network for all layers, one table of three rows per layer."""

import math

import torch
from torch import Tensor, nn

from megatron_twotower.config.schema import ConditioningConfig


def sinusoid(times: Tensor, config: ConditioningConfig) -> Tensor:
    """[cos, sin] features of `time_scale * t`, frequencies falling geometrically over the period.

    Args:
        times: noise levels, any shape, float32.

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
    """Times (b, n) -> (b, n, 3h): the shift, scale and gate that every layer's table is added to.

    Parameter names are those of the released checkpoint: `t_embedder.mlp.{0,2}`, `t_block.1`.
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
        features = sinusoid(times, self.config).to(next(self.parameters()).dtype)
        return self.t_block(self.t_embedder["mlp"](features))


def split_modulation(conditioning: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, scale and gate of one layer, each (n, b, h), from (b, n, 3h) and the layer's table (3, h)."""
    rows = (conditioning + table.flatten()).transpose(0, 1).contiguous()
    shift, scale, gate = rows.chunk(3, dim=-1)
    return shift, scale, gate


def rows_of_rank(rows: Tensor, *, length: int, rank: int, ranks: int) -> Tensor:
    """The rows (n, b, h) of a rank's part of the sequence, one for each of its stretches of equal length: (k, b, h).

    Args:
        length: positions of this rank, the whole sequence where `ranks` is 1.
    """
    n, whole = len(rows), length * ranks
    if n == 1 or ranks == 1:
        return rows
    block = whole // n
    if length % block == 0:
        return rows[rank * length // block : (rank + 1) * length // block]
    return rows.repeat_interleave(block, dim=0)[rank * length : (rank + 1) * length]


def identity_state(hidden: int, layers: int, config: ConditioningConfig) -> dict[str, Tensor]:
    """The part of a conditioning start that makes the denoiser the backbone: gate 1, shift and scale 0."""
    table = torch.zeros(3, hidden)
    table[2] = 1.0
    state = {f"scale_shift_tables.{i}": table for i in range(layers)}
    return state | {"t_block.1.weight": torch.zeros(3 * hidden, hidden), "t_block.1.bias": torch.zeros(3 * hidden)}
