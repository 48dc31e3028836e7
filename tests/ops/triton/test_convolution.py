"""The Triton kernels of the convolution against the reference implementation, and compiled."""

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
from megatron_twotower.ops.convolution import block_history, seeded_block_conv_ref
from megatron_twotower.ops.triton import convolution
from megatron_twotower.ops.triton.convolution import block_conv_triton

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def errors(x, clean, weight, bias, *, block, documents=None, causal=False):
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    before = exact[0] if causal else clean.double()
    expected = seeded_block_conv_ref(exact[0], before, *exact[1:], block=block, documents=documents)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    grads = torch.autograd.grad(expected, exact, upstream.double())
    wanted = dict(zip(("out", "x", "weight", "bias"), (expected, *grads), strict=True))
    leaves = [on_device(t).requires_grad_() for t in (x, weight, bias)]
    history = None if causal else on_device(block_history(clean, taps=weight.shape[1], block=block))
    rows = None if documents is None else on_device(documents)
    out = block_conv_triton(leaves[0], history, *leaves[1:], block=block, documents=rows)
    got = [out, *torch.autograd.grad(out, leaves, on_device(upstream))]
    assert [t.dtype for t in got] == [x.dtype, x.dtype, weight.dtype, bias.dtype] and out.is_contiguous()
    return largest_errors(got, wanted)


@runs_kernels
@settings(
    max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    data=st.data(),
    block=st.sampled_from([1, 2, 3, 5, 16, 24]),
    taps=st.sampled_from([2, 3, 4]),
    channels=st.sampled_from([1, 12, 70]),
    dtype=st.sampled_from(list(TOLERANCES)),
    batch=st.integers(1, 2),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_all_gradients(data, block, taps, channels, dtype, batch, packed, seed):
    length = block * data.draw(st.integers(1, max(1, 32 // block)), label="blocks")
    generator = torch.Generator().manual_seed(seed)
    # Views of one projection over (l, b), as in the layers.
    x, clean = torch.randn(length, batch, 2 * channels, generator=generator).to(dtype).transpose(0, 1).chunk(2, dim=-1)
    weight, bias = torch.randn(channels, taps, generator=generator), torch.randn(channels, generator=generator)
    starts = torch.rand(batch, length, generator=generator) < 0.2
    documents = starts.cumsum(1).to(torch.int32) if packed else None
    found = errors(x, clean, weight.to(dtype), bias.to(dtype), block=block, documents=documents)
    assert {name: error for name, error in found.items() if not error <= TOLERANCES[dtype]} == {}


@runs_kernels
@pytest.mark.parametrize("packed", [False, True])
def test_one_block_without_history_is_the_causal_convolution(monkeypatch, packed):
    """The sequence is divided among several programs, the last of which is not full."""
    monkeypatch.setattr(convolution, "POSITIONS", 32)
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 90, 5, generator=generator), torch.randn(5, 4, generator=generator)
    documents = (torch.arange(90) > 70).int().repeat(2, 1) if packed else None
    found = errors(x, x, weight, torch.randn(5, generator=generator), block=90, documents=documents, causal=True)
    assert max(found.values()) <= TOLERANCES[torch.float32]


@compiles_kernels
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_it_compiles_for_hopper_without_spills(name):
    x = torch.empty(1, 8192, 6144, dtype=torch.bfloat16)
    weight, documents = torch.empty(6144, 4), torch.empty(1, 8192, dtype=torch.int32)
    _, _, constants = convolution._arguments(x, x, weight, weight[:, 0], documents, 16)
    narrow = dict.fromkeys(("x", "history", "weight", "bias", "out", "grad", "grad_x"), POINTERS[torch.bfloat16])
    whole = dict.fromkeys(("blocks", "x_b", "x_l", "docs_b", "docs_l"), "i32") | {"documents": "*i32"}
    if name == "backward":
        constants += (convolution.POSITIONS, 4)
    kernel = compiled(getattr(convolution, f"block_conv_{name}_kernel"), narrow | whole, constants)
    assert spilled_bytes(kernel) == 0
