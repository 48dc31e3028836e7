"""The Triton kernels of the gated norm against the reference in float64, and compiled."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from helpers.triton_kernels import (
    POINTERS,
    compiled,
    compiles_kernels,
    largest_errors,
    on_device,
    runs_kernels,
    spilled_bytes,
)
from megatron_twotower.ops.norm import gated_rms_norm_ref
from megatron_twotower.ops.triton import norm
from megatron_twotower.ops.triton.norm import gated_rms_norm_triton

# Each result is rounded once; sums are in float32.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def errors(y, z, weight):
    exact = [t.double().requires_grad_() for t in (y, z, weight)]
    expected = gated_rms_norm_ref(*exact, 1e-5)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    grads = torch.autograd.grad(expected, exact, upstream.double())
    wanted = dict(zip(("out", "y", "z", "weight"), (expected, *grads), strict=True))
    leaves = [on_device(t).requires_grad_() for t in (y, z, weight)]
    out = gated_rms_norm_triton(*leaves, 1e-5)
    got = [out, *torch.autograd.grad(out, leaves, on_device(upstream))]
    assert [t.dtype for t in got] == [y.dtype, y.dtype, z.dtype, weight.dtype]
    return largest_errors(got, wanted)


@runs_kernels
@settings(
    max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    rows=st.sampled_from([1, 3, 64, 130]),
    groups=st.integers(1, 3),
    width=st.sampled_from([1, 8, 24, 512]),
    dtype=st.sampled_from(list(TOLERANCES)),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_value_and_all_gradients(rows, groups, width, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    y, z = (scale * torch.randn(rows, groups * width, generator=generator) for _ in range(2))
    weight = torch.randn(groups, width, generator=generator)
    found = errors(y.to(dtype), z.to(dtype), weight.to(dtype))
    assert {name: error for name, error in found.items() if not error <= TOLERANCES[dtype]} == {}


@runs_kernels
@pytest.mark.parametrize("transposed", [False, True])
def test_batches_and_views(transposed):
    whole = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))
    whole = whole.transpose(0, 1) if transposed else whole
    found = errors(whole[..., :24], whole[..., 24:], torch.ones(3, 8))
    assert max(found.values()) <= TOLERANCES[torch.float32]


@compiles_kernels
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_it_compiles_for_hopper_without_spills(name):
    weight = torch.empty(8, 512)
    constants = norm._constants(weight) + ((norm.ROWS,) if name == "backward" else ())
    narrow = dict.fromkeys(("y", "z", "weight", "out", "grad", "grad_y", "grad_z"), POINTERS[torch.bfloat16])
    kernel = compiled(
        getattr(norm, f"gated_norm_{name}_kernel"),
        narrow | {"rows": "i32", "epsilon": "fp32", "length": "i32", "z_b": "i32", "z_l": "i32"},
        constants,
    )
    assert spilled_bytes(kernel) == 0
