"""Which class serves each part of a layer, and in which precision: Megatron's own modules, or Transformer Engine's.

There is one set of layers (`layers.py`); what they are made of is a row of `SPECS`, chosen by
Megatron's own setting `transformer_impl`. Both rows hold the same weights: `names.canonical_name`
tells where. FP8 needs the second.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_twotower.common.device import device
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.precision import CONTEXT_PRECISIONS, PRECISIONS
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.ops.dispatch import unavailable
from megatron_twotower.ops.norm import rms_norm

# What Megatron calls scaling by the largest values of the steps before.
_DELAYED = "delayed"
# Megatron's name of a dispatcher, and of its kernels where it has several.
_DISPATCHERS = {
    "alltoall": ("alltoall", None),
    "allgather": ("allgather", None),
    "deepep": ("flex", "deepep"),
    "hybridep": ("flex", "hybridep"),
}


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, the same on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype, device=device()))
        # Megatron sums the gradients of parameters so marked over the ranks that hold parts of the
        # sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.epsilon = config.layernorm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


@dataclass(frozen=True)
class Spec:
    """The classes of the parts of a layer; their arguments are those of Megatron's modules.

    norm_column: a norm and the column-parallel projection after it as one module; None where they
    are two.
    wide: around a layer that is not in FP8, wherever it stands.
    """

    norm: Callable[[TransformerConfig], nn.Module]
    column: Any
    row: Any
    norm_column: Any | None
    experts: ModuleSpec
    wide: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @property
    def feed_forward(self) -> MLPSubmodules:
        """Of a dense MLP, and of shared experts."""
        return MLPSubmodules(linear_fc1=self.column, linear_fc2=self.row)


def _local() -> Spec:
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=SequentialMLP, submodules=parts)
    return Spec(RMSNorm, ColumnParallelLinear, RowParallelLinear, norm_column=None, experts=experts)


def _transformer_engine() -> Spec:
    from megatron.core.extensions import transformer_engine as te

    parts = MLPSubmodules(linear_fc1=te.TEColumnParallelGroupedLinear, linear_fc2=te.TERowParallelGroupedLinear)
    return Spec(
        norm=lambda config: te.TENorm(config, config.hidden_size, config.layernorm_epsilon),
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        norm_column=te.TELayerNormColumnParallelLinear,
        experts=ModuleSpec(module=TEGroupedMLP, submodules=parts),
        wide=_without_fp8,
    )


def _without_fp8() -> contextlib.AbstractContextManager[None]:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager, fp8_autocast

    return fp8_autocast(enabled=False) if FP8GlobalStateManager.is_fp8_enabled() else contextlib.nullcontext()


SPECS: dict[str, Callable[[], Spec]] = {"local": _local, "transformer_engine": _transformer_engine}


def of(config: TransformerConfig) -> Spec:
    return SPECS[config.transformer_impl]()


def implementation(config: RunConfig) -> str:
    """The row of `SPECS` that serves a run here.

    Raises:
        UserError: what the configuration asks for is not there.
    """
    train, dispatcher, missing = config.train, config.parallel.moe_dispatcher, unavailable("transformer-engine")
    asked = {"train.precision": train.precision, "train.context_precision": train.context_precision}
    needs = {key: value for key, value in asked.items() if value.startswith("fp8")}
    if train.transformer_impl == "transformer_engine":
        needs["train.transformer_impl"] = train.transformer_impl
    for key, value in needs.items():
        if reason := missing or _too_old(value):
            raise UserError(f"{key}: found {value}, but {reason}; expected Transformer Engine and a device for it")
    if _DISPATCHERS[dispatcher][1] and (absent := unavailable("deep-ep")):
        raise UserError(f"parallel.moe_dispatcher: found {dispatcher}, but {absent}; expected alltoall or allgather")
    if train.transformer_impl != "auto":
        return train.transformer_impl
    return "local" if missing or train.precision == "fp32" else "transformer_engine"


def _too_old(value: str) -> str | None:
    """Why the CUDA device does not multiply in a precision; None when it does, or it is no precision."""
    precision = PRECISIONS.get(value)
    if precision is None or (found := torch.cuda.get_device_capability()) >= precision.capability:
        return None
    wanted, has = (".".join(map(str, each)) for each in (precision.capability, found))
    return f"the device has compute capability {has}, not {wanted}"


def megatron_fields(config: RunConfig, *, served: str) -> dict[str, object]:
    """What spec, precision and fusions set in Megatron's configuration of what trains.

    Args:
        served: a row of `SPECS`.
    """
    fused, precision = served == "transformer_engine", PRECISIONS[config.train.precision]
    fp8 = precision.recipe if fused else None
    dtype = torch.float32 if precision.bytes == 4 else torch.bfloat16
    fields: dict[str, object] = {
        "transformer_impl": served,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "gradient_accumulation_fusion": fused and config.fusion.gradient_accumulation,
    }
    if fp8 is not None:
        fields |= _fp8_fields(config, fp8)
    if "E" in config.model.hybrid_override_pattern:
        dispatcher, backend = _DISPATCHERS[config.parallel.moe_dispatcher]
        fields |= {
            "moe_token_dispatcher_type": dispatcher,
            "moe_grouped_gemm": fused,
            "moe_permute_fusion": fused and config.fusion.permutation,
            # Transformer Engine's router computes in fp32.
            "moe_router_fusion": fused and config.fusion.router and config.train.router_dtype == "fp32",
            "use_fused_weighted_squared_relu": fused and config.fusion.squared_relu,
            "moe_router_padding_for_quantization": fp8 is not None and config.fp8.router_padding,
        }
        if backend is not None:
            fields["moe_flex_dispatcher_backend"] = backend
    return fields


def _fp8_fields(config: RunConfig, recipe: str) -> dict[str, object]:
    fp8 = config.fp8
    return {
        "fp8": fp8.format,
        "fp8_recipe": recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.history_steps,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(fp8.first_layers_bf16 + fp8.last_layers_bf16),
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }


def frozen(config: RunConfig, megatron: TransformerConfig) -> TransformerConfig:
    """Megatron's configuration of the context tower: in `train.context_precision`, and with no gradients to sum."""
    context = copy.copy(megatron)
    served_fp8 = megatron.transformer_impl == "transformer_engine"
    recipe = CONTEXT_PRECISIONS[config.train.context_precision] if served_fp8 else None
    fields: dict[str, object] = {
        "fp8": None,
        "gradient_accumulation_fusion": False,
        "moe_router_padding_for_quantization": recipe is not None and config.fp8.router_padding,
    }
    if recipe is not None:
        fields |= _fp8_fields(config, recipe) | {"fp8_param": True}
    for name, value in fields.items():
        setattr(context, name, value)
    return context


