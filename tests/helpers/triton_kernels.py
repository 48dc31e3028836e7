"""Shared by tests of Triton kernels: their device, and Triton's compiler without a device.

Without a GPU, Triton's interpreter runs the kernels. It has to be switched on before triton is
first imported, which other tests may have done in this process:
`tests/ops/triton/test_interpreter.py` runs the tests of kernels again in a process of its own.
"""

import contextlib
import dataclasses
import inspect
import mmap
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = (lambda test: test) if INTERPRETED else pytest.mark.gpu
# A kernel that Triton's interpreter has not replaced.
compiles_kernels = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
SHARED_MEMORY = 227 * 1024  # bytes that a program may have at compute capability 9.0
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def on_device(tensor):
    """The same tensor, with the same strides."""
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return moved.copy_(tensor)


def sparse(shape, stride, dtype):
    """Zeros with these strides. Memory is used only where something is written."""
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which mmap has a name for since Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, (last + 1) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


@contextlib.contextmanager
def programs_of(choose):
    """Let Triton's interpreter run only the programs `choose(grid)` of a kernel.

    A 32-bit sum or product that overflows is an error. Memory is not copied, as the interpreter
    would do (Triton 3.9, runtime/interpreter.py).
    """
    from triton.runtime import interpreter

    def call(self, *arguments, **options):
        known = inspect.getfullargspec(self.fn)
        options = {name: value for name, value in options.items() if name in (*known.args, *known.kwonlyargs)}
        scope = interpreter._patch_lang(self.fn)
        try:
            values = inspect.getcallargs(self.fn, *arguments, **options)
            values = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in values.items()}
            grid = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for index in choose(grid):
                interpreter.interpreter_builder.set_grid_idx(*index)
                self.fn(**values)
        finally:
            scope.restore()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
        yield


def every_program(grid):
    """All programs."""
    return [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]


def last_program(grid):
    """The last program of each axis."""
    return [tuple(size - 1 for size in grid)]


def largest_errors(got, wanted):
    """The largest difference over the largest expected value, by name."""
    pairs = zip(got, wanted.values(), strict=True)
    found = (((a.cpu().double() - b).abs().max() / (b.abs().max() + 1e-30)).item() for a, b in pairs)
    return dict(zip(wanted, found, strict=True))


def compiled(kernel, types, numbers, **options):
    """A kernel compiled for compute capability 9.0, all pointers and whole numbers multiples of 16.

    types: of its arguments that are no float32 pointer. numbers: its compile-time numbers, the last
    of its arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = kernel.arg_names[-len(numbers) :]
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    whole = ((k,) for k, kind in enumerate(signature.values()) if kind not in ("constexpr", "fp32"))
    source = ASTSource(
        kernel,
        signature,
        constexprs=dict(zip(constants, numbers, strict=True)),
        attrs={place: [["tt.divisibility", 16]] for place in whole},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**options, "enable_fp_fusion": True})


def spilled_bytes(kernel):
    """Bytes that a thread of a compiled kernel spills to memory for lack of registers."""
    import triton

    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [reader, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1])
