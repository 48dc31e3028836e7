"""Padded batches, streaming, seeding, wrong arguments, and the compiled denoiser step."""

from functools import partial

import pytest
import torch

from helpers.modeling import MASK, PATTERNS, VOCABULARY, random_ids, tiny_model
from megatron_twotower.hf.modeling_nemotron_h_twotower import ArgumentError, ContextCache, Sampling

MODES = ("generate_ar", "generate_mock_ar", "generate_mask_diffusion", "generate_speculative", "generate")
LENGTHS = (1, 4, 9, 21)


def padded_prompts(lengths=LENGTHS, pad=0):
    """Left-padded ids and their mask, (rows, longest)."""
    ids, longest = random_ids(len(lengths), max(lengths)), max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(-1)
    return ids.masked_fill(~mask, pad), mask.long()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_states_of_padded_rows_are_those_of_each_row_alone(pattern):
    model, t = tiny_model(pattern), torch.tensor([0.2, 0.5, 0.8, 1.0])
    ids, mask = padded_prompts()
    block, more = random_ids(4, 5, seed=2), random_ids(4, 3, seed=3)
    copied = ContextCache(model.context_tower.states(), model.context_tower.states())  # as on two devices
    shared = model.prefill(ids, mask)
    copied.starts = shared.starts
    model._extend(copied, ids, mask.bool(), None)
    expected = []
    for row, length in enumerate(LENGTHS):
        cache = model.prefill(ids[row : row + 1, -length:])
        first = model.denoise_block(block[row : row + 1], t[row : row + 1], cache)
        model.extend(model.extend(cache, more[row : row + 1]), more[row : row + 1, :1])
        second = model.denoise_block(block[row : row + 1], t[row : row + 1], cache)
        expected.append((first, second, cache.hidden))
    first, second, hidden = (torch.cat(parts) for parts in zip(*expected, strict=True))
    for cache in (shared, copied):
        torch.testing.assert_close(model.denoise_block(block, t, cache), first)
        model.extend(model.extend(cache, more), more[:, :1])
        torch.testing.assert_close(model.denoise_block(block, t, cache), second)
        torch.testing.assert_close(cache.hidden, hidden)


@pytest.mark.parametrize("eos", [None, 7])
@pytest.mark.parametrize("mode", MODES)
def test_padded_rows_are_written_as_if_alone(mode, eos):
    model = tiny_model()
    ids, mask = padded_prompts()
    settings = {"max_new_tokens": 21, "eos_token_id": eos}
    settings |= {"pad_token_id": eos or model.config.eos_token_id} if mode == "generate" else {}
    together = getattr(model, mode)(ids, attention_mask=mask, **settings)
    assert torch.equal(together[:, : ids.shape[1]], ids)
    assert torch.equal(
        getattr(model, mode)(ids.masked_fill(mask == 0, 11), attention_mask=mask, **settings)[:, 21:], together[:, 21:]
    )
    longest = 0
    for row, length in enumerate(LENGTHS):
        alone = getattr(model, mode)(ids[row : row + 1, -length:], **settings)[0, length:]
        longest = max(longest, len(alone))
        found = together[row, 21:]
        assert torch.equal(found[: len(alone)], alone)
        assert set(found[len(alone) :].tolist()) <= {eos or model.config.eos_token_id}
    assert together.shape == (4, 21 + longest)
    unpadded = ids[-1:].repeat(2, 1)
    assert torch.equal(
        getattr(model, mode)(unpadded, attention_mask=torch.ones_like(unpadded), **settings),
        getattr(model, mode)(unpadded, **settings),
    )


@pytest.mark.parametrize("mode", ["generate_ar", "generate_mock_ar", "generate_speculative", "generate"])
@pytest.mark.parametrize("new", [1, 13])
def test_streamed_tokens_are_the_text(mode, new):
    model, ids = tiny_model(), random_ids(4, 6)
    eos = int(model.generate_ar(ids, 13)[0, 6 + 4])
    streamed = [[] for _ in range(4)]

    def on_tokens(tokens, is_text):
        for row in range(4):
            streamed[row] += tokens[row][is_text[row]].tolist()

    settings = {"max_new_tokens": new, "eos_token_id": eos, "on_tokens": on_tokens}
    settings |= {"pad_token_id": eos} if mode == "generate" else {}
    written = getattr(model, mode)(ids, **settings)[:, 6:]
    assert model.last_generation.new_tokens == sum(map(len, streamed))
    for row, parts in zip(written.tolist(), streamed, strict=True):
        assert row[: len(parts)] == parts
        assert set(row[len(parts) :]) <= {eos}


