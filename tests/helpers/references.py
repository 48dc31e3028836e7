"""Comparisons of an operation with its reference implementation, values and gradients."""

import torch

# Largest error over largest value: gradients of float32 are sums of many products, bfloat16 rounds
# each of them.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def draw(*shape, seed=0, grad=True):
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def random_documents(length, seed):
    """The documents of two sequences, five positions long on average."""
    starts = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    return starts.cumsum(1).to(torch.int32)


def assert_same_gradients(got, want, tensors):
    """Both values and their gradients into the tensors are equal, in float64."""
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = draw(*got.shape, seed=99, grad=False)
    pairs = zip(torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(want, tensors, upstream), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def assert_follows(operation, reference, tensors, dtype):
    """In a narrow dtype, value and gradients follow the reference in float64."""
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    got, want = operation(*narrow), reference(*wide)
    assert got.dtype == dtype
    upstream = draw(*got.shape, seed=99, grad=False).to(dtype)
    ours, theirs = torch.autograd.grad(got, narrow, upstream), torch.autograd.grad(want, wide, upstream.double())
    for a, b in zip((got, *ours), (want, *theirs), strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCES[dtype] * b.abs().max().clamp(min=1), (a, b)
