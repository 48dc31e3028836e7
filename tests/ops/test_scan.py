"""The scans against the recurrence in float64, all gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_twotower.ops import scan_chunks
from megatron_twotower.ops.scan import chunk_length, chunk_scan, scan_ref, two_stream_scan, two_stream_scan_ref

NAMES = ("x", "dt", "A", "B", "C", "D")


def inputs(length, *, batch=2, heads=4, groups=2, size=3, state=5, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dt = draw(batch, length, heads, size), torch.nn.functional.softplus(draw(batch, length, heads))
    A, B, C, D = -draw(heads).exp(), draw(batch, length, groups, state), draw(batch, length, groups, state), draw(heads)
    return [t.requires_grad_(grad) for t in (x, dt, A, B, C, D)]


def random_documents(batch, length, seed, *, share=0.2):
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share
    return starts.cumsum(1).to(torch.int32)


def assert_same(got, want, tensors, wide, *, tolerance):
    """Errors of y and all gradients relative to the largest value; some are zero up to rounding."""
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=want.dtype)
    ours = torch.autograd.grad(got, tensors, upstream.to(got.dtype))
    theirs = torch.autograd.grad(want, wide, upstream.to(got.dtype).double())
    for name, a, b in zip(("y", *NAMES), (got, *ours), (want, *theirs), strict=True):
        error = (a.double() - b.double()).abs().max() / b.abs().max().clamp(min=0.1)
        assert error < tolerance, (name, error)


shapes = st.fixed_dictionaries(
    {
        "block": st.sampled_from([1, 2, 3, 4, 6, 7, 16]),
        "blocks": st.integers(1, 9),
        "preferred": st.sampled_from([2, 4, 8, 12, 32]),
        "batch": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
        "share": st.sampled_from([0.0, 0.15, 0.6]),
        "cached": st.sampled_from([1, 1 << 19]),
        "seed": st.integers(0, 10**6),
    }
)


# Largest error over largest value. In float32 the gradient of A, a sum of differences, is the least
# accurate. bfloat16 rounds y and the gradients themselves.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2}


@given(case=shapes, dtype=st.sampled_from(list(TOLERANCES)))
@settings(max_examples=80, deadline=None)
def test_two_streams_equal_block_by_block_with_all_gradients(case, dtype):
    block, length, seed = case["block"], case["block"] * case["blocks"], case["seed"]
    kind = {"batch": case["batch"], "groups": case["groups"]}
    noisy, clean = (
        [
            t.to(dtype if t.dim() == 4 else torch.promote_types(dtype, torch.float32))
            for t in inputs(length, **kind, seed=i)
        ]
        for i in (seed, seed + 1)
    )
    wide_noisy, wide_clean = [t.double().requires_grad_() for t in noisy], [t.double() for t in clean]
    noisy = [t.requires_grad_() for t in noisy]
    documents = random_documents(case["batch"], length, seed, share=case["share"]) if case["share"] else None
    chunk = chunk_length(block, preferred=case["preferred"])
    shape = {"block": block, "documents": documents}
    names = ("clean_x", "clean_dt", "clean_A", "clean_B")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_chunks, "CPU_ELEMENTS", case["cached"])
        _, states, _ = chunk_scan(*clean, chunk=chunk, documents=documents)
        got = two_stream_scan(*noisy, **dict(zip(names, clean, strict=False)), states=states, chunk=chunk, **shape)
        assert got.dtype == dtype
        want = two_stream_scan_ref(*wide_noisy, **dict(zip(names, wide_clean, strict=False)), **shape)
        assert_same(got, want, noisy, wide_noisy, tolerance=TOLERANCES[dtype])


@given(case=shapes, length=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_chunk_scan_equals_the_recurrence_with_all_gradients(case, length):
    kind = {"batch": case["batch"], "groups": case["groups"]}
    tensors = inputs(length, seed=case["seed"], grad=True, **kind)
    documents = random_documents(case["batch"], length, case["seed"], share=case["share"]) if case["share"] else None
    initial = torch.randn(case["batch"], 4, 3, 5, dtype=torch.float64)
    chunk = chunk_length(1, preferred=case["preferred"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_chunks, "CPU_ELEMENTS", case["cached"])
        patch.setattr(scan_chunks, "MAX_TILE", 4)
        got, states, final = chunk_scan(*tensors, chunk=chunk, initial=initial, documents=documents)
        want, last = scan_ref(*tensors, initial=initial, documents=documents)
        assert_same(got, want, tensors, tensors, tolerance=1e-10)
    torch.testing.assert_close(final, last.detach(), rtol=1e-11, atol=1e-11)
    x, dt, A, B, C, D = tensors
    for c in range(1, states.shape[1]):
        past = slice(0, c * chunk)
        past_documents = None if documents is None else documents[:, past]
        _, state = scan_ref(
            x[:, past], dt[:, past], A, B[:, past], C[:, past], D, initial=initial, documents=past_documents
        )
        torch.testing.assert_close(states[:, c], state.detach(), rtol=1e-11, atol=1e-11)


def test_large_states_stay_finite_in_bfloat16():
    clean, noisy = inputs(64, seed=3), inputs(64, seed=4)
    clean = [t.bfloat16() for t in clean]
    noisy = [t.bfloat16().requires_grad_() for t in noisy]
    _, states, _ = chunk_scan(*clean, chunk=16)
    names = {"clean_x": clean[0], "clean_dt": clean[1].float(), "clean_A": clean[2], "clean_B": clean[3]}
    y = two_stream_scan(*noisy, **names, states=states * 1e4, block=4, chunk=16)
    gradients = torch.autograd.grad(y, noisy, torch.ones_like(y))
    assert all(t.isfinite().all() for t in (y, *gradients)) and y.abs().max() > 1e3


def test_only_the_state_of_each_chunk_is_kept():
    """The memory between forward and backward does not grow with the number of blocks."""
    kept = {}
    for block in (2, 32):
        noisy, clean = inputs(64, seed=1, grad=True), inputs(64, seed=2)
        _, states, _ = chunk_scan(*clean, chunk=32)
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t.numel()) or t, lambda t: t):
            two_stream_scan(
                *noisy,
                clean_x=clean[0],
                clean_dt=clean[1],
                clean_A=clean[2],
                clean_B=clean[3],
                states=states,
                block=block,
                chunk=32,
            )
        kept[block] = sum(seen)
    assert kept[2] == kept[32]


@pytest.mark.parametrize(
    ("preferred", "expected"),
    [(64, {1: 64, 16: 64, 24: 48, 64: 64, 100: 50, 127: 127, 256: 64}), (128, {4: 128, 32: 128, 48: 96, 512: 128})],
)
def test_chunks_are_multiples_of_small_blocks_and_divisors_of_large_ones(preferred, expected):
    assert {block: chunk_length(block, preferred=preferred) for block in expected} == expected


# --- long sequences ---


@pytest.mark.slow
def test_float32_stays_accurate_over_131072_steps():
    """Against float64, for heads whose states last about 1, 10^3 and 10^7 steps."""
    length, scale = 131_072, torch.tensor([1.0, 1.0, 1e-3, 1e-3, 1e-5, 1e-5], dtype=torch.float64)
    sizes = {"batch": 1, "heads": 6, "groups": 3, "size": 2, "state": 4}
    clean, noisy = ([t.float() for t in inputs(length, **sizes, seed=seed)] for seed in (0, 1))
    for stream in (clean, noisy):
        stream[1], stream[2] = stream[1] * scale.float(), -torch.tensor([0.5, 1.0, 0.5, 1.0, 0.01, 1.0])
    by_step, last = scan_ref(*[t.double() for t in clean])
    found = {}
    # In float64 in other chunks, so that an error of the chunks would show.
    for dtype, chunk in ((torch.float32, 128), (torch.float64, 32)):
        trained, own = ([t.to(dtype).requires_grad_() for t in stream] for stream in (clean, noisy))
        y, states, final = chunk_scan(*trained, chunk=chunk)
        names = dict(zip(("clean_x", "clean_dt", "clean_A", "clean_B"), (t.detach() for t in trained), strict=False))
        two = two_stream_scan(*own, **names, states=states, block=16, chunk=chunk)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
        grads = [torch.autograd.grad(out, of, upstream.to(dtype)) for out, of in ((y, trained), (two, own))]
        found[dtype] = {"y": y, "states": states[:, :: 128 // chunk], "final": final, "noisy y": two} | {
            f"{kind} {name}": t
            for kind, of in zip(("clean", "noisy"), grads, strict=True)
            for name, t in zip(NAMES, of, strict=True)
        }
    exact = found[torch.float64]
    assert errors_by_group({"y": exact["y"], "final": exact["final"]}, {"y": by_step, "final": last}) < 1e-11
    values = ("y", "states", "final", "noisy y")
    assert errors_by_group(*({name: t[name] for name in values} for t in found.values())) < 5e-6
    gradients = exact.keys() - values
    assert errors_by_group(*({name: t[name] for name in gradients} for t in found.values())) < 3e-5


def errors_by_group(got, want):
    """The largest error over the largest value, of tensors and three groups of heads of each."""
    errors = {}
    for name, exact in want.items():
        # Heads or groups: the dimension of 6 or 3.
        dim = next(d for d, size in enumerate(exact.shape) if size in (3, 6))
        for group, (a, b) in enumerate(zip(got[name].double().chunk(3, dim), exact.chunk(3, dim), strict=True)):
            errors[name, group] = ((a - b).abs().max() / b.abs().max()).item()
    return max(errors.values())
