"""Environment variables that follow from the layout."""

import os

import pytest

from megatron_twotower.cli.main import main
from megatron_twotower.config.environment import cuda_environment
from megatron_twotower.config.recipes import load_recipe

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel=h100x64"], {}),
        (["parallel=h100x1024"], {}),
        (["parallel=h100x8"], {NAME: "1"}),
        (["parallel=h100x8", "parallel.card=b200"], {}),
    ],
)
def test_one_queue_to_the_gpu_only_with_tensor_parallelism(overrides, expected):
    assert cuda_environment(load_recipe("nano_30b_a3b", overrides, planning=True).parallel) == expected


@pytest.mark.parametrize(("before", "tensor", "after"), [(None, 1, None), (None, 2, "1"), ("8", 2, "8"), ("8", 1, "8")])
def test_training_sets_it_unless_the_user_has(before, tensor, after, monkeypatch, tmp_path):
    """Before Megatron is imported, which asks for the CUDA device. This run has too few ranks."""
    monkeypatch.setenv(NAME, before or "")
    if before is None:
        monkeypatch.delenv(NAME)
    assert main(["train", "recipe=tiny_ar", f"output={tmp_path}", f"parallel.tensor={tensor}", "parallel.ranks=9"]) == 2
    assert os.environ.get(NAME) == after
