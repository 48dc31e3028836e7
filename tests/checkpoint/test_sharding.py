"""Boxes of flattened tensors, and shards that any layout can read."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers.models import build_two_tower, tiny_config
from helpers.pretended_groups import Group
from helpers.trainers import built_trainer
from megatron_twotower.checkpoint import sharding
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.mcore.optimizer_state import optimizer_shards
from megatron_twotower.model import parameter_map
from megatron_twotower.plan.layout import layout_of
from megatron_twotower.plan.weights import rank_parameters


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
    for piece in sharding.sharded_tensors("key", data, entry, other, shape=(4, 2), first=3):
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


@pytest.mark.parametrize("sizes", [[7], [3, 0, 5, 1], [1] * 9, [100, 1, 1, 40]])
@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_pieces_cover_every_tensor_once_and_are_equal(sizes, ranks):
    found = list(sharding.pieces(sizes, ranks=ranks))
    elements = [(piece.tensor, i) for piece in found for i in range(piece.first, piece.last)]
    assert elements == [(tensor, i) for tensor, size in enumerate(sizes) for i in range(size)]
    assert len(found) < len(sizes) + ranks
    stored = [sum(piece.last - piece.first for piece in found if piece.rank == rank) for rank in range(ranks)]
    assert max(stored) - min(stored) <= 1


def bytes_of_ranks(tensors, *, ranks):
    """The bytes that each data-parallel rank writes: the shards that it lists as first replica."""
    return [sum(t.data.nbytes for t in tensors(rank) if not any(t.replica_id)) for rank in range(ranks)]


@pytest.mark.parametrize("distributed", [False, True])
def test_every_data_parallel_rank_writes_an_equal_part(distributed):
    """Eight pretended ranks of which all have all weights."""
    config = tiny_config("ME*-", precision="bf16")
    config = replace(config, optimizer=replace(config.optimizer, distributed=distributed))
    with built_trainer(config) as (trainer, model):
        module, entries = model.module, model.entries
        total = sum(t.nbytes for _, t in sharding.local_tensors(module, entries, config.model, trainer.groups))
        state = optimizer_shards(trainer.optimizer, list(module.parameters()))

        def groups(rank):
            one, copies = Group(0, 1), Group(rank, 8)
            return SimpleNamespace(tp=one, expt_tp=one, ep=one, dp_cp=copies, expt_dp=copies)

        def weights(rank):
            return sharding.sharded_weights(module, entries, config.model, groups(rank))

        def moments(rank):
            return sharding.sharded_optimizer(module, entries, config.model, groups(rank), state)

        written = bytes_of_ranks(weights, ranks=8)
        assert sum(written) == total and max(written) < 1.02 * total / 8
        written = bytes_of_ranks(moments, ranks=8)
        whole = sum(tensor.nbytes for each in state.values() for tensor in each.tensors.values())
        # Here one rank has the complete state; with a distributed optimizer each has its own.
        assert written == [whole] * 8 if distributed else max(written) < 1.05 * whole / 8


def test_a_thousand_ranks_write_as_much_as_each_other():
    """Nano on 1024 ranks: the weights of a rank besides its optimizer state."""
    config = load_recipe("nano_30b_a3b", ["parallel=h100x1024"], planning=True)
    layout = layout_of(config, ranks=1024)
    (parameters,) = rank_parameters(config, layout).chunks
    written = [0] * layout.expert_data
    for expert, copies in ((False, layout.data), (True, layout.expert_data)):
        sizes = [parameter.elements for parameter in parameters if parameter.expert == expert]
        for piece in sharding.pieces(sizes, ranks=copies):
            if piece.rank < len(written):
                written[piece.rank] += 2 * (piece.last - piece.first)
    # Before, rank 0 wrote all of its weights, 11.8 GB, and most ranks none.
    assert sum(2 * parameter.elements for parameter in parameters) > 11e9
    assert min(written) > 0.06e9 and max(written) < 0.062e9
