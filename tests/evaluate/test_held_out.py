"""The figures of an exported folder, their tables and pictures, and the command."""

import dataclasses
import json
import shutil

import pytest

from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.evaluate import held_out, held_out_figures
from megatron_twotower.evaluate.held_out import EvaluationSettings
from megatron_twotower.evaluate.likelihood import LEVELS

VOCABULARY = 512
SMALL = EvaluationSettings(
    sequences=3,
    sequence_length_tokens=48,
    block_size_tokens=8,
    levels=(0.25, 1.0),
    bound_draws=2,
    thresholds=(0.2, 0.9),
    block_sizes=(4,),
    steps=(2,),
    prompts=2,
    prompt_tokens=12,
    new_tokens=16,
    samples=1,
)
ARGUMENTS = [
    "--sequences",
    "3",
    "--length",
    "48",
    "--block-size",
    "8",
    "--draws",
    "2",
    "--thresholds",
    "0.2",
    "0.9",
    "--block-sizes",
    "4",
    "--steps",
    "2",
    "--prompts",
    "2",
    "--prompt-tokens",
    "12",
    "--new-tokens",
    "16",
    "--samples",
    "1",
]


def test_evaluate_returns_every_figure_and_its_count(identity_folder, tiny_data):
    stages = {}
    found = held_out.evaluate(
        identity_folder,
        tiny_data,
        settings=SMALL,
        progress=lambda stage, done, total: stages.update({stage: (done, total)}),
    )
    assert json.loads(json.dumps(found)) == found | {"settings": json.loads(json.dumps(found["settings"]))}
    assert found["sequences"] == 3
    assert found["ar_loss_tokens"] == 3 * 47
    assert found["diffusion_bound_tokens"] == 3 * 40
    assert [(e["t"], e["count"]) for e in found["masked_loss_by_noise"]][1] == (1.0, 3 * 40)
    assert found["ar_loss_per_byte"] == pytest.approx(found["ar_loss"] / found["bytes_per_token"])
    assert found["bytes_per_token"] > 1
    assert [row["confidence_threshold"] for row in found["sweep"]] == [0.2, 0.9]
    assert found["ar_generation"]["speedup"] == 1.0
    assert [sample["mode"] for sample in found["samples"]] == ["mask_diffusion", "mock_ar", "ar"]
    assert [each["tokens"] for each in found["diffusion_bound_by_position"]] == 8 * [15]
    mean = sum(each["nats_per_token"] for each in found["ar_loss_by_position"]) / 8
    assert mean == pytest.approx(found["ar_loss_on_bound_tokens"])
    assert [len(entry["by_position"]) for entry in found["masked_loss_by_noise"]] == [8, 8]
    kinds = [(row["block_size"], row["steps_per_block"]) for row in found["generation"]]
    assert kinds == [(None, None), (8, 8), (8, 8), (4, 4), (8, 2)]
    assert found["machine"]["commit"]
    assert found["samples"][1]["text"] == found["samples"][2]["text"]  # the denoiser is a copy of the context tower
    assert all(done == total for done, total in stages.values())
    again = held_out.evaluate(identity_folder, tiny_data, settings=SMALL)
    for key in ("ar_loss", "ar_loss_on_bound_tokens", "diffusion_bound", "masked_loss_by_noise"):
        assert again[key] == found[key]


def test_the_command_writes_json_and_plots_and_prints_tables(identity_folder, tiny_data, tmp_path, capsys):
    output = tmp_path / "new" / "evaluation.json"
    arguments = ["--model", str(identity_folder), "--data", str(tiny_data), "--output", str(output), *ARGUMENTS]
    assert main.main(["evaluate", *arguments]) == 0
    found = json.loads(output.read_text())
    expected = json.loads(json.dumps(dataclasses.asdict(SMALL))) | {"levels": list(LEVELS)}
    assert found["settings"] == expected
    names = ["evaluation-pareto.png", "evaluation-positions.png", "evaluation.json"]
    assert sorted(path.name for path in output.parent.iterdir()) == names
    assert all(path.read_bytes()[1:4] == b"PNG" for path in output.parent.glob("*.png"))
    printed = capsys.readouterr().out
    for title in ("masked loss by noise level", "by position in the block", "against cached AR", "repeated-4"):
        assert title in printed
    ar = found["ar_generation"]
    assert f"{ar['nats_per_token']:.2f} ± {ar['nats_per_token_stderr']:.2f}" in printed


def test_every_combination(identity_folder, tiny_data):
    settings = dataclasses.replace(SMALL, block_sizes=(4, 8), every=True, samples=0)
    found = held_out.evaluate(identity_folder, tiny_data, settings=settings)
    assert len(found["generation"]) == 1 + 2 * 2 * 2
    assert [row["confidence_threshold"] for row in found["sweep"]] == [0.2, 0.9]
    assert {row["block_size"] for row in found["sweep"]} == {8}
    assert held_out_figures.pareto_plot(found)[1:4] == b"PNG"


