"""The one-pass two-tower forward against blocks computed one by one, and what no block may see."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from helpers.models import build_two_tower, random_noisy_batch, tiny_config
from helpers.reference import block_by_block, context_caches, denoise_block
from megatron_twotower.convert import initial_weights, load
from megatron_twotower.mcore import transformer_config
from megatron_twotower.model import parameter_map, towers
from megatron_twotower.model.parameter_map import hf_from_parameter
from megatron_twotower.train.noise import noisy_batch
from megatron_twotower.types import Batch, Blocks

PATTERNS = ["M", "*", "E", "-", "ME*-M*"]


def logits_of(model, batch):
    """(b, l, v)."""
    return (model(batch) @ model.tower.output_layer.weight.t()).transpose(0, 1)


def assert_close_gradients(model, entries, source, shape):
    """Every parameter's gradient against that of the Hugging Face tensors it is made of."""
    parameters = dict(model.named_parameters())
    compared = 0
    for entry in entries:
        if entry.megatron_name not in parameters:
            continue  # the router's selection bias is no parameter
        parameter = parameters[entry.megatron_name]
        got = parameter.grad
        parts = hf_from_parameter(
            entry, torch.zeros_like(parameters[entry.megatron_name]) if got is None else got, shape
        )
        for name, part in zip(entry.hf_names, parts, strict=True):
            want = source[name].grad
            torch.testing.assert_close(part, torch.zeros_like(part) if want is None else want, rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared >= len(parameters)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("block", "per_block"), [(4, True), (4, False), (1, True), (16, True), (2, True)])
def test_one_pass_equals_block_by_block(groups, pattern, block, per_block):
    config = tiny_config(pattern, block=block)
    model, source = build_two_tower(config, groups)
    batch = random_noisy_batch(config, per_block=per_block)
    got = logits_of(model, batch)
    for row in range(2):
        rows = (batch.tokens[row], batch.noisy[row], batch.times[row])
        want = block_by_block(source, config.model, 16, *rows, block)
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_pass_gradients_equal_block_by_block(groups, pattern):
    config = tiny_config(pattern)
    model, source = build_two_tower(config, groups)
    batch = random_noisy_batch(config, batch=1)
    upstream = torch.randn(1, 16, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logits_of(model, batch) * upstream).sum().backward()

    tensors = {name: source(name).requires_grad_(not name.startswith("context")) for name in source.shapes}
    rows = (batch.tokens[0], batch.noisy[0], batch.times[0])
    want = block_by_block(tensors.__getitem__, config.model, 16, *rows, 4)
    (want * upstream[0]).sum().backward()
    entries = parameter_map.denoiser_entries(config.model, 16)
    # The head is applied outside the model's forward here, so its gradient comes through logits_of.
    assert_close_gradients(model, entries, tensors, config.model)
    assert all(parameter.grad is None for parameter in model.context.parameters())


@pytest.mark.parametrize("pattern", ["M", "*", "ME*-M*"])
def test_a_block_sees_only_earlier_clean_tokens_and_itself(groups, pattern):
    config = tiny_config(pattern)
    model, _ = build_two_tower(config, groups)
    batch = random_noisy_batch(config, batch=1)
    before = logits_of(model, batch).detach()
    block = slice(8, 12)

    clean = batch.tokens.clone()
    clean[:, 8:] = (clean[:, 8:] + 7) % 40 + 4
    noisy = batch.noisy.clone()
    noisy[:, :8], noisy[:, 12:] = (noisy[:, :8] + 5) % 48, (noisy[:, 12:] + 5) % 48
    after = logits_of(model, dataclasses.replace(batch, tokens=clean, noisy=noisy)).detach()
    # Bit for bit, but for experts: other tokens in an expert's matrix product change the rounding
    # of its last bits.
    tolerance = 1e-12 if "E" in pattern else 0.0
    torch.testing.assert_close(after[:, block], before[:, block], rtol=tolerance, atol=tolerance)
    assert not torch.allclose(after[:, :8], before[:, :8]), "the change must be visible elsewhere"

    clean = batch.tokens.clone()
    clean[:, 7] = (clean[:, 7] + 7) % 40 + 4
    seen = logits_of(model, dataclasses.replace(batch, tokens=clean)).detach()
    assert not torch.allclose(seen[:, block], before[:, block]), "the last token before the block must matter"
    noisy = batch.noisy.clone()
    noisy[:, 11] = (noisy[:, 11] + 5) % 48
    seen = logits_of(model, dataclasses.replace(batch, noisy=noisy)).detach()
    if "*" in pattern:
        assert not torch.allclose(seen[:, 8], before[:, 8]), "attention inside a block goes both ways"


