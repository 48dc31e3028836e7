"""`bench prepare`: every way makes the same ids, and the command writes what it prints."""

import json

import numpy as np
import pytest

from helpers.corpora import texts, write_records
from megatron_twotower.bench import prepare as bench
from megatron_twotower.cli import main
from megatron_twotower.config.recipes import recipes_folder
from megatron_twotower.data.shards import Corpus

TOKENIZER = recipes_folder() / "backbones" / "small"


def test_every_way_makes_the_ids_of_the_tokenizer(tmp_path):
    values, file = texts(40), TOKENIZER / "tokenizer.json"
    source = write_records(tmp_path / "text" / "text.jsonl", values)
    plain = bench._plain(file)
    expected = [plain.encode(text, add_special_tokens=False).ids for text in values]
    total, end = sum(map(len, expected)), plain.token_to_id("</s>")
    assert bench._alone(values, file, characters=1) == bench._alone(values, file, characters=999) == total
    assert bench._ours(source, TOKENIZER, tmp_path / "ours") == total + len(values)
    assert bench._megatron(source, file, tmp_path / "theirs") == total + len(values)
    stream = [token for ids in expected for token in (*ids, end)]
    assert Corpus.open(tmp_path / "ours" / "train").tokens(0, len(stream)).tolist() == stream
    assert np.fromfile(tmp_path / "theirs" / "text.bin", dtype=np.uint16).tolist() == stream


@pytest.mark.slow
def test_the_command_prints_and_writes(tmp_path, capsys):
    words = ["--megabytes", "0.3", "--rounds", "1", "--documents", "30000", "--unit-bytes", "50000"]
    assert main.main(["bench", "prepare", *words, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "prepare.json").read_text())
    tokens = found["tokens"]
    assert tokens[bench.SINGLE] == tokens[bench.BATCHES] == tokens[bench.MEGATRON] - found["documents"]
    assert max(found["of_the_limit"][name] for name in (bench.SINGLE, bench.BATCHES)) == 1.0
    assert [row["documents"] for row in found["selection"]] == [3000, 10_000, 30_000]
    assert set(found["seconds_by_workers"]) == {"1", "2"}
    printed = capsys.readouterr().out
    assert "data prepare" in printed and f"{found['tokens_per_cpu_second'][bench.OURS]:,}" in printed
