"""What a start costs, counted: calls and bytes of each rank."""

import collections
import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from helpers.corpora import make_tokenizer, texts, write_records
from helpers.pretended_groups import Group
from helpers.runs import PLAIN, settings, train
from helpers.thread_ranks import ThreadRanks
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.convert import hf_folder
from megatron_twotower.convert.tensors import FileTensor
from megatron_twotower.data.prepare import prepare
from megatron_twotower.model import parameter_map
from megatron_twotower.train import run as train_run

RANKS = 16


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """A prepared folder with several shards in both splits."""
    folder = tmp_path_factory.mktemp("many")
    make_tokenizer(folder / "tokenizer", texts())
    write_records(folder / "texts.jsonl", texts(400))
    prepare(
        [str(folder / "texts.jsonl")],
        tokenizer=folder / "tokenizer",
        output=folder / "data",
        holdout_fraction=0.3,
        shard_tokens=1000,
    )
    return folder / "data"


@pytest.fixture
def examined(monkeypatch):
    """How often the size of each shard was asked for."""
    counts, stat = collections.Counter(), Path.stat

    def counting(path, **more):
        if path.suffix == ".tar":
            counts[path] += 1
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", counting)
    return counts


def opened(config):
    """Open training and validation data as a run does. Returns the sizes of both on this rank."""

    def on_rank(rank):
        groups = SimpleNamespace(dp=Group(rank, RANKS), cp=Group(0, 1))
        return len(train_run._training_data(config)), len(train_run._validation_batches(config, groups))

    return on_rank


def test_every_shard_is_examined_once_by_all_ranks_together(many_shards, examined, monkeypatch):
    overrides = [f"data.folder={many_shards}", "train.validate_every_steps=1", f"train.validation_sequences={RANKS}"]
    config = load_recipe("tiny_ar", [*overrides, "data.micro_batch_size=1", "data.sequence_length_tokens=32"])
    sizes = ThreadRanks(monkeypatch, RANKS).run(opened(config))
    assert len(set(sizes)) == 1 and sizes[0][0] > RANKS, sizes
    training = {path for path in examined if path.parent.name == "train"}
    assert len(training) >= 8 and {examined[path] for path in training} == {1}
    # Besides, each rank compares the size of the shards from which it reads its sequences.
    validation = {path for path in examined if path.parent.name == "validation"}
    assert sum(examined[path] for path in validation) <= len(validation) + 2 * RANKS


def test_what_the_first_rank_finds_every_rank_says(many_shards, tmp_path, monkeypatch):
    config = load_recipe("tiny_ar", [f"data.folder={tmp_path}", "train.validate_every_steps=0"])
    (tmp_path / "train").mkdir()
    for file in (many_shards / "train").iterdir():
        size = 2000 if file.name == "shard-00003.tar" else None
        (tmp_path / "train" / file.name).write_bytes(file.read_bytes()[:size])
    errors = ThreadRanks(monkeypatch, 4).run(opened(config))
    assert {type(error) for error in errors} == {UserError}
    assert {str(error).split(": found 2000 bytes")[0] for error in errors} == {f"{tmp_path}/train/shard-00003.tar"}


class CountedFile(io.FileIO):
    """A file whose reads are counted for the thread that reads."""

    counts: ClassVar = collections.Counter()

    def read(self, size=-1):
        data = super().read(size)
        self.counts[threading.current_thread()] += len(data)
        return data


@pytest.fixture
def bytes_read(monkeypatch):
    """The bytes that each rank has read from safetensors files."""
    call = Path.open
    CountedFile.counts.clear()

    def counting(path, mode="r", **more):
        return CountedFile(path, mode) if path.suffix == ".safetensors" else call(path, mode, **more)

    monkeypatch.setattr(Path, "open", counting)
    return CountedFile.counts


def test_one_rank_reads_the_backbone_for_its_fingerprint(tiny_backbone, bytes_read, monkeypatch):
    config = load_recipe("tiny", [f"init.backbone={tiny_backbone}"])
    found = ThreadRanks(monkeypatch, RANKS).run(lambda rank: train_run.backbone_fingerprint(config))
    size = sum(file.stat().st_size for file in Path(tiny_backbone).glob("*.safetensors"))
    assert list(bytes_read.values()) == [size]
    monkeypatch.undo()
    assert set(found) == {hf_folder.fingerprint(tiny_backbone)}


def test_a_start_reads_each_tensor_once_and_a_resume_only_the_context_tower(
    tiny_data, tiny_backbone, tmp_path, monkeypatch
):
    """The denoiser starts as a copy of what was read; a checkpoint overwrites it."""
    reads, read = collections.Counter(), FileTensor.read

    def counting(tensor):
        reads[tensor.name] += 1
        return read(tensor)

    monkeypatch.setattr(FileTensor, "read", counting)
    arguments = settings(tiny_data, tmp_path / "run", tiny_backbone, *PLAIN, "schedule.kind=constant")
    model = load_recipe("tiny", arguments).model
    names = parameter_map.hf_shapes(parameter_map.backbone_entries(model), model)
    for steps in (1, 2):
        assert train("tiny", *arguments, f"train.steps={steps}", "schedule.warmup_steps=0")
        assert reads == dict.fromkeys(names, 1)
        reads.clear()
