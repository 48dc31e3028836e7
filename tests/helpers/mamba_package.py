"""The real mamba-ssm on a machine without a GPU: its Triton kernels in Triton's interpreter.

Nothing of the package is replaced. What is: its CUDA extension (an empty module; the scan of
Mamba-2 has none), torch's device contexts, the number of multiprocessors, and the choice of block
sizes by timing, which a GPU makes.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch

MODULES = ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_combined", "ssd_state_passing")


def scan_module() -> ModuleType:
    """mamba_ssm.ops.triton.ssd_combined."""
    sys.modules.setdefault("selective_scan_cuda", ModuleType("selective_scan_cuda"))
    try:
        return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except ModuleNotFoundError as error:
        pytest.fail(f"{error.name}: not found, expected mamba-ssm (make test-mamba)")


def kernels() -> dict[str, object]:
    """All kernels of the scan that have several block sizes to choose from, by name."""
    from triton.runtime.autotuner import Autotuner

    scan_module()
    modules = [importlib.import_module(f"mamba_ssm.ops.triton.{name}") for name in MODULES]
    found = {name: value for module in modules for name, value in vars(module).items()}
    return {name: value for name, value in found.items() if isinstance(value, Autotuner)}


@contextlib.contextmanager
def block_sizes(number: int) -> Iterator[None]:
    """Use configuration `number` of each kernel, modulo the number of its configurations."""
    tuned = kernels().values()
    offered = [kernel.configs for kernel in tuned]
    for kernel, configs in zip(tuned, offered, strict=True):
        kernel.configs = [configs[number % len(configs)]]
    try:
        yield
    finally:
        for kernel, configs in zip(tuned, offered, strict=True):
            kernel.configs = configs


def on_the_host(patch: pytest.MonkeyPatch) -> None:
    """Replace the functions of CUDA."""
    for context in ("device", "device_of"):
        patch.setattr(torch.cuda, context, lambda *_: contextlib.nullcontext())
    properties = SimpleNamespace(multi_processor_count=132)
    patch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)


def memory_holds_nan(patch: pytest.MonkeyPatch) -> None:
    """Let torch.empty return NaN: a kernel that reads before it writes gives NaN."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def filled(*arguments, plain=plain, **settings):
            made = plain(*arguments, **settings)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        patch.setattr(torch, name, filled)


def fenced(tensor: torch.Tensor, *, wide: int = 4096) -> torch.Tensor:
    """The same values with NaN (or -7) before and after them.

    A kernel that reads past an end shows it.
    """
    room = torch.full((tensor.numel() + 2 * wide,), float("nan") if tensor.is_floating_point() else -7)
    inner = room.to(tensor.dtype)[wide:-wide].view(tensor.shape)
    return inner.copy_(tensor.detach())


def mend_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Fix bfloat16 in Triton 3.9's interpreter.

    It multiplies the bits as integers, and truncates where a GPU rounds.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(numpy.ascontiguousarray(data)).to(torch.bfloat16)
        return values.view(torch.int16).numpy().view(numpy.uint16)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    patch.setattr(interpreter, "_convert_float", rounded)
    patch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: multiply(self, widened(a), widened(b), *others),
    )


def multiply_in_tf32(patch: pytest.MonkeyPatch) -> None:
    """Round as tl.dot does with float32 on tensor cores by default.

    Factors have ten bits after the point.
    """
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def narrowed(handle):
        if handle.data.dtype != numpy.float32:
            return handle
        bits = numpy.ascontiguousarray(handle.data).view(numpy.uint32) + numpy.uint32(0x1000)
        return interpreter.TensorHandle((bits & numpy.uint32(0xFFFFE000)).view(numpy.float32), handle.dtype)

    patch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: multiply(self, narrowed(a), narrowed(b), *others),
    )
