"""The calls of other packages' kernels, with stand-ins of the same signatures in torch."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_twotower.ops import dispatch, scan
from megatron_twotower.ops.context_parallel import finish
from megatron_twotower.ops.dispatch import (
    causal_conv1d,
    causal_conv1d_unsupported,
    mamba_ssm_chunk_scan,
    mamba_ssm_scan,
)
from megatron_twotower.ops.scan import scan_ref, stream_scan


def stream(length, *, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, dt, A = draw(2, length, 4, 3), F.softplus(draw(2, length, 4)), -draw(4).exp()
    return [t.requires_grad_(grad) for t in (x, dt, A, draw(2, length, 2, 5), draw(2, length, 2, 5), draw(4))]


# Stand-ins for mamba_ssm.ops.triton.ssd_combined: the signatures and layouts of mamba-ssm 2.2 and
# 2.3.


def _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))):
    padded = F.pad(dt, (0, 0, 0, -dt.shape[1] % chunk_size)).unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2)
    return (padded * A[:, None, None]).cumsum(-1), padded


def _each_chunk(t, chunk):
    return F.pad(t, (0, 0) * (t.dim() - 2) + (0, -t.shape[1] % chunk)).unflatten(1, (-1, chunk))


def _same(seq_idx, chunk, chunks, batch):
    """Whether two positions of a chunk are of one document: (b, c, q, q)."""
    if seq_idx is None:
        return torch.ones(batch, chunks, chunk, chunk, dtype=torch.bool)
    rows = _each_chunk(seq_idx.unsqueeze(-1), chunk).squeeze(-1)
    return rows.unsqueeze(-1) == rows.unsqueeze(-2)


def _chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx=None, states=None, states_in_fp32=True):
    assert states_in_fp32
    (_, _, chunks, chunk), heads, length = dt.shape, x.shape[2] // B.shape[2], x.shape[1]
    weights = (dA_cumsum[..., -1:] - dA_cumsum).exp() * dt
    if seq_idx is not None:
        rows = _each_chunk(seq_idx.unsqueeze(-1), chunk).squeeze(-1)
        ends = seq_idx[:, [min((c + 1) * chunk, length) - 1 for c in range(chunks)]]
        weights = weights * (rows == ends.unsqueeze(-1)).unsqueeze(1)
    xs, Bs = _each_chunk(x, chunk), _each_chunk(B.repeat_interleave(heads, 2), chunk)
    return torch.einsum("bmcq,bcqmp,bcqmd->bcmpd", weights, xs, Bs)


def _state_passing_fwd(states, dA_chunk_cumsum, initial_states=None, seq_idx=None, chunk_size=None, out_dtype=None):
    assert states.dim() == 4 and out_dtype == torch.float32
    state, out, before = torch.zeros_like(states[:, 0]), [], torch.zeros(len(states))
    for c in range(states.shape[1]):
        out.append(state)
        keep = dA_chunk_cumsum[..., c].exp()
        if seq_idx is not None:
            now = seq_idx[:, min((c + 1) * chunk_size, seq_idx.shape[1]) - 1]
            keep, before = keep * (now == before).unsqueeze(-1), now
        state = keep.unsqueeze(-1) * state + states[:, c]
    return torch.stack(out, 1), state


def _bmm_chunk_fwd(a, b, chunk_size, seq_idx=None, causal=False, output_dtype=None):
    assert output_dtype == torch.float32
    scores = torch.einsum("bcigd,bcjgd->bcgij", _each_chunk(a, chunk_size), _each_chunk(b, chunk_size))
    return scores * _same(seq_idx, chunk_size, scores.shape[1], len(a)).unsqueeze(2)


def _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, states, D=None, z=None, seq_idx=None):
    (batch, _, chunks, chunk), heads = dt.shape, x.shape[2] // C.shape[2]
    assert states.shape == (batch, chunks, x.shape[2], x.shape[3], C.shape[3])
    decays = (dA_cumsum.unsqueeze(-1) - dA_cumsum.unsqueeze(-2)).tril().exp().tril()
    xs, Cs = _each_chunk(x, chunk), _each_chunk(C.repeat_interleave(heads, 2), chunk)
    intra_chunk = torch.einsum("bcmij,bmcij,bmcj,bcjmp->bcimp", cb.repeat_interleave(heads, 2), decays, dt, xs)
    read = dA_cumsum.exp()
    if seq_idx is not None:
        rows = _each_chunk(seq_idx.unsqueeze(-1), chunk).squeeze(-1)
        before = F.pad(seq_idx[:, chunk - 1 : -1 : chunk], (1, 0))
        read = read * (rows == before.unsqueeze(-1)).unsqueeze(1)
    carried = torch.einsum("bmcq,bcqmd,bcmpd->bcqmp", read, Cs, states)
    return (intra_chunk + carried).flatten(1, 2)[:, : x.shape[1]] + D.unsqueeze(-1) * x, None


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    assert z is None and dt_bias is None and not dt_softplus and not return_final_states
    return scan_ref(x, dt, A, B, C, D, documents=seq_idx)[0]


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Stand-in for causal-conv1d 1.5 and 1.7, with its checks of layout."""
    batch, channels, length = x.shape
    assert x.stride(1) == 1 and x.stride(2) > 1 and channels % 8 == 0
    assert x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    assert bias.dtype == weight.dtype and activation == "silu"
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    taps, out = weight.shape[1], bias.view(1, -1, 1).expand(batch, channels, length)
    for i in range(taps):
        back = taps - 1 - i
        seen = F.pad(x, (back, 0))[..., :length]
        if seq_idx is not None:
            seen = seen * (F.pad(seq_idx, (back, 0), value=-1)[:, :length] == seq_idx).unsqueeze(1)
        out = out + weight[:, i].view(1, -1, 1) * seen
    return F.silu(out)


