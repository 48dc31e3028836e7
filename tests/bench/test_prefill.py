"""The benchmark of reading a prompt, at the smallest size."""

import json

import torch

from helpers.modeling import random_ids, tiny_model
from megatron_twotower.bench import prefill
from megatron_twotower.cli.main import main
from megatron_twotower.config.recipes import recipes_folder

BYTES = recipes_folder() / "models" / "bytes"


def test_the_bytes_of_a_cache():
    """By hand, of ME*-M in float64: two states of Mamba, keys and values of 20 tokens."""
    cache = tiny_model().prefill(random_ids(3, 20))
    mamba = 3 * (3 * (32 + 2 * 16) + 4 * 8 * 8)
    attention = 2 * 3 * 2 * 20 * 16
    conv = next(state.conv for state in cache.context if getattr(state, "conv", None) is not None)
    assert conv.dtype == torch.float64
    assert prefill.cache_bytes(cache) == 8 * (2 * mamba + attention)


def test_every_case_is_measured(tmp_path, capsys, monkeypatch):
    # A new process takes seconds to start.
    monkeypatch.setattr(prefill.measure, "in_new_process", lambda work, *arguments, preload: work(*arguments))
    assert main(["bench", "prefill", "--model", str(BYTES), "--quick", "--output", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "prefill.json").read_text())["cases"]
    assert [(case["length"], case["chunk_size"]) for case in cases] == [(64, 32), (64, 0), (128, 32), (128, 0)]
    assert all(case["seconds"] > 0 and 0 < case["attention_share"] < 1 and case["cache_bytes"] > 0 for case in cases)
    assert "reading a prompt" in capsys.readouterr().out