@pytest.mark.parametrize("mode", MODES)
def test_any_of_several_ends_ends_a_row(mode):
    model, ids = tiny_model(), random_ids(4, 6)
    write = partial(getattr(model, mode), ids, max_new_tokens=32)
    full = write()[:, 6:]
    eos = [int(full[0, 4]), int(full[1, 7])]
    given = write(eos_token_id=eos)[:, 6:]
    assert torch.equal(write(eos_token_id=torch.tensor(eos))[:, 6:], given)
    model.generation_config.eos_token_id = eos
    assert model.eos_token_ids == tuple(eos)
    assert torch.equal(write()[:, 6:], given), "those of the folder"
    assert torch.equal(write(eos_token_id=())[:, 6:], full), "none"
    ends = [next((i for i, token in enumerate(row) if token in eos), 31) for row in full.tolist()]
    for row, whole, end in zip(given.tolist(), full.tolist(), ends, strict=True):
        assert row[: end + 1] == whole[: end + 1]
        # `generate` fills as transformers does.
        assert set(row[end + 1 :]) <= {model.config.pad_token_id if mode == "generate" else row[end]}
    assert max(ends[:2]) < 31
    assert model.last_generation.new_tokens == 4 * 32


def test_the_mask_token_and_the_block_size_are_those_of_the_folder():
    model, ids = tiny_model(), random_ids(2, 6)
    assert (model.mask_token_id, model.block_size) == (3, 16)
    model.config.mask_token_id = 30
    assert model.mask_token_id == 30
    model.generation_config.mask_token_id, model.generation_config.block_size = 20, 8
    for mode in ("generate_mask_diffusion", "generate_speculative"):
        write = getattr(model, mode)
        found, steps = write(ids, 24), model.last_generation
        assert torch.equal(found, write(ids, 24, block_size=8, mask_token_id=20)) and steps.passes > 0
        assert (model.last_generation.passes, model.last_generation.draft_passes) == (steps.passes, steps.draft_passes)
        assert steps.passes == 3 * 8 or mode == "generate_speculative"


def test_generate_is_the_context_tower_with_the_configurations_end():
    model, ids = tiny_model(), random_ids(2, 6)
    eos = int(model.generate_ar(ids, 8)[0, 6 + 2])
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = eos
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8), model.generate_ar(ids, 8, eos_token_id=eos))
    sampled = [
        model.generate(ids, max_new_tokens=8, do_sample=True, top_p=0.9, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


@pytest.mark.parametrize("mode", MODES[:4])
def test_without_a_generator_torch_seeds(mode):
    model, ids = tiny_model(), random_ids(2, 6)

    def write(seed):
        torch.manual_seed(seed)
        return getattr(model, mode)(ids, max_new_tokens=12, temperature=1.0)

    assert torch.equal(write(1), write(1))
    assert not torch.equal(write(1), write(2))


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 3), (1.0, 4), (None, 4)])
def test_top_p_keeps_the_fewest_that_sum_to_it(top_p, kept):
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    assert int(Sampling(1.0, None, None, top_p).scores(logits).isfinite().sum()) == kept
    # Among the two most probable, of 2/3 and 1/3.
    two = 1 if top_p is not None and top_p < 2 / 3 else 2
    assert int(Sampling(1.0, 2, None, top_p).scores(logits).isfinite().sum()) == two


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: found shape \(1, 3\), expected that of input_ids"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}, "attention_mask: found padding on the right"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, "attention_mask: found padding within text"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])}, "attention_mask: found a row without text"),
        ({"eos_token_id": [2, -1]}, f"eos_token_id: found -1, expected 0 to {VOCABULARY - 1}"),
        ({"eos_token_id": ["2"]}, "eos_token_id: found .'2'., expected ids"),
        ({"eos_token_id": VOCABULARY}, f"eos_token_id: found {VOCABULARY}, expected 0 to {VOCABULARY - 1}"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
    ],
)
def test_arguments_that_no_mode_can_work_with_are_named(mode, changes, message):
    with pytest.raises(ArgumentError, match=message):
        getattr(tiny_model(), mode)(random_ids(2, 4), **changes)


def test_a_top_p_of_zero_is_refused():
    with pytest.raises(ArgumentError, match=r"top_p: found 0\.0, expected above 0"):
        Sampling(1.0, None, None, 0.0)


def compiled_steps(backend, t):
    """Steps over a growing context, compiled in one graph and not."""
    model = tiny_model()
    step = torch.compile(model.denoise_hidden, backend=backend, fullgraph=True)
    modulations = model.modulations(t)
    ids, mask = padded_prompts((8, 5))
    for padding in (None, mask):
        cache = model.prefill(ids, padding)
        for seed in range(4):
            block = random_ids(2, 16, seed=seed)
            block[:, ::3] = MASK
            with torch.no_grad():
                yield step(block, modulations, cache), model.denoise_hidden(block, modulations, cache)
            model.extend(cache, block)


@pytest.mark.slow
def test_the_denoiser_step_is_one_graph():
    torch._dynamo.reset()
    for found, expected in compiled_steps("eager", torch.tensor([0.4, 1.0])):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_the_compiled_denoiser_step_gives_the_same():
    torch._dynamo.reset()
    # Small t: the sinusoid of 1000 t is made in float32, where the cosine of a large angle depends
    # on every rounding.
    for found, expected in compiled_steps("inductor", torch.tensor([0.0, 0.001])):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
