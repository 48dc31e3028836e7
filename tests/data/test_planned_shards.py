"""Planned shards: a shard written from ranges of several parts."""

from pathlib import Path

import numpy as np

from helpers.corpora import read_samples, texts, write_records
from helpers.parts import unit_task
from megatron_twotower.data.documents import Document, Unit
from megatron_twotower.data.parts import KEEP, RECORD, part_array, write_part
from megatron_twotower.data.planned_shards import (
    PartRange,
    PlannedShard,
    ShardTask,
    read_planned_shard,
    shard_arrays,
    write_planned_shard,
)
from megatron_twotower.data.repeats import group_path
from megatron_twotower.data.tokenizer import load_tokenizer


def test_a_shard_is_written_from_ranges_of_parts(work_folder, small_tokenizer):
    """The second half of a part of files, then every other line of a part of records."""
    files = []
    for number, text in enumerate(texts(10)):
        (work_folder / f"{number}.txt").write_text(text)
        files.append(Document(f"{number}.txt", work_folder / f"{number}.txt"))
    path = write_records(work_folder / "a.jsonl", texts(20, start=100))
    units = [Unit(tuple(files), "train", 0, 0, 1), Unit((Document("a.jsonl", path),), None, 0, 10**6, 1)]
    for number, unit in enumerate(units):
        write_part(unit_task(unit, number, folder=work_folder, tokenizer=small_tokenizer))
    first_id = int(part_array(work_folder, 0, ".records", dtype=RECORD)["tokens"][:5].sum())
    (work_folder / "selection").mkdir()
    np.full(4, 9, np.uint8).tofile(group_path(work_folder, 0, ".kept"))
    kept = [*[9] * 2, *[KEEP["train"]] * 5, *[KEEP["train"], KEEP["validation"]] * 10]
    np.array(kept, np.uint8).tofile(group_path(work_folder, 1, ".kept"))
    ranges = (
        PartRange(0, 5, 10, 1, 2, first_id, tuple(file.name for file in files), None),
        PartRange(1, 0, 19, 1, 7, 0, ("a.jsonl",), 1000),
    )
    task = ShardTask(PlannedShard("train", 2, 500, ranges), work_folder, "uint16", bos=1, eos=2)
    assert read_planned_shard(task) is None
    shard = write_planned_shard(task)
    assert read_planned_shard(task) == shard and shard.file == "shard-00002.tar" and shard.documents == 15
    samples = read_samples(work_folder / "data" / "train")
    names = [f"{number}.txt" for number in range(5, 10)] + [f"a.jsonl:{1001 + line}" for line in range(0, 20, 2)]
    assert [sample["json"]["name"] for sample in samples] == names
    expected = [*texts(10)[5:], *texts(20, start=100)[::2]]
    opened = load_tokenizer(small_tokenizer)
    for sample, text in zip(samples, expected, strict=True):
        assert sample["tokens.npy"].tolist() == [1, *opened(text, add_special_tokens=False)["input_ids"], 2]
    offsets, lengths, *_ = shard_arrays(task)
    assert lengths.sum() == shard.tokens and len(offsets) == 15
    assert [Path(sample["__key__"]).name for sample in samples] == [f"{number:09d}" for number in range(500, 515)]
