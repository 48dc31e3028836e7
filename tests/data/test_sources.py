"""What a configuration opens and refuses, and what may change when a run resumes."""

import copy
import json
import logging
import shutil

import pytest
import torch

from helpers.two_corpora import settings, write_two_corpora
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.context_split import COMPLETE
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.data import sources
from megatron_twotower.data.dataset import SequenceDataset, batches, global_batch
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def two_corpora(tmp_path_factory, tiny_data):
    return write_two_corpora(tmp_path_factory.mktemp("blend"), tokenizer=tiny_data / "tokenizer")


def test_ranks_that_share_sequences_read_all_of_them_if_damaged_shards_are_skipped(two_corpora, tiny_backbone):
    parts = (slice(0, 4), slice(12, 16))
    for damaged, expected in (("stop", parts), ("skip", COMPLETE)):
        source = sources.open_training(recipe(two_corpora, tiny_backbone, f"data.damaged_shards={damaged}"))
        read = sources.reading_only(source, parts)
        assert all(dataset.stretches == expected for dataset in read.datasets.values())
        assert all(dataset.stretches == COMPLETE for dataset in source.datasets.values())


def recipe(corpora, backbone, *extra):
    return load_recipe("tiny_phases", settings(corpora, "nowhere", backbone, *extra))


def test_one_corpus_is_read_without_a_blend(tiny_data):
    config = load_recipe("tiny_ar", [f"data.folder={tiny_data}"])
    source = sources.open_training(config)
    assert isinstance(source, SequenceDataset) and source.number == 0
    summary = sources.data_summary(config, source)
    assert list(summary["corpora"]) == [""] and summary["phases"] == []
    batch = global_batch(source, first=0, count=6)
    assert batch.corpora is None and batch.documents is None
    assert sources.tokenizer_folder(config) == tiny_data / "tokenizer"


def test_a_blend_is_opened_with_the_choices_of_the_recipe(two_corpora, tiny_backbone):
    config = recipe(
        two_corpora,
        tiny_backbone,
        "data.documents=respect",
        "data.shuffle=windowed",
        "data.shuffle_run_tokens=100",
        "data.damaged_shards=skip",
    )
    source = sources.open_training(config)
    assert list(source.datasets) == ["numbers", "calls"]
    calls = source.datasets["calls"]
    assert (calls.number, calls.packing.alignment, calls.skip_damaged) == (1, 16, True)
    assert (calls.shuffle.kind, calls.shuffle.run, calls.shuffle.runs) == ("windowed", 4, 32)
    assert sources.tokenizer_folder(config) == two_corpora / "numbers" / "tokenizer"
    other = recipe(two_corpora, tiny_backbone, "data.folder=elsewhere")
    with pytest.raises(UserError, match=r"elsewhere/numbers/train/index.json: not found"):
        sources.open_training(other)


def test_validation_has_the_proportions_of_the_whole_run(two_corpora, tiny_backbone):
    source = sources.open_validation(recipe(two_corpora, tiny_backbone), 8)
    # 11 steps of 3 to 1, then 19 of 1 to 4.
    share = (11 * 0.75 + 19 * 0.2) / 30
    assert abs(source.sequences_before(8)["numbers"] - 8 * share) < 1
    held_out = global_batch(source, first=0, count=8)
    assert len(set(zip(held_out.corpora.tolist(), held_out.samples.tolist(), strict=True))) == 8
    assert "validation" in str(source.datasets["calls"].corpus.folder)


def test_a_recipe_that_does_not_fit_the_blend_is_refused(tmp_path, two_corpora, tiny_backbone):
    common = settings(two_corpora, tmp_path / "run", tiny_backbone)
    with pytest.raises(UserError, match="found the mixtures breadth, quality, expected depth"):
        sources.open_training(load_recipe("tiny_phases", [*common, "phases.0.mixture=depth"]))
    with pytest.raises(UserError, match="expected phases that name them"):
        sources.open_training(load_recipe("tiny_phases", [*common, "phases=[]", "train.steps=30"]))
    with pytest.raises(UserError, match=r"train.validation_sequences: found 5000, expected at most the .* held out of"):
        sources.open_validation(load_recipe("tiny_phases", common), 5000)
    assert not (tmp_path / "run").exists()


def test_a_corpus_of_another_tokenizer_is_named(tmp_path, two_corpora, tiny_backbone):
    train_tokenizer(["1 2 3 4"], vocab_size=300, output=tmp_path / "tokenizer")
    prepare([str(two_corpora / "texts" / "calls")], tokenizer=tmp_path / "tokenizer", output=tmp_path / "other")
    (tmp_path / "blend.yaml").write_text(
        f"corpora:\n  numbers: {{folder: {two_corpora / 'numbers'}}}\n  other: {{folder: other}}\n"
        "mixtures:\n  all: {numbers: 1, other: 1}\n"
    )
    config = load_recipe(
        "tiny_phases", [*settings(tmp_path, tmp_path / "run", tiny_backbone), "phases=[]", "train.steps=30"]
    )
    with pytest.raises(UserError, match=r"other/train: found tokens of tokenizer \w{12}, expected those of .*numbers"):
        sources.open_training(config)


