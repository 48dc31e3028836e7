"""`bench prepare`: every way makes the same ids, and the command writes what it prints."""

import json

import numpy as np
import pytest

from helpers.corpora import texts, write_records
from megatron_twotower.bench import prepare as bench
from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import recipes_folder

TOKENIZER = recipes_folder() / "backbones" / "small"


def test_every_way_makes_the_ids_of_the_tokenizer(tmp_path):
    values, file = texts(40), TOKENIZER / "tokenizer.json"
    source = write_records(tmp_path / "text" / "text.jsonl", values)
    plain = bench._plain(file)
    end = plain.token_to_id("</s>")
    stream = [token for text in values for token in (*plain.encode(text, add_special_tokens=False).ids, end)]
    ways = bench._ways(values, source, TOKENIZER)
    assert {bench.BATCHES, bench.SINGLE, bench.OFFSETS, bench.OURS, bench.MEGATRON} <= set(ways)
    assert bench._check_ids(ways, tmp_path / "out") == len(stream)
    for name, way in ways.items():
        way.work(tmp_path / name)
        assert way.ids(tmp_path / name).tolist() == stream
    other = {bench.BATCHES: ways[bench.BATCHES], "other": bench.Way(lambda target: None, lambda target: np.zeros(3))}
    with pytest.raises(UserError, match="other: found other ids"):
        bench._check_ids(other, tmp_path / "out")


def test_a_share_is_measured_against_what_ran_directly_before_and_after():
    alone = iter([1.0, 1.0, 2.0, 4.0, 4.0])
    ways = {name: bench.Way(lambda target: None, lambda target: np.zeros(0)) for name in (bench.BATCHES, "a", "b")}
    clocks = {id(ways[bench.BATCHES]): lambda: next(alone), id(ways["a"]): lambda: 2.0, id(ways["b"]): lambda: 6.0}
    seconds, shares = bench._shares(ways, 2, lambda way: clocks[id(way)]())
    assert seconds == 2.0
    assert shares == {bench.BATCHES: 1.0, "a": (1 / 2 + 4 / 2) / 2, "b": (1.5 / 6 + 3 / 6) / 2}


def test_a_way_is_measured_in_a_process_of_its_own(tmp_path):
    here = []

    def work(target):
        here.append(target)
        while bench.time.process_time() < 0.05:
            pass
        target.mkdir()

    assert bench._cpu_seconds(tmp_path / "out", bench.Way(work, lambda target: np.zeros(0))) > 0
    assert not here and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="a measured process died"):
        bench._in_child(lambda: 1 / 0)


@pytest.mark.slow
def test_the_command_prints_and_writes(tmp_path, capsys):
    words = ["--megabytes", "0.3", "--rounds", "1", "--documents", "30000", "--unit-bytes", "50000"]
    assert main.main(["bench", "prepare", *words, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "prepare.json").read_text())
    assert found["tokens"] > found["documents"]
    assert max(found["of_the_limit"][name] for name in (bench.BATCHES, bench.SINGLE, bench.OFFSETS)) == 1.0
    assert [row["documents"] for row in found["selection"]] == [3000, 10_000, 30_000]
    assert set(found["seconds_by_workers"]) == {"1", "2"}
    printed = capsys.readouterr().out
    assert "data prepare" in printed and f"{found['tokens_per_cpu_second'][bench.OURS]:,}" in printed
