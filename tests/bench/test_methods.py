"""The benchmark of methods at a very small size: drafts, passes and what it counts as exact."""

import io
import json

import pytest
import torch
from rich.console import Console

from helpers.modeling import VOCABULARY, random_ids, tiny_model
from megatron_twotower.bench import methods as bench
from megatron_twotower.bench.methods import QUICK, MethodTotals
from megatron_twotower.cli.main import main

NEW = 14


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def small():
    return tiny_model("M*", seed=5)


def greedy(model, ids, count):
    """Brute force: a complete pass for each token."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def drafters(model, ids):
    """Drafts of several lengths that are right, wrong, right for a while, or none."""
    whole = greedy(model, ids, NEW + 8)

    def right(text):
        return whole[:, text.shape[1] : text.shape[1] + 5]

    def half(text):
        draft = right(text).clone()
        draft[:, 2:] = (draft[:, 2:] + 1) % VOCABULARY
        return draft

    def uneven(text):
        return right(text)[:, : text.shape[1] % 4]

    return {
        "none": lambda text: text[:, :0],
        "right": right,
        "wrong": lambda text: (right(text) + 1) % VOCABULARY,
        "half": half,
        "uneven": uneven,
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "passes"), [("none", NEW), ("right", 3), ("wrong", NEW), ("half", 5), ("uneven", None)]
)
@pytest.mark.parametrize("length", [1, 7])
def test_text_with_drafts_is_greedy_text(model, name, passes, length):
    ids = random_ids(1, length)
    drafter, expected = drafters(model, ids)[name], greedy(model, ids, NEW)
    with bench.counted_passes([model.context_tower]) as count:
        found = bench.verified(model, ids, NEW, drafter)
    assert torch.equal(found, expected)
    # Of drafts that are right for two tokens, a pass adds three; of those that are right for five,
    # six. A prompt of one token leaves nothing to read before the first pass.
    assert passes is None or count[0] == passes + (length > 1)


@torch.no_grad()
def test_a_smaller_model_drafts_its_own_greedy_text_after_any_text(small):
    drafter, text = bench.model_drafter(small, 4), random_ids(1, 5)
    for added in (2, 1, 3, 9):
        text = torch.cat([text, random_ids(1, added, seed=added)], dim=1)
        assert torch.equal(drafter(text), greedy(small, text, 4)[:, text.shape[1] :])


def test_prompt_lookup_drafts_what_followed_the_last_two_tokens():
    text = torch.tensor([[7, 8, 1, 2, 3, 7, 9, 7, 8]])
    assert bench.lookup_drafter(4, 99)(text).tolist() == [[1, 2, 3, 7]]
    assert bench.lookup_drafter(2, 99)(text).tolist() == [[1, 2]]
    assert bench.lookup_drafter(4, 99)(torch.tensor([[7, 8, 9, 1, 8]])).tolist() == [[9, 1, 8]]
    assert bench.lookup_drafter(4, 99)(torch.tensor([[7, 8, 9]])).shape == (1, 0)


def test_figures_are_means_over_prompts():
    same = {"same_as_ar": 1.0, "agreement": 1.0, "repeated_4": 0.0}
    other = {"same_as_ar": 0.5, "agreement": 0.5, "repeated_4": 0.5}
    row = MethodTotals([1.0, 3.0], [10, 5], [same, other]).row("a", 20, [2.0, 3.0])
    assert (row["tokens_per_second"], row["tokens_per_pass"], row["speedup"]) == (10.0, 3.0, 1.5)
    assert row["speedup_stderr"] == pytest.approx(0.5) and row["tokens_per_pass_stderr"] == pytest.approx(1.0)
    assert (row["exact_texts"], row["texts"], row["agreement"]) == (1, 2, 0.75)


def test_it_measures_every_method_and_writes_what_it_prints(two_tower_folder, tiny_data, tmp_path):
    console = Console(file=io.StringIO(), width=170)
    bench.run(
        tmp_path,
        model=two_tower_folder,
        data=tiny_data,
        draft=two_tower_folder,
        options=QUICK,
        threads=1,
        console=console,
    )
    rows = {row["method"]: row for row in json.loads((tmp_path / "methods.json").read_text())["rows"]}
    exact = ["AR", "AR, transformers", "prompt lookup", "smaller model drafts", "denoiser drafts"]
    assert list(rows) == [*exact, "mask diffusion, 0.8"]
    for name in exact:
        assert (rows[name]["exact_texts"], rows[name]["texts"], rows[name]["agreement"]) == (2, 2, 1.0), name
    assert rows["AR"]["tokens_per_pass"] == rows["AR, transformers"]["tokens_per_pass"] == rows["AR"]["speedup"] == 1
    # The drafts of the context tower itself are all accepted: 12 tokens in passes of 5, 5 and 2.
    assert rows["smaller model drafts"]["tokens_per_pass"] > 1
    assert rows["mask diffusion, 0.8"]["exact_texts"] == 0 and rows["mask diffusion, 0.8"]["agreement"] < 1
    for row in rows.values():
        assert f"{row['tokens_per_second']:,.0f}" in console.file.getvalue()


def test_the_command(two_tower_folder, tiny_data, tmp_path, capsys):
    words = ["bench", "methods", "--model", str(two_tower_folder), "--data", str(tiny_data), "--output", str(tmp_path)]
    assert main([*words, "--quick", "--threads", "1"]) == 0
    rows = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert "smaller model drafts" not in [row["method"] for row in rows]
    assert main([*words, "--draft-tokens", "3"]) == 2
    assert "--draft-tokens: found with no --draft" in capsys.readouterr().err
