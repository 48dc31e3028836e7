"""A save that an earlier run of this process did not finish is no part of the next one."""

import torch

from helpers.runs import settings
from helpers.trainers import built_trainer, restore, save
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.mcore import patches
from megatron_twotower.train.progress import TrainingProgress


def test_the_results_of_an_unfinished_save_are_forgotten(tmp_path, tiny_data, tiny_backbone):
    config = load_recipe("tiny", settings(tiny_data, tmp_path / "run", tiny_backbone))
    with built_trainer(config) as (trainer, model):
        patches._WRITE_RESULTS.put({0: []})  # written, and not finalised
        weight = next(model.module.parameters())
        before = weight.detach().clone()
        save(tmp_path / "run", trainer, model, TrainingProgress(step=1, cursor=8, updates=1))
        weight.data.zero_()
        restore(tmp_path / "run", trainer, model)
        assert torch.equal(weight, before)
