"""The benchmark of generation at a very small size: its batches, its rows and its options."""

import io
import json

import pytest
import torch
from rich.console import Console

from megatron_twotower.bench import generate as bench
from megatron_twotower.bench.generate import QUICK, GenerateOptions, GenerationCase
from megatron_twotower.bench.measure import CaseTimes
from megatron_twotower.cli.main import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.generate.engine import load
from megatron_twotower.hf.modeling_nemotron_h_twotower import GenerationStats


def test_it_measures_every_case_and_writes_what_it_prints(two_tower_folder, tmp_path):
    console = Console(file=io.StringIO(), width=150)
    bench.run(tmp_path, model=two_tower_folder, options=QUICK, threads=1, console=console)
    results = json.loads((tmp_path / "generate.json").read_text())
    assert [(row["case"], row["batch_size"]) for row in results["rows"]] == [
        ("mask_diffusion", 1),
        ("mask_diffusion", 4),
        ("mask_diffusion, unsorted", 4),
        ("ar", 1),
        ("ar", 4),
        ("speculative", 1),
        ("speculative", 4),
    ]
    text = console.file.getvalue()
    for row in results["rows"]:
        assert row["new_tokens"] == 4 * 8
        assert row["tokens_per_second"] == row["new_tokens"] / row["median_seconds"]
        assert f"{row['tokens_per_second']:,.0f}" in text
        assert 0 < row["busy"] <= 1
        assert row["batch_size"] > 1 or (row["padding"], row["busy"]) == (0, 1)
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_have_the_given_range_of_lengths(two_tower_folder):
    tokenizer = load(two_tower_folder)[1]
    options = GenerateOptions(prompts=30, shortest=4, longest=40)
    prompts = bench.source_prompts(tokenizer, options)
    lengths = [len(ids) for ids in prompts]
    assert len(prompts) == 30 and 4 <= min(lengths) < 10 and 20 < max(lengths) <= 40
    assert bench.source_prompts(tokenizer, options) == prompts


def test_batches_contain_every_prompt_once_and_sorted_ones_less_padding():
    prompts = [[5 + i] * length for i, length in enumerate((9, 2, 8, 3))]
    sorted_ones = bench.make_batches(prompts, 2, by_length=True)
    unsorted = bench.make_batches(prompts, 2, by_length=False)
    assert [ids.shape[1] for ids, _ in sorted_ones] == [9, 3]
    assert bench.padding_share(sorted_ones) == pytest.approx(2 / 24)
    assert bench.padding_share(unsorted) == pytest.approx(12 / 34)
    for batches in (sorted_ones, unsorted):
        rows = [ids[row][mask[row] == 1].tolist() for ids, mask in batches for row in range(2)]
        assert sorted(rows) == sorted(prompts)


def test_busy_rows_are_those_that_are_not_finished():
    batches = [(torch.zeros(2, 3), None), (torch.zeros(1, 3), None)]
    case = GenerationCase("a", "ar", 2, batches, [GenerationStats(10, 15, 30, 1.0), GenerationStats(4, 4, 6, 1.0)])
    row = case.row(CaseTimes({"write": [2.0, 4.0, 3.0]}))
    assert (row["busy"], row["new_tokens"], row["tokens_per_second"]) == (19 / 24, 36, 12.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GenerateOptions(modes=("ara",)), "mode: found 'ara'"),
        (GenerateOptions(batch_sizes=(4, 0)), "--batch-sizes: found 0, expected"),
        (GenerateOptions(prompts=0), "--prompts: found 0"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        bench.check_options(options)


def test_the_command(two_tower_folder, tmp_path):
    arguments = ["bench", "generate", "--model", str(two_tower_folder), "--output", str(tmp_path), "--quick"]
    assert main([*arguments, "--modes", "ar", "--threads", "1"]) == 0
    assert (tmp_path / "generate.json").is_file()
    assert main([*arguments, "--modes", "none"]) == 2
