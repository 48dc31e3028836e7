"""The module classes of a layer, and the precision that they compute in.

There is one set of layers (`model/layers.py`). Their modules are either Megatron's own or those of
Transformer Engine. Megatron's setting `transformer_impl` chooses a row of `LAYER_MODULES`. Both
rows have the same weights; `parameter_map.canonical_name` maps their names to each other. FP8 needs
Transformer Engine.
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

from megatron_twotower.common import versions
from megatron_twotower.common.device import device, is_cpu
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.precision import CONTEXT_PRECISIONS, PRECISIONS
from megatron_twotower.config.schema import RunConfig, TrainConfig
from megatron_twotower.ops.dispatch import unavailable
from megatron_twotower.ops.norm import rms_norm

# Megatron's name of the FP8 recipe that scales by the largest values of earlier steps.
_DELAYED = "delayed"
# Recipe key: Megatron's name of the token dispatcher, and of its kernels if it has several.
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
        # Megatron sums the gradients of parameters with this mark over the ranks that split the
        # sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.epsilon = config.layernorm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., h)."""
        return rms_norm(x, self.weight, self.epsilon)


@dataclass(frozen=True)
class LayerModules:
    """The classes of the modules of a layer. They take the arguments of Megatron's modules.

    Attributes:
        norm: Builds an RMS norm.
        column_linear: A column-parallel projection.
        row_linear: A row-parallel projection.
        norm_column_linear: A norm and the column-parallel projection after it as one module; `None`
            if they are two modules.
        experts: The routed experts of a rank.
        without_fp8: A context for a layer that does not compute in FP8, also inside an FP8 context.
    """

    norm: Callable[[TransformerConfig], nn.Module]
    column_linear: Any
    row_linear: Any
    norm_column_linear: Any | None
    experts: ModuleSpec
    without_fp8: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @property
    def mlp(self) -> MLPSubmodules:
        """The projections of a dense MLP and of shared experts."""
        return MLPSubmodules(linear_fc1=self.column_linear, linear_fc2=self.row_linear)


def _local_modules() -> LayerModules:
    projections = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return LayerModules(
        norm=RMSNorm,
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        norm_column_linear=None,
        experts=ModuleSpec(module=SequentialMLP, submodules=projections),
    )


def _transformer_engine_modules() -> LayerModules:
    from megatron.core.extensions import transformer_engine as te

    projections = MLPSubmodules(linear_fc1=te.TEColumnParallelGroupedLinear, linear_fc2=te.TERowParallelGroupedLinear)
    return LayerModules(
        norm=lambda config: te.TENorm(config, config.hidden_size, config.layernorm_epsilon),
        column_linear=te.TEColumnParallelLinear,
        row_linear=te.TERowParallelLinear,
        norm_column_linear=te.TELayerNormColumnParallelLinear,
        experts=ModuleSpec(module=TEGroupedMLP, submodules=projections),
        without_fp8=_without_fp8,
    )


def _without_fp8() -> contextlib.AbstractContextManager[None]:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager, fp8_autocast

    return fp8_autocast(enabled=False) if FP8GlobalStateManager.is_fp8_enabled() else contextlib.nullcontext()


# transformer_impl: a function, because Transformer Engine is imported only if it is used.
LAYER_MODULES: dict[str, Callable[[], LayerModules]] = {
    "local": _local_modules,
    "transformer_engine": _transformer_engine_modules,
}


def layer_modules(config: TransformerConfig) -> LayerModules:
    """The module classes that Megatron's configuration chooses."""
    return LAYER_MODULES[config.transformer_impl]()


def choose_transformer_impl(config: RunConfig) -> str:
    """Choose the key of `LAYER_MODULES` for a run on this machine.

    Raises:
        UserError: The configuration asks for something that is not available.
    """
    train, dispatcher = config.train, config.parallel.moe_dispatcher
    _require_versions(train)
    missing = unavailable("transformer-engine")
    precisions = {"train.precision": train.precision, "train.context_precision": train.context_precision}
    needs = {key: value for key, value in precisions.items() if value.startswith("fp8")}
    if train.transformer_impl == "transformer_engine":
        needs["train.transformer_impl"] = train.transformer_impl
    for key, value in needs.items():
        if reason := missing or _unsupported_by_device(value):
            raise UserError(f"{key}: found {value}, but {reason}; expected Transformer Engine and a device for it")
    if _DISPATCHERS[dispatcher][1] and (absent := unavailable("deep-ep")):
        raise UserError(f"parallel.moe_dispatcher: found {dispatcher}, but {absent}; expected alltoall or allgather")
    if train.transformer_impl != "auto":
        return train.transformer_impl
    return "local" if missing or train.precision == "fp32" else "transformer_engine"


