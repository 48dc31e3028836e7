"""An emulation of Transformer Engine's FP8 rounding of weights and inputs, on any device.

It scales as transformer-engine 2.11 does for Hopper: E4M3 in the forward pass
(common/recipe/__init__.py, Float8CurrentScaling and Float8BlockScaling with their defaults), and a
scale from the largest absolute value of all values that share it
(pytorch/custom_recipes/quantization_current_scaling.py, _scale_from_amax_tensor; `pytest -m te`
compares). Not emulated: the order in which tensor cores sum products, and bfloat16 between layers.
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

# Rows and columns that share a scale; all of a matrix if None.
Block = tuple[int, int] | None


@dataclass(frozen=True)
class Rounding:
    """Which values share a scale.

    Attributes:
        weights: The block of a weight.
        inputs: The block of the inputs of a projection, with tokens in rows.
        powers_of_two: Scales are rounded down to powers of two.
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
    """Factors that bring the largest absolute values to the largest number of E4M3; 1 for zeros.

    Args:
        largest: The largest absolute values, float32 of any shape.
        powers_of_two: Round the factors down to powers of two.
    """
    found = (LARGEST / largest).clamp(max=torch.finfo(torch.float32).max)
    if powers_of_two:
        found = torch.ldexp(torch.ones_like(found), torch.frexp(found).exponent - 1)
    return torch.where(largest == 0, 1.0, found)


def rounded(x: Tensor, block: Block, *, powers_of_two: bool) -> Tensor:
    """Round x (..., columns) to E4M3 and return it in float32.

    Args:
        block: Rows and columns that share a scale. Blocks at an edge may be smaller.
        powers_of_two: See `scales`.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    if block is None:
        scale = scales(rows.abs().amax(), powers_of_two=powers_of_two)
    else:
        height, width = block
        below, right = -rows.shape[0] % height, -rows.shape[1] % width
        blocks = F.pad(rows.abs(), (0, right, 0, below)).unflatten(1, (-1, width)).unflatten(0, (-1, height))
        scale = scales(blocks.amax((1, 3)), powers_of_two=powers_of_two)
        scale = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)[: rows.shape[0], : rows.shape[1]]
    # The conversion saturates, as that of the hardware does. torch's would give NaN.
    narrow = (rows * scale).clamp(-LARGEST, LARGEST).to(E4M3)
    return (narrow.float() * scale.reciprocal()).view(x.shape)


class RoundedLinear(nn.Linear):
    """A projection with a rounded weight.

    Args:
        linear: The projection to replace, whose bias is shared.
        weight: The rounded weight.
        rounding: How the inputs are rounded; they are not if `None`.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, *, rounding: Rounding | None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x (..., in features)."""
        if self.rounding is not None:
            x = rounded(x, self.rounding.inputs, powers_of_two=self.rounding.powers_of_two)
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RoundedTower:
    """A tower with its projections and experts in FP8.

    It shares everything else with the tower that it was made from.

    Attributes:
        tower: The tower.
        elements: The number of elements in FP8.
        total: The number of all elements of the tower.
        error: Root mean square of the rounding error over that of the weights.
    """

    tower: Tower
    elements: int
    total: int
    error: float


def rounded_tower(tower: Tower, model: ModelConfig, rounding: Rounding, *, inputs: bool) -> RoundedTower:
    """The tower as `train.context_precision` would keep it on one rank.

    Matrices are rounded in Megatron's layout, where q, k and v are one matrix.

    Args:
        tower: A context tower in float32.
        inputs: Round the inputs of projections too.
    """
    # A new tower with the same tensors: the memo tells deepcopy that they are already copied.
    memo = {id(tensor): tensor for tensor in (*tower.parameters(), *tower.buffers())}
    copied = copy.deepcopy(tower, memo)
    elements, squares, squared_errors = 0, 0.0, 0.0
    for entry in context_entries(model):
        if layer_of_projection(entry.megatron_name) is None:
            continue
        names = [name.removeprefix("context_tower.").removesuffix(".weight") for name in entry.hf_names]
        linears = [module for module in map(tower.get_submodule, names) if isinstance(module, nn.Linear)]
        weight = parameter_from_hf(entry, [linear.weight for linear in linears], model).float()
        narrow = rounded(weight, rounding.weights, powers_of_two=rounding.powers_of_two)
        elements += weight.numel()
        squares += weight.double().square().sum().item()
        squared_errors += (weight - narrow).double().square().sum().item()
        for name, linear, own in zip(names, linears, hf_from_parameter(entry, narrow, model), strict=True):
            parent, _, attribute = name.rpartition(".")
            copied.get_submodule(parent).register_module(
                attribute, RoundedLinear(linear, own, rounding=rounding if inputs else None)
            )
    error = (squared_errors / squares) ** 0.5
    return RoundedTower(copied, elements, sum(p.numel() for p in tower.parameters()), error)