@pytest.fixture
def stand_ins(monkeypatch):
    ssd, conv = ModuleType("mamba_ssm.ops.triton.ssd_combined"), ModuleType("causal_conv1d")
    for function in (_chunk_cumsum_fwd, _chunk_state_fwd, _state_passing_fwd, _bmm_chunk_fwd, _chunk_scan_fwd):
        setattr(ssd, function.__name__, function)
    ssd.mamba_chunk_scan_combined, conv.causal_conv1d_fn = mamba_chunk_scan_combined, causal_conv1d_fn
    for parent in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, ssd.__name__, ssd)
    monkeypatch.setitem(sys.modules, conv.__name__, conv)


DOCUMENTS = [None, torch.tensor([[0] * 5 + [1] * 4 + [2] * 10, [0] * 19]), torch.tensor([[3] * 8 + [5] * 11] * 2)]


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("chunk", [4, 8])
def test_the_scan_is_the_recurrence_with_its_states(stand_ins, documents, chunk):
    tensors = stream(19)
    y, states, final = finish(mamba_ssm_chunk_scan(*tensors, chunk=chunk, documents=documents))
    expected, last = scan_ref(*tensors, documents=documents)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, last, rtol=1e-10, atol=1e-10)
    assert states.shape == (2, -(-19 // chunk), 4, 3, 5)
    for c in range(1, states.shape[1]):
        past = [t[:, : c * chunk] if t.dim() > 1 else t for t in tensors]
        rows = None if documents is None else documents[:, : c * chunk]
        torch.testing.assert_close(states[:, c], scan_ref(*past, documents=rows)[1], rtol=1e-10, atol=1e-10)


def test_only_the_scan_for_training_has_gradients(stand_ins):
    tensors = stream(8, grad=True)
    assert not any(t.requires_grad for t in finish(mamba_ssm_chunk_scan(*tensors, chunk=4)))
    torch.testing.assert_close(
        mamba_ssm_scan(*tensors, chunk=4), stream_scan(*tensors, chunk=4), rtol=1e-10, atol=1e-10
    )
    y = mamba_ssm_scan(*tensors, chunk=4, documents=torch.tensor([[0] * 4 + [1] * 4] * 2))
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(y.sum(), tensors))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("offset", [0, 3, 8])
def test_the_convolution_of_a_view_equals_torch(stand_ins, documents, offset):
    """The kernel receives a layout that it takes, whatever the alignment of the view."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 19, 32, generator=generator)
    x, weight, bias = wide[..., offset : offset + 16], torch.randn(16, 4, generator=generator), torch.randn(16)
    expected = torch.zeros(2, 19, 16)
    for row in range(2):
        numbers = torch.zeros(19) if documents is None else documents[row]
        for number in numbers.unique():
            of_document = numbers == number
            part = F.pad(x[row, of_document].T, (3, 0)).unsqueeze(0)
            expected[row, of_document] = F.silu(F.conv1d(part, weight.unsqueeze(1), bias, groups=16))[0].T
    got = causal_conv1d(x, weight, bias, documents=documents)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_bias_takes_the_dtype_of_the_weight(stand_ins):
    x, weight, bias = torch.randn(1, 4, 8), torch.randn(8, 4, dtype=torch.bfloat16), torch.randn(8)
    assert causal_conv1d(x, weight, bias).shape == x.shape


def test_why_causal_conv1d_does_not_take_a_convolution():
    assert causal_conv1d_unsupported(6144, 4) is None
    assert causal_conv1d_unsupported(12, 4) == "12 channels, expected a multiple of 8"
    assert causal_conv1d_unsupported(16, 5) == "5 taps, expected 2 to 4"


@pytest.fixture
def fresh_cache():
    dispatch.unavailable.cache_clear()
    yield
    dispatch.unavailable.cache_clear()


def test_nothing_is_imported_without_a_device(fresh_cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch.importlib, "import_module", None)
    assert {dispatch.unavailable(package) for package in dispatch.MODULES} == {"no CUDA device"}


def test_why_a_package_is_unavailable(fresh_cache, monkeypatch, stand_ins):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch.unavailable("mamba-ssm") is None
    monkeypatch.setitem(dispatch.MODULES, "triton", "triton_that_is_not_there")
    assert dispatch.unavailable("triton") == "triton_that_is_not_there is not installed"

    def broken(module):
        raise RuntimeError("undefined symbol: _Z1\nmore")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    reason = "causal-conv1d cannot be imported (RuntimeError: undefined symbol: _Z1)"
    assert dispatch.unavailable("causal-conv1d") == reason


def test_a_package_can_be_switched_off_for_a_while(fresh_cache, monkeypatch, stand_ins):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with dispatch.without("mamba-ssm"):
        with dispatch.without("causal-conv1d"):
            assert [dispatch.unavailable(p) for p in ("mamba-ssm", "causal-conv1d")] == ["switched off"] * 2
        assert (dispatch.unavailable("mamba-ssm"), dispatch.unavailable("causal-conv1d")) == ("switched off", None)
    assert dispatch.unavailable("mamba-ssm") is None


def test_mamba_ssm_is_not_used_in_float32(monkeypatch):
    """It would multiply in TF32."""
    monkeypatch.setattr(dispatch, "unavailable", lambda package: None)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    monkeypatch.setattr(dispatch, "mamba_ssm_unsupported", lambda *_, **__: None)
    xs = {dtype: SimpleNamespace(is_cuda=True, dtype=dtype) for dtype in dtypes}
    used = [dtype for dtype, x in xs.items() if scan._uses_mamba_ssm(x, None, None, None, chunk=128)]
    assert used == [torch.float16, torch.bfloat16]


def at_nano_width(batch, length):
    """x, dt, B and C of Nano as views of the convolution's output, without memory."""
    with torch.device("meta"):
        x, B, C = torch.empty(batch, length, 6144).split([4096, 1024, 1024], -1)
        dt = torch.empty(batch, length, 64)
    return x.unflatten(-1, (64, 64)), dt, B.unflatten(-1, (8, 128)), C.unflatten(-1, (8, 128))


def test_mamba_ssm_is_not_used_where_its_offsets_overflow(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda package: None)
    assert dispatch.mamba_ssm_unsupported(*at_nano_width(1, 262_144), chunk=128) is None
    assert dispatch.mamba_ssm_unsupported(*at_nano_width(2, 131_072), chunk=128) is None
    expected = "offsets up to 2,415,917,055 elements, expected at most 2,147,483,647"
    assert dispatch.mamba_ssm_unsupported(*at_nano_width(3, 131_072), chunk=128) == expected
    # The states are larger than x if the chunks are short.
    assert dispatch.mamba_ssm_unsupported(*at_nano_width(1, 262_144), chunk=16) is not None
    small, large = (at_nano_width(batch, 131_072) for batch in (1, 3))
    for (x, *others), taken in ((small, True), (large, False)):
        there = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=x.shape, stride=x.stride, numel=x.numel)
        assert scan._uses_mamba_ssm(there, *others, chunk=128) is taken


def test_causal_conv1d_is_not_used_where_its_offsets_overflow():
    weight, projected = torch.empty(6144, 4), torch.empty(1, 262_144, 10_304, device="meta")
    assert dispatch.causal_conv1d_takes(projected[:, :131_072, 4096:10_240], weight)
    assert not dispatch.causal_conv1d_takes(projected[..., 4096:10_240], weight)


def test_each_of_our_own_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda package: None)
    monkeypatch.setattr(dispatch.unavailable, "cache_clear", lambda: None, raising=False)
    there = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    with dispatch.without("scan", "gated norm"):
        used = [name for name in dispatch.TRITON_KERNELS if dispatch.uses_triton(there, name)]
    assert used == ["convolution", "modulation", "cross-entropy"]
    assert all(dispatch.uses_triton(there, name) for name in dispatch.TRITON_KERNELS)
    for other in ({"is_cuda": False}, {"dtype": torch.float64}, {"dtype": torch.float16}):
        assert not dispatch.uses_triton(SimpleNamespace(**vars(there) | other), "scan")
    monkeypatch.setattr(dispatch, "unavailable", lambda package: "no triton")
    assert not dispatch.uses_triton(there, "scan")
