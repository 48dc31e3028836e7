"""The Triton kernels on tensors that reach past 2^31 elements, without their memory.

The interpreter computes with the integers that a kernel declares, and raises an error where a
32-bit product overflows. Two ways:

* A small tensor with one very long stride: all results are those of the same tensor without it.
* A tensor of more than 2^31 elements in address space alone, of which the last program of each
  kernel reads and writes a few.
"""

import pytest
import torch

pytest.importorskip("triton")
from helpers.triton_kernels import INTERPRETED, every_program, last_program, programs_of, sparse
from megatron_twotower.ops.convolution import seeded_block_conv
from megatron_twotower.ops.cross_entropy import chunk_cross_entropy_torch
from megatron_twotower.ops.norm import gated_rms_norm
from megatron_twotower.ops.scan import two_stream_scan_torch
from megatron_twotower.ops.triton import convolution, cross_entropy, modulation, norm
from megatron_twotower.ops.triton.scan import two_stream_scan_triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="in the interpreter alone: a device has no such memory"),
]

FAR = 2**31


def spread(tensor, dim):
    """The same values with a long stride along `dim`: the last index is past 2^31 elements."""
    if tensor is None or tensor.dim() <= dim or tensor.shape[dim] < 3:
        return tensor
    strides = list(tensor.contiguous().stride())
    strides[dim] = FAR // (tensor.shape[dim] - 1) + 16
    # Otherwise the kernel gets the stride itself as a 64-bit number.
    assert strides[dim] < FAR
    made = sparse(tensor.shape, strides, tensor.dtype)
    made.copy_(tensor)
    assert made.stride() == tuple(strides)
    return made


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(function, tensors, upstream):
    """The output, and the gradients of all tensors that have one."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    out = function(*leaves)
    trained = [leaf for leaf in leaves if leaf.is_floating_point()]
    grads = torch.autograd.grad(out, trained, upstream, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


def same_with_long_strides(function, tensors, *, dims, upstream=None):
    """All results of `function` are the same if one dimension of all tensors has a long stride."""
    upstream = numbers(*function(*tensors).shape, seed=9) if upstream is None else upstream
    wanted = results(function, tensors, upstream)
    with programs_of(every_program):
        for dim in dims:
            got = results(function, [spread(t, dim) for t in tensors], spread(upstream, dim))
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


SCAN = ("clean_x", "clean_dt", "clean_A", "clean_B", "states", "documents")


def scan_inputs(*, batch, length, heads, groups, size, state, chunk):
    """The tensors of a scan, in order, then those of the names SCAN."""

    def stream(seed):
        x, B, C = (
            numbers(batch, length, n, k, seed=seed) for n, k in ((heads, size), (groups, state), (groups, state))
        )
        dt, A = numbers(batch, length, heads, seed=seed).abs(), -numbers(heads, seed=seed).abs()
        return x, dt, A, B, C, numbers(heads, seed=seed)

    noisy, clean = stream(1), stream(2)
    states = numbers(batch, -(-length // chunk), heads, size, state, seed=3)
    documents = torch.arange(length).div(5, rounding_mode="floor").int().expand(batch, length).contiguous()
    return [*noisy, *clean[:4], states, documents]


@pytest.mark.parametrize(
    ("dim", "batch", "length", "heads", "chunk"),
    [
        pytest.param(0, 3, 4, 1, 4, id="sequences"),
        pytest.param(1, 1, 12, 1, 4, id="chunks"),
        pytest.param(1, 1, 4, 1, 4, id="positions of a chunk"),
        pytest.param(2, 1, 4, 3, 4, id="heads and groups"),
    ],
)
def test_the_scan_with_long_strides(dim, batch, length, heads, chunk):
    def scan(*tensors):
        names = dict(zip(SCAN, tensors[6:], strict=True))
        return two_stream_scan_triton(*tensors[:6], **names, block=2, chunk=chunk)

    sizes = {"batch": batch, "length": length, "heads": heads, "groups": heads, "size": 4, "state": 4, "chunk": chunk}
    same_with_long_strides(scan, scan_inputs(**sizes), dims=[dim])


def test_the_convolution_with_long_strides():
    x, history, weight, bias = numbers(3, 8, 5), numbers(3, 4, 3, 5), numbers(5, 4), numbers(5)
    documents = torch.arange(8).div(3, rounding_mode="floor").int().expand(3, 8).contiguous()

    def convolve(*tensors):
        x, documents, weight, bias = tensors
        return convolution.block_conv_triton(x, history, weight, bias, block=2, documents=documents)

    same_with_long_strides(convolve, [x, documents, weight, bias], dims=[0, 1])


def test_the_gated_norm_with_long_strides():
    y, z, weight = numbers(3, 5, 8), numbers(3, 5, 8), numbers(2, 4)
    same_with_long_strides(lambda *t: norm.gated_rms_norm_triton(*t, 1e-5), [y, z, weight], dims=[0, 1])


def test_modulation_and_gate_with_long_strides():
    x, shift, scale = numbers(12, 3, 4), numbers(3, 3, 4), numbers(3, 3, 4)
    same_with_long_strides(modulation.modulate_triton, [x, shift, scale], dims=[0, 1])
    same_with_long_strides(modulation.add_gated_triton, [x, scale, numbers(12, 3, 4, seed=5)], dims=[0, 1])


# --- tensors of more than 2^31 elements: the last program of each kernel ---


def large(*shape, dtype=torch.bfloat16):
    """Zeros of more than 2^31 elements, in address space alone."""
    assert torch.Size(shape).numel() > FAR
    return sparse(shape, torch.empty(shape, device="meta").stride(), dtype)


def close(got, wanted):
    # The inputs are rounded to bfloat16 before both computations, the results once.
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-2, atol=1e-2)


def filled(tensor, tail, seed):
    """Write random numbers to `tail` of a tensor; return them in float64, with gradients."""
    tensor[tail] = numbers(*tensor[tail].shape, seed=seed).abs().to(tensor.dtype)
    return tensor[tail].double().requires_grad_()


def test_the_scan_of_many_positions():
    heads, chunk, block = 128, 64, 16
    length = FAR // heads + chunk
    # One head for each group, so that all inputs and the log decays are equally large.
    last = (slice(None), slice(-chunk, None), slice(-1, None))
    x, B, C, clean_x, clean_B, upstream = (large(1, length, heads, 1) for _ in range(6))
    dt, clean_dt = (large(1, length, heads, dtype=torch.float32) for _ in range(2))
    states = torch.zeros(1, length // chunk, heads, 1, 1)
    A, D = -torch.full((heads,), 0.1), torch.ones(heads)
    small = [filled(t, last, seed) for seed, t in enumerate((x, dt, B, C))]
    small_clean = [filled(t, last, 5 + seed).detach() for seed, t in enumerate((clean_x, clean_dt, clean_B))]
    small_upstream = filled(upstream, last, 10).detach()
    small_states = filled(states, (slice(None), slice(-1, None), slice(-1, None)), 11).detach()
    one_head = [t[-1:].double() for t in (A, D)]
    wanted = two_stream_scan_torch(
        *small[:2],
        one_head[0],
        *small[2:],
        one_head[1],
        clean_x=small_clean[0],
        clean_dt=small_clean[1],
        clean_A=one_head[0],
        clean_B=small_clean[2],
        states=small_states,
        block=block,
        chunk=chunk,
    )
    gradients = torch.autograd.grad(wanted, small, small_upstream)
    leaves = [t.requires_grad_() for t in (x, dt, B, C)]
    with programs_of(last_program):
        names = {"clean_x": clean_x, "clean_dt": clean_dt, "clean_A": A, "clean_B": clean_B, "states": states}
        y = two_stream_scan_triton(x, dt, A, B, C, D, **names, block=block, chunk=chunk)
        got = torch.autograd.grad(y, leaves, upstream)
    close(y[last].detach(), wanted.detach())
    for one, other in zip(got, gradients, strict=True):
        close(one[last], other)


def test_the_convolution_of_many_positions():
    channels, block, taps = 2**16, 2, 4
    length = FAR // channels + 256
    cols = slice(-convolution.CHANNELS, None)
    # The last program of the backward pass has all positions from a multiple of its number on.
    tail = (slice(None), slice(-convolution.TILE, None), cols)
    x, upstream = large(1, length, channels), large(1, length, channels)
    history = large(1, length // block, taps - 1, channels)
    weight, bias = (numbers(*shape).to(torch.bfloat16) for shape in ((channels, taps), (channels,)))
    small_x, small_upstream = filled(x, tail, 1), filled(upstream, tail, 2).detach()
    small_history = filled(history, (slice(None), slice(-convolution.TILE // block, None), slice(None), cols), 3)
    wanted = seeded_block_conv(small_x, small_history.detach(), weight[cols].double(), bias[cols].double())
    (gradient,) = torch.autograd.grad(wanted, small_x, small_upstream)
    x.requires_grad_()
    with programs_of(last_program):
        out = convolution.block_conv_triton(x, history, weight, bias, block=block)
        (got,) = torch.autograd.grad(out, x, upstream)
    close(out[tail].detach(), wanted.detach())
    close(got[tail], gradient)


def test_the_gated_norm_of_many_rows():
    groups, width = 8, 512
    rows = FAR // (groups * width) + norm.ROWS
    tail = (slice(None), slice(-1, None), slice(-width, None))
    y, z, upstream = (large(1, rows, groups * width) for _ in range(3))
    weight = numbers(groups, width).to(torch.bfloat16)
    small, small_upstream = [filled(t, tail, 1 + k) for k, t in enumerate((y, z))], filled(upstream, tail, 3).detach()
    wanted = gated_rms_norm(*small, weight[-1:].double(), 1e-5)
    gradients = torch.autograd.grad(wanted, small, small_upstream)
    leaves = [t.requires_grad_() for t in (y, z)]
    with programs_of(last_program):
        out = norm.gated_rms_norm_triton(*leaves, weight, 1e-5)
        got = torch.autograd.grad(out, leaves, upstream)
    close(out[tail].detach(), wanted.detach())
    for one, other in zip(got, gradients, strict=True):
        close(one[tail], other)


def test_the_modulation_of_many_positions():
    width, segment = 4096, 16
    length = FAR // width + segment
    tail = (slice(-1, None), slice(None), slice(-16, None))
    x, upstream, out = (large(length, 1, width) for _ in range(3))
    shift, scale = (torch.zeros(length // segment, 1, width, dtype=torch.bfloat16) for _ in range(2))
    small_x, small_upstream, small_out = (filled(t, tail, k) for k, t in enumerate((x, upstream, out)))
    small_shift, small_scale = (filled(t, tail, 5 + k).detach() for k, t in enumerate((shift, scale)))
    leaves = [t.requires_grad_() for t in (x, out)]
    with programs_of(last_program):
        modulated = modulation.modulate_triton(x, shift, scale)
        gated = modulation.add_gated_triton(x, scale, out)
        (grad_x,) = torch.autograd.grad(modulated, leaves[:1], upstream)
        (grad_out,) = torch.autograd.grad(gated, leaves[1:], upstream)
    close(modulated[tail].detach(), small_x.detach() * (1 + small_scale) + small_shift)
    close(gated[tail].detach(), (small_x + small_scale * small_out).detach())
    close(grad_x[tail], small_upstream * (1 + small_scale))
    close(grad_out[tail], small_upstream * small_scale)


def test_the_cross_entropy_of_many_logits():
    columns = 2**17
    rows = FAR // columns + 1
    logits, targets = large(rows, columns), torch.zeros(rows, dtype=torch.int64)
    logits[-1] = numbers(columns).to(logits.dtype)
    targets[-1], weights = columns - 2, torch.full((rows,), 0.5)
    last = (logits[-1:].clone(), targets[-1:], weights[-1:])
    wanted, gradient = chunk_cross_entropy_torch(*last, group=None, first=0, gradient=True)
    with programs_of(last_program):
        losses, got = cross_entropy.chunk_cross_entropy_triton(
            logits, targets, weights, group=None, first=0, gradient=True
        )
    torch.testing.assert_close(losses[-1:], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[-1:], gradient, rtol=1e-2, atol=1e-6)
