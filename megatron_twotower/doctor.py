"""What this machine has, and which implementation each role of a training step uses here.

A role is one operation of a training step that has several implementations. The command `doctor`
prints two tables: the environment, and the roles with what would be faster. The tables of roles
below name the function or class that decides; a test imports each of them.
"""

import importlib
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
from megatron_twotower.common import device, versions
from megatron_twotower.common.errors import require
from megatron_twotower.config.schema import RunConfig, TrainConfig
from megatron_twotower.mcore.modules import choose_transformer_impl
from megatron_twotower.ops import dispatch

GPU_EXTRA = "a CUDA build of torch and nvcc, then: pip install --no-build-isolation 'megatron-twotower[gpu]'"
APEX = "build Apex from source against that torch, with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"


@dataclass(frozen=True)
class Role:
    """One role of a training step on this machine.

    Attributes:
        role: Its name.
        implementation: What it uses here.
        faster: What would be faster on a GPU, or "nothing".
        how_to_get: What to install or to set for that, or "-".
    """

    role: str
    implementation: str
    faster: str
    how_to_get: str


@dataclass(frozen=True)
class _Package:
    """A package that may be installed.

    Attributes:
        distribution: Its name in a package index.
        module: The module that must import for the package to be usable.
    """

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
    _Package("torchao", "torchao"),
    _Package("triton", "triton"),
)
_BY_NAME = {package.distribution: package for package in PACKAGES}


@dataclass(frozen=True)
class _ModuleRole:
    """A role of Megatron's own modules or of Transformer Engine, as `mcore.modules` chooses.

    Attributes:
        code: The class or function that Megatron's own modules use: a dotted name.
        megatron: The implementation with Megatron's own modules.
        transformer_engine: The implementation with Transformer Engine.
        requested: Whether a configuration asks for Transformer Engine in this role.
    """

    role: str
    code: str
    megatron: str
    transformer_engine: str
    requested: Callable[[RunConfig], bool] = lambda config: True


MODULE_ROLES = (
    _ModuleRole(
        "norm",
        "megatron_twotower.mcore.modules.RMSNorm",
        "torch RMSNorm",
        "Transformer Engine, fused with the projection in M and *",
    ),
    _ModuleRole(
        "projections",
        "megatron_twotower.mcore.modules.ColumnParallelLinear",
        "torch, Megatron's parallel linears",
        "Transformer Engine linears",
    ),
    _ModuleRole(
        "grouped GEMM",
        "megatron_twotower.mcore.modules.SequentialMLP",
        "Megatron SequentialMLP, expert by expert",
        "Transformer Engine grouped linear",
    ),
    _ModuleRole(
        "token permutation",
        "megatron.core.transformer.moe.moe_utils.permute",
        "torch index_select and scatter_add",
        "Transformer Engine, fused",
        lambda config: config.fusion.permutation,
    ),
    _ModuleRole(
        "router",
        "megatron_twotower.mcore.router.Router",
        "torch",
        "Transformer Engine, fused (train.router_dtype=fp32)",
        lambda config: config.fusion.router and config.train.router_dtype == "fp32",
    ),
)


@dataclass(frozen=True)
class _KernelRole:
    """A role that uses kernels of a package if `ops.dispatch` finds the package usable.

    Attributes:
        code: The function that chooses between the two: a dotted name.
        kernels: The implementation with the package.
        fallback: The implementation without it.
    """

    role: str
    code: str
    kernels: str
    fallback: str
    package: str


KERNEL_ROLES = (
    _KernelRole(
        "denoiser attention",
        "megatron_twotower.ops.attention.block_attention",
        "FlexAttention, block-sparse",
        "torch, by chunks of queries",
        "triton",
    ),
    _KernelRole(
        "denoiser scan",
        "megatron_twotower.ops.scan.two_stream_scan",
        "this project's Triton kernels",
        "torch, chunked two-stream scan",
        "triton",
    ),
    _KernelRole(
        "context scan",
        "megatron_twotower.ops.scan.chunk_scan",
        "mamba-ssm kernels, in bfloat16",
        "torch, chunked scan",
        "mamba-ssm",
    ),
    _KernelRole(
        "denoiser conv",
        "megatron_twotower.ops.convolution.seeded_block_conv",
        "this project's Triton kernels",
        "torch, sum of shifted copies",
        "triton",
    ),
    _KernelRole(
        "context conv",
        "megatron_twotower.ops.convolution.causal_conv",
        "causal-conv1d kernels",
        "that of denoiser conv",
        "causal-conv1d",
    ),
    _KernelRole(
        "gated norm", "megatron_twotower.ops.norm.gated_rms_norm", "this project's Triton kernels", "torch", "triton"
    ),
    _KernelRole(
        "modulation", "megatron_twotower.ops.modulation.modulate", "this project's Triton kernels", "torch", "triton"
    ),
    _KernelRole(
        "cross-entropy",
        "megatron_twotower.ops.cross_entropy.linear_cross_entropy",
        "head by chunks, this project's Triton kernel",
        "torch, fused with the head, by chunks",
        "triton",
    ),
)


