"""What this machine has, and which implementation serves each role of a training step. Nothing falls back in silence.

The table of roles says what the code does now.
"""

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_twotower import __version__
from megatron_twotower.common import device
from megatron_twotower.config.schema import RunConfig, TrainConfig
from megatron_twotower.mcore.modules import choose_transformer_impl
from megatron_twotower.ops import dispatch

GPU_EXTRA = "a CUDA build of torch and nvcc, then: pip install --no-build-isolation 'megatron-twotower[gpu]'"
APEX = "build Apex from source against that torch, with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"


@dataclass(frozen=True)
class Role:
    """One job in a training step: what serves it here, what would be faster, and how to get that."""

    role: str
    serves: str
    faster: str
    how: str


@dataclass(frozen=True)
class _Package:
    """A package that may be there. module: what must import for it to count as usable."""

    distribution: str
    module: str


PACKAGES = (
    _Package("megatron-core", "megatron.core"),
    _Package("transformers", "transformers"),
    _Package("webdataset", "webdataset"),
    _Package("transformer-engine", "transformer_engine.pytorch"),
    _Package("apex", "apex.optimizers"),
    _Package("mamba-ssm", "mamba_ssm"),
    _Package("causal-conv1d", "causal_conv1d"),
    _Package("triton", "triton"),
)
_BY_NAME = {package.distribution: package for package in PACKAGES}


@dataclass(frozen=True)
class _OfSpec:
    """A role that the spec of a run gives to Megatron's own modules or to Transformer Engine's (`spec.py`).

    code: what serves it in the first case, importable; a test holds that it exists.
    asked: whether a configuration wants the second in this role too.
    """

    role: str
    code: str
    own: str
    transformer_engine: str
    asked: Callable[[RunConfig], bool] = lambda config: True


SPEC_ROLES = (
    _OfSpec(
        "norm",
        "megatron_twotower.mcore.modules.RMSNorm",
        "torch RMSNorm",
        "Transformer Engine, fused with the projection in M and *",
    ),
    _OfSpec(
        "projections",
        "megatron_twotower.mcore.modules.ColumnParallelLinear",
        "torch, Megatron's parallel linears",
        "Transformer Engine linears",
    ),
    _OfSpec(
        "grouped GEMM",
        "megatron_twotower.mcore.modules.SequentialMLP",
        "Megatron SequentialMLP, expert by expert",
        "Transformer Engine grouped linear",
    ),
    _OfSpec(
        "token permutation",
        "megatron.core.transformer.moe.moe_utils.permute",
        "torch index_select and scatter_add",
        "Transformer Engine, fused",
        lambda config: config.fusion.permutation,
    ),
    _OfSpec(
        "router",
        "megatron_twotower.mcore.router.Router",
        "torch",
        "Transformer Engine, fused (train.router_dtype=fp32)",
        lambda config: config.fusion.router and config.train.router_dtype == "fp32",
    ),
)


@dataclass(frozen=True)
class _Kernels:
    """A role that kernels of a package take over where that package serves (`ops.kernels.unavailable`).

    code: where it is decided, importable; a test holds that it exists.
    otherwise: what serves it without the package.
    """

    role: str
    code: str
    kernels: str
    otherwise: str
    package: str


KERNEL_ROLES = (
    _Kernels(
        "denoiser attention",
        "megatron_twotower.ops.attention.block_attention",
        "FlexAttention, block-sparse",
        "torch, by chunks of queries",
        "triton",
    ),
    _Kernels(
        "denoiser scan",
        "megatron_twotower.ops.scan.two_stream_scan",
        "this project's Triton kernels",
        "torch, chunked two-stream scan",
        "triton",
    ),
    _Kernels(
        "context scan",
        "megatron_twotower.ops.scan.chunk_scan",
        "mamba-ssm kernels, in bfloat16",
        "torch, chunked scan",
        "mamba-ssm",
    ),
    _Kernels(
        "denoiser conv",
        "megatron_twotower.ops.convolution.seeded_block_conv",
        "this project's Triton kernels",
        "torch, sum of shifted copies",
        "triton",
    ),
    _Kernels(
        "context conv",
        "megatron_twotower.ops.convolution.causal_conv",
        "causal-conv1d kernels",
        "as the denoiser's",
        "causal-conv1d",
    ),
    _Kernels(
        "gated norm", "megatron_twotower.ops.norm.gated_rms_norm", "this project's Triton kernels", "torch", "triton"
    ),
    _Kernels(
        "modulation", "megatron_twotower.ops.modulation.modulate", "this project's Triton kernels", "torch", "triton"
    ),
    _Kernels(
        "cross-entropy",
        "megatron_twotower.ops.cross_entropy.linear_cross_entropy",
        "head by chunks, this project's Triton kernel",
        "torch, fused with the head, by chunks",
        "triton",
    ),
)


