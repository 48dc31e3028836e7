"""The measurement of one objective: its weights, its accelerator, and the memory that it frees."""

import weakref

import pytest
import torch

from megatron_twotower.bench import training_steps
from megatron_twotower.bench.gpu import steps
from megatron_twotower.bench.gpu.command import QUICK_OVERRIDES
from megatron_twotower.bench.gpu.steps import known_accelerator
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.model.parameter_map import backbone_entries, hf_shapes
from megatron_twotower.plan.layout import ACCELERATORS

QUICK = {"repeats": 1, "budget_seconds": 0.0}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA L40S", None),
    ],
)
def test_a_peak_is_known_only_for_the_accelerator_of_the_data_sheet(name, known):
    assert known_accelerator(name) == (known and ACCELERATORS[known])


def test_weights_drawn_on_the_device_are_keyed_by_name():
    model = load_recipe("bench_gpu", QUICK_OVERRIDES).model
    first, again, other = (steps.random_on_device(model, seed=seed) for seed in (0, 0, 1))
    shapes = hf_shapes(backbone_entries(model), model)
    for name, shape in shapes.items():
        assert first(name).shape == shape and torch.equal(first(name), again(name))
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    assert all(not torch.equal(first(name), other(name)) for name in matrices)
    assert not torch.equal(*(first(name)[:4, :4] for name in matrices[:2]))


def test_a_measured_trainer_is_freed(groups, monkeypatch):
    """Trainers of both objectives do not fit at the same time."""
    config, alive = load_recipe("bench_gpu", QUICK_OVERRIDES), []
    original = training_steps.build_trainer

    def build_trainer(*arguments, **named):
        trainer = original(*arguments, **named)
        alive.append(weakref.ref(trainer.model.only))
        return trainer

    monkeypatch.setattr(training_steps, "build_trainer", build_trainer)
    steps.measure_objective(config, training_steps.TWO_TOWER, groups, **QUICK)
    assert [reference() for reference in alive] == [None]
