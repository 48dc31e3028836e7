"""Training, resuming, exporting and generating on a GPU as on the CPU (`make test-gpu`)."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import gpu_checks
from helpers.runs import GOLDEN, PLAIN, losses, settings, train
from megatron_twotower.common import device as common_device
from megatron_twotower.convert import export

# On the CPU they only show that the tests themselves are right; tests/train has the same and more.
pytestmark = pytest.mark.slow

# Rounding differs between devices, and steps at this learning rate increase the differences: the
# largest relative error of a loss, up to each step.
LIMITS = ((1, 2e-5), (10, 1e-3), (30, 5e-3), (100, 5e-2))


@pytest.fixture
def here(device):
    """The device, if training runs on it: with a GPU training runs on the GPU only."""
    if common_device.device().type != device:
        pytest.skip("training runs on the GPU that is here, where the same is tested")
    return device


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def deviations(got, want):
    """The largest relative error of a loss up to each step of LIMITS, and of the last twenty."""
    off = [abs(a - b) / b for a, b in zip(got, want, strict=True)]
    last = abs(sum(got[-20:]) - sum(want[-20:])) / sum(want[-20:])
    return {step: max(off[:step]) for step, _ in LIMITS if step <= len(off)} | {"last twenty": last}


# The number of steps that are compared with the golden run.
STEPS = {"cpu": 30, "cuda": 100}


def test_steps_in_fp32_follow_the_golden_losses(here, tmp_path, tiny_data, tiny_backbone):
    """The golden losses are of a CPU.

    `python tests/golden/update.py` writes them again after an intended change.
    """
    run, steps = tmp_path / "run", STEPS[here]
    assert train("tiny", *settings(tiny_data, run, tiny_backbone, *PLAIN, f"train.steps={steps}"))
    found = deviations(list(losses(run).values()), golden("tiny_100")[:steps])
    gpu_checks.report(f"{steps} steps in fp32", deviations=found)
    assert {step: off for step, off in found.items() if off > dict(LIMITS).get(step, 1e-2)} == {}


def test_bf16_stays_close_to_fp32(here, tmp_path, tiny_data, tiny_backbone):
    run, steps = tmp_path / "run", STEPS[here]
    bf16 = (f"train.steps={steps}", "train.precision=bf16")
    assert train("tiny", *settings(tiny_data, run, tiny_backbone, *PLAIN, *bf16))
    found = deviations(list(losses(run).values()), golden("tiny_100")[:steps])
    gpu_checks.report(f"{steps} steps in bf16", deviations=found)
    assert 0 < found["last twenty"] < 0.03


def test_a_resumed_run_is_the_uninterrupted_run(here, tmp_path, tiny_data, tiny_backbone):
    for name, ends in (("whole", [12]), ("resumed", [5, 12])):
        for steps in ends:
            # A rate that is constant after the warm-up: the schedule does not depend on the end.
            train(
                "tiny",
                *settings(
                    tiny_data,
                    tmp_path / name,
                    tiny_backbone,
                    *PLAIN,
                    f"train.steps={steps}",
                    "schedule.kind=constant",
                    "schedule.warmup_steps=2",
                ),
            )
    whole, resumed = (list(losses(tmp_path / name).values()) for name in ("whole", "resumed"))
    gpu_checks.report("resumed after 5 of 12 steps", deviations=deviations(resumed, whole))
    # On a GPU some sums have no fixed order, such as those of tokens from experts.
    assert resumed == pytest.approx(whole, rel=0 if here == "cpu" else 1e-4)


def test_an_exported_run_scores_alike_on_both_devices_and_generates(here, tmp_path, tiny_data, tiny_backbone):
    run, folder = tmp_path / "run", tmp_path / "model"
    train("tiny", *settings(tiny_data, run, tiny_backbone, "train.steps=6", "train.validate_every_steps=0"))
    export.export(run, folder)
    ids = torch.randint(4, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    scores, texts = {}, {}
    for where in {"cpu", here}:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).to(where)
        scores[where] = model.score(ids.to(where)).cpu()
        texts[where] = model.generate_mask_diffusion(
            ids[:, :8].to(where), max_new_tokens=16, block_size=8, steps_per_block=4
        ).cpu()
    torch.testing.assert_close(scores[here], scores["cpu"], rtol=1e-4, atol=1e-4)
    for text in texts.values():
        assert text.shape == (2, 24) and torch.equal(text[:, :8], ids[:, :8]) and not (text[:, 8:] == 3).any()
    gpu_checks.report(
        "exported run",
        largest_difference_of_scores=(scores[here] - scores["cpu"]).abs().max().item(),
        same_tokens=(texts[here] == texts["cpu"]).float().mean().item(),
    )
