"""A complete run on a pretended device.

Data, training, validation, records and checkpoints are those of the host.
"""

import pytest

from helpers.pretended_device import as_there, pretended_cuda
from helpers.runs import settings, train

EVERY_TWO = [
    "train.log_every_steps=2",
    "train.validate_every_steps=2",
    "train.checkpoint_every_steps=2",
    "schedule.warmup_steps=1",
    "schedule.kind=constant",
]
FIGURES = ("loss", "loss_by_noise", "grad_norm", "learning_rate", "scored_tokens", "expert_load", "tokens")
# Four steps, two records, three validations and two checkpoints.
WAITS = {
    "a number: optimizer.guarded_step": 4,
    "a copy to the host: loop._figures": 2 + 3,
    "a number: loop._train_record": 2,
    "a copy from the host: progress.damaged_on_all_ranks": 2,
    "a number: progress.damaged_on_all_ranks": 2,
}


@pytest.fixture
def run(tmp_path, tiny_data, tiny_backbone, records_of):
    def once(name, steps):
        train("tiny", *settings(tiny_data, tmp_path / name, tiny_backbone, *EVERY_TWO, f"train.steps={steps}"))
        records = [records_of(tmp_path / name, kind) for kind in ("train", "validation")]
        return [{step: {key: record.get(key) for key in FIGURES} for step, record in kind.items()} for kind in records]

    return once


@pytest.mark.slow
def test_a_run_is_that_of_the_host_and_resumes_on_either(run):
    with as_there():
        want = run("host", 4)
    with pretended_cuda() as waits:
        assert run("there", 4) == want
    counted = waits.counted("ours")
    assert counted.pop("a copy from the host: load.load_weights") > 0
    assert counted == WAITS
    with pretended_cuda():
        run("moved", 2)
    with as_there():
        assert run("moved", 4) == want
    with as_there():
        run("back", 2)
    with pretended_cuda():
        assert run("back", 4) == want
