"""The load of experts by noise level, as validation reports it, against a count by hand."""

import pytest
import torch

from helpers import layouts
from helpers.trainers import built_trainer
from megatron_twotower.mcore.router import Router
from megatron_twotower.train import loop

EXPERTS = layouts.MODEL.n_routed_experts


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return layouts.write_backbone(tmp_path_factory.mktemp("load") / "backbone")


def routed(monkeypatch):
    """What every router of the denoiser chooses, (positions, experts) bool of each pass."""
    seen, forward = {}, Router.forward

    def recorded(self, *arguments, **named):
        weights, chosen = forward(self, *arguments, **named)
        if self.tokens_by_noise is not None:
            seen.setdefault(self, []).append(chosen.clone())
        return weights, chosen

    monkeypatch.setattr(Router, "forward", recorded)
    return seen


@pytest.mark.parametrize("padded", [False, True])
def test_validation_reports_the_load_by_noise_level(backbone, monkeypatch, padded):
    config = layouts.changed(layouts.base(backbone), layouts.RUNS["hard" if padded else "plain"])
    seen = routed(monkeypatch)
    with built_trainer(config) as (trainer, _):
        batches = layouts.micro_batches(config, trainer.groups, 0)
        figures = loop.validate(trainer, batches)
        assert all(router.tokens_by_noise is None for _, router in trainer.model.routers())
    times = loop.validation_times(config.train.validation_sequences, config.noise)
    pattern = layouts.MODEL.hybrid_override_pattern
    assert len(seen) == pattern.count("E")
    worst = {}
    for passes in seen.values():
        counts = torch.zeros(config.noise.report_buckets, EXPERTS)
        for batch, chosen in zip(batches, passes, strict=True):
            # Positions come first in the order of a layer: (l, b).
            by_sequence = chosen.unflatten(0, (-1, len(batch.tokens))).transpose(0, 1)
            for row, (choices, position) in enumerate(zip(by_sequence, batch.positions, strict=True)):
                real = choices if batch.padding is None else choices[~batch.padding[row]]
                counts[int((times[position] * config.noise.report_buckets).ceil()) - 1] += real.sum(0)
        for level, row in enumerate(counts):
            if row.sum():
                worst[level] = max(worst.get(level, 0), (row.max() / row.mean()).item())
    names = [f"{level / 5:.1f}-{(level + 1) / 5:.1f}" for level in sorted(worst)]
    assert figures["expert_load_by_noise"] == pytest.approx(
        dict(zip(names, [worst[level] for level in sorted(worst)], strict=True))
    )
    assert "rank_load_by_noise" not in figures


def test_the_load_of_ranks_is_that_of_their_experts():
    """By hand: a layer without experts, and two with different loads at two noise levels."""
    tokens = torch.zeros(3, 5, 4)
    tokens[1, 0], tokens[1, 1] = torch.tensor([1.0, 3.0, 0.0, 4.0]), torch.tensor([2.0, 2.0, 2.0, 2.0])
    tokens[2, 0] = torch.tensor([3.0, 3.0, 1.0, 1.0])
    alone, shared = loop.load_by_noise(tokens, 1), loop.load_by_noise(tokens, 2)
    assert alone == {"expert_load_by_noise": {"0.0-0.2": 2.0, "0.2-0.4": 1.0}}
    assert shared == alone | {"rank_load_by_noise": {"0.0-0.2": 1.5, "0.2-0.4": 1.0}}


def test_next_token_training_has_no_noise_levels(backbone):
    config = layouts.changed(layouts.base(backbone), layouts.RUNS["ar"])
    with built_trainer(config) as (trainer, _):
        figures = loop.validate(trainer, layouts.micro_batches(config, trainer.groups, 0))
    assert not {"expert_load_by_noise", "rank_load_by_noise"} & figures.keys()
