"""Checkpoints: any layout reads any other, damage is named, and incomplete ones are never used."""

import json
import os
import shutil
import signal

import pytest

from helpers.runs import losses, records, settings, train_arguments
from megatron_twotower.bench import ranks
from megatron_twotower.checkpoint import files
from megatron_twotower.cli.main import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import load_recipe
from megatron_twotower.convert import hf_folder
from megatron_twotower.data.sources import data_summary, open_training
from megatron_twotower.train import checkpoints

# The schedule does not depend on the number of steps, so a run can be continued.
PLAIN = [
    "schedule.kind=constant",
    "schedule.warmup_steps=0",
    "optimizer.learning_rate=1e-3",
    "train.validate_every_steps=0",
    "train.checkpoint_every_steps=0",
]


def train(count, arguments, logs):
    job = ranks.start(count, arguments, logs=logs)
    try:
        assert set(job.wait(400)) == {0}, job.output()
    finally:
        job.kill()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_data, tiny_backbone):
    """An uninterrupted run of sixteen steps on one rank, with a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("whole")
    extra = [*PLAIN, "train.steps=16", "train.checkpoint_every_steps=2", "train.keep_checkpoints=99"]
    train(1, train_arguments(tiny_data, folder / "run", tiny_backbone, *extra), folder / "logs")
    return folder / "run"


# Each layout resumes from the checkpoint of the previous one and trains two steps.
LAYOUTS = (
    (1, []),
    (2, ["optimizer.distributed=true"]),
    (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    (2, ["parallel.pipeline=2", "parallel.pipeline_layers=[2,3]", "optimizer.distributed=true"]),
    (2, ["parallel.expert=2", "optimizer.distributed=true"]),
    (2, ["parallel.context=2", "optimizer.distributed=true"]),
    (2, ["parallel.tensor=2", "parallel.sequence=true", "optimizer.distributed=true", "train.checkpoint_async=false"]),
    (1, ["optimizer.distributed=true"]),
)


def test_any_layout_resumes_from_any_other(tmp_path, tiny_data, tiny_backbone, whole_run):
    run = tmp_path / "run"
    for number, (count, layout) in enumerate(LAYOUTS, start=1):
        extra = [*PLAIN, *layout, f"train.steps={2 * number}", "train.ledger=true"]
        train(count, train_arguments(tiny_data, run, tiny_backbone, *extra), tmp_path / "logs")
    got, want = records(run), records(whole_run)
    assert sorted(got) == sorted(want) == list(range(1, 17))
    for step, record in want.items():
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
            assert got[step][key] == pytest.approx(record[key], rel=tolerance), (step, key)
        assert got[step]["scored_tokens"] == record["scored_tokens"], "the same samples and noise"


FOUR = {
    "pipeline, tensor": [
        "parallel.pipeline=2",
        "parallel.pipeline_layers=[3,2]",
        "parallel.tensor=2",
        "parallel.sequence=true",
    ],
    "tensor, expert": ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2", "parallel.expert_tensor=1"],
    "context, tensor, distributed": [
        "parallel.context=2",
        "parallel.tensor=2",
        "parallel.sequence=true",
        "optimizer.distributed=true",
    ],
    "expert, distributed": ["parallel.expert=4", "optimizer.distributed=true", "data.micro_batch_size=1"],
    "data, distributed": ["optimizer.distributed=true", "data.micro_batch_size=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("first", FOUR)
@pytest.mark.parametrize("second", FOUR)
def test_four_ranks_resume_from_four_others(first, second, tmp_path, tiny_data, tiny_backbone, whole_run):
    run = tmp_path / "run"
    for steps, layout in ((3, first), (8, second)):
        extra = [*PLAIN, *FOUR[layout], f"train.steps={steps}"]
        train(4, train_arguments(tiny_data, run, tiny_backbone, *extra), tmp_path / "logs")
    got, want = losses(run), losses(whole_run)
    assert sorted(got) == list(range(1, 9))
    assert all(got[step] == pytest.approx(want[step], rel=1e-5) for step in got)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["optimizer.distributed=true", "train.checkpoint_async=false"]])
def test_bf16_resumes_bit_for_bit(layout, tmp_path, tiny_data, tiny_backbone):
    """The fp32 weights that Adam updates are stored besides those of the model."""
    extra = [*PLAIN, *layout, "train.precision=bf16", "train.steps=6"]
    for name, stops in (("whole", (6,)), ("parts", (3, 6))):
        for steps in stops:
            arguments = train_arguments(tiny_data, tmp_path / name, tiny_backbone, *extra, f"train.steps={steps}")
            train(2, arguments, tmp_path / "logs")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [[], ["optimizer.distributed=true"], ["parallel.tensor=2", "parallel.sequence=true"]]
)
def test_two_ranks_change_their_precision(layout, tmp_path, tiny_data, tiny_backbone, whole_run):
    """What is exact about it is in tests/train/test_precision_changes.py, on one rank."""
    for steps, precision in ((2, "fp32"), (4, "bf16"), (6, "fp32")):
        extra = [*PLAIN, *layout, f"train.precision={precision}", f"train.steps={steps}"]
        train(2, train_arguments(tiny_data, tmp_path / "run", tiny_backbone, *extra), tmp_path / "logs")
    got, want = losses(tmp_path / "run"), losses(whole_run)
    assert sorted(got) == list(range(1, 7))
    assert all(got[step] == pytest.approx(want[step], rel=0.03) for step in got)


def test_the_newest_checkpoints_and_those_of_every_third_step_stay(tmp_path, tiny_data, tiny_backbone):
    run = tmp_path / "run"
    extra = [
        "train.steps=7",
        "train.checkpoint_every_steps=1",
        "train.keep_every_steps=3",
        "train.keep_checkpoints=2",
        "train.validate_every_steps=0",
    ]
    assert main(train_arguments(tiny_data, run, tiny_backbone, *extra)) == 0
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [f"step-{step:08d}" for step in (3, 6, 7)]
    assert [files.damaged(path) for path in files.find_checkpoints(run)] == [None] * 3
    saved = records(run, "checkpoint")
    assert all(0 < each["stall_seconds"] < 60 and 0 < each["write_seconds"] < 60 for each in saved.values())
    assert saved[7]["saved_step"] == 7 and saved[7]["gib"] > 0


def test_shards_of_all_ranks_are_compared_at_the_first_save_of_a_process(
    tmp_path, tiny_data, tiny_backbone, monkeypatch
):
    """Rank 0 gathers and compares them, which takes seconds on a thousand ranks."""
    # Not above: processes that start with this file must run `megatron_twotower.mcore` first.
    from megatron.core.dist_checkpointing import state_dict_utils

    calls, validate = [], state_dict_utils.validate_sharding_integrity
    monkeypatch.setattr(
        state_dict_utils, "validate_sharding_integrity", lambda *each, **more: calls.append(validate(*each, **more))
    )
    extra = [*PLAIN, "train.steps=3", "train.checkpoint_every_steps=1", "train.checkpoint_async=false"]
    assert main(train_arguments(tiny_data, tmp_path, tiny_backbone, *extra)) == 0
    assert len(records(tmp_path, "checkpoint")) == 3 and len(calls) == 1


@pytest.fixture
def copied(tmp_path, whole_run):
    """A run with a few checkpoints, to damage."""
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("__0_0.distcp", flip, "found the checksum"),
        ("__0_0.distcp", truncate, "bytes, expected"),
        ("__0_0.distcp", os.remove, "missing"),
        (".metadata", flip, "found the checksum"),
        ("common.pt", flip, "found the checksum"),
        ("state.json", truncate, "not a checkpoint"),
    ],
)
def test_a_damaged_file_is_named(name, damage, told, copied, tmp_path, tiny_data, tiny_backbone, capsys):
    newest = files.find_checkpoints(copied)[-1]
    damage(newest / name)
    assert main(train_arguments(tiny_data, copied, tiny_backbone, *PLAIN, "train.steps=16")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{newest / name}: " in said and told in said
    assert "train.on_damaged_checkpoint=previous" in said


def test_a_changed_number_in_the_state_is_noticed(copied):
    newest = files.find_checkpoints(copied)[-1]
    file = newest / "state.json"
    file.write_text(file.read_text().replace('"cursor": 128', '"cursor": 104'))
    assert "damaged" in files.damaged(newest)


def test_the_previous_checkpoint_is_used_on_request(copied, whole_run, tiny_data, tiny_backbone):
    newest = files.find_checkpoints(copied)[-1]
    flip(newest / "__0_0.distcp")
    extra = [*PLAIN, "train.steps=16", "train.on_damaged_checkpoint=previous"]
    assert main(train_arguments(tiny_data, copied, tiny_backbone, *extra)) == 0
    assert losses(copied) == losses(whole_run)
    assert files.damaged(newest) is None, "written again"
    assert newest.with_name(f"{newest.name}.damaged").is_dir(), "kept for inspection"


def contents(run):
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("then", ["all damaged", "set aside", "removed"])
def test_a_run_never_starts_anew_over_an_earlier_one(then, copied, tiny_data, tiny_backbone, capsys):
    for folder in files.find_checkpoints(copied)[:-2]:
        shutil.rmtree(folder)
    for folder in files.find_checkpoints(copied):
        flip(folder / "__0_0.distcp")
        if then == "set aside":
            folder.rename(f"{folder}.damaged")
        elif then == "removed":
            shutil.rmtree(folder)
    before = contents(copied)
    extra = [*PLAIN, "train.steps=16", "train.on_damaged_checkpoint=previous"]
    assert main(train_arguments(tiny_data, copied, tiny_backbone, *extra)) == 2
    said = capsys.readouterr().err
    told = {
        "all damaged": "found 2 checkpoints, all damaged",
        "set aside": "found checkpoints/step-00000016.damaged and no complete checkpoint",
        "removed": "found metrics.jsonl with records of checkpoints and no complete checkpoint",
    }
    assert (
        said.count("\n") == 1
        and told[then] in said
        and "to start again from step 0, name another output folder" in said
    )
    assert contents(copied) == before


def test_without_resume_any_record_of_a_step_is_an_earlier_run(copied, tmp_path, tiny_data, tiny_backbone, capsys):
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(copied / "metrics.jsonl", fresh)
    for folder, found in ((copied, "checkpoints/step-00000016"), (fresh, "metrics.jsonl with records")):
        assert main(train_arguments(tiny_data, folder, tiny_backbone, *PLAIN, "resume=false")) == 2
        assert f"{folder}: found {found}, expected resume=true or another" in capsys.readouterr().err


def start(run, data, backbone, *overrides):
    """What a start looks at before it restores a checkpoint."""
    config = load_recipe("tiny", settings(data, run, backbone, *PLAIN, *overrides))
    found = checkpoints.find_checkpoint(run, config, fingerprint=hf_folder.fingerprint(backbone))
    checkpoints.check_data(found, run, data_summary(config, open_training(config)))
    return found


@pytest.fixture(params=["this version", "an older version"])
def alone(request, tmp_path, whole_run):
    """A folder with a checkpoint and nothing else, also without what the run has read."""
    run = tmp_path / "alone"
    folder = shutil.copytree(files.find_checkpoints(whole_run)[-1], run / "checkpoints" / "step-00000016")
    if request.param == "an older version":
        content = json.loads((folder / "state.json").read_text())
        assert content["data"]["order"]["seed"] == 1234
        del content["data"], content["sha256"]
        (folder / "state.json").write_text(json.dumps(content | {"sha256": files._content_sum(content)}))
    return run


FIXED = {
    "seed=4321": "seed: found 4321, expected 1234",
    "data.sequence_length_tokens=64": "sequence_length_tokens: found 64, expected 32",
    "data.shuffle=none": "shuffle: found none, expected full",
    "noise.mask_token_id=5": "noise.mask_token_id: found 5, expected 3, as in",
    "conditioning.period=100": "conditioning.period: found 100.0, expected 10000.0, as in",
    "conditioning.frequencies=64": "conditioning.frequencies: found 64, expected 256, as in",
    "noise.token_shift=true": "noise.token_shift: found True, expected False, as in",
}


def test_what_must_not_change_is_in_the_checkpoint_itself(alone, tiny_data, tiny_backbone):
    assert start(
        alone, tiny_data, tiny_backbone, "optimizer.learning_rate=1e-4", "conditioning.initialisation=released"
    )
    for setting, told in FIXED.items():
        with pytest.raises(UserError, match=told):
            start(alone, tiny_data, tiny_backbone, setting)


def test_another_corpus_is_refused_by_the_checkpoint_itself(copied, tmp_path, tiny_data, tiny_backbone):
    (copied / "provenance.json").unlink()
    other = tmp_path / "data"
    shutil.copytree(tiny_data, other)
    shutil.rmtree(other / "train")
    shutil.copytree(other / "validation", other / "train")
    with pytest.raises(UserError, match=rf"{other}/train: found tokens .*, as the run has read so far"):
        start(copied, other, tiny_backbone)


def test_incomplete_checkpoints_are_ignored_and_removed(copied, whole_run, tiny_data, tiny_backbone):
    folder = copied / "checkpoints"
    whole = files.find_checkpoints(copied)[-1]
    shutil.copytree(whole, folder / "step-00000015.partial")
    os.remove(folder / "step-00000015.partial" / "state.json")
    shutil.copytree(whole, folder / "step-00000016.removed")
    os.makedirs(folder / "step-00000099")
    assert files.find_checkpoints(copied)[-1] == whole
    assert main(train_arguments(tiny_data, copied, tiny_backbone, *PLAIN, "train.steps=16")) == 0
    assert not list(folder.glob("*.*"))
    assert sorted(losses(copied)) == list(range(1, 17))


def test_the_state_describes_the_run(whole_run, tiny_backbone):
    state = files.read_state(files.find_checkpoints(whole_run)[-1])
    assert (state.step, state.cursor, state.updates) == (16, 128, 16)
    assert state.backbone == str(tiny_backbone) and len(state.fingerprint) == 64
    assert state.configuration["train"]["steps"] == 16
    assert set(state.files) == {".metadata", "metadata.json", "common.pt", "__0_0.distcp"}


def test_killed_in_the_middle_of_every_part_of_a_save(tmp_path, whole_run, tiny_data, tiny_backbone):
    """A process that kills itself before one of the steps of a save, once for each step."""
    run = tmp_path / "run"
    extra = [*PLAIN, "train.steps=16", "train.checkpoint_every_steps=2"]
    for number, place in enumerate(KILLED_AT):
        process = ranks.forkserver().Process(
            target=train_killed_at, args=(place, train_arguments(tiny_data, run, tiny_backbone, *extra))
        )
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, place
        found = files.find_checkpoints(run)
        assert all(files.damaged(path) is None for path in found)
        assert number == 0 or found, "there was one before"
    assert main(train_arguments(tiny_data, run, tiny_backbone, *extra)) == 0
    assert losses(run) == losses(whole_run)


# The function before whose call the process is killed, and which call. The run gets further each
# time.
KILLED_AT = (
    ("megatron_twotower.mcore.async_save.FileSystemWriterAsync.write_preloaded_data", 2),
    ("megatron_twotower.checkpoint.files.checksum", 7),
    ("megatron_twotower.checkpoint.files.write_state", 2),
    ("megatron_twotower.checkpoint.files.os.replace", 2),
    ("megatron_twotower.checkpoint.files.shutil.rmtree", 4),
)


def train_killed_at(place, arguments):
    import importlib

    name, nth = place
    module, *path = name.removeprefix("megatron_twotower.").split(".")
    holder = importlib.import_module(f"megatron_twotower.{module}")
    for part in path[:-1]:
        holder = getattr(holder, part)
    original, calls = getattr(holder, path[-1]), iter(range(1, nth))

    def killed(*given, **named):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(holder, path[-1], staticmethod(killed) if isinstance(holder, type) else killed)
    main(arguments)


def test_a_full_disk_ends_in_one_line_and_leaves_what_is_there(tmp_path, whole_run, tiny_data, tiny_backbone):
    run = tmp_path / "run"
    extra = [*PLAIN, "train.checkpoint_every_steps=2", "train.steps=16"]
    train(1, train_arguments(tiny_data, run, tiny_backbone, *extra, "train.steps=4"), tmp_path / "logs")
    before = files.find_checkpoints(run)
    for mode in ("true", "false"):
        process = ranks.forkserver().Process(
            target=train_with_files_of,
            args=(
                100_000,
                tmp_path / "said",
                train_arguments(tiny_data, run, tiny_backbone, *extra, f"train.checkpoint_async={mode}"),
            ),
        )
        process.start()
        process.join(300)
        said = (tmp_path / "said").read_text()
        assert process.exitcode == 2, said
        assert said.count("\n") == 1 and "step-00000006: cannot be written" in said, said
        assert "older checkpoints are complete" in said
        assert files.find_checkpoints(run) == before
        assert [files.damaged(path) for path in before] == [None] * len(before)
        assert not list((run / "checkpoints").glob("*.partial")), "its space is given back"
    train(1, train_arguments(tiny_data, run, tiny_backbone, *extra), tmp_path / "logs")
    assert losses(run) == losses(whole_run)


def train_with_files_of(limit, said, arguments):
    """Train with at most `limit` bytes per file; the first write beyond that fails."""
    import resource
    import sys

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.stderr = open(said, "w")  # noqa: SIM115
    sys.exit(main(arguments))