def test_samplers_are_compared_with_the_released_rule(identity_folder, tiny_data, tmp_path, capsys):
    settings = dataclasses.replace(
        SMALL, thresholds=(0.9,), threshold=0.5, samplers=("factor:3", "prefix:0.2"), sequences=4, prompts=4, samples=0
    )
    held_out.run(identity_folder, data=tiny_data, output=tmp_path / "e.json", settings=settings)
    found = json.loads((tmp_path / "e.json").read_text())
    rules = [(row["confidence_threshold"], row["sampler"]) for row in found["generation"][:5]]
    assert rules == [(None, None), (0.9, None), (0.5, None), (None, "factor:3"), (None, "prefix:0.2")]
    assert [row["confidence_threshold"] for row in found["sweep"]] == [0.9, 0.5]
    assert [curve["name"] for curve in found["samplers"]["curves"]] == ["threshold", "factor", "prefix"]
    assert (found["samplers"]["base"]["setting"], found["samplers"]["prompts"]) == ("0.5", 2)
    assert (tmp_path / "e-samplers.png").read_bytes()[1:4] == b"PNG"
    printed = capsys.readouterr().out
    assert "released rule" in printed and "factor:3" in printed and "by 2 prompts; its figures on 2 others" in printed
    grid = held_out.evaluate(
        identity_folder, tiny_data, settings=dataclasses.replace(settings, block_sizes=(4, 8), every=True)
    )
    assert len(grid["generation"]) == 1 + 3 * 2 * 2 and "samplers" not in grid
    assert held_out_figures.samplers_plot(grid) is None


def test_settings_out_of_range_are_named():
    for name, value in (("sequences", 1), ("prompts", 0), ("bound_draws", 0), ("new_tokens", 1)):
        with pytest.raises(UserError, match=f"{name}: found {value}, expected at least"):
            EvaluationSettings(**{name: value})
    for changes, message in (
        ({"prompts": 40}, "prompts 40: expected at most 32"),
        ({"prompt_tokens": 300}, "prompt_tokens 300: expected at most the sequence length 256"),
        ({"thresholds": (0.5, 1.5)}, "threshold: found 1.5, expected 0 to 1"),
        ({"steps": (0,)}, "steps: found 0, expected at least 1"),
        ({"samplers": ("none",)}, "sampler: found 'none', expected one of factor"),
        ({"samplers": ("factor",), "prompts": 3}, "prompts: found 3 with samplers, expected at least 4"),
    ):
        with pytest.raises(UserError, match=message):
            EvaluationSettings(**changes)


def test_data_or_tasks_are_required(identity_folder, tmp_path, capsys):
    assert main.main(["evaluate", "--model", str(identity_folder), "--output", str(tmp_path / "x.json")]) == 2
    assert "found neither --data nor --tasks" in capsys.readouterr().err


def test_mistakes_are_named(identity_folder, tiny_data, tmp_path):
    output = tmp_path / "evaluation.json"
    with pytest.raises(UserError, match=r"index.json: not found"):
        held_out.run(identity_folder, data=tmp_path, output=output)
    with pytest.raises(UserError, match=r"config.json: not found"):
        held_out.run(tmp_path, data=tiny_data, output=output)
    other = shutil.copytree(identity_folder, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="found a tokenizer with sha256"):
        held_out.run(other, data=tiny_data, output=output)
    settings = EvaluationSettings(sequence_length_tokens=10**6)
    with pytest.raises(UserError, match="expected at least 2 x 1000000"):
        held_out.evaluate(identity_folder, tiny_data, settings=settings)
    assert not output.exists()


def test_mask_token_and_block_size_are_those_of_the_folder(identity_folder, tiny_data, tmp_path, monkeypatch):
    folder = shutil.copytree(identity_folder, tmp_path / "folder")
    names = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"mask_token": None}))
    (folder / "generation_config.json").write_text(json.dumps({"mask_token_id": 500, "block_size": 8}))
    asked = []

    def sweep(model, prompts, *, points, mask_id, **_):
        asked.append((mask_id, points[0].block_size))
        raise KeyboardInterrupt

    monkeypatch.setattr(held_out, "sweep", sweep)
    masked = []
    monkeypatch.setattr(held_out, "likelihoods", lambda *_, settings, mask_id, **__: masked.append((settings, mask_id)))
    with pytest.raises(KeyboardInterrupt):
        held_out.evaluate(folder, tiny_data, settings=dataclasses.replace(SMALL, block_size_tokens=None))
    assert asked == [(500, 8)]
    assert masked == [(SMALL, 500)]
