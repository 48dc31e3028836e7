"""Complete runs of a blend.

Phases, kills inside a phase, damaged shards, and separate documents.
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from helpers.two_corpora import settings, write_two_corpora
from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.common.run_folder import checkpoint_folder
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.data import sources
from megatron_twotower.data.dataset import global_batch
from megatron_twotower.mcore import parallel
from megatron_twotower.train import run as train_run

CLI = [sys.executable, "-m", "megatron_twotower"]
LENGTH, BATCH = 32, 8


@pytest.fixture(scope="module")
def two_corpora(tmp_path_factory, tiny_data):
    return write_two_corpora(tmp_path_factory.mktemp("blend"), tokenizer=tiny_data / "tokenizer")


def train(*overrides):
    try:
        return train_run.run_training(load_recipe("tiny_phases", list(overrides)))
    finally:
        parallel.shutdown()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, two_corpora, tiny_backbone):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(*settings(two_corpora, run, tiny_backbone))
    return run


def figures(record):
    """The figures of a record that do not depend on the clock."""
    return {key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second", "memory_gib")}


def test_a_run_passes_through_its_phases(whole_run, records_of):
    records = records_of(whole_run)
    assert sorted(records) == list(range(1, 31))
    names = ["breadth"] * 11 + ["quality"] * 10 + ["short-blocks"] * 9
    assert [records[step]["phase"] for step in range(1, 31)] == names
    rates = [records[step]["learning_rate"] for step in range(1, 31)]
    assert rates[:3] == pytest.approx([5e-3 / 3, 1e-2 / 3, 5e-3])
    assert rates[7:11] == pytest.approx([5e-3, 1e-2 / 3, 5e-3 / 3, 0]), "it decays to the minimum, which is 0"
    assert rates[11:13] == pytest.approx([1.5e-3, 3e-3]) and rates[21:23] == pytest.approx([2.5e-3, 5e-3])
    assert sum(records[step]["loss"] for step in (28, 29, 30)) < sum(records[step]["loss"] for step in (1, 2, 3))
    facts = json.loads((whole_run / "provenance.json").read_text())
    assert facts["data"]["corpora"].keys() == {"numbers", "calls"}
    assert [phase["first"] for phase in facts["data"]["phases"]] == [0, 88, 168]


def test_it_logs_what_it_read_of_each_corpus(whole_run, records_of, two_corpora, tiny_backbone):
    config = load_recipe("tiny_phases", settings(two_corpora, whole_run, tiny_backbone))
    source = sources.open_training(config)
    for step, record in records_of(whole_run).items():
        first, later = min(step, 11), max(step - 11, 0)
        numbers, calls = (first * 3 / 4 + later / 5) * BATCH, (first / 4 + later * 4 / 5) * BATCH
        assert abs(record["tokens_by_corpus"]["numbers"] / LENGTH - numbers) <= 2
        assert abs(record["tokens_by_corpus"]["calls"] / LENGTH - calls) <= 2
        assert sum(record["tokens_by_corpus"].values()) == record["tokens"] == step * BATCH * LENGTH
        counted = source.sequences_before(step * BATCH)
        assert record["tokens_by_corpus"] == {name: count * LENGTH for name, count in counted.items()}


def assert_same(got, want):
    """Counts and names are equal, and floats to 1e-6.

    Last bits differ between processes (memory alignment).
    """
    assert got.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, dict):
            assert_same(got[key], value)
        else:
            assert got[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


@pytest.mark.slow
def test_a_run_killed_inside_a_phase_resumes_to_the_same_run(
    tmp_path, two_corpora, tiny_backbone, whole_run, records_of
):
    run = tmp_path / "run"
    arguments = ["train", "recipe=tiny_phases", *settings(two_corpora, run, tiny_backbone)]
    process = subprocess.Popen([*CLI, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    mark, deadline = checkpoint_folder(run, 15), time.monotonic() + 240
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert mark.exists() and process.returncode == -signal.SIGKILL, output[-3000:]
    assert not checkpoint_folder(run, 30).exists(), "killed inside a phase"
    assert train(*settings(two_corpora, run, tiny_backbone, "data.prefetch_workers=3"))
    for kind in ("train", "validation"):
        got, want = records_of(run, kind), records_of(whole_run, kind)
        assert got.keys() == want.keys()
        for step, record in want.items():
            assert_same(figures(got[step]), figures(record))


def test_a_run_resumes_only_with_the_data_it_has_read(tmp_path, two_corpora, tiny_backbone, records_of):
    run, short = tmp_path / "run", "phases=[{name: breadth, tokens: 512, warmup_tokens: 0}"
    common = settings(two_corpora, run, tiny_backbone, "schedule.warmup_steps=0", "train.validate_every_steps=0")
    assert train(*common, short + "]")
    longer = short + ",{name: quality, tokens: 256}]"
    with pytest.raises(UserError, match=r"shuffle: found windowed, expected full, as the run has read so far"):
        train(*common, longer, "data.shuffle=windowed")
    with pytest.raises(UserError, match=r"phases: found .*'calls': 4.*, expected .*'breadth', 'first': 0.*begun"):
        train(*common, "phases=[{name: quality, tokens: 768, warmup_tokens: 0}]")
    assert train(*common, longer), "what is to come may change"
    assert [record["phase"] for record in records_of(run).values()] == ["breadth", "breadth", "quality"]


def test_a_run_with_phases_resumes_only_with_its_batch_size(tmp_path, two_corpora, tiny_backbone):
    short = [
        "phases=[{name: breadth, tokens: 512, warmup_tokens: 0}]",
        "schedule.warmup_steps=0",
        "train.validate_every_steps=0",
    ]
    arguments = settings(two_corpora, tmp_path / "run", tiny_backbone, *short)
    assert train(*arguments)
    with pytest.raises(UserError, match=r"data.global_batch_size: found 4, expected the one of the checkpoint, 8"):
        train(*arguments, "data.global_batch_size=4")


def damaged(two_corpora, folder):
    """Copy the corpora and flip one bit of one shard."""
    shutil.copytree(two_corpora, folder)
    shard = sorted((folder / "numbers" / "train").glob("*.tar"))[1]
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    return shard


def test_a_damaged_shard_stops_a_run_in_one_line(tmp_path, two_corpora, tiny_backbone, capsys):
    shard = damaged(two_corpora, tmp_path / "data")
    arguments = settings(tmp_path / "data", tmp_path / "run", tiny_backbone)
    assert main.main(["train", "recipe=tiny_phases", *arguments]) == 2
    message = capsys.readouterr().err
    assert str(shard) in message and "sha256" in message and message.count("\n") == 1


def test_a_damaged_shard_is_skipped_and_counted(tmp_path, two_corpora, tiny_backbone, records_of):
    damaged(two_corpora, tmp_path / "data")
    extra = ["data.damaged_shards=skip", "train.validate_every_steps=0"]
    assert train(*settings(tmp_path / "data", tmp_path / "run", tiny_backbone, *extra))
    records = records_of(tmp_path / "run")
    skipped = sum(record["skipped_sequences"] for record in records.values())
    assert 0 < skipped < 30 * BATCH
    config = load_recipe("tiny_phases", settings(tmp_path / "data", tmp_path / "run", tiny_backbone, *extra))
    counted = sum(int(batch.padding.all(1).sum()) for batch in read(config) if batch.padding is not None)
    assert counted == skipped
    assert all(record["loss"] < 100 for record in records.values())


def test_a_run_with_only_damaged_shards_stops(tmp_path, two_corpora, tiny_backbone):
    shutil.copytree(two_corpora, tmp_path / "data")
    for shard in (tmp_path / "data").glob("*/train/*.tar"):
        shard.write_bytes(shard.read_bytes()[:-512])
    extra = ["data.damaged_shards=skip", "train.validate_every_steps=0"]
    with pytest.raises(UserError, match="step 1: all 8 sequences since the last record are in damaged shards"):
        train(*settings(tmp_path / "data", tmp_path / "run", tiny_backbone, *extra))


@pytest.mark.slow
def test_the_number_of_ranks_may_change_within_a_run(tmp_path, two_corpora, tiny_backbone, records_of):
    """Two ranks train past a damaged shard, and one rank resumes.

    The result is the run of one rank.
    """
    damaged(two_corpora, tmp_path / "data")
    common = ["data.damaged_shards=skip", "train.validate_every_steps=0", "schedule.warmup_steps=0"]
    first, second = "{name: breadth, tokens: 1024, warmup_tokens: 0}", "{name: quality, tokens: 1024, warmup_tokens: 0}"

    def arguments(run, *phases):
        return [*settings(tmp_path / "data", tmp_path / run, tiny_backbone, *common), f"phases=[{','.join(phases)}]"]

    assert train(*arguments("one", first, second))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    two = ["megatron_twotower", "train", "recipe=tiny_phases", *arguments("two", first), "data.micro_batch_size=1"]
    subprocess.run([*torchrun, *two], check=True, timeout=300, capture_output=True)
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["ranks"] == 2
    assert train(*arguments("two", first, second), "data.micro_batch_size=4", "data.prefetch_workers=3")
    got, want = records_of(tmp_path / "two"), records_of(tmp_path / "one")
    assert sorted(got) == list(range(1, 9)) and sum(record["skipped_sequences"] for record in want.values()) > 0
    for step, record in want.items():
        for key in ("skipped_sequences", "scored_tokens", "tokens_by_corpus", "phase"):
            assert got[step][key] == record[key], (step, key)
        assert got[step]["loss"] == pytest.approx(record["loss"], rel=1e-5), step


def read(config):
    """The global batches of a run."""
    source = sources.open_training(config)
    return [global_batch(source, first=step * BATCH, count=BATCH) for step in range(config.train.steps)]


@pytest.mark.slow
def test_documents_are_kept_apart_through_all_phases(tmp_path, two_corpora, tiny_backbone, records_of):
    extra = ["data.documents=respect", "train.validation_sequences=4"]
    assert train(*settings(two_corpora, tmp_path / "run", tiny_backbone, *extra))
    assert all(record["loss"] < 100 for record in records_of(tmp_path / "run").values())
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert all(0 < corpus["padding"] < 0.5 for corpus in facts["data"]["corpora"].values())
