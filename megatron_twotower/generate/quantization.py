"""Weight-only quantisation of either tower by torchao, at load or as a folder of its own.

The numbers of a linear layer are kept in eight or four bits with factors for a row or a group of
them; a product converts them. Everything else stays as it is: embeddings, heads, norms, routers,
scans and the time conditioning. It needs the extra `quantize`.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.versions import require_fit
from megatron_twotower.config.hf_config import model_from_hf
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel

# Weights that share a factor, of the kind int4. It divides all widths of Nano's layers.
INT4_GROUP = 64
# The modules that are left out for a choice of towers, by the start of their names.
LEFT_OUT: Mapping[str, tuple[str, ...]] = {"both": (), "context": ("denoiser_tower",), "denoiser": ("context_tower",)}
# Modules that are never quantised: heads, and the small layers of the time conditioning.
KEPT = ("context_lm_head", "lm_head", "t_embedder", "t_block")


@dataclass(frozen=True)
class Quantization:
    """Which weights are quantised, and how.

    Attributes:
        kind: A key of `KINDS`; None for none.
        towers: A key of `LEFT_OUT`.
    """

    kind: str | None = None
    towers: str = "both"


NO_QUANTIZATION = Quantization()


def _int8(device: torch.device) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _fp8(device: torch.device) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig(set_inductor_config=False)


def _int4(device: torch.device) -> Any:
    """Packed for the kernel of CUDA. Elsewhere a byte holds each number: the same loss."""
    from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup

    if device.type == "cuda":
        return Int4WeightOnlyConfig(
            group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    return IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=PerGroup(INT4_GROUP),
        mapping_type=MappingType.ASYMMETRIC,
    )


# The configuration of torchao of each kind, for weights that are quantised on a device.
KINDS: Mapping[str, Callable[[torch.device], Any]] = {"int8": _int8, "int4": _int4, "fp8": _fp8}


def first_device(chosen: Quantization, devices: Sequence[str]) -> str:
    """Where to load a model that goes to `devices`: to the CPU, or where weights are quantised."""
    return "cpu" if chosen.kind is None else devices[0]


def require_torchao(what: str) -> None:
    """Check that torchao is installed.

    Args:
        what: What needs it, for the error.

    Raises:
        UserError: It is not there, or its version is not accepted.
    """
    found = importlib.util.find_spec("torchao") is not None
    require(found, f"{what}: found no torchao, expected it (pip install 'megatron-twotower[quantize]')")
    require_fit("torchao")


def quantization_config(chosen: Quantization, device: torch.device) -> Any:
    """The `TorchAoConfig` of transformers for a choice, None for none.

    Args:
        chosen: What to quantise.
        device: Where the weights are quantised.

    Raises:
        UserError: An unknown kind or choice of towers, or torchao is not installed.
    """
    if chosen.kind is None:
        return None
    for name, value, known in (("quantize", chosen.kind, KINDS), ("quantized-towers", chosen.towers, LEFT_OUT)):
        require(value in known, f"--{name}: found {value!r}, expected one of {', '.join(known)}")
    require_torchao(f"--quantize {chosen.kind}")
    from transformers import TorchAoConfig

    return TorchAoConfig(KINDS[chosen.kind](device), modules_to_not_convert=[*KEPT, *LEFT_OUT[chosen.towers]])


def is_quantized(weight: Any) -> bool:
    """Whether a parameter is a quantised tensor of torchao."""
    return hasattr(type(weight), "__tensor_flatten__")


def check_widths(chosen: Quantization, config: Mapping[str, Any], *, source: str) -> None:
    """Check that the widths of a model fit the groups of the kind int4.

    Args:
        chosen: What to quantise.
        config: The content of `config.json`.
        source: Name of that file for error messages.

    Raises:
        UserError: One line with the first width that does not fit.
    """
    if chosen.kind != "int4":
        return
    model = model_from_hf(config, source=source)
    of_kind = {
        "M": {"mamba_num_heads x mamba_head_dim": model.mamba_inner},
        "*": {"num_attention_heads x head_dim": model.num_attention_heads * model.head_dim},
        "E": {
            "moe_intermediate_size": model.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        },
        "-": {"intermediate_size": model.intermediate_size},
    }
    widths = {"hidden_size": model.hidden_size}
    for letter in dict.fromkeys(model.hybrid_override_pattern):
        widths |= of_kind[letter]
    for name, width in widths.items():
        found = f"{source}: {name}: found {width}, expected a multiple of {INT4_GROUP} for --quantize int4"
        require(width % INT4_GROUP == 0, found)


def check_quantized(model: TwoTowerModel, chosen: Quantization) -> None:
    """Check that all chosen weights are quantised: torchao passes over what does not fit.

    Raises:
        UserError: One line with the first weight that is not as it should be.
    """
    out = (*KEPT, *LEFT_OUT[chosen.towers])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(out) and not is_quantized(module.weight):
            rows, columns = module.weight.shape
            raise UserError(
                f"--quantize {chosen.kind}: {name}: found {rows} x {columns} numbers, expected what torchao takes"
            )


def _rows_of(size: int) -> Callable[[int, int], int]:
    """Bytes of (rows, columns) numbers of a byte, with `size` bytes of factors for each row."""
    return lambda rows, columns: rows * (columns + size)


def _packed_int4(rows: int, columns: int) -> int:
    """Half a byte a number, in rows of a multiple of 1024; 4 bytes for each group."""
    padded = -(-columns // 1024) * 1024
    return rows * (padded // 2 + 4 * padded // INT4_GROUP)


# Bytes of a quantised weight (rows, columns) on a GPU, as torchao 0.18 keeps it. A row of int8 has
# a float32 factor and a zero point of a byte, a row of fp8 a float32 factor.
WEIGHT_BYTES: Mapping[str, Callable[[int, int], int]] = {"int8": _rows_of(5), "fp8": _rows_of(4), "int4": _packed_int4}


def expected_bytes(model: TwoTowerModel, chosen: Quantization) -> int:
    """Bytes of the weights of a model after it is quantised on a GPU, by formula.

    Args:
        model: Not quantised; on the device "meta" it needs no memory.
        chosen: What would be quantised.
    """
    total, out = 0, (*KEPT, *LEFT_OUT[chosen.towers])
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        linear = path != name and isinstance(model.get_submodule(path), nn.Linear)
        if chosen.kind is not None and linear and not path.startswith(out):
            total += WEIGHT_BYTES[chosen.kind](*parameter.shape)
        else:
            total += parameter.numel() * parameter.element_size()
    return total


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of a model, of quantised ones with their factors."""
    total = 0
    weights: list[Any] = list(model.parameters())
    for weight in weights:
        names = weight.__tensor_flatten__()[0] if is_quantized(weight) else None
        tensors = [weight] if names is None else [getattr(weight, name) for name in names]
        total += sum(each.numel() * each.element_size() for each in tensors)
    return total
