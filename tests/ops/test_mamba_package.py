"""The real mamba-ssm against the float64 recurrence, without a GPU: `make test-mamba`.

The kernels run in Triton's interpreter, which has to be switched on before triton is first
imported: one test here runs this file again in a process of its own. The interpreter checks neither
the compiler nor the hardware, so the kernels are also compiled for Hopper.
"""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from helpers import mamba_package
from helpers.gpu_checks import relative
from helpers.mamba_package import block_sizes, fenced, scan_module
from megatron_twotower.ops.context_parallel import finish
from megatron_twotower.ops.dispatch import mamba_ssm_chunk_scan, mamba_ssm_scan
from megatron_twotower.ops.scan import scan_ref

pytestmark = pytest.mark.mamba
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
NAMES = ("x", "dt", "A", "B", "C", "D")
HEADS, GROUPS, SIZE, STATE = 4, 2, 8, 16


@pytest.fixture
def host(monkeypatch):
    mamba_package.on_the_host(monkeypatch)
    mamba_package.mend_bfloat16(monkeypatch)
    return monkeypatch


def stream(length, *, dtype=torch.float32, batch=2, seed=0):
    """The inputs x, dt, A, B, C, D; x, B and C are views of one projection, as in the layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    widths = [HEADS * SIZE, GROUPS * STATE, GROUPS * STATE]
    x, B, C = draw(batch, length, sum(widths)).to(dtype).split(widths, dim=-1)
    x, B, C = x.unflatten(-1, (HEADS, SIZE)), B.unflatten(-1, (GROUPS, STATE)), C.unflatten(-1, (GROUPS, STATE))
    return [x, F.softplus(draw(batch, length, HEADS)), -draw(HEADS).exp(), B, C, draw(HEADS)]


def initial_states(batch=2):
    return 10 * torch.randn(batch, HEADS, SIZE, STATE, generator=torch.Generator().manual_seed(7))


def documents(length, *, first=0):
    """One row of three documents, one row of one document."""
    places = torch.arange(length)
    three = (places >= (length + 2) // 3).int() + (places >= (length + 1) // 2).int()
    return torch.stack([three - three[0], torch.zeros(length).int()]) + first


def too_large(errors, dtype):
    return {name: error for name, error in errors.items() if not error <= TOLERANCES[dtype]}


# --- this project's calls of the package ---


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("length", "chunk"), [(19, 16), (64, 16), (16, 128), (1, 16)])
@pytest.mark.parametrize("apart", [False, True])
def test_the_context_tower_s_scan_is_the_recurrence_with_its_states(host, length, chunk, apart, dtype):
    tensors, rows = stream(length, dtype=dtype), documents(length, first=3) if apart else None
    with block_sizes(length + apart):
        y, states, final = finish(mamba_ssm_chunk_scan(*tensors, chunk=chunk, documents=rows))
    assert y.dtype == dtype and states.dtype == final.dtype == torch.float32
    exact = [t.double() for t in tensors]
    expected, last = scan_ref(*exact, documents=rows)
    errors = {"y": relative(y, expected), "final": relative(final, last)}
    assert states.shape == (2, -(-length // chunk), HEADS, SIZE, STATE) and not states[:, 0].any()
    for c in range(1, states.shape[1]):
        past = [t[:, : c * chunk] if t.dim() > 1 else t for t in exact]
        before = scan_ref(*past, documents=None if rows is None else rows[:, : c * chunk])[1]
        errors[f"state {c}"] = relative(states[:, c], before)
    assert too_large(errors, dtype) == {}


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("length", "chunk"), [(19, 16), (40, 64)])
@pytest.mark.parametrize("apart", [False, True])
def test_next_token_training_has_the_recurrence_s_gradients(host, length, chunk, apart, dtype):
    own = [t.detach().requires_grad_() for t in stream(length, dtype=dtype)]
    exact = [t.detach().double().requires_grad_() for t in own]
    rows = documents(length) if apart else None
    expected = scan_ref(*exact, documents=rows)[0]
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    with block_sizes(length + apart):
        y = mamba_ssm_scan(*own, chunk=chunk, documents=rows)
        got = torch.autograd.grad(y, own, upstream)
    assert [t.dtype for t in got] == [t.dtype for t in own]
    pairs = zip(NAMES, got, torch.autograd.grad(expected, exact, upstream.double()), strict=True)
    assert too_large({"y": relative(y, expected)} | {name: relative(a, b) for name, a, b in pairs}, dtype) == {}


# --- initial states and short sequences, which this project does not use ---

# Lengths and chunks. All of (1, 8, 16, 17, 64) x (16, 64, 128, 256) were run once, which takes
# twenty minutes.
SIZES = [(1, 16), (1, 64), (8, 16), (8, 128), (16, 16), (16, 64), (16, 128), (16, 256), (17, 16), (17, 64), (64, 16)]
SHORT = [(*sizes, apart, dtype) for sizes, apart, dtype in itertools.product(SIZES, (False, True), TOLERANCES)]


@interpreted
@pytest.mark.parametrize(("number", "length", "chunk", "apart", "dtype"), [(i, *case) for i, case in enumerate(SHORT)])
def test_short_sequences_from_initial_states(host, number, length, chunk, apart, dtype):
    """Value, final state and all gradients, also of the initial states.

    The block sizes are larger and smaller than the sequence. Memory that is not yet written is NaN,
    and so is the memory around the inputs.
    """
    tensors, initial, rows = stream(length, dtype=dtype), initial_states(), documents(length) if apart else None
    own = [fenced(t).requires_grad_() for t in (*tensors, initial)]
    exact = [t.double().requires_grad_() for t in (*tensors, initial)]
    want = scan_ref(*exact[:6], initial=exact[6], documents=rows)
    upstream = [torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for t in want]
    upstream[0] = upstream[0].to(dtype)
    gradients = torch.autograd.grad(want, exact, [t.double() for t in upstream])
    mamba_package.memory_holds_nan(host)
    x, dt, A, B, C, D, start = own
    with block_sizes(number):
        got = scan_module().mamba_chunk_scan_combined(
            x,
            dt,
            A,
            B,
            C,
            chunk,
            D=D,
            initial_states=start,
            seq_idx=None if rows is None else fenced(rows),
            return_final_states=True,
        )
        found = torch.autograd.grad(got, own, [fenced(t) for t in upstream])
    errors = {"y": relative(got[0], want[0]), "final": relative(got[1], want[1])}
    errors |= {name: relative(a, b) for name, a, b in zip((*NAMES, "initial"), found, gradients, strict=True)}
    assert too_large(errors, dtype) == {}


def states_of_packed(lengths, *, chunk, initial):
    """Error of y, and of the state at the end of each sequence of one packed row (`cu_seqlens`)."""
    tensors, bounds = stream(sum(lengths), batch=1), list(itertools.accumulate(lengths, initial=0))
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int().unsqueeze(0)
    start = initial_states(1) if initial else None
    with block_sizes(len(lengths)):
        y, states = scan_module().mamba_chunk_scan_combined(
            *tensors[:5],
            chunk,
            D=tensors[5],
            initial_states=start,
            seq_idx=rows,
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            return_varlen_states=True,
        )
    exact, errors = [t.double() for t in tensors], []
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        own = [t[:, first:last] if t.dim() > 1 else t for t in exact]
        expected, state = scan_ref(*own, initial=start.double() if initial and i == 0 else None)
        errors.append((relative(y[:, first:last], expected), relative(states[i : i + 1], state)))
    return errors


@interpreted
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("lengths", [[16], [16, 16], [16, 8, 30], [1, 15, 17], [70, 16]], ids=str)
def test_packed_sequences_without_an_initial_state(host, lengths, chunk):
    assert max(itertools.chain(*states_of_packed(lengths, chunk=chunk, initial=False))) < TOLERANCES[torch.float32]


@interpreted
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("lengths", [[16], [1, 15, 17], [16, 16], [70, 16]], ids=str)
def test_the_state_of_a_packed_first_sequence_of_one_chunk_lacks_the_initial_one(host, lengths, chunk):
    """A bug of mamba-ssm 2.2 and 2.3 in the final states of packed sequences.

    `_chunk_state_varlen_kernel` adds the state before the last chunk only if the sequence starts
    before that chunk. A sequence that ends in the first chunk loses the initial state, although its
    y includes it. When this test fails, upstream has fixed the bug.
    """
    (y, state), *others = states_of_packed(lengths, chunk=chunk, initial=True)
    assert y < TOLERANCES[torch.float32] and all(max(pair) < TOLERANCES[torch.float32] for pair in others)
    assert (state > 1e-4) == (lengths[0] <= chunk), state


@interpreted
def test_an_initial_state_belongs_to_document_zero(host):
    """Rows whose seq_idx does not start at 0 start from a state of zeros."""
    tensors, initial = stream(17), initial_states()
    x, dt, A, B, C, D = tensors
    with block_sizes(0):
        y = scan_module().mamba_chunk_scan_combined(
            x, dt, A, B, C, 16, D=D, initial_states=initial, seq_idx=documents(17, first=1)
        )
    expected = scan_ref(*(t.double() for t in tensors), documents=documents(17))[0]
    assert relative(y, expected) < TOLERANCES[torch.float32]


@interpreted
def test_a_state_is_rounded_to_the_dtype_of_c(host):
    """C cancels states of ten thousand: in bfloat16 the package's y has an error of a tenth."""
    x, dt, A, B, C, D = stream(16, dtype=torch.bfloat16)
    C = torch.tensor([1.0, -1.0]).repeat(STATE // 2).expand_as(C).to(torch.bfloat16)
    initial = 1e4 + initial_states() / 10
    with block_sizes(0):
        y = scan_module().mamba_chunk_scan_combined(x, dt, A, B, C, 16, D=D, initial_states=initial)
    expected, _ = scan_ref(*(t.double() for t in (x, dt, A, B, C, D)), initial=initial.double())
    assert relative(y, expected) > 0.05


@interpreted
def test_float32_is_multiplied_in_tf32_on_a_gpu(host):
    """Why `ops.scan` does not use it in float32: the error is a thousandth, not 1e-4."""
    tensors = stream(40)
    mamba_package.multiply_in_tf32(host)
    with block_sizes(6):
        y, _, final = finish(mamba_ssm_chunk_scan(*tensors, chunk=16))
    expected, last = scan_ref(*(t.double() for t in tensors))
    errors = (relative(y, expected), relative(final, last))
    assert min(errors) > 1e-4 and max(errors) < 2e-3


# --- compiled ---

FORWARD = (
    "_chunk_cumsum_fwd_kernel",
    "_chunk_state_fwd_kernel",
    "_state_passing_fwd_kernel",
    "_bmm_chunk_fwd_kernel",
    "_chunk_scan_fwd_kernel",
)
BACKWARD = (
    "_chunk_scan_bwd_dstates_kernel",
    "_state_passing_bwd_kernel",
    "_chunk_scan_chunk_state_bwd_dx_kernel",
    "_chunk_state_bwd_db_kernel",
    "_chunk_scan_bwd_dc_kernel",
    "_chunk_scan_bwd_dcb_kernel",
    "_bmm_chunk_bwd_kernel",
    "_chunk_scan_bwd_ddAcs_stable_kernel",
    "_chunk_cumsum_bwd_kernel",
)
SHARED_MEMORY = 227 * 1024  # bytes a program may have at compute capability 9.0


def compiled(name, dtype, *, number):
    """A kernel for compute capability 9.0 at the head sizes of the real model.

    Chunks of 128, with initial states, without documents. number: the index of its configuration.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = mamba_package.kernels()[name]
    config = kernel.configs[number % len(kernel.configs)]
    narrow = dtype == torch.bfloat16
    constants = {
        "DT_SOFTPLUS": False,
        "HAS_DT_BIAS": False,
        "HAS_SEQ_IDX": False,
        "HAS_INITSTATES": True,
        "HAS_Z": False,
        "HAS_DFINAL_STATES": False,
        "HAS_DINITSTATES": True,
        "CONVERT_STATES": narrow,
        "HAS_D": True,
        "D_HAS_HDIM": False,
        "HAS_DDA_CS": name != "_chunk_scan_bwd_dcb_kernel",
        "HAS_RESIDUAL": True,
        "IS_CAUSAL": name == "_chunk_scan_fwd_kernel",
        "IS_TRITON_22": True,
        "DETERMINISTIC_REDUCTION": False,
        "BLOCK_SIZE_CHUNK": 128,
        "BLOCK_SIZE_DSTATE": 128,
        "BLOCK_SIZE_K": 64,
        "BLOCK_SIZE_N": 64,
        "dot_dtype": tl.bfloat16 if narrow else tl.float32,
        **config.kwargs,
        **dict.fromkeys(("seq_idx_ptr", "z_ptr", "out_x_ptr", "dt_bias_ptr", "ddt_bias_ptr", "dfinal_states_ptr")),
    }
    like_x = {"x_ptr", "b_ptr", "c_ptr", "C_ptr", "a_ptr", "dout_ptr", "dx_ptr", "db_ptr"}
    like_x |= {"out_ptr"} if name == "_chunk_scan_fwd_kernel" else set()
    signature, fixed, aligned = {}, {}, {}
    for place, parameter in enumerate(kernel.arg_names):
        if parameter in constants:
            signature[parameter], fixed[parameter] = "constexpr", constants[parameter]
        elif parameter in ("dt_min", "dt_max"):
            signature[parameter] = "fp32"
        elif parameter.endswith("_ptr"):
            signature[parameter] = "*bf16" if narrow and parameter in like_x else "*fp32"
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter] = "i32"
            if "stride" in parameter or parameter in ("chunk_size", "hdim", "dstate", "K", "dim"):
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.fn, signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@compiled_only
@pytest.mark.parametrize("name", FORWARD + BACKWARD)
def test_a_kernel_compiles_for_hopper_in_bfloat16(name):
    kernel = compiled(name, torch.bfloat16, number=6)
    assert kernel.asm["cubin"] and kernel.metadata.shared <= SHARED_MEMORY
    assert "tf32" not in kernel.asm["ptx"]


@compiled_only
@pytest.mark.parametrize("name", FORWARD[3:])
def test_float32_is_compiled_to_tf32(name):
    """What `test_float32_is_multiplied_in_tf32_on_a_gpu` assumes."""
    assert re.search(r"mma.*\.tf32\.tf32", compiled(name, torch.float32, number=6).asm["ptx"])


@compiled_only
def test_the_kernels_run_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-m", "mamba", "-p", "no:cacheprovider", "--durations=5"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
