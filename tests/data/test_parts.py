"""Parts: a tokenised unit, with a record of each text and counts of what was left out."""

from itertools import chain

import numpy as np

from helpers.corpora import texts, write_records
from helpers.parts import unit_task
from megatron_twotower.data.documents import Document, Unit, cut_units
from megatron_twotower.data.parts import RECORD, part_array, part_path, read_part, write_part
from megatron_twotower.data.tokenizer import load_tokenizer


def test_a_part_holds_ids_and_a_record_for_each_text(work_folder, small_tokenizer, monkeypatch):
    for name in ("BATCH_CHARACTERS", "ONE_THREAD_CHARACTERS"):
        monkeypatch.setattr(f"megatron_twotower.data.parts.{name}", 1000)  # several batches
    values = [*texts(50), "", 7, "ünï", *texts(3)]
    path = write_records(work_folder / "a.jsonl", values)
    (unit,) = cut_units([Document("a.jsonl", path)], holdout_fraction=0, text_field="text", unit_bytes=1 << 20)
    counts = write_part(unit_task(unit, 3, folder=work_folder, tokenizer=small_tokenizer))
    assert read_part(work_folder, 3) == {**counts, "faults": [list(fault) for fault in counts["faults"]]}
    assert (counts["documents"], counts["lines"]) == (54, 56)
    assert counts["left_out"] == {"empty": 1, "malformed": 1}
    assert counts["faults"] == [(51, "field 'text' holds int, expected a string")]
    kept = [(place, text) for place, text in enumerate(values) if text and text != 7]
    plain = [load_tokenizer(small_tokenizer)(text, add_special_tokens=False)["input_ids"] for _, text in kept]
    records = part_array(work_folder, 3, ".records", dtype=RECORD)
    assert records["place"].tolist() == [place for place, _ in kept]
    assert records["tokens"].tolist() == list(map(len, plain))
    assert records["bytes"].tolist() == [len(text.encode()) for _, text in kept]
    assert records["characters"].tolist() == [len(text) for _, text in kept]
    assert len(np.unique(records["digest"], axis=0)) == 51
    ids = part_array(work_folder, 3, ".ids", dtype=np.dtype("uint16"))
    assert ids.tolist() == list(chain.from_iterable(plain)) and counts["tokens"] == len(ids)


def test_an_empty_unit_is_an_empty_part(work_folder, small_tokenizer):
    path = write_records(work_folder / "a.jsonl", [])
    counts = write_part(
        unit_task(Unit((Document("a", path),), None, 0, 0, 0), 0, folder=work_folder, tokenizer=small_tokenizer)
    )
    assert (counts["documents"], counts["tokens"], counts["lines"]) == (0, 0, 0)
    assert len(part_array(work_folder, 0, ".records", dtype=RECORD)) == 0


def test_a_part_not_written_in_full_is_none(work_folder):
    assert read_part(work_folder, 0) is None
    part_path(work_folder, 0, ".json").write_text('{"documents"')
    assert read_part(work_folder, 0) is None
