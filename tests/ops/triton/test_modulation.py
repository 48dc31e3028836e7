"""The Triton kernels of modulation and gate against float64, and compiled."""

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
from megatron_twotower.ops import modulation
from megatron_twotower.ops.triton import modulation as kernels
from megatron_twotower.ops.triton.modulation import add_gated_triton, modulate_triton

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
# By name: the Triton function, the one in torch, and its arguments with one row per segment.
FUNCTIONS = {
    "modulate": (modulate_triton, modulation.modulate, (1, 2)),
    "add gated": (add_gated_triton, modulation.add_gated, (1,)),
}


@runs_kernels
@settings(
    max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    name=st.sampled_from(list(FUNCTIONS)),
    segments=st.integers(1, 3),
    length=st.sampled_from([1, 5, 16, 20, 130]),
    batch=st.integers(1, 2),
    width=st.sampled_from([8, 100, 300]),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 99),
)
def test_value_and_all_gradients(name, segments, length, batch, width, dtype, seed):
    ours, in_torch, by_segment = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(seed)

    def draw(rows):
        """A view of a wider tensor, as shift, scale and gate are."""
        return torch.randn(rows, batch, 2 * width, generator=generator).to(dtype).chunk(2, dim=-1)[1]

    given_ = [draw(segments if i in by_segment else segments * length) for i in range(3)]
    exact = [t.double().requires_grad_() for t in given_]
    expected = in_torch(*exact)
    upstream = torch.randn(expected.shape, generator=generator).to(dtype)
    gradients = torch.autograd.grad(expected, exact, upstream.double())
    expected_by_name = dict(zip(("out", "first", "second", "third"), (expected, *gradients), strict=True))
    leaves = [on_device(t).requires_grad_() for t in given_]
    out = ours(*leaves)
    got = [out, *torch.autograd.grad(out, leaves, on_device(upstream))]
    assert {t.dtype for t in got} == {dtype}
    errors = largest_errors(got, expected_by_name)
    assert {part: error for part, error in errors.items() if not error <= TOLERANCES[dtype]} == {}


@compiles_kernels
@pytest.mark.parametrize("segment", [16, 8192])
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_it_compiles_for_hopper_without_spills(name, by_position, segment):
    x, factor = torch.empty(8192, 1, 2688, device="meta"), torch.empty(8192 // segment, 1, 2688, device="meta")
    _, _, constants = kernels._arguments(x, factor, 1.0, by_position)
    narrow = dict.fromkeys(("x", "factor", "base", "out", "grad", "grad_x"), POINTERS[torch.bfloat16])
    whole = dict.fromkeys(("segment_length", "batches", "factor_k", "factor_b", "base_k", "base_b"), "i32")
    kernel = getattr(kernels, f"modulation_{name}_kernel")
    assert spilled_bytes(compiled(kernel, narrow | whole, constants)) == 0
