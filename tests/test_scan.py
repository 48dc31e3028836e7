"""The scans against the plain recurrence, in float64, all gradients included."""

import pytest
import torch

from megatron_twotower.ops.scan import chunk_length, chunk_scan, scan_ref, two_stream_scan, two_stream_scan_ref


def inputs(length, *, heads=4, groups=2, size=3, state=5, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dt = draw(2, length, heads, size), torch.nn.functional.softplus(draw(2, length, heads))
    A, B, C, D = -draw(heads).exp(), draw(2, length, groups, state), draw(2, length, groups, state), draw(heads)
    return [t.requires_grad_(grad) for t in (x, dt, A, B, C, D)]


@pytest.mark.parametrize(("length", "chunk"), [(12, 4), (13, 4), (5, 8), (16, 16)])
def test_chunk_scan_equals_the_recurrence(length, chunk):
    tensors = inputs(length)
    initial = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    y, states, final = chunk_scan(*tensors, chunk=chunk, initial=initial)
    expected, last = scan_ref(*tensors, initial=initial)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, last, rtol=1e-12, atol=1e-12)
    for c in range(1, states.shape[1]):
        x, dt, A, B, C, D = tensors
        past = slice(0, c * chunk)
        _, state = scan_ref(x[:, past], dt[:, past], A, B[:, past], C[:, past], D, initial=initial)
        torch.testing.assert_close(states[:, c], state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "block", "preferred"), [(12, 1, 4), (24, 4, 8), (24, 4, 16), (24, 12, 4), (16, 16, 64), (30, 6, 12)]
)
def test_two_streams_equal_block_by_block_with_all_gradients(length, block, preferred):
    noisy = inputs(length, seed=1, grad=True)
    clean_x, clean_dt, clean_A, clean_B, clean_C, clean_D = inputs(length, seed=2)
    chunk = chunk_length(block, preferred=preferred)
    _, states, _ = chunk_scan(clean_x, clean_dt, clean_A, clean_B, clean_C, clean_D, chunk=chunk)
    clean = {"clean_x": clean_x, "clean_dt": clean_dt, "clean_A": clean_A, "clean_B": clean_B, "block": block}
    y = two_stream_scan(*noisy, **clean, states=states, chunk=chunk)
    expected = two_stream_scan_ref(*noisy, **clean)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, noisy, upstream)
    for got, want in zip(gradients, torch.autograd.grad(expected, noisy, upstream), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_bfloat16_inputs_are_accumulated_in_float32():
    noisy = inputs(64, seed=3)
    exact, _ = scan_ref(*[t.bfloat16().double() for t in noisy])
    y, states, _ = chunk_scan(*[t.bfloat16() for t in noisy], chunk=16)
    assert y.dtype == torch.bfloat16 and states.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


def test_chunk_length_is_a_multiple_of_the_block():
    assert [chunk_length(s, preferred=64) for s in (1, 16, 24, 64, 100)] == [64, 64, 48, 64, 100]
