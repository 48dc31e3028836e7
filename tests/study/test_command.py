"""`twotower study`: it trains what is missing, shows what is done, stops at a failure."""

import json

import pytest
import yaml

from megatron_twotower.cli.main import main
from megatron_twotower.study import writing


@pytest.fixture(scope="module")
def study_file(tiny_data, tiny_backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("studies") / "pair.yaml"
    content = {
        "question": "Are five steps better than two?",
        "recipe": "tiny",
        "overrides": [f"data.folder={tiny_data}", "train.steps=5", "schedule.warmup_steps=1"],
        "sizes": {"tiny": [f"init.backbone={tiny_backbone}"]},
        "seeds": [1],
        "reference": "plain",
        "arms": {"plain": {"overrides": [], "shares": [0.4, 1]}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_study(study_file, tmp_path, capsys, monkeypatch):
    """Both trainings are done side by side. A second call trains nothing."""
    arguments = ["study", str(study_file), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--workers", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Are five steps better than two?" in shown
    result = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [(row["arm"], row["share"], row["loss"]["count"]) for row in result["rows"]] == [
        ("plain", 0.4, 1),
        ("plain", 1, 1),
    ]
    assert result["rows"][0]["difference"]["value"] == pytest.approx(
        result["rows"][0]["loss"]["value"] - result["rows"][1]["loss"]["value"]
    )
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")
    folders = [tmp_path / "out" / "tiny" / f"plain-{share}" / "seed-1" for share in ("0.4", "1")]
    before = [(folder / "training.log").read_text() for folder in folders]
    assert main(arguments) == 0
    assert [(folder / "training.log").read_text() for folder in folders] == before
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    assert main(["study", str(study_file), "--output", str(moved), "--show"]) == 0
    moved.rename(tmp_path / "out")

    # The denoisers write, once. Without `--generate` what they wrote is shown.
    monkeypatch.setattr(writing, "PROMPTS", 2)
    monkeypatch.setattr(writing, "NEW_TOKENS", 8)
    monkeypatch.setattr(writing, "PROMPT_TOKENS", 8)
    capsys.readouterr()
    assert main([*arguments, "--generate"]) == 0
    assert "Tokens per pass at equal agreement with AR" in capsys.readouterr().out
    measured = folders[0] / "writing.json"
    assert [row["confidence_threshold"] for row in json.loads(measured.read_text())["curve"]] == [*writing.THRESHOLDS]
    assert sorted(path.name for path in folders[0].iterdir() if path.is_dir()) == ["checkpoints"]
    when = measured.stat().st_mtime_ns
    assert main([*arguments, "--generate"]) == 0
    assert measured.stat().st_mtime_ns == when
    assert main([*arguments, "--show"]) == 0
    assert "Tokens per pass at equal agreement with AR" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [each["share"] for each in result["tokens_per_pass"]] == [0.4, 1]

    # A training of a version that did not have a key yet had its default.
    config = folders[0] / "config.yaml"
    kept = config.read_text()
    assert "  distance_decay: 0.0\n" in kept
    config.write_text(kept.replace("  distance_decay: 0.0\n", ""))
    assert main(["study", str(study_file), "--output", str(tmp_path / "out"), "--show"]) == 0
    config.write_text(kept)

    # A training whose settings the study no longer has is not taken for one of its own.
    changed = study_file.read_text().replace("schedule.warmup_steps=1", "schedule.warmup_steps=2")
    other = tmp_path / "other.yaml"
    other.write_text(changed)
    assert main(["study", str(other), "--output", str(tmp_path / "out")]) == 2
    assert "found a training with other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_that_fails(study_file, tmp_path, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(study_file.read_text().replace("train.steps=5", "train.validation_sequences=100000000"))
    assert main(["study", str(wrong), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "a training ended with status 2, it said: twotower: " in message and "100000000" in message.replace(",", "")


def test_mistakes(study_file, tmp_path, capsys):
    arguments = ["study", str(study_file), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--sizes", "huge"]) == 2
    assert "--sizes: found huge, expected one of tiny" in capsys.readouterr().err
    assert main([*arguments, "--show"]) == 2
    assert "no training of" in capsys.readouterr().err
    assert main([*arguments, "--show", "--workers", "2"]) == 2
    assert "--workers: found with --show" in capsys.readouterr().err
