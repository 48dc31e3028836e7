"""Long prompts: the context tower reads them in pieces, with the numbers of one pass."""

import pytest
import torch

from helpers.modeling import PATTERNS, random_ids, tiny_model
from megatron_twotower.evaluate.likelihood import ar_scores
from megatron_twotower.hf import modeling_nemotron_h_twotower as modeling
from megatron_twotower.hf.modeling_nemotron_h_twotower import ArgumentError, KeyValueCache, MambaState

# Of the tiny model a chunk of the scan has 8 positions.
CHUNKS = (1, 8, 16, 24)


def values(cache):
    """All tensors of a cache."""
    found = [cache.hidden]
    for state in cache.context:
        if isinstance(state, KeyValueCache):
            found += state.views()
        elif isinstance(state, MambaState):
            found += [state.conv, state.ssm]
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_give_the_numbers_of_one_pass(pattern, chunk_size, padded, monkeypatch):
    model, ids, mask = tiny_model(pattern), random_ids(3, 45), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :3], mask[2, :29] = 0, 0
    whole = model.prefill(ids, mask, chunk_size=64)
    monkeypatch.setattr(modeling, "MASK_ELEMENTS", 300)  # some queries at a time
    pieces = model.prefill(ids, mask, chunk_size=chunk_size)
    assert pieces.length == whole.length == 45
    for got, want in zip(values(pieces), values(whole), strict=True):
        if padded and got.dim() == 4 and got.shape[2] == 45:  # keys and values of padding are never read
            visible = mask.bool()[:, None, :, None]
            got, want = got * visible, want * visible
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    block, t = random_ids(3, 4, seed=1), torch.full((3,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(
        model.denoise_block(block, t, pieces), model.denoise_block(block, t, whole), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_scores_in_pieces_are_those_of_forward(padding, monkeypatch):
    model, ids, mask = tiny_model(), random_ids(3, 45), None
    if padding != "none":
        mask = torch.ones_like(ids)
        mask[1, :20] = 0
        mask = mask.flip(1) if padding == "right" else mask
    logits = model(ids, mask).logits.log_softmax(-1)
    wanted = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    if mask is not None:
        wanted = wanted * (mask[:, 1:] & mask[:, :-1])
    monkeypatch.setattr(model, "prefill_chunk_size", 16)
    monkeypatch.setattr(modeling, "SCORE_CHUNK", 10)
    got = model.score(ids, mask)
    assert (got[:, 0] == 0).all()
    torch.testing.assert_close(got[:, 1:], wanted, rtol=0, atol=1e-12)


def test_long_answers_are_scored_in_pieces(monkeypatch):
    model, ids = tiny_model(), random_ids(2, 60)
    wanted = ar_scores(model, model.prefill(ids[:, :7]), ids[:, 7:])
    monkeypatch.setattr("megatron_twotower.evaluate.likelihood.LOGIT_ROWS", 6)
    monkeypatch.setattr(model, "prefill_chunk_size", 16)
    cache = model.prefill(ids[:, :7])
    for _ in range(2):  # the cache stays as it is
        for got, want in zip(ar_scores(model, cache, ids[:, 7:]), wanted, strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=1e-12)
    assert cache.length == 7


def test_a_folder_on_two_devices_reads_in_pieces():
    model, ids = tiny_model(), random_ids(2, 45)
    whole = model.prefill(ids, chunk_size=64)
    copied = model.prefill(ids[:, :0])
    copied.denoiser = model.denoiser_tower.states()
    for _ in model._read(copied, ids, None, 16):
        pass
    block, t = random_ids(2, 4, seed=1), torch.full((2,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(
        model.denoise_block(block, t, copied), model.denoise_block(block, t, whole), rtol=0, atol=1e-12
    )


def test_no_tensor_of_a_prefill_grows_with_the_square_of_the_length():
    """The largest tensor that the passes create, but for the cache, is that of any length."""
    model, largest = tiny_model(), {}

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None:
                largest[length] = max(largest.get(length, 0), out.numel())
            return out

    model.prefill_chunk_size = 32
    with pytest.MonkeyPatch.context() as patch, Sizes():
        patch.setattr(modeling, "MASK_ELEMENTS", 1 << 11)
        patch.setattr(KeyValueCache, "write", uncounted(KeyValueCache.write))
        for length in (256, 1024):
            model.prefill(random_ids(1, length))
    assert largest[256] == largest[1024], largest


def uncounted(function):
    """The function, whose tensors `Sizes` does not see."""

    def call(*arguments):
        with torch._C.DisableTorchFunction():
            return function(*arguments)

    return call


def test_generate_takes_the_chunk_size_of_transformers():
    model, ids, sizes = tiny_model(), random_ids(1, 45), []
    read = model._read
    model._read = lambda cache, ids, is_text, chunk_size: (
        sizes.append(chunk_size) or read(cache, ids, is_text, chunk_size)
    )
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    got = model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=16)
    assert (got == wanted).all() and sizes[0] is None and 16 in sizes
    with pytest.raises(ArgumentError, match="prefill_chunk_size: found 0, expected at least 1"):
        model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=0)
