"""`noise.token_shift`: what positions read and predict, against blocks computed by hand."""

import dataclasses
import math

import pytest
import torch

from helpers.models import build_two_tower, tiny_config
from helpers.reference import context_caches, denoise_block
from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.train.losses import masked_diffusion_loss
from megatron_twotower.train.noise import corrupt, noisy_batch
from megatron_twotower.types import Batch

BLOCK, LENGTH, MASK = 4, 16, 3
NOISE = NoiseConfig(block_size_tokens=BLOCK, mask_token_id=MASK, token_shift=True, time_per="block")


def sequences(**more):
    tokens = torch.randint(4, 48, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    numbers = torch.arange(2)
    return Batch(tokens, numbers, numbers, numbers, **more)


def two_documents():
    """A second document after padding in one sequence."""
    documents = torch.zeros(2, LENGTH, dtype=torch.int32)
    documents[1, 8:] = 1
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1, 6:8] = True
    return {"documents": documents, "padding": padding}


def loss_by_hand(source, model, batch, masked, times, noise):
    """The sum of the loss of one draw, and the number of its targets.

    Block after block, target after target, each from the text that it may see.
    """
    total, count = 0.0, 0
    documents = torch.zeros_like(batch.tokens) if batch.documents is None else batch.documents
    padding = torch.zeros_like(masked) if batch.padding is None else batch.padding
    for row, start in ((row, start) for row in range(2) for start in range(0, LENGTH, BLOCK)):
        tokens, begin = batch.tokens[row], int((documents[row] == documents[row, start]).nonzero()[0])
        hides = masked[row, start : start + BLOCK].tolist()  # the targets start + 1, ..., start + BLOCK
        block = [int(tokens[start])]
        block += [MASK if hides[j - 1] else int(tokens[start + j]) for j in range(1, BLOCK)]
        caches, _ = context_caches(source, model, tokens[begin:start])
        logits = denoise_block(source, model, 16, torch.tensor(block), times[row, start // BLOCK], caches)
        for j in range(BLOCK):
            target = start + j + 1
            if not hides[j] or target == LENGTH or padding[row, target]:
                continue
            if documents[row, target] != documents[row, start + j]:
                continue
            sees_later = not all(hides[k] for k in range(j + 1, BLOCK - 1))
            share = noise.distillation_elsewhere if sees_later else noise.distillation
            _, hidden = context_caches(source, model, tokens[begin:target])
            teacher = (hidden[-1] @ source("context_lm_head.weight").T).softmax(-1)
            loss = -share * (teacher * logits[j].log_softmax(-1)).sum()
            loss = loss - (1 - share) * logits[j].log_softmax(-1)[tokens[target]]
            distance = 1
            while distance <= j and hides[j - distance]:
                distance += 1
            decay = noise.distance_decay
            total = total + loss * (math.exp(-(distance - 1) / decay) if decay else 1.0)
            count += 1
    return total, count


@pytest.mark.parametrize("batch", [{}, two_documents()], ids=["one document", "two documents"])
@pytest.mark.parametrize(
    "more",
    [{}, {"distillation": 0.75, "distillation_elsewhere": 0.25}, {"distillation": 1.0, "distance_decay": 1.5}],
    ids=["clean targets", "shared targets", "decay"],
)
def test_loss_and_gradients_are_those_of_blocks_after_the_last_token(groups, batch, more):
    config = tiny_config("ME*-M*")
    noise, batch = dataclasses.replace(NOISE, **more), sequences(**batch)
    config = dataclasses.replace(config, noise=noise)
    model, source = build_two_tower(config, groups)
    generator = torch.Generator().manual_seed(3)
    masked, times = torch.rand(2, LENGTH, generator=generator) < 0.6, torch.rand(2, 4, generator=generator)
    noisy = noisy_batch(batch, masked, times, noise)
    report = masked_diffusion_loss(model.tower, model(noisy), noisy, noise, groups, context=model.context)
    head = source("lm_head.weight").requires_grad_()
    tensors = {name: head if name == "lm_head.weight" else source(name) for name in source.shapes}
    total, count = loss_by_hand(tensors.__getitem__, config.model, batch, masked, times, noise)
    assert report.count == count > 10
    torch.testing.assert_close(report.total.double(), total.detach(), rtol=1e-6, atol=1e-6)
    report.total.backward()
    total.backward()
    torch.testing.assert_close(model.tower.output_layer.weight.grad, head.grad, rtol=1e-5, atol=1e-6)


def test_the_first_position_of_a_block_is_never_masked_and_every_other_target_is_sometimes():
    noise = dataclasses.replace(NOISE, time_min=0.9)
    noisy = corrupt(sequences(), noise, seed=1)
    in_blocks = (noisy.noisy == MASK).unflatten(1, (-1, BLOCK))
    assert not in_blocks[..., 0].any()
    assert in_blocks[..., 1:].float().mean() > 0.8
    assert torch.equal(noisy.targets[:, :-1], noisy.tokens[:, 1:])
    places = noisy.scored_positions[: noisy.num_scored] % LENGTH
    assert set(places.tolist()) == set(range(LENGTH - 1)), "all but the last position of a sequence have a target"


def test_only_answers_are_masked_and_scored():
    scored = torch.zeros(2, LENGTH, dtype=torch.bool)
    scored[:, 6:11] = True
    for counts in ("random", "exact", "at_least_one"):
        noise = dataclasses.replace(NOISE, time_min=0.9, mask_counts=counts)
        noisy = corrupt(sequences(scored=scored), noise, seed=1)
        hidden = noisy.noisy == MASK
        assert not (hidden & ~scored).any()
        assert hidden[:, 6:8].any() and hidden[:, 9:11].any() and not hidden[:, 8].any()
        places = noisy.scored_positions[: noisy.num_scored] % LENGTH
        assert set(places.tolist()) <= set(range(5, 10))
        assert noisy.num_tokens == 10
