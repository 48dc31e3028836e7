"""Megatron's asynchronous save on the installed release: what each step writes, and failures."""

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_twotower.mcore import async_save, releases

SCHEDULE = {"lr": 0.5, "num_steps": 3}


def sharded_state(**tensors):
    """Tensors that no rank shares, and an object."""
    shards = {
        name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=(0, 0, 0)) for name, tensor in tensors.items()
    }
    return shards | {"history": ShardedObject("history", {"values": [1, 2]}, (1,), (0,), (0, 0, 0))}


def prepare(folder):
    state = sharded_state(weight=torch.arange(6.0).view(2, 3), bias=torch.ones(3))
    return async_save.prepare_save(state, folder, common={"schedule": SCHEDULE})


def test_a_save_is_read_back(groups, tmp_path):
    save = prepare(tmp_path)
    save.copy_to_host()
    written = save.write()
    save.finalise()
    state = sharded_state(weight=torch.zeros(2, 3), bias=torch.zeros(3))
    loaded = dist_checkpointing.load(state, str(tmp_path))
    assert torch.equal(loaded["weight"], torch.arange(6.0).view(2, 3))
    assert torch.equal(loaded["bias"], torch.ones(3))
    assert loaded["history"] == {"values": [1, 2]} and loaded["schedule"] == SCHEDULE
    assert {file.name for file in tmp_path.iterdir()} == {*async_save.INDEX_FILES, *(file.name for file in written)}


def test_nothing_is_complete_before_the_last_step(groups, tmp_path):
    save = prepare(tmp_path)
    save.copy_to_host()
    assert not list(tmp_path.glob("*.distcp"))
    assert [file.name for file in save.write()] == [file.name for file in tmp_path.glob("*.distcp")]
    assert not (tmp_path / ".metadata").exists()
    save.finalise()
    assert (tmp_path / ".metadata").is_file()


def test_the_common_state_is_in_its_file_in_every_release(groups, tmp_path):
    prepare(tmp_path)
    common = torch.load(tmp_path / async_save.COMMON_FILE, weights_only=False)
    assert common["schedule"] == SCHEDULE


def test_the_error_of_a_writer_is_raised(groups, tmp_path, monkeypatch):
    def full_disk(transforms, number, bucket, outcome, busy, fsync):
        outcome.put((number, OSError("No space left on device")))

    save = prepare(tmp_path)
    save.copy_to_host()
    monkeypatch.setattr(async_save.FileSystemWriterAsync, "write_preloaded_data", staticmethod(full_disk))
    with pytest.raises(OSError, match="No space left"):
        save.write()


def test_a_rank_with_nothing_to_write_writes_no_file():
    request = async_save.AsyncRequest(None, (), [])
    save = async_save.AsyncSave(request)
    save.copy_to_host()
    assert save.write() == []


def test_each_supported_release_names_what_it_does_differently(monkeypatch):
    found = {}
    for name in releases.RELEASES:
        monkeypatch.setattr(releases, "RELEASE", name)
        found[name] = releases.installed_release()
    assert found["0.16"].save_arguments == {} and found["0.19"].save_arguments == {"async_strategy": "mcore"}
    assert found["0.16"].results_queue_function == "_get_write_results_queue"
    assert found["0.19"].results_queue_function == "get_write_results_queue"
