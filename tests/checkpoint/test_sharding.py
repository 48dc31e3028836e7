"""Boxes of flattened tensors, and shards that any layout can read."""

import itertools
import math

import pytest
import torch

from helpers.models import build_two_tower, tiny_config
from megatron_twotower.checkpoint import sharding
from megatron_twotower.model import parameter_map


@pytest.mark.parametrize("shape", [(7,), (3, 4), (5, 1), (2, 3, 4), (1, 6), (3, 1, 5)])
def test_boxes_cover_the_range_in_its_order(shape):
    count = math.prod(shape)
    whole = torch.arange(count).view(shape)
    for first, last in itertools.combinations(range(count + 1), 2):
        found = sharding.boxes(shape, first, last)
        assert len(found) <= 2 * len(shape) - 1
        read = [whole[tuple(slice(begin, begin + size) for begin, size in box)].flatten() for box in found]
        assert torch.cat(read).tolist() == list(range(first, last))
    assert sharding.boxes(shape, 2, 2) == []


def test_shards_are_views_that_cover_the_tensors_once(groups):
    config = tiny_config("ME*-")
    model, _ = build_two_tower(config, groups)
    entries = parameter_map.denoiser_entries(config.model, config.conditioning.frequencies)
    count = sum(tensor.numel() for _, tensor in sharding.local_tensors(model, entries, config.model, groups))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    found = list(sharding.sharded_weights(model, entries, config.model, groups))
    assert sum(piece.data.numel() for piece in found) == count
    assert len({(piece.key, piece.global_offset) for piece in found}) == len(found)
    with torch.no_grad():
        for piece in found:
            piece.data.add_(1)
    after = model.state_dict()
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    trained = {
        name
        for name in before
        if name in held
        and any(p is held[name] for _, p in sharding.local_tensors(model, entries, config.model, groups))
    }
    assert trained and all(torch.equal(after[name], before[name] + 1) for name in trained)


def test_a_range_of_a_split_parameter_has_the_right_offsets(groups):
    """The second of two ranks; its optimizer has elements 3 to 7 of a parameter of two sections."""

    class Group:
        def rank(self):
            return 1

        def size(self):
            return 2

    entry = parameter_map.Entry("name", ("name",), (8, 2), 0, (4, 4))
    other = type("Groups", (), {"tp": Group(), "dp_cp": Group()})()
    data = torch.arange(3, 8)
    found = {}
    for piece in sharding.sharded_tensors("key", data, entry, other, shape=(4, 2), first=3, replicated=False):
        assert piece.global_shape == (4, 2) and piece.replica_id == (0, 0, 0)
        for place in itertools.product(*(range(size) for size in piece.local_shape)):
            where = tuple(a + b for a, b in zip(place, piece.global_offset, strict=True))
            found[piece.key, where] = int(piece.data[place])
    # This rank has rows 2 and 3 of each section. Its own rows 0 and 1 are of the first section, and
    # its rows 2 and 3 of the second.
    assert found == {
        ("key.part0", (3, 1)): 3,
        ("key.part1", (2, 0)): 4,
        ("key.part1", (2, 1)): 5,
        ("key.part1", (3, 0)): 6,
        ("key.part1", (3, 1)): 7,
    }
