"""Parts: a unit tokenised and told, and a shard written from what several parts hold."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from helpers.corpora import make_tokenizer, read_samples, texts, write_records
from megatron_twotower.data.documents import Document, Unit, cut_units
from megatron_twotower.data.parts import (
    KEEP,
    RECORD,
    PlannedShard,
    ShardTask,
    Span,
    UnitTask,
    part_array,
    part_path,
    read_part,
    read_planned_shard,
    shard_arrays,
    write_part,
    write_planned_shard,
)
from megatron_twotower.data.tokenizer import load_tokenizer, tokenizer_fingerprint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", texts())


@pytest.fixture
def folder(tmp_path):
    for name in ("parts", "shards", "data/train"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def task_of(unit, number, *, folder, tokenizer):
    return UnitTask(number, unit, folder, tokenizer, tokenizer_fingerprint(tokenizer), "text", "uint16")


def test_a_part_holds_ids_and_a_record_for_each_text(folder, tokenizer, monkeypatch):
    monkeypatch.setattr("megatron_twotower.data.parts._BATCH_CHARACTERS", 1000)  # in many batches
    values = [*texts(50), "", 7, "ünï", *texts(3)]
    path = write_records(folder / "a.jsonl", values)
    (unit,) = cut_units([Document("a.jsonl", path)], holdout_fraction=0, text_field="text", unit_bytes=1 << 20)
    about = write_part(task_of(unit, 3, folder=folder, tokenizer=tokenizer))
    assert read_part(folder, 3) == {**about, "faults": [list(fault) for fault in about["faults"]]}
    assert (about["documents"], about["lines"]) == (54, 56)
    assert about["left_out"] == {"empty": 1, "malformed": 1}
    assert about["faults"] == [(51, "field 'text' holds int, expected a string")]
    kept = [(place, text) for place, text in enumerate(values) if text and text != 7]
    plain = [load_tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"] for _, text in kept]
    records = part_array(folder, 3, ".records", dtype=RECORD)
    assert records["place"].tolist() == [place for place, _ in kept]
    assert records["tokens"].tolist() == list(map(len, plain))
    assert records["bytes"].tolist() == [len(text.encode()) for _, text in kept]
    assert records["characters"].tolist() == [len(text) for _, text in kept]
    assert len(np.unique(records["digest"], axis=0)) == 51
    ids = part_array(folder, 3, ".ids", dtype=np.dtype("uint16"))
    assert ids.tolist() == list(chain.from_iterable(plain)) and about["tokens"] == len(ids)


def test_an_empty_unit_is_an_empty_part(folder, tokenizer):
    path = write_records(folder / "a.jsonl", [])
    about = write_part(task_of(Unit((Document("a", path),), None, 0, 0, 0), 0, folder=folder, tokenizer=tokenizer))
    assert (about["documents"], about["tokens"], about["lines"]) == (0, 0, 0)
    assert len(part_array(folder, 0, ".records", dtype=RECORD)) == 0


def test_a_part_not_written_in_full_is_none(folder):
    assert read_part(folder, 0) is None
    part_path(folder, 0, ".json").write_text('{"documents"')
    assert read_part(folder, 0) is None


def test_a_shard_is_written_from_spans_of_parts(folder, tokenizer):
    """The second half of a part of files, then every other line of a part of records."""
    files = []
    for number, text in enumerate(texts(10)):
        (folder / f"{number}.txt").write_text(text)
        files.append(Document(f"{number}.txt", folder / f"{number}.txt"))
    path = write_records(folder / "a.jsonl", texts(20, start=100))
    units = [Unit(tuple(files), "train", 0, 0, 1), Unit((Document("a.jsonl", path),), None, 0, 10**6, 1)]
    for number, unit in enumerate(units):
        write_part(task_of(unit, number, folder=folder, tokenizer=tokenizer))
    first_id = int(part_array(folder, 0, ".records", dtype=RECORD)["tokens"][:5].sum())
    np.full(10, KEEP["train"], np.uint8).tofile(part_path(folder, 0, ".keep"))
    np.array([KEEP["train"], KEEP["validation"]] * 10, np.uint8).tofile(part_path(folder, 1, ".keep"))
    spans = (Span(0, 5, 10, first_id, tuple(file.name for file in files), None), Span(1, 0, 19, 0, ("a.jsonl",), 1000))
    task = ShardTask(PlannedShard("train", 2, 500, spans), folder, "uint16", bos=1, eos=2)
    assert read_planned_shard(task) is None
    shard = write_planned_shard(task)
    assert read_planned_shard(task) == shard and shard.file == "shard-00002.tar" and shard.documents == 15
    samples = read_samples(folder / "data" / "train")
    names = [f"{number}.txt" for number in range(5, 10)] + [f"a.jsonl:{1001 + line}" for line in range(0, 20, 2)]
    assert [sample["json"]["name"] for sample in samples] == names
    expected = [*texts(10)[5:], *texts(20, start=100)[::2]]
    opened = load_tokenizer(tokenizer)
    for sample, text in zip(samples, expected, strict=True):
        assert sample["tokens.npy"].tolist() == [1, *opened(text, add_special_tokens=False)["input_ids"], 2]
    offsets, lengths = shard_arrays(task)
    assert lengths.sum() == shard.tokens and len(offsets) == 15
    assert [Path(sample["__key__"]).name for sample in samples] == [f"{number:09d}" for number in range(500, 515)]
