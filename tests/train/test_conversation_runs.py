"""Runs on conversations: exact resume, micro-batches and ranks, and both objectives."""

import json

import numpy as np
import pytest

from helpers.corpora import prepare_chats
from helpers.runs import launch, losses, records, settings, train
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.convert import export
from megatron_twotower.data.dataset import global_batch
from megatron_twotower.data.sources import open_training
from megatron_twotower.data.verify import verify

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "{{ '<unk>' if message.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
UNK = 0  # what ends an answer in these data; the tokenizer's EOS is another one
RUN = (
    "data.documents=respect",
    "train.steps=8",
    "schedule.warmup_steps=2",
    "train.validate_every_steps=4",
    "noise.time_per=block",
)
QUIET = ("train.validate_every_steps=0", "train.log_every_steps=1", "logging.wandb=disabled", "logging.console=false")


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("chats")
    words = ["alpha", "beta", "gamma", "delta", "count", "value", "index"]
    turns = [
        [
            {
                "role": role,
                "content": " ".join(words[(n + i) % 7] for i in range(1 + n % 4)) + (f" {n}" if not i else ""),
            }
            for i, role in enumerate(["user", "assistant"] * (1 + n % 2))
        ]
        for n in range(300)
    ]
    data = prepare_chats(
        folder, turns, template=TEMPLATE, tokenizer=tiny_data / "tokenizer", holdout_fraction=0.3, shard_tokens=1000
    )
    assert verify(str(data)) == []
    return data


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, chats, tiny_backbone):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train("tiny", *settings(chats, run, tiny_backbone, *RUN))
    return run


def test_only_answers_count(whole_run, chats, tiny_backbone):
    """What a step scored is part of what its sequences have to score; padding is none of it."""
    config = load_recipe("tiny", settings(chats, whole_run, tiny_backbone, *RUN))
    dataset = open_training(config)
    found = records(whole_run)
    for step in range(1, 9):
        batch = global_batch(dataset, first=8 * (step - 1), count=8)
        assert 0 < found[step]["scored_tokens"] <= int(batch.scored.sum()) < batch.tokens.numel() // 2
        assert not (batch.scored & batch.padding).any()
    facts = json.loads((whole_run / "provenance.json").read_text())["data"]["corpora"][""]
    assert facts["cut"] == int((np.diff(dataset.corpus.starts) > 32).sum()) > 0 and 0 < facts["padding"] < 1
    got = list(losses(whole_run).values())
    assert sum(got[-3:]) < sum(got[:3]), "eight steps must teach something"


def test_a_resumed_run_is_the_uninterrupted_run(whole_run, chats, tiny_backbone, tmp_path):
    run = tmp_path / "run"
    for steps in (4, 8):  # the rate is constant after the warm-up
        assert train("tiny", *settings(chats, run, tiny_backbone, *RUN, f"train.steps={steps}"))
    assert losses(run) == losses(whole_run)
    assert losses(run, "validation")[8] == losses(whole_run, "validation")[8]


def test_blocks_may_begin_with_answers(chats, tiny_data, tiny_backbone, tmp_path):
    words = (*RUN, "data.align_blocks=answer", "data.sequence_length_tokens=64")
    overrides = settings(chats, tmp_path / "whole", tiny_backbone, *words)
    assert train("tiny", *overrides)
    batch = global_batch(open_training(load_recipe("tiny", overrides)), first=0, count=8)
    begins = batch.scored & ~np.pad(batch.scored, ((0, 0), (1, 0)))[:, :-1]
    assert (begins.nonzero()[:, 1] % 8 == 0).all() and begins.sum() > 8
    for steps in (4, 8):
        assert train("tiny", *settings(chats, tmp_path / "run", tiny_backbone, *words, f"train.steps={steps}"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match="align_blocks: found None, expected answer, as the run has read so far"):
        train("tiny", *settings(chats, tmp_path / "run", tiny_backbone, *words[:-2], *words[-1:], "train.steps=9"))
    with pytest.raises(UserError, match=r"data\.align_blocks: found answer, but .* has no conversations"):
        train("tiny", *settings(tiny_data, tmp_path / "other", tiny_backbone, *words))


@pytest.mark.parametrize(
    "more",
    [
        ("noise.weighting=elbo",),
        pytest.param(("noise.draws_per_context=2", "noise.time_per=sequence"), marks=pytest.mark.slow),
    ],
)
def test_micro_batches_change_nothing(chats, tiny_backbone, tmp_path, more):
    """The loss and the norm of the gradient are those of the global batch, however it is cut."""
    for size in (1, 8):
        words = ("train.steps=2", "schedule.warmup_steps=1", f"data.micro_batch_size={size}", *more)
        assert train("tiny", *settings(chats, tmp_path / str(size), tiny_backbone, *RUN, *words))
    small, large = (records(tmp_path / str(size)) for size in (1, 8))
    for step in (1, 2):
        for key in ("loss", "grad_norm"):
            assert small[step][key] == pytest.approx(large[step][key], rel=1e-5), (step, key)
        assert small[step]["scored_tokens"] == large[step]["scored_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [(), ("parallel.tensor=2", "parallel.sequence=true"), ("parallel.expert=2",), ("parallel.context=2",)]
)
def test_two_ranks_give_the_losses_of_one(layout, whole_run, chats, tiny_backbone, tmp_path):
    launch(2, "tiny", *settings(chats, tmp_path / "run", tiny_backbone, *RUN, *layout))
    got, want = records(tmp_path / "run"), records(whole_run)
    for step in range(1, 9):
        assert got[step]["loss"] == pytest.approx(want[step]["loss"], rel=1e-4), step
        assert got[step]["scored_tokens"] == want[step]["scored_tokens"]


def test_a_backbone_is_tuned_on_answers_and_both_exports_end_them(whole_run, chats, tiny_backbone, tmp_path):
    words = ("data.sequence_length_tokens=32", "train.steps=2", "schedule.warmup_steps=1", *QUIET)
    overrides = settings(chats, tmp_path / "ar", tiny_backbone, *words)
    assert train("sft_ar", *overrides)
    found, batch = (
        records(tmp_path / "ar"),
        global_batch(open_training(load_recipe("sft_ar", overrides)), first=0, count=8),
    )
    same = batch.documents[:, 1:] == batch.documents[:, :-1]
    assert found[1]["scored_tokens"] == int((batch.scored[:, 1:] & same).sum())
    for name, run in (("backbone", tmp_path / "ar"), ("towers", whole_run)):
        export.export(run, tmp_path / name)
        said = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert UNK in said["eos_token_id"], "the end of an answer ends generation"
        assert (tmp_path / name / "chat_template.jinja").read_text() == TEMPLATE
