"""Process groups: what a launcher says, which are created, with which time-out."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_twotower.cli import main
from megatron_twotower.common import device
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.config.schema import ParallelConfig, RunConfig
from megatron_twotower.config.validation import validate
from megatron_twotower.mcore import parallel

CUDA = torch.device("cuda", 3)


@pytest.fixture
def created(monkeypatch):
    """The arguments of each subgroup, and the device of the process group when it was created."""
    found, new_group = [], dist.new_group

    def recording(**arguments):
        found.append(arguments | {"bound": dist.group.WORLD.bound_device_id})
        return new_group(**arguments)

    monkeypatch.setattr(dist, "new_group", recording)
    yield found
    parallel.shutdown()


def test_no_group_is_a_mesh_of_gloo_sockets_that_nothing_uses(created):
    parallel.initialise(RunConfig())
    assert len(created) > 10 and {each["backend"] for each in created} == {None}


def test_the_time_out_of_collectives_is_a_setting(created, monkeypatch):
    started, start = [], dist.init_process_group

    def recording(*names, **more):
        started.append(more)
        start(*names, **more)

    monkeypatch.setattr(dist, "init_process_group", recording)
    for name, value in {"WORLD_SIZE": 1, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    parallel.initialise(RunConfig(parallel=ParallelConfig(collective_timeout_minutes=7)))
    assert [each["timeout"] for each in started] == [timedelta(minutes=7)]
    assert {each["timeout"] for each in created} == {timedelta(minutes=7)}


@pytest.mark.parametrize("key", ["hang_timeout_seconds", "save_timeout_seconds"])
def test_the_watchdog_comes_before_the_time_out_of_collectives(key):
    others = ["train.hang_timeout_seconds=1", "train.save_timeout_seconds=1", "parallel.collective_timeout_minutes=10"]
    config = load_recipe("tiny_ar", [*others, f"train.{key}=600"])
    with pytest.raises(UserError, match=rf"collective_timeout_minutes 10: expected more than train.{key} 600"):
        validate(config, world_size=1)
    for value in (0, 599):
        validate(load_recipe("tiny_ar", [*others, f"train.{key}={value}"]), world_size=1)
    validate(load_recipe("tiny_ar", []), world_size=1)


def test_a_gpu_is_given_to_the_process_group_but_subgroups_are_not_split_from_it(created, monkeypatch):
    """A split is a call of all ranks, also for the thousands of groups that a rank is not in."""
    started = {}
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    monkeypatch.setattr(device, "device", lambda: CUDA)
    monkeypatch.setattr(parallel.meeting, "place", dict)
    monkeypatch.setattr(dist, "init_process_group", lambda *names, **more: started.update(more))
    parallel._start_process_group(RunConfig())
    assert started["device_id"] == CUDA
    monkeypatch.undo()


def test_subgroups_are_created_without_the_device_of_the_process_group(created):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.group.WORLD.bound_device_id = CUDA
    parallel.initialise(RunConfig())
    assert {each["bound"] for each in created} == {None}
    assert dist.group.WORLD.bound_device_id == CUDA
    dist.group.WORLD.bound_device_id = None


def test_a_thousand_ranks_create_thousands_of_groups_and_a_rank_is_in_few(created):
    config = load_recipe("nano_30b_a3b", ["parallel=h100x1024"], planning=True)
    with parallel.pretend_rank(config, ranks=1024, rank=5):
        own = [each for each in created if 5 in each["ranks"]]
    assert len(created) > 8000 and len(own) < 20


LAUNCHED = {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_a_launcher_sets_the_number_of_ranks():
    assert parallel._launched_ranks({}) == parallel._launched_ranks({"RANK": "3"}) == 1
    assert parallel._launched_ranks(LAUNCHED) == 4


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE: found 4 .* without RANK, MASTER_ADDR, MASTER_PORT, .*unset WORLD_SIZE"),
        (LAUNCHED | {"WORLD_SIZE": "many"}, "WORLD_SIZE: found 'many'"),
        (LAUNCHED | {"RANK": "-1"}, "RANK: found '-1'"),
        (LAUNCHED | {"RANK": "4"}, "RANK: found 4 .* less than WORLD_SIZE 4"),
        (LAUNCHED | {"MASTER_PORT": ""}, "MASTER_PORT: found ''"),
    ],
)
def test_what_is_left_of_a_launcher_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        parallel._launched_ranks(environment)


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_a_number_of_ranks_without_a_launcher_is_one_line(words, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main.main(["train", "recipe=tiny_ar", f"output={tmp_path}/run", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("twotower: WORLD_SIZE: found 4") and error.count("\n") == 1
