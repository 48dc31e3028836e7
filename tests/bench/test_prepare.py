"""`bench prepare`: every way makes the same ids, and the command writes what it prints."""

import json

import pytest

from helpers.corpora import texts, write_records
from megatron_twotower.bench import prepare as bench
from megatron_twotower.bench.measure import in_process_of_its_own
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
    made = {}
    for name in bench._names():
        ways[name].work(tmp_path / name)
        assert ways[name].ids(tmp_path / name).tolist() == stream
        made[name] = bench._made(bench.Job(name, source, TOKENIZER, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    assert bench._same_ids(made) == len(stream)
    with pytest.raises(UserError, match="other: found other ids"):
        bench._same_ids({**made, "other": (len(stream), "another digest")})


def test_a_share_is_measured_against_what_ran_directly_before_and_after():
    alone = iter([1.0, 1.0, 2.0, 4.0, 4.0])
    clocks = {bench.BATCHES: lambda: next(alone), "a": lambda: 2.0, "b": lambda: 6.0}
    seconds, shares = bench._shares(list(clocks), 2, lambda name: clocks[name]())
    assert seconds == 2.0
    assert shares == {bench.BATCHES: 1.0, "a": (1 / 2 + 4 / 2) / 2, "b": (1.5 / 6 + 3 / 6) / 2}


def test_a_way_is_measured_in_a_process_of_its_own(tmp_path):
    source = write_records(tmp_path / "text" / "text.jsonl", texts(4))
    job = bench.Job(bench.OURS, source, TOKENIZER, tmp_path / "out")
    assert in_process_of_its_own(bench._cpu_seconds, job, preload=bench.__name__) > 0
    assert not (tmp_path / "out").exists()
    wrong = bench.Job("no way", source, TOKENIZER, tmp_path / "out")
    with pytest.raises(UserError, match="its process ended with status 1, expected a result"):
        in_process_of_its_own(bench._cpu_seconds, wrong, preload=bench.__name__)


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
