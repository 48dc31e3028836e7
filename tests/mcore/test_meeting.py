"""Where the ranks of a job meet, and how they wait."""

import threading
import time

import pytest

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.mcore import meeting, parallel

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@pytest.mark.parametrize(
    ("restarts", "shared", "refused"), [("2", "True", True), ("2", "False", False), ("0", "True", False)]
)
def test_ranks_that_may_start_again_do_not_share_the_store_of_their_agents(restarts, shared, refused, monkeypatch):
    agent = {"TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_USE_AGENT_STORE": shared}
    for name, value in (TORCHRUN | agent).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "_job_store", meeting.dist.HashStore())
    if not refused:
        assert meeting.place()["world_size"] == 1
        return
    with pytest.raises(UserError, match=r"--max-restarts: found 2 .* expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        parallel.initialise(RunConfig())


def test_every_run_of_a_process_meets_at_a_place_of_its_own(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "_job_store", meeting.dist.HashStore())
    for number in range(3):
        meeting.place()["store"].add("arrived", 1)
        assert meeting.place()["store"].check(["arrived"]) is False, number


def test_all_wait_for_the_last(monkeypatch):
    store, passed = meeting.dist.HashStore(), []
    monkeypatch.setattr(meeting.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(meeting.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(meeting.dist.distributed_c10d, "_get_default_store", lambda: store)
    ranks = [
        threading.Thread(target=lambda number=number: (meeting.wait_for_all("save"), passed.append(number)))
        for number in range(3)
    ]
    for rank in ranks[:2]:
        rank.start()
    time.sleep(0.2)
    assert passed == []
    ranks[2].start()
    for rank in ranks:
        rank.join(10)
    assert sorted(passed) == [0, 1, 2]
