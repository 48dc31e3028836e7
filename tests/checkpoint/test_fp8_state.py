"""The state of delayed FP8 in checkpoints, with a module that imitates Transformer Engine's."""

import dataclasses
import itertools

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from helpers.models import tiny_config
from megatron_twotower.checkpoint import files, fp8_state
from megatron_twotower.checkpoint.writer import CheckpointWriter
from megatron_twotower.common.run_folder import checkpoint_folder

DELAYED = tiny_config("M", precision="fp8_delayed")


class ModuleWithHistory(nn.Linear):
    """Keeps the largest value of every pass, so the size of its state is not known beforehand."""

    def __init__(self):
        super().__init__(2, 2)
        self.history = []

    def forward(self, x):
        self.history.append(float(x.detach().abs().max()))
        return super().forward(x)

    def get_extra_state(self):
        return torch.tensor(self.history, dtype=torch.float64).view(torch.uint8)

    def set_extra_state(self, state):
        self.history = state.view(torch.float64).tolist()


def model(passes=0):
    module = nn.Sequential(ModuleWithHistory(), nn.ReLU(), ModuleWithHistory())
    for number in range(passes):
        module(torch.full((1, 2), number + 1.0))
    return module


def sharded_state(module, config, groups):
    """The state of a run: tensors, and the extra state of the modules."""
    rows = (
        ShardedTensor.from_rank_offsets(name, tensor.detach(), replica_id=(0, 0, 0))
        for name, tensor in module.named_parameters()
    )
    return itertools.chain(rows, fp8_state.sharded_fp8_state(module, config, groups))


def saved(folder, module, config, groups, *, background):
    state = files.CheckpointState(1, 1, 1, "ar", None, None, {}, {}, dataclasses.asdict(config))
    saver = CheckpointWriter(
        folder, lambda: sharded_state(module, config, groups), background=background, keep=1, keep_every=0
    )
    saver.begin(state, {"lr": 1.0})
    saver.finish()
    saver.close()
    return checkpoint_folder(folder, 1)


@pytest.mark.parametrize("background", [True, False])
def test_extra_state_is_restored(groups, tmp_path, background):
    before = model(passes=3)
    folder = saved(tmp_path, before, DELAYED, groups, background=background)
    after = model(passes=1)
    loaded = files.load(folder, lambda: sharded_state(after, DELAYED, groups))
    fp8_state.restore_fp8_state([after], loaded)
    assert [part.history for part in (after[0], after[2])] == [before[0].history, before[2].history]
    assert before[0].history == [1.0, 2.0, 3.0]
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))
    assert loaded["schedule"] == {"lr": 1.0}


def test_other_precisions_neither_write_nor_read_extra_state(groups, tmp_path):
    bf16 = tiny_config("M", precision="bf16")
    folder = saved(tmp_path / "delayed", model(passes=2), DELAYED, groups, background=False)
    after = model()
    loaded = files.load(folder, lambda: sharded_state(after, bf16, groups))
    fp8_state.restore_fp8_state([after], loaded)
    assert after[0].history == [] and loaded.keys() >= {"schedule"}
    tensors = dist_checkpointing.load_tensors_metadata(str(folder))
    assert sorted(tensors) == ["0.bias", "0.weight", "2.bias", "2.weight"], "what other programs list"
    assert list(fp8_state.sharded_fp8_state(model(passes=2), bf16, groups)) == []


def changed(section, **values):
    return dataclasses.replace(DELAYED, **{section: dataclasses.replace(getattr(DELAYED, section), **values)})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DELAYED, True),
        (changed("parallel", pipeline=2, threads_per_rank=2), True),
        (changed("optimizer", distributed=True), True),
        (changed("parallel", expert=2), False),
        (changed("parallel", tensor=2, sequence=True), False),
        (changed("train", precision="fp8_current"), False),
        (changed("train", precision="bf16"), False),
    ],
)
def test_scales_are_restored_if_precision_and_layout_are_the_same(config, expected):
    assert fp8_state.can_restore(dataclasses.asdict(DELAYED), config) is expected
    assert fp8_state.can_restore(dataclasses.asdict(config), DELAYED) is expected


def test_an_old_checkpoint_without_a_precision_has_no_scales():
    assert not fp8_state.can_restore({}, DELAYED)
