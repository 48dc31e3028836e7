"""The Triton kernel of the loss against float64, and compiled."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from helpers.triton_kernels import POINTERS, compiled, compiles_kernels, on_device, runs_kernels, spilled_bytes
from megatron_twotower.ops.triton import cross_entropy
from megatron_twotower.ops.triton.cross_entropy import chunk_cross_entropy_triton

# The gradient is rounded once, the loss not at all.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def wanted_rows(logits, targets, weights):
    """Losses and gradient in float64."""
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad((losses * weights).sum(), exact)
    return {"losses": losses.detach(), "gradient": gradient}


def assert_close(got, wanted, dtype):
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=TOLERANCES[dtype], atol=1e-6)


def drawn(rows, columns, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, columns, generator=generator)).to(dtype)
    weights = torch.rand(rows, generator=generator)
    weights[::3] = 0.0
    return logits, torch.randint(columns, (rows,), generator=generator), weights


@runs_kernels
@settings(
    max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    rows=st.integers(1, 6),
    columns=st.sampled_from([2, 15, 16, 100, 4096, 9000]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(list(TOLERANCES)),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    gradient=st.booleans(),
)
def test_losses_and_gradient(rows, columns, dtype, scale, seed, gradient):
    logits, targets, weights = drawn(rows, columns, dtype, scale, seed)
    wanted = wanted_rows(logits, targets, weights)
    ours = on_device(logits)
    losses, found = chunk_cross_entropy_triton(
        ours, on_device(targets), on_device(weights), group=None, first=0, gradient=gradient
    )
    assert losses.dtype == torch.float32 and found.dtype == dtype
    assert found.data_ptr() == ours.data_ptr()
    if not gradient:
        assert torch.equal(found.cpu(), logits)
    assert_close(losses, wanted["losses"], torch.float32)
    if gradient:
        assert_close(found, wanted["gradient"], dtype)


class TwoRanks:
    """Collectives of two ranks that run one after the other.

    Each round repeats all collectives, and uses what the other rank sent in the round before.
    """

    ReduceOp = dist.ReduceOp

    def __init__(self):
        self.sent = {}

    def begin(self, rank):
        self.rank, self.number = rank, 0

    def get_world_size(self, group):
        return 2

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None):
        both = self.sent.setdefault(self.number, {})
        both[self.rank], self.number = tensor.clone(), self.number + 1
        if len(both) == 2:
            tensor.copy_(torch.maximum(*both.values()) if op == dist.ReduceOp.MAX else both[0] + both[1])


@runs_kernels
@pytest.mark.parametrize("columns", [16, *(pytest.param(each, marks=pytest.mark.slow) for each in (24, 10))])
def test_two_slices_of_the_vocabulary_are_one(monkeypatch, columns):
    logits, _, weights = drawn(2 * columns, 2 * columns, torch.float32, 3.0, seed=1)
    targets = torch.arange(2 * columns)
    wanted, ranks = wanted_rows(logits, targets, weights), TwoRanks()
    monkeypatch.setattr(cross_entropy, "dist", ranks)
    for _ in range(3):
        found = []
        for rank in range(2):
            ranks.begin(rank)
            own = on_device(logits[:, rank * columns :][:, :columns].contiguous())
            found.append(
                chunk_cross_entropy_triton(
                    own, on_device(targets), on_device(weights), group="both", first=rank * columns, gradient=True
                )
            )
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[0][0], wanted["losses"], torch.float32)
    assert_close(torch.cat([found[0][1], found[1][1]], dim=1), wanted["gradient"], torch.float32)


@compiles_kernels
@pytest.mark.parametrize(("sums", "gradient"), [(True, True), (True, False), (False, True)])
def test_it_compiles_for_hopper_without_spills(sums, gradient):
    types = {"logits": POINTERS[torch.bfloat16], "targets": "*i64", "first": "i32"}
    constants = (131072, cross_entropy.MAX_COLUMNS, sums, gradient)
    assert spilled_bytes(compiled(cross_entropy.cross_entropy_kernel, types, constants, num_warps=8)) == 0