def rounded_by_transformer_engine(weight: Tensor, precision: str) -> Tensor:
    """A matrix as `frozen` holds it in a precision of `CONTEXT_PRECISIONS`, read back in float32; on CUDA."""
    return _quantizer(precision, weight.device)(weight).dequantize(dtype=torch.float32)


def _quantizer(precision: str, device: torch.device) -> Any:
    """Transformer Engine's, with what its recipes give those of weights."""
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    e4m3 = TE_DType[torch.float8_e4m3fn]
    if CONTEXT_PRECISIONS[precision] == "tensorwise":
        return Float8CurrentScalingQuantizer(e4m3, device)
    return Float8BlockQuantizer(e4m3, rowwise=True, columnwise=True, block_scaling_dim=2)


def unfused(config: TransformerConfig) -> TransformerConfig:
    """For modules that are Megatron's own in both specs: it sums their gradients by Apex's kernel or not at all."""
    own = copy.copy(config)
    own.gradient_accumulation_fusion = False
    return own


def building(config: TransformerConfig, number: int) -> contextlib.AbstractContextManager[None]:
    """Around the making of layer `number` (from 0): its weights are made in FP8 where they are held in it."""
    return get_fp8_context(config, number, is_init=True)


def computing(config: TransformerConfig, number: int) -> contextlib.AbstractContextManager[None]:
    """Around what layer `number` (from 0) multiplies. The scales of `delayed` are of all layers: `model_computing`."""
    if config.fp8 is None:
        return of(config).wide()
    return contextlib.nullcontext() if config.fp8_recipe == _DELAYED else get_fp8_context(config, number)


def model_computing(config: TransformerConfig) -> contextlib.AbstractContextManager[None]:
    """Around a forward pass of all layers of this rank: at its end the scales of `delayed` are made anew."""
    delayed = config.fp8 is not None and config.fp8_recipe == _DELAYED
    return get_fp8_context(config) if delayed else contextlib.nullcontext()


def recomputed(
    run: Callable[..., Tensor], *inputs: Tensor, config: TransformerConfig, groups: ProcessGroupCollection
) -> Tensor:
    """`run(*inputs)`, of which the backward pass makes again what it needs, with the scales of the forward pass."""
    if config.fp8 is None:
        return tensor_parallel.checkpoint(run, False, *inputs)
    from megatron.core.extensions.transformer_engine import te_checkpoint

    return te_checkpoint(run, False, tensor_parallel.random.get_cuda_rng_tracker, groups.tp, *inputs)
