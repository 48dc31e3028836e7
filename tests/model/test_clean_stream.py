"""While messages to other context-parallel ranks are under way, the denoiser computes."""

from types import SimpleNamespace

import pytest
import torch

from helpers.models import build_two_tower, tiny_config
from megatron_twotower.config.context_split import stretches
from megatron_twotower.model import layers, towers
from megatron_twotower.ops import context_parallel
from megatron_twotower.train.noise import corrupt
from megatron_twotower.types import Batch

LENGTH, RANKS = 32, 2


@pytest.fixture
def events(monkeypatch):
    """What happens in which order; the other rank has the same stretches as this one."""
    seen = []

    def gather(out, own, group, async_op):
        number = sum(event.startswith("send") for event in seen)
        seen.append(f"send {number}")

        def wait():
            seen.append(f"wait {number}")
            out.copy_(torch.cat([own, own]))

        return SimpleNamespace(wait=wait)

    ranks = SimpleNamespace(get_world_size=lambda group: RANKS, get_rank=lambda group: 0, all_gather_into_tensor=gather)
    monkeypatch.setattr(context_parallel, "dist", ranks)
    forward = layers.DenoiserLayer.forward

    def recorded(self, *arguments):
        seen.append(f"denoise {self.number}")
        return forward(self, *arguments)

    monkeypatch.setattr(layers.DenoiserLayer, "forward", recorded)
    return seen


def run(groups, pattern, grad=True, **train):
    config = tiny_config(pattern, length=LENGTH, **train)
    model, _ = build_two_tower(config, groups)
    tokens = torch.randint(4, 48, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    own = stretches(LENGTH, ranks=RANKS, rank=0)
    noisy = corrupt(Batch(tokens, *[torch.arange(2)] * 3), config.noise, seed=3, stretches=own)
    with torch.set_grad_enabled(grad):
        return model(noisy)


def between(events, number):
    """The layers of the denoiser that are computed while message `number` is under way."""
    return events[events.index(f"send {number}") + 1 : events.index(f"wait {number}")]


# Only the first message of a layer M at the start, and what follows it before the first layer of
# the denoiser can run, has nothing to hide behind.
@pytest.mark.parametrize(
    ("pattern", "exposed"), [("MEMEM*EMEME", 2), ("*EMEM", 1), ("EMEM", 1), ("MM", 3), ("M*", 2), ("E-E", 0)]
)
def test_a_layer_of_the_denoiser_hides_each_message(groups, events, pattern, exposed):
    run(groups, pattern)
    messages = 2 * pattern.count("M") + pattern.count("*")
    hidden = [between(events, number) for number in range(messages)]
    assert [event for event in events if event.startswith("denoise")] == [f"denoise {i}" for i in range(len(pattern))]
    assert sum(not layers for layers in hidden) == exposed
    assert all(len(layers) <= 1 for layers in hidden), "one is enough"


@pytest.mark.parametrize("recompute", ["", "ME*-"])
def test_order_does_not_change_the_numbers(groups, events, monkeypatch, recompute):
    ahead = run(groups, "MEM*-EM", recompute_layers=recompute)
    order = list(events)
    monkeypatch.setattr(towers, "LAYERS_AHEAD", 0)
    events.clear()
    behind = run(groups, "MEM*-EM", recompute_layers=recompute)
    assert torch.equal(ahead, behind) and order != events
    assert not any(between(events, number) for number in range(7))


def test_gradients_are_on_again_in_the_denoiser(groups, events):
    """The frozen layers run without gradients, also if they pause in the middle."""
    assert run(groups, "MEM").requires_grad
    assert not run(groups, "MEM", grad=False).requires_grad
