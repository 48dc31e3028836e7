"""Held-out answers of conversations: likelihoods and generated text against direct computations."""

import json

import pytest
import torch
from rich.console import Console

from helpers.corpora import prepare_chats
from megatron_twotower.common.errors import UserError
from megatron_twotower.data.shards import Corpus
from megatron_twotower.evaluate import answers
from megatron_twotower.evaluate.held_out import EvaluationSettings
from megatron_twotower.generate import engine

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
SETTINGS = EvaluationSettings(
    sequences=6, thresholds=(0.5,), samplers=("factor:2",), new_tokens=5, block_size_tokens=4, prompts=6
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("chats")
    words = ["alpha", "beta", "gamma", "delta", "count"]
    turns = [
        [
            {"role": "user", "content": f"{words[n % 5]} {n}"},
            {"role": "assistant", "content": f"{words[(n + 1) % 5]} " * (n % 3)},
            {"role": "user", "content": f"{words[n % 4]} {n}"},
            {"role": "assistant", "content": f"{words[(n + 2) % 5]} " * (1 + n % 4)},
        ]
        for n in range(30)
    ]
    return prepare_chats(folder, turns, template=TEMPLATE, tokenizer=tiny_data / "tokenizer", holdout_fraction=0.5)


def test_the_last_answers_are_scored_after_all_before_them(chats, two_tower_folder):
    corpus = Corpus.open(chats / "validation")
    pairs = answers.held_out_answers(corpus, 6)
    assert len(pairs) == 6
    model, tokenizer = engine.load(two_tower_folder)
    for context, answer in pairs:
        text = tokenizer.decode(context)
        assert text.count("</s>") == 1 and text.endswith("\n") and tokenizer.decode(answer).endswith("</s>")
    found = answers.evaluate(two_tower_folder, chats, settings=SETTINGS)
    nats = []
    for context, answer in pairs:
        logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        nats.append(-float(logits[torch.arange(len(answer)), answer].sum()))
    tokens = sum(len(answer) for _, answer in pairs)
    assert found["ar_loss"] == pytest.approx(sum(nats) / tokens, rel=1e-5)
    assert found["ar_loss_tokens"] == found["diffusion_bound_tokens"] == tokens
    assert found["diffusion_bound"] > 0 and found["conversations"] == 6
    ar, diffusion, sampled = found["answers"]
    assert (sampled["mode"], sampled["sampler"], sampled["confidence_threshold"]) == (
        "mask_diffusion",
        "factor:2",
        None,
    )
    assert (ar["mode"], ar["agreement"], ar["tokens_per_pass"], ar["exact_match"]) == ("ar", 1.0, 1.0, 0.0)
    assert diffusion["confidence_threshold"] == 0.5 and diffusion["tokens_per_pass"] > 0
    # Generated one by one and compared with the choices of the context tower.
    chosen = total = 0
    for context, _ in pairs:
        settings = engine.GenerationSettings(5, block_size=4, steps_per_block=4, confidence_threshold=0.5)
        output, _ = engine.generate_ids(
            model, torch.tensor([context]), mode="mask_diffusion", settings=settings, eos_id=model.eos_token_ids
        )
        choices = model(output).logits[0, len(context) - 1 : -1].argmax(-1)
        chosen += int((choices == output[0, len(context) :]).sum())
        total += output.shape[1] - len(context)
    assert (diffusion["agreement"], diffusion["new_tokens"]) == (pytest.approx(chosen / total), total)


def test_an_answer_is_exact_if_its_text_is_the_same_and_it_ends(chats, two_tower_folder, monkeypatch):
    model, tokenizer = engine.load(two_tower_folder)
    pairs = answers.held_out_answers(Corpus.open(chats / "validation"), 4)
    longest = max(len(answer) for _, answer in pairs)
    (eos,) = model.eos_token_ids
    order = sorted(range(4), key=lambda place: -len(pairs[place][0]))
    # Right; another token; right without its end; right, with something behind its end.
    written = [pairs[place][1] + [7] * (longest + 1 - len(pairs[place][1])) for place in order]
    written[1][0] = 7 if written[1][0] != 7 else 8
    written[2] = [each if each != eos else 7 for each in written[2]]
    call = answers.generate_ids

    def scripted(model, ids, **settings):
        _, stats = call(model, ids, **settings)
        return torch.cat([ids, torch.tensor(written)], dim=1), stats

    monkeypatch.setattr(answers, "generate_ids", scripted)
    settings = engine.GenerationSettings(max_new_tokens=2, block_size=4)
    found = answers.write_answers(model, tokenizer, pairs, mode="ar", settings=settings)
    assert found.exact == [True, False, False, True]
    row = found.row("ar", None)
    assert row["exact_match"] == 0.5 and row["exact_match_stderr"] == pytest.approx((0.25 / 3) ** 0.5)


def test_the_command_writes_and_prints_or_refuses(chats, tiny_data, two_tower_folder, tmp_path):
    assert answers.has_conversations(chats) and not answers.has_conversations(tiny_data)
    console = Console(record=True, width=120, file=(tmp_path / "log").open("w"))
    answers.run(two_tower_folder, data=chats, output=tmp_path / "out.json", settings=SETTINGS, console=console)
    text = console.export_text()
    assert "held-out answers" in text and "threshold 0.5" in text and "factor:2" in text and "exact %" in text
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["settings"].keys() == {
        *("sequences", "block_size_tokens", "bound_draws", "thresholds", "samplers", "new_tokens", "seed")
    }
    with pytest.raises(UserError, match=r"steps: found \(2,\) for conversations, which do not use it"):
        answers.evaluate(two_tower_folder, chats, settings=EvaluationSettings(steps=(2,)))
