"""Modules with the parameters of Transformer Engine's that compute with torch, for a CPU.

Arguments are those that Megatron gives its wrappers (extensions/transformer_engine.py), names and
shapes of parameters those of transformer-engine 2.11. Grouped experts are Megatron's own
TEGroupedMLP around these.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_twotower.common import device
from megatron_twotower.mcore import modules
from megatron_twotower.ops.norm import rms_norm


class NormColumn(ColumnParallelLinear):
    """Replaces TELayerNormColumnParallelLinear."""

    def __init__(self, input_size, output_size, *, config, **arguments):
        super().__init__(input_size, output_size, config=config, **arguments)
        weight = torch.empty(input_size, dtype=config.params_dtype, device=device.device())
        self.layer_norm_weight = nn.Parameter(weight)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return super().forward(rms_norm(x, self.layer_norm_weight, self.config.layernorm_epsilon))


class _Grouped(nn.Module):
    """Replaces TEGroupedLinear.

    One product after the other, for the tokens of each of the rank's experts.
    """

    split: int

    def __init__(
        self,
        num_gemms,
        input_size,
        output_size,
        *,
        config,
        init_method,
        bias,
        skip_bias_add,
        is_expert,
        tp_comm_buffer_name=None,
        pg_collection=None,
        name=None,
    ):
        super().__init__()
        assert is_expert and not bias
        shape = [output_size, input_size]
        shape[self.split] //= pg_collection.expt_tp.size()
        for number in range(num_gemms):
            weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device.device()))
            weight.allreduce = config.expert_model_parallel_size == 1
            weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, self.split, 1
            self.register_parameter(f"weight{number}", weight)

    def forward(self, x, m_splits):
        parts = zip(x.split(m_splits), self.parameters(), strict=True)
        return torch.cat([F.linear(tokens, weight) for tokens, weight in parts]), None


class GroupedColumn(_Grouped):
    split = 0


class GroupedRow(_Grouped):
    split = 1


def twin():
    parts = MLPSubmodules(linear_fc1=GroupedColumn, linear_fc2=GroupedRow)
    experts = ModuleSpec(module=TEGroupedMLP, submodules=parts)
    return modules.LayerModules(
        modules.RMSNorm, ColumnParallelLinear, RowParallelLinear, norm_column_linear=NormColumn, experts=experts
    )


def install(monkeypatch):
    """Use these modules in runs with Transformer Engine and without the `UNFUSED` kernels."""
    monkeypatch.setitem(modules.LAYER_MODULES, "transformer_engine", twin)
    monkeypatch.setattr(modules, "unavailable", lambda package: None)


# Kernels that only Transformer Engine itself has.
UNFUSED = {"permutation": False, "router": False, "gradient_accumulation": False, "squared_relu": False}
