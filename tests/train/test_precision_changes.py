"""A run whose precision changes at a resume continues with the same fp32 weights and moments."""

import shutil

import pytest
import torch
from megatron.core import dist_checkpointing

from helpers import TESTS
from helpers.trainers import built_trainer, restore, save
from megatron_twotower.common.run_folder import checkpoint_folder
from megatron_twotower.config.recipes import load_recipe

MAIN = "optimizer.main."


def resaved(run, target, *overrides):
    """Restore the checkpoint of step 15 under other settings and save it. Returns its tensors."""
    with built_trainer(load_recipe("run/config.yaml", list(overrides))) as (trainer, model):
        save(target, trainer, model, restore(run, trainer, model))
        tensors = dist_checkpointing.load_plain_tensors(str(checkpoint_folder(target, 15)))
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_fp32_to_bf16_and_back_is_exact(distributed, tmp_path, tiny_data, tiny_backbone, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TESTS / "fixtures" / "run_at_step_15", tmp_path / "run")
    (tmp_path / "data").symlink_to(tiny_data)
    (tmp_path / "backbone").symlink_to(tiny_backbone)
    extra = f"optimizer.distributed={distributed}"
    fp32 = resaved(tmp_path / "run", tmp_path / "fp32", extra)
    bf16 = resaved(tmp_path / "run", tmp_path / "bf16", extra, "train.precision=bf16")
    again = resaved(tmp_path / "bf16", tmp_path / "again", extra)
    mains = {name: tensor for name, tensor in bf16.items() if name.startswith(MAIN)}
    assert len(mains) > 20 and bf16.keys() - mains.keys() == fp32.keys()
    rounded = 0
    for name, tensor in fp32.items():
        assert torch.equal(again[name], tensor), name
        if MAIN + name in mains:
            assert torch.equal(mains[MAIN + name], tensor), name
            assert bf16[name].dtype == torch.bfloat16 and torch.equal(bf16[name], tensor.bfloat16()), name
            rounded += not torch.equal(bf16[name].float(), tensor)
        else:
            assert torch.equal(bf16[name], tensor), name
    assert rounded > 10, "the weights are not bf16 numbers by chance"
    assert again.keys() == fp32.keys()