def test_identity_start_on_clean_single_token_blocks_is_the_context_tower(groups):
    config = tiny_config("ME*-M*", block=1)
    megatron, model = transformer_config.transformer_config(config), config.model
    backbone = initial_weights.random_backbone(model, seed=3)
    read = parameter_map.backbone_entries(model)
    context = towers.build_context_tower(config, megatron, groups).double()
    load.load_weights(context, read, backbone, model=model, groups=groups)
    two_tower = towers.TwoTower(config, megatron, groups, context).double()
    conditioning = initial_weights.fresh_conditioning(model, config.conditioning, seed=3)

    def source(name):
        released = ("t_embedder.", "t_block.", "scale_shift_tables.")
        return conditioning(name) if name.startswith(released) else backbone(name.replace("denoiser_tower", "backbone"))

    entries = parameter_map.denoiser_entries(model, config.conditioning.frequencies)
    load.load_weights(two_tower, entries, source, model=model, groups=groups)
    tokens = torch.randint(4, 48, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = Batch(tokens, *[torch.arange(2)] * 3)
    batch = noisy_batch(plain, torch.zeros_like(tokens, dtype=torch.bool), torch.rand(2, 16), config.noise)

    hidden = context.embed(tokens)
    for layer in context.layers.values():
        hidden, _ = layer(hidden, Blocks())
    torch.testing.assert_close(two_tower(batch), context.final_norm(hidden), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("pattern", ["M*E", "ME*-M*"])
def test_with_targets_of_the_context_tower_its_final_states_follow(groups, pattern):
    config = tiny_config(pattern)
    model, _ = build_two_tower(config, groups)
    batch = random_noisy_batch(config, batch=2)
    shares = torch.ones(len(batch.scored_positions))
    both = model(dataclasses.replace(batch, teacher_shares=shares))
    hidden = model.context.embed(batch.tokens)
    for layer in model.context.layers.values():
        hidden, _ = layer(hidden, Blocks())
    assert torch.equal(both[:, :2], model(batch))
    torch.testing.assert_close(both[:, 2:], model.context.final_norm(hidden))


@pytest.mark.parametrize("pattern", ["M", "*", "ME*-M*"])
def test_packed_documents_are_as_if_each_were_alone(groups, pattern):
    """Forward and gradients of a sequence of three documents, none of which sees another."""
    config = tiny_config(pattern)
    batch = random_noisy_batch(config, batch=1)
    spans = [slice(0, 4), slice(4, 12), slice(12, 16)]
    documents = torch.tensor([[0] * 4 + [1] * 8 + [2] * 4], dtype=torch.int32)
    model, _ = build_two_tower(config, groups)
    together = logits_of(model, dataclasses.replace(batch, documents=documents))
    upstream = torch.randn(together.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (together * upstream).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for span in spans:
        blocks = slice(span.start // 4, span.stop // 4)
        alone = dataclasses.replace(
            batch, tokens=batch.tokens[:, span], noisy=batch.noisy[:, span], times=batch.times[:, blocks]
        )
        logits = logits_of(model, alone)
        torch.testing.assert_close(together[:, span], logits, rtol=1e-9, atol=1e-10)
        (logits * upstream[:, span]).sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-9, msg=name)
    assert not torch.allclose(together, logits_of(model, batch)), "the boundaries must matter"


@pytest.mark.parametrize("pattern", ["M", "*", "ME*-M*"])
def test_packed_conversations_have_the_gradients_of_single_ones(groups, pattern):
    """The loss of answers over a sequence of three conversations, and over each alone, in float64.

    The counts of the routers, too, are the sums of those of single conversations.
    """
    config = tiny_config(pattern, length=24)
    generator, spans = torch.Generator().manual_seed(3), [slice(0, 8), slice(8, 12), slice(12, 20)]
    tokens = torch.randint(4, config.model.vocab_size, (1, 24), generator=generator)
    documents = torch.tensor([[0] * 8 + [1] * 4 + [2] * 12], dtype=torch.int32)
    scored, padding = torch.zeros(2, 1, 24, dtype=torch.bool)
    for answer in (slice(5, 8), slice(9, 12), slice(14, 20)):
        scored[:, answer] = True
    padding[:, 20:] = True  # what fills up the sequence
    numbers = torch.arange(1)
    whole = Batch(tokens, numbers, numbers, numbers, documents=documents, padding=padding, scored=scored)
    masked = (torch.rand(1, 24, generator=generator) < 0.6) & scored
    times = torch.full((1, 6), 0.6)
    model, _ = build_two_tower(config, groups)

    def total_and_count(batch, masked, times):
        noisy = noisy_batch(batch, masked, times, config.noise)
        places = noisy.scored_positions[: int(noisy.num_scored)]
        logits, targets = logits_of(model, noisy).flatten(0, 1)[places], noisy.tokens.flatten()[places]
        return F.cross_entropy(logits, targets, reduction="sum"), len(places)

    def router_counts():
        found = [buffer for name, buffer in model.named_buffers() if name.endswith("local_tokens_per_expert")]
        counts = torch.cat(found) if found else torch.zeros(1)
        for buffer in found:
            buffer.zero_()
        return counts.clone()

    model.train()
    total, count = total_and_count(whole, masked, times)
    assert count == masked.sum() > 5
    total.backward()
    together = router_counts()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for span in spans:
        alone = Batch(tokens[:, span], numbers, numbers, numbers, scored=scored[:, span])
        part, part_count = total_and_count(alone, masked[:, span], times[:, span.start // 4 : span.stop // 4])
        part.backward()
        total, count = total - part, count - part_count
    assert count == 0 and abs(float(total.detach())) < 1e-9
    alone_counts = router_counts()
    assert torch.equal(together, alone_counts) and (together.sum() > 0) == ("E" in pattern)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("pattern", ["M", "*", "ME*-M*"])
def test_blocks_that_begin_with_an_answer_are_those_of_generation(groups, pattern):
    """Two conversations after padding that nothing sees: each block as if it were generated."""
    config = tiny_config(pattern, length=24)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(4, config.model.vocab_size, (1, 24), generator=generator)
    # Padding, a prompt, an answer; twice. The prompts have 2 and 5 tokens, blocks 4.
    documents = torch.tensor([[0] * 2 + [1] * 6 + [2] * 3 + [3] * 13], dtype=torch.int32)
    padding = (documents == 0) | (documents == 2)
    scored = torch.zeros(1, 24, dtype=torch.bool)
    scored[:, 4:8] = scored[:, 16:24] = True
    numbers = torch.arange(1)
    batch = Batch(tokens, numbers, numbers, numbers, documents=documents, padding=padding, scored=scored)
    masked, times = torch.rand(1, 24, generator=generator) < 0.6, torch.rand(1, 6, generator=generator)
    model, source = build_two_tower(config, groups)
    noisy = noisy_batch(batch, masked, times, config.noise)
    got = logits_of(model, noisy)[0]
    for begin, start in ((2, 4), (11, 16), (11, 20)):
        caches, _ = context_caches(source, config.model, tokens[0, begin:start])
        want = denoise_block(source, config.model, 16, noisy.noisy[0, start : start + 4], times[0, start // 4], caches)
        torch.testing.assert_close(got[start : start + 4], want, rtol=1e-5, atol=1e-6)
    # What the padding holds makes no difference.
    other = dataclasses.replace(batch, tokens=tokens.masked_fill(padding, 7))
    again = logits_of(model, noisy_batch(other, masked, times, config.noise))[0]
    torch.testing.assert_close(again[scored[0]], got[scored[0]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pattern", ["M", "*", "ME*-M*"])
@pytest.mark.parametrize("per_block", [True, False])
def test_draws_that_share_a_context_pass_equal_separate_passes(groups, pattern, per_block):
    config = tiny_config(pattern)
    model, _ = build_two_tower(config, groups)
    draws = [random_noisy_batch(config, per_block=per_block, seed=seed) for seed in (1, 2, 3)]
    same = [dataclasses.replace(draw, tokens=draws[0].tokens) for draw in draws]
    joined = dataclasses.replace(
        draws[0], noisy=torch.cat([draw.noisy for draw in draws]), times=torch.cat([draw.times for draw in draws])
    )
    want = torch.cat([logits_of(model, draw) for draw in same])
    torch.testing.assert_close(logits_of(model, joined), want, rtol=1e-9, atol=1e-10)


def test_recomputed_layers_give_the_same_gradients(groups):
    gradients = []
    for recompute in ("", "ME*-"):
        config = tiny_config("ME*-M*", recompute_layers=recompute)
        model, _ = build_two_tower(config, groups)
        model.train()
        logits_of(model, random_noisy_batch(config)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-12)


def test_nothing_that_iterates_over_modules_reaches_the_context_tower(groups):
    config = tiny_config("ME*-")
    model, _ = build_two_tower(config, groups)
    inside = {id(parameter) for parameter in model.parameters()} | {id(buffer) for buffer in model.buffers()}
    frozen = [*model.context.parameters(), *model.context.buffers()]
    assert frozen and not any(id(tensor) in inside for tensor in frozen)
    assert not any(parameter.requires_grad for parameter in model.context.parameters())
    logits_of(model, random_noisy_batch(config)).sum().backward()
    counts = [b for name, b in model.context.named_buffers() if name.endswith("local_tokens_per_expert")]
    assert counts and not any(count.any() for count in counts), "the frozen router must count nothing"