def _installed(package: _Package) -> str | None:
    """The version installed; None when the package is not there."""
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(package: _Package) -> str | None:
    """Why an installed package cannot be imported, in one line; None when it can."""
    try:
        importlib.import_module(package.module)
    except Exception as error:  # a package built for another torch can raise anything
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


def _package_line(package: _Package) -> str:
    version = _installed(package)
    if version is None:
        return "not installed"
    error = _import_error(package)
    return version if error is None else f"{version}, cannot be imported ({error})"


def _device_line() -> str:
    if device.is_cpu():
        return "none, running on the CPU with Gloo"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB each"


def _environment() -> Iterator[tuple[str, str]]:
    memory = psutil.virtual_memory()
    yield "megatron-twotower", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__} ({'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU build'})"
    yield "CUDA device", _device_line()
    for package in PACKAGES:
        yield package.distribution, _package_line(package)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU cores", f"{cores}, torch uses {torch.get_num_threads()}"
    yield "memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"


def environment() -> dict[str, str]:
    """Versions and resources of this machine, in the order to show them. Imports the GPU packages it finds."""
    return dict(_environment())


def _kernel_role(by: _Kernels) -> Role:
    reason = dispatch.unavailable(by.package)
    if reason is None:
        return Role(by.role, f"{by.kernels} ({by.package} {_installed(_BY_NAME[by.package])})", "nothing", "-")
    how = "needs a CUDA device" if device.is_cpu() else f"{reason}: {GPU_EXTRA}"
    return Role(by.role, by.otherwise, by.kernels, how)


def _spec_role(by: _OfSpec, config: RunConfig, served: str) -> Role:
    reason, found = dispatch.unavailable("transformer-engine"), _installed(_BY_NAME["transformer-engine"])
    if served == "transformer_engine" and by.asked(config):
        return Role(by.role, f"{by.transformer_engine} (transformer-engine {found})", "nothing", "-")
    if reason is None:
        return Role(by.role, by.own, by.transformer_engine, "switched off by the configuration")
    how = "needs a CUDA device" if device.is_cpu() else f"{reason}: {GPU_EXTRA}"
    return Role(by.role, by.own, by.transformer_engine, how)


def _optimizer_role() -> Role:
    """Megatron picks the Adam itself while it is imported: ask it what it picked."""
    from megatron.core import optimizer as megatron_optimizer

    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        serves = "torch AdamW, fused"
        how = "needs a CUDA device" if device.is_cpu() else f"{GPU_EXTRA}; or {APEX}"
        return Role("optimizer", serves, "FusedAdam of Transformer Engine or Apex", how)
    source = megatron_optimizer.Adam.__module__.partition(".")[0]
    return Role("optimizer", f"FusedAdam of {source}", "nothing", "-")


# What the doctor speaks of where there is no run: bf16, and all that can be left to it.
_ANY_RUN = RunConfig(train=TrainConfig(precision="bf16"))


def diagnose(config: RunConfig = _ANY_RUN) -> list[Role]:
    """Every role of a training step and who serves it in a run of this configuration."""

    served = choose_transformer_impl(config)
    of_spec = [_spec_role(role, config, served) for role in SPEC_ROLES]
    return [*map(_kernel_role, KERNEL_ROLES), *of_spec, _optimizer_role()]


def one_line_summary() -> str:
    """Return the device and backend, and the versions of torch and megatron-core, in one short line."""
    where = "CPU and Gloo" if device.is_cpu() else f"{torch.cuda.get_device_name()} and NCCL"
    return f"{where}, torch {torch.__version__}, megatron-core {_installed(_BY_NAME['megatron-core'])}"


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def print_doctor(console: Console | None = None) -> None:
    """Show the environment and the roles as two tables."""
    console = console or Console()
    machine = _table("Environment", ("what", "found"))
    for name, value in environment().items():
        machine.add_row(name, value, style="dim" if value == "not installed" else None)
    console.print(machine)
    roles = _table("Roles in a training step", ("role", "served by", "faster on a GPU", "how to get it"))
    for role in diagnose():
        roles.add_row(f"[bold]{role.role}", role.serves, role.faster, role.how)
    console.print(roles)
