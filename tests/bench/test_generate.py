"""The benchmark of bulk text runs, at a very small size; what its cases write, and what it makes of them."""

import io
import json

import pytest
import torch
from rich.console import Console

from megatron_twotower.bench import generate as bench
from megatron_twotower.bench.generate import QUICK, Bulk, Settings
from megatron_twotower.bench.measure import Times
from megatron_twotower.cli.main import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.generate.engine import load
from megatron_twotower.hf.modeling_nemotron_h_twotower import GenerationStats


def test_it_measures_every_case_and_writes_what_it_prints(two_tower_folder, tmp_path):
    console = Console(file=io.StringIO(), width=150)
    bench.run(tmp_path, model=two_tower_folder, wanted=QUICK, threads=1, console=console)
    figures = json.loads((tmp_path / "generate.json").read_text())
    assert [(row["case"], row["batch_size"]) for row in figures["rows"]] == [
        ("mask_diffusion", 1),
        ("mask_diffusion", 4),
        ("mask_diffusion, unsorted", 4),
        ("ar", 1),
        ("ar", 4),
        ("speculative", 1),
        ("speculative", 4),
    ]
    text = console.file.getvalue()
    for row in figures["rows"]:
        assert row["new_tokens"] == 4 * 8
        assert row["tokens_per_second"] == row["new_tokens"] / row["median_seconds"]
        assert f"{row['tokens_per_second']:,.0f}" in text
        assert 0 < row["busy"] <= 1
        assert row["batch_size"] > 1 or (row["padding"], row["busy"]) == (0, 1)
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_have_the_lengths_that_are_asked_for(two_tower_folder):
    tokenizer = load(two_tower_folder)[1]
    wanted = Settings(prompts=30, shortest=4, longest=40)
    prompts = bench.source_prompts(tokenizer, wanted)
    lengths = [len(ids) for ids in prompts]
    assert len(prompts) == 30 and 4 <= min(lengths) < 10 and 20 < max(lengths) <= 40
    assert bench.source_prompts(tokenizer, wanted) == prompts


def test_batches_hold_every_prompt_once_and_sorted_ones_less_padding():
    prompts = [[5 + i] * length for i, length in enumerate((9, 2, 8, 3))]
    sorted_ones = bench.batched(prompts, 2, by_length=True)
    as_they_come = bench.batched(prompts, 2, by_length=False)
    assert [ids.shape[1] for ids, _ in sorted_ones] == [9, 3]
    assert bench.padding(sorted_ones) == pytest.approx(2 / 24)
    assert bench.padding(as_they_come) == pytest.approx(12 / 34)
    for batches in (sorted_ones, as_they_come):
        rows = [ids[row][mask[row] == 1].tolist() for ids, mask in batches for row in range(2)]
        assert sorted(rows) == sorted(prompts)


def test_busy_rows_are_those_that_had_something_left():
    batches = [(torch.zeros(2, 3), None), (torch.zeros(1, 3), None)]
    bulk = Bulk("a", "ar", 2, batches, [GenerationStats(10, 15, 30, 1.0), GenerationStats(4, 4, 6, 1.0)])
    row = bulk.row(Times({"write": [2.0, 4.0, 3.0]}))
    assert (row["busy"], row["new_tokens"], row["tokens_per_second"]) == (19 / 24, 36, 12.0)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Settings(modes=("ara",)), "mode: found 'ara'"),
        (Settings(batch_sizes=(4, 0)), "--batch-sizes: found 0, expected"),
        (Settings(prompts=0), "--prompts: found 0"),
    ],
)
def test_what_cannot_be_measured(wanted, message):
    with pytest.raises(UserError, match=message):
        bench.check(wanted)


def test_the_command(two_tower_folder, tmp_path):
    arguments = ["bench", "generate", "--model", str(two_tower_folder), "--output", str(tmp_path), "--quick"]
    assert main([*arguments, "--modes", "ar", "--threads", "1"]) == 0
    assert (tmp_path / "generate.json").is_file()
    assert main([*arguments, "--modes", "none"]) == 2
