"""The ledger: steps, lost steps, samples that were consumed twice or not at all."""

import json

import pytest
import torch

from megatron_twotower.train import ledger
from megatron_twotower.types import Batch


def batch(*samples, epoch=0):
    numbers = torch.tensor(samples)
    return Batch(torch.zeros(len(samples), 4, dtype=torch.int64), numbers, torch.full_like(numbers, epoch), numbers)


@pytest.fixture
def run_folder(tmp_path):
    """Two ranks, two sequences each per step: steps 1 to 3, a kill, steps 3 and 4.

    Sample n is at position n.
    """
    for rank in (0, 1):
        with ledger.open_ledger(tmp_path, rank=rank) as stream:
            for start, steps in ((100, (1, 2, 3)), (200, (3, 4))):
                for step in steps:
                    first = 4 * (step - 1) + 2 * rank
                    stream.write(ledger.ledger_line([batch(first), batch(first + 1)], start=start, step=step))
    return tmp_path


DUE = [(0, sample) for sample in range(16)]


def test_a_step_that_was_taken_again_is_lost_once_and_repeats_nothing(run_folder):
    assert ledger.audit(run_folder, DUE, last_step=4) == ledger.Audit(steps=4, lost_steps=1, repeated=0, skipped=0)
    assert ledger.audit(run_folder, DUE[:8], last_step=2) == ledger.Audit(steps=2, lost_steps=0, repeated=0, skipped=0)


def test_missing_and_repeated_samples_are_counted(run_folder):
    file = run_folder / "ledger" / "rank-00001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["samples"] = [[0, 6], [0, 6]]  # and not 7
    del lines[-1]  # 14 and 15, of step 4
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ledger.audit(run_folder, DUE, last_step=4) == ledger.Audit(steps=4, lost_steps=1, repeated=1, skipped=3)
    assert ledger.audit(run_folder, [(1, sample) for _, sample in DUE], last_step=4).skipped == 16, "of another epoch"


def test_a_line_that_a_kill_cut_off_is_ignored(run_folder):
    file = run_folder / "ledger" / "rank-00000.jsonl"
    with file.open("a") as stream:
        stream.write('{"start": 300, "step": 5, "sam')
    with ledger.open_ledger(run_folder, rank=0) as stream:
        stream.write(ledger.ledger_line([batch(16, 17)], start=400, step=5))
    found = ledger.audit(run_folder, [*DUE, (0, 16), (0, 17)], last_step=5)
    assert found == ledger.Audit(steps=5, lost_steps=1, repeated=0, skipped=0)
