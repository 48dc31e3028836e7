"""The Triton kernels of the two-stream scan against the recurrence in float64, and compiled."""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from helpers.triton_kernels import (
    POINTERS,
    SHARED_MEMORY,
    compiled,
    compiles_kernels,
    largest_errors,
    on_device,
    runs_kernels,
)
from megatron_twotower.ops.scan import scan_ref, two_stream_scan_ref

pytest.importorskip("triton")
from megatron_twotower.ops.triton import scan_kernels
from megatron_twotower.ops.triton.scan import tile_constants, two_stream_scan_triton, unsupported

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
NAMES = ("y", "x", "dt", "A", "B", "C", "D")
NANO = {"heads": 64, "groups": 8, "size": 64, "state": 128}


def stream(length, *, batch, heads, groups, size, state, dtype, seed, scale=1.0):
    """The inputs of one stream; x, B and C are views of one projection, as in the layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    widths = [heads * size, groups * state, groups * state]
    x, B, C = draw(batch, length, sum(widths)).to(dtype).split(widths, dim=-1)
    x, B, C = x.unflatten(-1, (heads, size)), B.unflatten(-1, (groups, state)), C.unflatten(-1, (groups, state))
    dt = torch.nn.functional.softplus(draw(batch, length, 2 * heads))[..., heads:]
    return x if scale == 1.0 else (x * scale).to(dtype), dt, -draw(heads).exp(), B, C, draw(heads)


def start_states(clean, chunk, documents):
    """The clean state before each chunk by the recurrence, in float64."""
    x, dt, A, B, C, D = (t.double() for t in clean)
    states = [x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])]
    for end in range(chunk, x.shape[1], chunk):
        past = slice(max(0, end - chunk), end)
        state, rows = states[-1], None
        if documents is not None:
            rows = documents[:, past]
            if past.start:
                state = state * (rows[:, 0] == documents[:, past.start - 1]).view(-1, 1, 1, 1)
        states.append(scan_ref(x[:, past], dt[:, past], A, B[:, past], C[:, past], D, initial=state, documents=rows)[1])
    return torch.stack(states, dim=1)


def errors(noisy, clean, *, block, chunk, documents=None):
    """By name, of y and all gradients: largest error over the largest value in float64."""
    clean_x, clean_dt, clean_A, clean_B = clean[:4]
    exact = [t.double().requires_grad_() for t in noisy]
    given_clean = {"clean_x": clean_x, "clean_dt": clean_dt, "clean_A": clean_A, "clean_B": clean_B}
    in_double = {name: t.double() for name, t in given_clean.items()}
    expected = two_stream_scan_ref(*exact, **in_double, block=block, documents=documents)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(noisy[0].dtype)
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]

    leaves = [on_device(t).requires_grad_() for t in noisy]
    moved = {name: on_device(t).requires_grad_() for name, t in given_clean.items()}
    states = on_device(start_states(clean, chunk, documents).float())
    rows = None if documents is None else on_device(documents)
    y = two_stream_scan_triton(*leaves, **moved, states=states, block=block, chunk=chunk, documents=rows)
    assert y.dtype == noisy[0].dtype
    got = [y, *torch.autograd.grad(y, leaves, on_device(upstream), retain_graph=True)]
    assert torch.autograd.grad(y, moved["clean_x"], on_device(upstream), allow_unused=True) == (None,)
    assert [t.dtype for t in got[1:]] == [t.dtype for t in leaves]
    return largest_errors(got, dict(zip(NAMES, wanted, strict=True)))


def check(noisy, clean, **settings):
    found, dtype = errors(noisy, clean, **settings), noisy[0].dtype
    assert {name: error for name, error in found.items() if not error <= TOLERANCES[dtype]} == {}


# Without shrinking, which would take minutes in the interpreter.
def of_drawn_sizes(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


DRAWN = {
    "data": st.data(),
    "block": st.sampled_from([1, 2, 3, 4, 8, 16, 20]),
    "chunk_blocks": st.integers(1, 5),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "batch": st.integers(1, 2),
}


@runs_kernels
@of_drawn_sizes(2)
@given(**DRAWN)
def test_output_and_all_gradients_equal_the_recurrence(data, block, chunk_blocks, dtype, batch):
    check_drawn(data, block, chunk_blocks, dtype, batch)


@runs_kernels
@pytest.mark.slow
@of_drawn_sizes(20)
@given(**DRAWN)
def test_of_more_sizes(data, block, chunk_blocks, dtype, batch):
    check_drawn(data, block, chunk_blocks, dtype, batch)


def check_drawn(data, block, chunk_blocks, dtype, batch):
    length = block * data.draw(st.integers(1, max(1, 32 // block)), label="blocks")
    groups, share = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]), label="groups and heads of each")
    sizes = {"heads": groups * share, "groups": groups}
    sizes |= data.draw(st.sampled_from([{"size": 4, "state": 7}, {"size": 16, "state": 16}, {"size": 17, "state": 5}]))
    documents = None
    if data.draw(st.booleans(), label="documents"):
        starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.15
        documents = starts.cumsum(1).to(torch.int32)
    noisy, clean = (stream(length, batch=batch, dtype=dtype, seed=seed, **sizes) for seed in (1, 2))
    check(noisy, clean, block=block, chunk=block * chunk_blocks, documents=documents)


@runs_kernels
@pytest.mark.parametrize(
    ("block", "chunk", "length"), [(8, 104, 120), pytest.param(48, 96, 96, marks=pytest.mark.slow)]
)
def test_chunks_in_two_halves_and_several_tiles(block, chunk, length):
    sizes = {"batch": 1, "heads": 2, "groups": 1, "size": 4, "state": 5, "dtype": torch.float32}
    check(stream(length, seed=1, **sizes), stream(length, seed=2, **sizes), block=block, chunk=chunk)


@runs_kernels
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_states_of_ten_thousand_give_no_nan(dtype):
    sizes = {"batch": 1, "heads": 4, "groups": 2, "size": 16, "state": 16, "dtype": dtype}
    noisy, clean = stream(64, seed=1, **sizes), stream(64, seed=2, scale=3e3, **sizes)
    assert start_states(clean, 32, None).abs().max() > 1e4
    check(noisy, clean, block=8, chunk=32)


@runs_kernels
def test_large_states_are_not_rounded_to_bfloat16():
    """C cancels states of ten thousand, which in bfloat16 would leave errors of tens."""
    sizes = {"batch": 1, "heads": 2, "groups": 1, "size": 16, "state": 16, "dtype": torch.bfloat16}
    (x, dt, A, B, C, D), clean = stream(16, seed=1, **sizes), stream(16, seed=2, **sizes)
    C = torch.tensor([1.0, -1.0]).repeat(8).expand_as(C).to(torch.bfloat16)
    states = 1e4 + torch.randn(1, 2, 2, 16, 16, generator=torch.Generator().manual_seed(3))
    given_clean = dict(zip(("clean_x", "clean_dt", "clean_A", "clean_B"), map(on_device, clean), strict=False))
    noisy = [on_device(t) for t in (x, dt, A, B, C, D)]
    y = two_stream_scan_triton(*noisy, **given_clean, states=on_device(states), block=8, chunk=8)
    x, dt, A, B, C, D = ((t[:, 8:] if t.dim() > 1 else t).double() for t in (x, dt, A, B, C, D))
    expected, _ = scan_ref(x, dt, A, B, C, D, initial=states[:, 1].double())
    assert expected.abs().max() < 50
    assert (y[:, 8:].cpu().double() - expected).abs().max() < 1e-2 * expected.abs().max()


@runs_kernels
def test_steps_that_forget_everything_give_no_nan():
    """Log decays of minus ten thousand: exponents of pairs that do not count would overflow."""
    sizes = {"batch": 1, "heads": 2, "groups": 1, "size": 4, "state": 4, "dtype": torch.float32}
    noisy, clean = (
        [x, dt * 1e3, A, B, C, D] for x, dt, A, B, C, D in (stream(32, seed=seed, **sizes) for seed in (1, 2))
    )
    check(noisy, clean, block=4, chunk=16)


@runs_kernels
def test_a_gradient_that_is_one_expanded_number():
    sizes = {"batch": 1, "heads": 2, "groups": 1, "size": 4, "state": 4, "dtype": torch.float32}
    noisy, clean = ([on_device(t) for t in stream(16, seed=seed, **sizes)] for seed in (1, 2))
    states = on_device(start_states([t.cpu() for t in clean], 8, None).float())
    names = dict(zip(("clean_x", "clean_dt", "clean_A", "clean_B"), clean, strict=False))
    noisy[0].requires_grad_()
    y = two_stream_scan_triton(*noisy, **names, states=states, block=4, chunk=8)
    (expanded,) = torch.autograd.grad(y.sum(), noisy[0], retain_graph=True)
    (dense,) = torch.autograd.grad(y, noisy[0], torch.ones_like(y))
    torch.testing.assert_close(expanded, dense, rtol=0, atol=0)


@runs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("documents", [False, True])
def test_head_dimensions_of_nano(dtype, documents):
    sizes = {"batch": 1, "heads": 16, "groups": 2, "size": 64, "state": 128, "dtype": dtype}
    rows = (torch.arange(256) > 170).int().unsqueeze(0) if documents else None
    check(stream(256, seed=1, **sizes), stream(256, seed=2, **sizes), block=16, chunk=128, documents=rows)


# --- without a device ---


KERNELS = ("decay", "decay_backward", "forward", "backward_clean", "backward_block")


def compiled_for_hopper(name, dtype, *, block=16, chunk=128, heads=64, groups=8, size=64, state=128):
    kernel = getattr(scan_kernels, f"{name}_kernel")
    x, B = torch.empty(1, 1, heads, size, dtype=dtype), torch.empty(1, 1, groups, state, dtype=dtype)
    if name.startswith("decay"):
        constants, options = (heads, block, chunk, chunk, 32), {"num_warps": 4}
    else:
        constants, launch = tile_constants(name, x, B, block=block, chunk=chunk, documents=True)
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
    inputs = {"x", "B", "C", "clean_x", "clean_B", "y", "grad", "grad_x", "grad_B", "grad_C"}
    types = dict.fromkeys(inputs, POINTERS[dtype]) | {"documents": "*i32"}
    types |= {
        argument: "i32"
        for argument in kernel.arg_names
        if re.fullmatch(r"(x|dt|B|C|cx|cdt|cB|h|y|g|docs)_[a-z]|length", argument)
    }
    return compiled(kernel, types, constants, **options)


@compiles_kernels
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_hopper_in_bfloat16(name):
    kernel = compiled_for_hopper(name, torch.bfloat16)
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert kernel.asm["cubin"]
    if name not in ("decay", "decay_backward"):
        assert "wgmma" in kernel.asm["ptx"]


@compiles_kernels
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("changed", [{}, {"block": 128}, {"size": 128, "state": 256}], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_for_hopper_at_the_limits(name, changed, dtype):
    if dtype == torch.float32:
        changed = {key: value // 2 for key, value in changed.items()}
    assert compiled_for_hopper(name, dtype, **changed).metadata.shared <= SHARED_MEMORY


def test_what_is_supported():
    x, B = torch.empty(1, 64, 8, 64, dtype=torch.bfloat16), torch.empty(1, 64, 2, 128, dtype=torch.bfloat16)
    assert unsupported(x, B, block=16, chunk=128) is None
    assert unsupported(x.half(), B, block=16, chunk=128) == "dtype torch.float16, expected bfloat16 or float32"
    assert unsupported(x, B, block=16, chunk=24) == "blocks of 16 tokens in chunks of 24, expected whole blocks"
    assert unsupported(x, B, block=256, chunk=256) == "block 256, expected at most 128"
    assert unsupported(x, B.new_empty(1, 64, 2, 512), block=16, chunk=64) == "state size 512, expected at most 256"
    assert unsupported(x, B, block=8, chunk=136) == "chunk 136, expected at most 128"
    assert unsupported(x.float(), B.float(), block=128, chunk=128) == "block 128, expected at most 64"


@pytest.mark.parametrize("name", ["forward", "backward_clean", "backward_block"])
@pytest.mark.parametrize(("block", "chunk"), [(1, 1), (3, 126), (16, 128), (24, 120), (48, 96), (100, 100), (128, 128)])
def test_tiles_are_complete_blocks_and_cover_the_chunk(name, block, chunk):
    x, B = torch.empty(1, 1, 8, 64), torch.empty(1, 1, 2, 128)
    constants, _ = tile_constants(name, x, B, block=block, chunk=chunk, documents=False)
    assert constants.tile % block == 0
    assert (constants.tiles - 1) * constants.tile < chunk <= constants.tiles * constants.tile
    assert constants.tile <= constants.rows and chunk <= 2 * constants.keys
    assert constants.rows & (constants.rows - 1) == 0 and constants.rows >= 16


@compiles_kernels
def test_the_scan_does_not_import_triton():
    code = "import sys, megatron_twotower.ops.scan; print('megatron_twotower.ops.triton.scan' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