def _installed(package: _Package) -> str | None:
    """The installed version, or `None`."""
    return versions.installed(package.distribution)


def _import_error(package: _Package) -> str | None:
    """Why an installed package cannot be imported, in one line, or `None` if it can."""
    try:
        importlib.import_module(package.module)
    except Exception as error:  # a package built for another torch can raise anything
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


def _package_line(package: _Package) -> str:
    version = _installed(package)
    if version is None:
        return "not installed"
    if wrong := versions.unfit(package.distribution):
        return wrong.removeprefix("found ")
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
    """Versions and resources of this machine, in the order to show them.

    It imports the GPU packages that are installed.
    """
    return dict(_environment())


def _kernel_role(entry: _KernelRole) -> Role:
    reason = dispatch.unavailable(entry.package)
    if reason is None:
        version = _installed(_BY_NAME[entry.package])
        return Role(entry.role, f"{entry.kernels} ({entry.package} {version})", "nothing", "-")
    return Role(entry.role, entry.fallback, entry.kernels, _how_to_get(reason))


def _module_role(entry: _ModuleRole, config: RunConfig, transformer_impl: str) -> Role:
    reason = dispatch.unavailable("transformer-engine")
    if transformer_impl == "transformer_engine" and entry.requested(config):
        version = _installed(_BY_NAME["transformer-engine"])
        return Role(entry.role, f"{entry.transformer_engine} (transformer-engine {version})", "nothing", "-")
    how_to_get = "switched off by the configuration" if reason is None else _how_to_get(reason)
    return Role(entry.role, entry.megatron, entry.transformer_engine, how_to_get)


def _how_to_get(reason: str) -> str:
    return "needs a CUDA device" if device.is_cpu() else f"{reason}: {GPU_EXTRA}"


def _optimizer_role() -> Role:
    """The Adam that Megatron chose when it was imported."""
    from megatron.core import optimizer as megatron_optimizer

    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        how_to_get = "needs a CUDA device" if device.is_cpu() else f"{GPU_EXTRA}; or {APEX}"
        return Role("optimizer", "torch AdamW, fused", "FusedAdam of Transformer Engine or Apex", how_to_get)
    source = megatron_optimizer.Adam.__module__.partition(".")[0]
    return Role("optimizer", f"FusedAdam of {source}", "nothing", "-")


# The configuration that the command `doctor` describes: bf16, and defaults for the rest.
_ANY_RUN = RunConfig(train=TrainConfig(precision="bf16"))


def diagnose(config: RunConfig = _ANY_RUN) -> list[Role]:
    """Every role of a training step, and what implements it in a run of this configuration."""
    transformer_impl = choose_transformer_impl(config)
    modules = [_module_role(entry, config, transformer_impl) for entry in MODULE_ROLES]
    return [*map(_kernel_role, KERNEL_ROLES), *modules, _optimizer_role()]


def one_line_summary() -> str:
    """Return device, backend, and the versions of torch and megatron-core in one short line."""
    where = "CPU and Gloo" if device.is_cpu() else f"{torch.cuda.get_device_name()} and NCCL"
    return f"{where}, torch {torch.__version__}, megatron-core {_installed(_BY_NAME['megatron-core'])}"


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def print_doctor(console: Console | None = None) -> None:
    """Show the environment and the roles as two tables.

    Raises:
        UserError: The version of an installed package is not accepted; after the first table.
    """
    console = console or Console()
    machine = _table("Environment", ("what", "found"))
    for name, value in environment().items():
        machine.add_row(name, value, style="dim" if value == "not installed" else None)
    console.print(machine)
    unfit = {package: wrong for package in versions.ACCEPTED if (wrong := versions.unfit(package))}
    require(not unfit, "; ".join(f"{package}: {wrong}" for package, wrong in unfit.items()))
    roles = _table("Roles in a training step", ("role", "implementation", "faster on a GPU", "how to get it"))
    for role in diagnose():
        roles.add_row(f"[bold]{role.role}", role.implementation, role.faster, role.how_to_get)
    console.print(roles)
