"""A checkpoint that an earlier version of the program wrote resumes to the steps that it recorded.

`tests/fixtures/run_at_step_15` is a run of the recipe `tiny` at step 15. `steps_16_to_30.json` has
the losses and gradient norms of its later steps.
"""

import json
import shutil

import pytest
import torch
from megatron.core import dist_checkpointing

from helpers import TESTS
from helpers.runs import records, train
from helpers.trainers import built_trainer, restore, save
from megatron_twotower.common.run_folder import checkpoint_folder, read_provenance
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.doctor import diagnose

FIXTURES = TESTS / "fixtures"
STEPS = list(range(16, 31))


@pytest.fixture
def recorded(tmp_path, tiny_data, tiny_backbone, monkeypatch):
    """A copy of the run, in a working directory in which its relative paths exist."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "run_at_step_15", tmp_path / "run")
    (tmp_path / "data").symlink_to(tiny_data)
    (tmp_path / "backbone").symlink_to(tiny_backbone)
    return tmp_path / "run"


def test_every_tensor_is_restored_bit_for_bit(recorded, tmp_path):
    """A checkpoint that is restored and saved again has the same tensors and the same state."""
    first, second = checkpoint_folder(recorded, 15), checkpoint_folder(tmp_path / "again", 15)
    with built_trainer(load_recipe("run/config.yaml")) as (trainer, model):
        weight = next(model.module.parameters())
        initial = weight.clone()
        progress = restore(recorded, trainer, model)
        assert not torch.equal(weight, initial), "the checkpoint was read"
        save(tmp_path / "again", trainer, model, progress)
        want, got = (dist_checkpointing.load_plain_tensors(str(folder)) for folder in (first, second))
    assert got.keys() == want.keys()
    tensors = {name: value for name, value in want.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) > 50
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    others = want.keys() - tensors.keys()
    assert {name: got[name] for name in others} == {name: want[name] for name in others}
    recorded_state, state = (json.loads((folder / "state.json").read_text()) for folder in (first, second))
    # Checkpoints also say what data the run has read since the recorded one was written.
    assert [key for key in state if key != "data"] == list(recorded_state)
    recorded_state["window"]["unscored"] = 0  # not in the recorded file
    for key in ("step", "cursor", "updates", "objective", "fingerprint", "model", "window"):
        assert state[key] == recorded_state[key], key
    for section, values in recorded_state["configuration"].items():
        found = state["configuration"][section]
        # A later version may have more settings.
        assert (found if not isinstance(values, dict) else {key: found[key] for key in values}) == values, section


def test_it_resumes_to_the_recorded_steps(recorded):
    assert train("run/config.yaml")
    found = records(recorded)
    want = {int(step): figures for step, figures in json.loads((FIXTURES / "steps_16_to_30.json").read_text()).items()}
    assert list(found) == list(want) == STEPS
    for step, figures in want.items():
        assert {key: found[step][key] for key in figures} == pytest.approx(figures, rel=1e-6), step
    lines = [json.loads(line) for line in (recorded / "ledger" / "rank-00000.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == STEPS
    assert all(len(line["samples"]) == 8 for line in lines)
    assert read_provenance(recorded)["roles"].keys() == {role.role for role in diagnose()}