def test_older_data_is_read_with_a_word_where_its_ids_may_differ(tiny_data, tiny_backbone, tmp_path, caplog):
    """An index of an older version does not say how ids were made; its fingerprint still counts."""
    data, backbone = shutil.copytree(tiny_data, tmp_path / "data"), shutil.copytree(tiny_backbone, tmp_path / "hf")
    for file in (tiny_data / "tokenizer").iterdir():
        shutil.copyfile(file, backbone / file.name)
    config = load_recipe("tiny", [f"data.folder={data}", f"init.backbone={backbone}"])
    named = json.loads((backbone / "tokenizer_config.json").read_text())

    def warnings(tokenizer_class, exact):
        (backbone / "tokenizer_config.json").write_text(json.dumps(named | {"tokenizer_class": tokenizer_class}))
        index = json.loads((data / "train" / "index.json").read_text()) | {"exact_ids": exact}
        (data / "train" / "index.json").write_text(json.dumps(index))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(sources.open_training(config))
        return [record.getMessage() for record in caplog.records]

    assert warnings("TokenizersBackend", False) == warnings("Qwen2Tokenizer", True) == []
    (line,) = warnings("Qwen2Tokenizer", False)
    assert line.startswith(f"{data}: prepared by an older version with tokenizer_class Qwen2Tokenizer")
    assert "twotower data verify" in line


# --- resuming ---


def test_later_phases_may_change_and_what_was_read_may_not(two_corpora, tiny_backbone):
    config = recipe(two_corpora, tiny_backbone)
    expected = sources.data_summary(config, sources.open_training(config))

    def check(cursor, change):
        found = copy.deepcopy(expected)
        change(found)
        sources.check_unchanged(found, expected, cursor=cursor)

    check(240, lambda found: None)
    check(88, lambda found: found["phases"].pop())
    check(88, lambda found: found["phases"][1]["weights"].update(calls=9.0))
    with pytest.raises(
        UserError, match=r"phases: found .*9.0.*, expected .*'quality', 'first': 88.*: sequence 89 is past"
    ):
        check(89, lambda found: found["phases"][1]["weights"].update(calls=9.0))
    with pytest.raises(UserError, match=r"phases: found None, expected .*'short-blocks'"):
        check(240, lambda found: found["phases"].pop())
    with pytest.raises(UserError, match=r"seed: found 5, expected 1234, as the run has read so far"):
        check(1, lambda found: found["order"].update(seed=5))
    with pytest.raises(
        UserError, match=r"phases: found .*'quality', 'first': 40.*, expected None: sequence 80 is past"
    ):
        check(80, lambda found: found["phases"][1].update(first=40))  # part of the first phase would be the second
    with pytest.raises(UserError, match=r"calls/train: found tokens 9, expected \d+, as the run has read so far"):
        check(1, lambda found: found["corpora"]["calls"].update(tokens=9))
    with pytest.raises(UserError, match=r"calls: found place in the blend file None, expected 1, as the run has"):
        check(1, lambda found: found["corpora"].pop("calls"))
    with pytest.raises(UserError, match=r"calls/train: found shards of sha256 0, expected \w{64}, as the run has read"):
        check(1, lambda found: found["corpora"]["calls"].update(sha256="0"))
    check(0, lambda found: found["corpora"]["calls"].update(tokens=9))


def test_corpora_that_changed_places_in_the_blend_file_are_refused(tmp_path, two_corpora, tiny_backbone):
    """The place of a corpus keys its order and noise: another place would repeat sequences."""
    config = recipe(two_corpora, tiny_backbone)
    expected = sources.data_summary(config, sources.open_training(config))
    (tmp_path / "blend.yaml").write_text(
        f"corpora:\n  calls: {{folder: {two_corpora}/calls}}\n  numbers: {{folder: {two_corpora}/numbers}}\n"
        "mixtures:\n  breadth: {numbers: 3, calls: 1}\n  quality: {numbers: 1, calls: 4}\n"
    )
    other = recipe(tmp_path, tiny_backbone)
    found = sources.data_summary(other, sources.open_training(other))
    with pytest.raises(UserError, match="numbers/train: found place in the blend file 1, expected 0"):
        sources.check_unchanged(found, expected, cursor=1)


# --- from URLs ---


def test_corpora_at_urls_are_read_like_local_ones(tmp_path, two_corpora, tiny_backbone, monkeypatch):
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "blend.yaml").write_text(
        f'corpora:\n  numbers: {{folder: "pipe:cat {two_corpora}/numbers/{{file}}"}}\n'
        f"  calls: {{folder: {two_corpora}/calls}}\n"
        "mixtures:\n  breadth: {numbers: 3, calls: 1}\n  quality: {numbers: 1, calls: 4}\n"
    )
    local, remote = (sources.open_training(recipe(folder, tiny_backbone)) for folder in (two_corpora, tmp_path))
    sizes = {"cursor": 80, "global_batch_size": 8, "micro_batch_size": 4, "rank": 0, "world": 1, "workers": 3}
    for (one, first), (two, second), _ in zip(
        batches(local, **sizes), batches(remote, **sizes), range(12), strict=False
    ):
        assert first == second
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.samples, b.samples)
    assert list((tmp_path / "cache").rglob("*")), "shards were fetched"
