"""What Transformer Engine's FP8 rounds, done on any device: the arithmetic of weights and inputs, not its kernels.

As transformer-engine 2.11 scales for Hopper: E4M3 for what goes forward (common/recipe/__init__.py,
Float8CurrentScaling and Float8BlockScaling with their defaults), the scale from the largest
absolute value of what shares it (pytorch/custom_recipes/quantization_current_scaling.py,
_scale_from_amax_tensor: `pytest -m te` compares). Not emulated: how tensor cores sum the products,
and bfloat16 between the layers.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.hf.modeling_nemotron_h_twotower import Tower
from megatron_twotower.model.parameter_map import (
    context_entries,
    hf_from_parameter,
    layer_of_projection,
    parameter_from_hf,
)

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max

# Rows and columns that share a scale; None: all of a matrix.
Block = tuple[int, int] | None


@dataclass(frozen=True)
class Rounding:
    """Which values share a scale, of a weight and of what it is multiplied with (tokens in rows).

    powers_of_two: scales are rounded down to these.
    """

    weights: Block
    inputs: Block
    powers_of_two: bool


# By the names of `precision.CONTEXT_PRECISIONS`.
ROUNDINGS = {
    "fp8_current": Rounding(weights=None, inputs=None, powers_of_two=False),
    "fp8_blockwise": Rounding(weights=(128, 128), inputs=(1, 128), powers_of_two=True),
}


def scales(largest: Tensor, *, powers_of_two: bool) -> Tensor:
    """What to multiply with so that the largest absolute values (float32, any shape) become E4M3's; 1 for zeros."""
    found = (LARGEST / largest).clamp(max=torch.finfo(torch.float32).max)
    if powers_of_two:
        found = torch.ldexp(torch.ones_like(found), torch.frexp(found).exponent - 1)
    return torch.where(largest == 0, 1.0, found)


def rounded(x: Tensor, block: Block, *, powers_of_two: bool) -> Tensor:
    """x (..., columns) through E4M3 and back, in float32. Blocks at an edge are as large as what is left."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if block is None:
        scale = scales(rows.abs().amax(), powers_of_two=powers_of_two)
    else:
        height, width = block
        below, right = -rows.shape[0] % height, -rows.shape[1] % width
        blocks = F.pad(rows.abs(), (0, right, 0, below)).unflatten(1, (-1, width)).unflatten(0, (-1, height))
        scale = scales(blocks.amax((1, 3)), powers_of_two=powers_of_two)
        scale = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)[: rows.shape[0], : rows.shape[1]]
    # It saturates, as the conversion of the hardware does; torch's own would give NaN.
    narrow = (rows * scale).clamp(-LARGEST, LARGEST).to(E4M3)
    return (narrow.float() * scale.reciprocal()).view(x.shape)


class RoundedLinear(nn.Linear):
    """A projection whose weight was rounded, and which rounds what it multiplies with; inputs None: it does not."""

    def __init__(self, linear: nn.Linear, weight: Tensor, *, rounding: Rounding | None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        if self.rounding is not None:
            x = rounded(x, self.rounding.inputs, powers_of_two=self.rounding.powers_of_two)
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RoundedTower:
    """A tower with its projections and experts in FP8, everything else shared with the one it was made from.

    elements: that are held in FP8, of `total` in the tower. error: root mean square of the rounding
    over that of the weights.
    """

    tower: Tower
    elements: int
    total: int
    error: float


def rounded_tower(tower: Tower, model: ModelConfig, rounding: Rounding, *, inputs: bool) -> RoundedTower:
    """The tower as `train.context_precision` would hold it on one rank: matrices as Megatron has them, q, k and v one.

    Args:
        tower: a context tower in float32.
        inputs: round what is multiplied, too.
    """
    # A new tower of the same tensors: deepcopy finds each already copied.
    shared = {id(tensor): tensor for tensor in (*tower.parameters(), *tower.buffers())}
    made = copy.deepcopy(tower, shared)
    elements, squares, off = 0, 0.0, 0.0
    for entry in context_entries(model):
        if layer_of_projection(entry.megatron_name) is None:
            continue
        names = [name.removeprefix("context_tower.").removesuffix(".weight") for name in entry.hf_names]
        linears = [module for module in map(tower.get_submodule, names) if isinstance(module, nn.Linear)]
        weight = parameter_from_hf(entry, [linear.weight for linear in linears], model).float()
        narrow = rounded(weight, rounding.weights, powers_of_two=rounding.powers_of_two)
        elements += weight.numel()
        squares += weight.double().square().sum().item()
        off += (weight - narrow).double().square().sum().item()
        for name, linear, own in zip(names, linears, hf_from_parameter(entry, narrow, model), strict=True):
            parent, _, attribute = name.rpartition(".")
            made.get_submodule(parent).register_module(
                attribute, RoundedLinear(linear, own, rounding=rounding if inputs else None)
            )
    return RoundedTower(made, elements, sum(p.numel() for p in tower.parameters()), (off / squares) ** 0.5)
