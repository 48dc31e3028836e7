"""The benchmark of a limit of experts at a very small size."""

import json

import pytest
import torch

from helpers.modeling import random_ids, tiny_model
from megatron_twotower.bench import pooling
from megatron_twotower.cli import main


def test_each_limit_is_kept_and_all_experts_are_no_limit():
    model, prompts = tiny_model(), random_ids(2, 8)
    few, every = model.config.num_experts_per_tok, model.config.n_routed_experts
    with torch.no_grad():
        rows = pooling.compare(
            model, prompts, options=pooling.PoolingOptions(limits=(few + 1,), new_tokens=8, rounds=1)
        )
    assert [row["limit"] for row in rows] == [few, few + 1, every]
    assert rows[0]["experts"] == few and all(few < row["experts"] <= row["limit"] for row in rows[1:])
    plain = [
        model.generate_mask_diffusion(ids, 8, confidence_threshold=0.8, eos_token_id=()) for ids in prompts.split(1)
    ]
    agreement = [pooling.text_quality(model, text, 8, text[0, 8:])["agreement"] for text in plain]
    assert rows[-1]["agreement"] == pytest.approx(sum(agreement) / 2)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_command_prints_and_writes(identity_folder, tiny_data, tmp_path, capsys):
    words = ["bench", "pooling", "--model", str(identity_folder), "--data", str(tiny_data), "--output", str(tmp_path)]
    assert main.main([*words, "--quick", "--threads", "1"]) == 0
    assert "experts, at most" in capsys.readouterr().out
    assert json.loads((tmp_path / "pooling.json").read_text())["prompts"] == 2
    assert main.main([*words, "--limits", "1"]) == 2
    assert "--limits: found 1, expected 2 to" in capsys.readouterr().err