def _require_versions(train: TrainConfig) -> None:
    """Refuse packages that a run on this device would use, if their versions are not accepted.

    Without this check an old Transformer Engine fails at the first forward pass, after all weights
    are loaded, and an old mamba-ssm gives gradients that are not finite.
    """
    if is_cpu():
        return
    for package in ("mamba-ssm", "causal-conv1d"):
        versions.require_fit(package, otherwise=", or none of it")
    by_itself = train.transformer_impl == "auto" and train.precision != "fp32"
    if by_itself or train.transformer_impl == "transformer_engine":
        versions.require_fit("transformer-engine", otherwise=", or train.transformer_impl=local")


def _unsupported_by_device(value: str) -> str | None:
    """Why the CUDA device cannot multiply in a precision.

    Returns:
        `None` if it can, or if `value` is not a precision.
    """
    precision = PRECISIONS.get(value)
    if precision is None or (found := torch.cuda.get_device_capability()) >= precision.capability:
        return None
    expected, actual = (".".join(map(str, each)) for each in (precision.capability, found))
    return f"the device has compute capability {actual}, not {expected}"


def implementation_fields(config: RunConfig, *, transformer_impl: str) -> dict[str, object]:
    """The fields of the trained model's `TransformerConfig` for its modules, precision and fusions.

    Args:
        config: The configuration of the run.
        transformer_impl: A key of `LAYER_MODULES`.
    """
    fused, precision = transformer_impl == "transformer_engine", PRECISIONS[config.train.precision]
    fp8 = precision.recipe if fused else None
    dtype = torch.float32 if precision.bytes == 4 else torch.bfloat16
    fields: dict[str, object] = {
        "transformer_impl": transformer_impl,
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


def context_tower_config(config: RunConfig, trained: TransformerConfig) -> TransformerConfig:
    """Megatron's configuration of the frozen context tower, in `train.context_precision`.

    Args:
        config: The configuration of the run.
        trained: Megatron's configuration of the trained model.
    """
    context = copy.copy(trained)
    fp8_available = trained.transformer_impl == "transformer_engine"
    recipe = CONTEXT_PRECISIONS[config.train.context_precision] if fp8_available else None
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
    """A matrix on CUDA as the context tower stores it in a precision, converted back to float32.

    Args:
        weight: The matrix.
        precision: A key of `CONTEXT_PRECISIONS` for FP8.
    """
    return _quantizer(precision, weight.device)(weight).dequantize(dtype=torch.float32)


def _quantizer(precision: str, device: torch.device) -> Any:
    """Transformer Engine's quantizer of weights, with the arguments that its FP8 recipes use."""
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    e4m3 = TE_DType[torch.float8_e4m3fn]
    if CONTEXT_PRECISIONS[precision] == "tensorwise":
        return Float8CurrentScalingQuantizer(e4m3, device)
    return Float8BlockQuantizer(e4m3, rowwise=True, columnwise=True, block_scaling_dim=2)


def without_gradient_fusion(config: TransformerConfig) -> TransformerConfig:
    """The configuration for modules that are Megatron's own in both rows of `LAYER_MODULES`.

    Megatron's own modules can fuse gradient accumulation only with a kernel of Apex.
    """
    unfused = copy.copy(config)
    unfused.gradient_accumulation_fusion = False
    return unfused


def fp8_init_context(config: TransformerConfig, layer: int) -> contextlib.AbstractContextManager[None]:
    """The context in which the modules of a layer are built.

    In this context weights are created in FP8 if the tower stores FP8 weights.

    Args:
        config: Megatron's configuration of the tower.
        layer: The index of the layer in the model, from 0.
    """
    return get_fp8_context(config, layer, is_init=True)


def fp8_layer_context(config: TransformerConfig, layer: int) -> contextlib.AbstractContextManager[None]:
    """The context in which a layer computes.

    The recipe `delayed` scales all layers of a rank together, so its context is that of the model:
    `fp8_model_context`.

    Args:
        config: Megatron's configuration of the tower.
        layer: The index of the layer in the model, from 0.
    """
    if config.fp8 is None:
        return layer_modules(config).without_fp8()
    return contextlib.nullcontext() if config.fp8_recipe == _DELAYED else get_fp8_context(config, layer)


def fp8_model_context(config: TransformerConfig) -> contextlib.AbstractContextManager[None]:
    """The context of a forward pass of all layers of this rank.

    When it ends, the recipe `delayed` updates its scales.
    """
    delayed = config.fp8 is not None and config.fp8_recipe == _DELAYED
    return get_fp8_context(config) if delayed else contextlib.nullcontext()


def run_with_recompute(
    function: Callable[..., Tensor], *inputs: Tensor, config: TransformerConfig, groups: ProcessGroupCollection
) -> Tensor:
    """Compute `function(*inputs)` and keep no activations: the backward pass recomputes them.

    In FP8 the recomputation uses the scales of the forward pass.
    """
    if config.fp8 is None:
        return tensor_parallel.checkpoint(function, False, *inputs)
    from megatron.core.extensions.transformer_engine import te_checkpoint

    return te_checkpoint(function, False, tensor_parallel.random.get_cuda_rng_tracker, groups.tp, *inputs)
