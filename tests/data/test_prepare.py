"""Preparing: what is written, for any number of workers and kills; and what goes wrong."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tokenizers import Tokenizer

from helpers.corpora import as_lines, content, make_tokenizer, read_samples, texts, write_records, write_tree
from megatron_twotower.cli import main
from megatron_twotower.common.engines import EngineSettings
from megatron_twotower.common.errors import UserError
from megatron_twotower.data import parts, planned_shards, workspace
from megatron_twotower.data.documents import find_documents, held_out, split_documents
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import load_tokenizer, tokenizer_fingerprint

BOS, END = 1, 2


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def tokenizer(tree, tmp_path_factory):
    samples = [path.read_text() for path in sorted(tree.glob("package*/*.py"))]
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", samples)


@pytest.fixture(scope="module")
def prepared(tree, tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "prepared"
    summary = prepare([str(tree)], tokenizer=tokenizer, output=output, holdout_fraction=0.2, shard_tokens=1500)
    return output, summary


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Text and records of every form, some texts in several of them."""
    root = write_tree(tmp_path_factory.mktemp("mixed"), count=20)
    for number, name in enumerate(["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]):
        write_records(root / "records" / name, texts(100, start=80 * number))
    with open(root / "records" / "a.jsonl", "ab") as stream:
        stream.write(as_lines(["", *(path.read_text() for path in sorted((root / "package1").iterdir()))]))
    return root


SMALL = {"holdout_fraction": 0.2, "shard_tokens": 1500, "unit_bytes": 2000}


def texts_of(folder, tokenizer, *, skip=(END,)):
    """Text of each document of a split, by name."""
    opened = load_tokenizer(tokenizer)
    return {
        sample["json"]["name"]: opened.decode([one for one in sample["tokens.npy"].tolist() if one not in skip])
        for sample in read_samples(folder)
    }


# --- what is written ---


def test_every_kept_document_is_in_one_split_and_comes_back_exactly(tree, tokenizer, prepared):
    output, _ = prepared
    opened = load_tokenizer(tokenizer)
    found = {}
    for split in ("train", "validation"):
        for sample in read_samples(output / split):
            name, ids = sample["json"]["name"], sample["tokens.npy"]
            assert name not in found
            assert ids.dtype == np.uint16
            assert ids[-1] == END and END not in ids[:-1] and 3 not in ids
            assert sample["json"]["tokens"] == len(ids)
            text = (tree / name).read_bytes()
            assert opened.decode(ids[:-1].tolist()).encode() == text
            assert sample["json"]["bytes"] == len(text)
            found[name] = split
    expected = {document.name for document in find_documents([str(tree)])} - {"empty.py", "latin.py"}
    missing = expected - found.keys()
    assert len(missing) == 1 and missing < {"copy.py", "package0/module0.py"}  # one text, written once
    splits = split_documents(find_documents([str(tree)]), holdout_fraction=0.2)
    for split, documents in splits.items():
        names = [document.name for document in documents if document.name in found]
        assert [name for name in found if found[name] == split] == names


def test_the_summary_counts_what_was_written(prepared):
    output, summary = prepared
    assert json.loads((output / "summary.json").read_text()) == summary
    left_out = {}
    for split, totals in summary["splits"].items():
        samples = read_samples(output / split)
        assert totals["documents"] == len(samples)
        assert totals["tokens"] == sum(len(sample["tokens.npy"]) for sample in samples)
        assert totals["bytes"] == sum(sample["json"]["bytes"] for sample in samples) >= totals["characters"]
        assert totals["shards"] == len(list((output / split).glob("*.tar")))
        for reason, count in totals["left_out"].items():
            left_out[reason] = left_out.get(reason, 0) + count
    assert left_out == {"empty": 1, "not_utf8": 1, "repeated": 1}


def test_of_a_repeated_text_the_held_out_copy_stays(tokenizer, tmp_path):
    """Otherwise validation would score a text that was trained on."""
    (tmp_path / "tree").mkdir()
    for number in range(30):
        (tmp_path / "tree" / f"{number}.txt").write_text("the same words\n")
    (tmp_path / "tree" / "other.txt").write_text("other words\n")
    write_records(tmp_path / "tree" / "records.jsonl", ["the same words\n", "other words\n", *texts(40)])
    prepare([str(tmp_path / "tree")], tokenizer=tokenizer, output=tmp_path / "out", holdout_fraction=0.3)
    found = {split: texts_of(tmp_path / "out" / split, tokenizer) for split in ("train", "validation")}
    assert sum(map(len, found.values())) == len({*found["train"].values(), *found["validation"].values()}) == 42
    held = split_documents(find_documents([str(tmp_path / "tree")])[:-1], holdout_fraction=0.3)["validation"]
    assert "the same words\n" in found["validation"].values() and held


def test_shards_hold_whole_documents_up_to_their_size(prepared):
    output, summary = prepared
    corpus = Corpus.open(output / "train")
    lengths = np.diff(corpus.starts)
    sizes = [shard.tokens for shard in corpus.shards]
    assert len(sizes) > 2
    assert max(sizes) <= 1500 and min(sizes[:-1]) > 1500 - lengths.max()
    assert sum(sizes) == summary["splits"]["train"]["tokens"]


def test_the_same_documents_give_the_same_bytes(tree, tokenizer, prepared, tmp_path):
    output, summary = prepared
    elsewhere = write_tree(tmp_path / "elsewhere")
    again = prepare(
        [str(elsewhere)], tokenizer=tokenizer, output=tmp_path / "again", holdout_fraction=0.2, shard_tokens=1500
    )
    assert again == summary
    other = {"provenance.json"}  # the only file that names paths
    assert content(output, leave_out=other) == content(tmp_path / "again", leave_out=other)
    assert content(output).keys() == content(tmp_path / "again").keys()


def test_the_tokenizer_is_copied_into_the_data(tokenizer, prepared):
    output, summary = prepared
    assert tokenizer_fingerprint(output / "tokenizer") == tokenizer_fingerprint(tokenizer)
    assert summary["tokenizer_fingerprint"] == tokenizer_fingerprint(tokenizer)
    assert load_tokenizer(output / "tokenizer").mask_token_id == 3


def test_the_ids_are_those_of_tokenizer_json_whatever_class_its_configuration_names(tokenizer, tmp_path):
    write_records(tmp_path / "a.jsonl", [f"don't add 12345 {text}" for text in texts(40)])
    named = json.loads((tokenizer / "tokenizer_config.json").read_text())
    found = []
    for name in ("TokenizersBackend", "GPT2Tokenizer"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps(named | {"tokenizer_class": name}))
        prepare([str(tmp_path / "a.jsonl")], tokenizer=folder, output=folder / "out", holdout_fraction=0)
        corpus = Corpus.open(folder / "out" / "train")
        assert corpus.exact_ids and corpus.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
        found.append(corpus.tokens(0, corpus.total_tokens).tolist())
    assert found[0] == found[1]
    file = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    first = file.encode(f"don't add 12345 {texts(1)[0]}", add_special_tokens=False).ids
    assert found[0][: len(first) + 1] == [*first, END]


def test_provenance_says_what_it_was_made_from(mixed, tokenizer, tmp_path):
    prepare([str(mixed)], tokenizer=tokenizer, output=tmp_path / "out", **SMALL)
    found = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert found["inputs"] == [str(mixed)] and found["tokenizer"] == str(tokenizer)
    assert found["settings"]["shard_tokens"] == 1500
    assert set(found["versions"]) == {"megatron_twotower", "tokenizers", "numpy"}
    assert found["text_files"]["files"] == 25
    records = {name.rpartition("/")[2]: file["records"] for name, file in found["record_files"].items()}
    assert records == {"a.jsonl": 105, "b.jsonl.gz": 100, "c.jsonl.zst": 100, "d.parquet": 100}


def test_records_of_every_form_come_back_with_file_and_line(mixed, tokenizer, tmp_path):
    summary = prepare([str(mixed / "records")], tokenizer=tokenizer, output=tmp_path / "out", **SMALL)
    found = {}
    for split in ("train", "validation"):
        for name, text in texts_of(tmp_path / "out" / split, tokenizer).items():
            assert held_out(text, 0.2) == (split == "validation")
            found[name] = text
    expected = {}
    for number, file in enumerate(["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]):
        for line, text in enumerate(texts(100, start=80 * number), start=1):
            if text not in expected.values():
                expected[f"{file}:{line}"] = text
    for line, path in enumerate(sorted((mixed / "package1").iterdir()), start=102):
        expected[f"a.jsonl:{line}"] = path.read_text()
    assert found == expected
    left_out = [totals["left_out"] for totals in summary["splits"].values()]
    assert sum(one.get("repeated", 0) for one in left_out) == 60 and sum(one.get("empty", 0) for one in left_out) == 1


def test_what_is_held_out_does_not_depend_on_how_records_are_cut_in_files(tokenizer, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_records(whole / "a.jsonl", texts(300))
    for number in range(6):
        write_records(cut / f"{number}.parquet", texts(50, start=50 * number))
    found = []
    for name in ("whole", "cut"):
        prepare([str(tmp_path / name)], tokenizer=tokenizer, output=tmp_path / f"{name}-out", **SMALL)
        found.append(
            {
                split: list(texts_of(tmp_path / f"{name}-out" / split, tokenizer).values())
                for split in ("train", "validation")
            }
        )
    assert found[0] == found[1]
    assert 30 < len(found[0]["validation"]) < 90


def test_documents_can_be_kept_twice_and_filtered_by_length(tokenizer, tmp_path):
    write_records(tmp_path / "a.jsonl", texts(50) + texts(50))
    lengths = [len(load_tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"]) for text in texts(50)]
    low, high = sorted(lengths)[10], sorted(lengths)[40]
    options = {"tokenizer": tokenizer, "holdout_fraction": 0}
    summary = prepare([str(tmp_path / "a.jsonl")], output=tmp_path / "both", deduplicate=False, **options)
    assert summary["splits"]["train"]["documents"] == 100
    summary = prepare([str(tmp_path / "a.jsonl")], output=tmp_path / "some", min_tokens=low, max_tokens=high, **options)
    found = np.diff(Corpus.open(tmp_path / "some" / "train").starts) - 1
    assert found.tolist() == [length for length in lengths if low <= length <= high]
    assert summary["splits"]["train"]["left_out"] == {
        "repeated": 50,
        "too_long": sum(length > high for length in lengths),
        "too_short": sum(length < low for length in lengths),
    }


@pytest.mark.parametrize(
    ("bos", "eos"), [("none", "document"), ("document", "document"), ("document", "none"), ("none", "none")]
)
def test_documents_begin_and_end_with_the_chosen_ids(bos, eos, tokenizer, tmp_path):
    write_records(tmp_path / "a.jsonl", texts(60))
    summary = prepare(
        [str(tmp_path / "a.jsonl")], tokenizer=tokenizer, output=tmp_path / "out", holdout_fraction=0, bos=bos, eos=eos
    )
    begin, end = [BOS] * (bos == "document"), [END] * (eos == "document")
    plain = [load_tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"] for text in texts(60)]
    corpus = Corpus.open(tmp_path / "out" / "train")
    assert [corpus.document(number).tolist() for number in range(60)] == [[*begin, *ids, *end] for ids in plain]
    assert (corpus.bos_token_id, corpus.eos_token_id) == ((begin or [None])[0], (end or [None])[0])
    assert (summary["bos_token_id"], summary["eos_token_id"]) == (corpus.bos_token_id, corpus.eos_token_id)


def test_a_large_vocabulary_takes_four_bytes_a_token(tree, tokenizer, tmp_path):
    file = tokenizer / "tokenizer.json"
    large = json.loads(file.read_text())
    merged = next(token for token, number in large["model"]["vocab"].items() if number == 300)
    large["model"]["vocab"][merged] = 131_071  # an id that text has
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(large))
    (tmp_path / "large" / "tokenizer_config.json").write_bytes((tokenizer / "tokenizer_config.json").read_bytes())
    summary = prepare([str(tree)], tokenizer=tmp_path / "large", output=tmp_path / "out")
    assert (summary["vocab_size"], summary["dtype"]) == (131_072, "uint32")
    samples = read_samples(tmp_path / "out" / "train")
    assert {sample["tokens.npy"].dtype for sample in samples} == {np.dtype("uint32")}
    corpus = Corpus.open(tmp_path / "out" / "train")
    expected = np.concatenate([sample["tokens.npy"] for sample in samples])
    assert (corpus.tokens(0, corpus.total_tokens) == expected).all() and expected.max() == 131_071


def test_progress_goes_from_nothing_to_all_in_both_stages(mixed, tokenizer, tmp_path):
    calls = []
    summary = prepare([str(mixed)], tokenizer=tokenizer, output=tmp_path / "out", progress=calls.append, **SMALL)
    for name in ("tokenising", "writing"):
        stages = [stage for stage in calls if stage.stage == name]
        assert len(stages) > 20 and stages[0].done == 0
        assert [stage.done for stage in stages] == sorted(stage.done for stage in stages)
        assert 0.9 * stages[-1].total <= stages[-1].done <= stages[-1].total
    assert stages[-1].tokens == stages[-1].total == sum(one["tokens"] for one in summary["splits"].values())
    assert stages[-1].documents == sum(one["documents"] for one in summary["splits"].values())


# --- any number of workers, any number of kills ---


@pytest.fixture(scope="module")
def expected(mixed, tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("expected") / "out"
    return prepare([str(mixed)], tokenizer=tokenizer, output=output, **SMALL), content(output)


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_number_of_workers_changes_nothing(workers, mixed, tokenizer, expected, tmp_path):
    calls = []
    summary = prepare(
        [str(mixed)],
        tokenizer=tokenizer,
        output=tmp_path / "out",
        engine=EngineSettings(workers=workers),
        progress=calls.append,
        **SMALL,
    )
    assert (summary, content(tmp_path / "out")) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert calls[-1].stage == "writing"


def test_the_size_of_units_changes_nothing_but_the_provenance(mixed, tokenizer, expected, tmp_path):
    for unit_bytes in (700, 10**9):
        output = tmp_path / str(unit_bytes)
        prepare([str(mixed)], tokenizer=tokenizer, output=output, **{**SMALL, "unit_bytes": unit_bytes})
        found = content(output)
        assert {name for name in found if found[name] != expected[1][name]} == {"provenance.json"}


def run_and_kill(reports, delay, arguments):
    """Run `prepare` in a process, and kill it `delay` seconds after its n-th report of progress.

    With `delay` None the process waits there for the kill, so that it comes on any machine.

    Returns:
        Whether the process was killed.
    """
    fork = multiprocessing.get_context("fork")
    reached, counter = fork.Event(), iter(range(1, reports))

    def report(_):
        if next(counter, None) is None:
            reached.set()
            while delay is None:
                time.sleep(1)

    process = fork.Process(target=prepare, kwargs=arguments | {"progress": report})
    process.start()
    while process.is_alive() and not reached.wait(0.001):
        pass
    process.join(delay or 0)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_until_done(kills, arguments):
    """Run and kill `prepare` until it is done, in a process without threads, whose children fork.

    The first three kills come between two units of work, the others anywhere.
    """
    draw = random.Random(1)
    while not arguments["output"].exists() and kills.value < 100:
        delay = None if kills.value < 3 else draw.uniform(0, 0.03)
        kills.value += run_and_kill(draw.randint(3, 30), delay, arguments)


def test_a_run_that_is_killed_many_times_gives_the_same_result(mixed, tokenizer, expected, tmp_path):
    arguments = {"inputs": [str(mixed)], "tokenizer": tokenizer, "output": tmp_path / "out", **SMALL}
    spawning = multiprocessing.get_context("spawn")
    kills = spawning.Value("i", 0)
    process = spawning.Process(target=kill_until_done, args=(kills, arguments))
    process.start()
    process.join()
    assert process.exitcode == 0 and 3 <= kills.value < 100
    assert content(tmp_path / "out") == expected[1]
    with pytest.raises(UserError, match="out: exists already"):
        prepare(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def stop_after(stage_name, calls):
    """A progress callback that interrupts at the n-th report of a stage."""
    counter = iter(range(calls))

    def report(stage):
        if stage.stage == stage_name and next(counter, None) is None:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize(("stage", "calls"), [("tokenising", 1), ("tokenising", 20), ("writing", 1), ("writing", 100)])
def test_finished_units_are_not_read_again(stage, calls, mixed, tokenizer, expected, tmp_path, monkeypatch):
    arguments = {"inputs": [str(mixed)], "tokenizer": tokenizer, "output": tmp_path / "out", **SMALL}
    with pytest.raises(KeyboardInterrupt):
        prepare(**arguments, progress=stop_after(stage, calls))
    partial = tmp_path / "out.partial"
    finished = {path.stem for path in (partial / "parts").glob("*.json")}
    shards = {path.name for path in (partial / "shards").glob("*.json")}
    assert not (tmp_path / "out").exists()
    begun, written = [], []
    monkeypatch.setattr(
        "megatron_twotower.data.prepare.write_part",
        lambda task: (begun.append(f"{task.number:06d}"), parts.write_part(task))[1],
    )
    monkeypatch.setattr(
        "megatron_twotower.data.prepare.write_planned_shard",
        lambda task: (written.append(f"{task.base.name}.json"), planned_shards.write_planned_shard(task))[1],
    )
    calls = []
    summary = prepare(**arguments, progress=calls.append)
    assert finished.isdisjoint(begun) and shards.isdisjoint(written)
    assert stage == "tokenising" or not begun
    assert calls[0].tokens > 0 or not finished  # what was done counts
    assert (summary, content(tmp_path / "out")) == expected


def test_an_unfinished_part_is_written_again(mixed, tokenizer, expected, tmp_path):
    arguments = {"inputs": [str(mixed)], "tokenizer": tokenizer, "output": tmp_path / "out", **SMALL}
    with pytest.raises(KeyboardInterrupt):
        prepare(**arguments, progress=stop_after("tokenising", 30))
    (tmp_path / "out.partial" / "parts" / "000099.ids.1234.partial").write_bytes(b"half")
    prepare(**arguments)
    assert content(tmp_path / "out") == expected[1]


def test_a_kill_between_the_last_steps_loses_nothing(mixed, tokenizer, expected, tmp_path, monkeypatch):
    arguments = {"inputs": [str(mixed)], "tokenizer": tokenizer, "output": tmp_path / "out", **SMALL}
    prepare([str(mixed / "records")], tokenizer=tokenizer, output=tmp_path / "out")
    replace = workspace.Path.replace

    def killed_at(name):
        def stop(self, target):
            result = replace(self, target)
            if self.name == name:
                raise KeyboardInterrupt
            return result

        return stop

    for name in ("out", "data"):  # the earlier data is moved away; the new one has taken its place
        monkeypatch.setattr(workspace.Path, "replace", killed_at(name))
        with pytest.raises(KeyboardInterrupt):
            prepare(**arguments, overwrite=True)
    monkeypatch.undo()
    assert content(tmp_path / "out") == expected[1]
    with pytest.raises(UserError, match="out: exists already"):
        prepare(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_with_another_request_is_not_resumed(mixed, tokenizer, expected, tmp_path):
    copy = tmp_path / "copy"
    write_tree(copy, count=20)
    write_records(copy / "records" / "a.jsonl", texts(100))
    arguments = {"inputs": [str(copy)], "tokenizer": tokenizer, "output": tmp_path / "out", **SMALL}
    with pytest.raises(KeyboardInterrupt):
        prepare(**arguments, progress=stop_after("tokenising", 20))
    for change, message in (
        ({"shard_tokens": 99}, "an interrupted run with shard_tokens 1500, expected 99"),
        ({"bos": "document"}, "an interrupted run with bos none, expected document"),
        ({"inputs": [str(copy / "records")]}, "an interrupted run with inputs"),
    ):
        with pytest.raises(UserError, match=rf"out\.partial: found {message}") as caught:
            prepare(**{**arguments, **change})
        assert "\n" not in str(caught.value)
    with open(copy / "records" / "a.jsonl", "ab") as stream:
        stream.write(b'{"text": "more"}\n')
    with pytest.raises(UserError, match="an interrupted run with files_sha256"):
        prepare(**arguments)
    prepare(**{**arguments, "inputs": [str(mixed)]}, overwrite=True)
    assert content(tmp_path / "out") == expected[1]


def test_two_runs_at_once_are_refused(tree, tokenizer, tmp_path):
    def another(_):
        with pytest.raises(UserError, match=r"out\.partial: in use"):
            prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "out")

    prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "out", progress=another)


COMMAND = [sys.executable, "-m", "megatron_twotower", "data", "prepare", "--workers", "2", "--shard-tokens", "40000"]


@pytest.mark.slow
def test_the_command_killed_with_its_workers_gives_the_same_result(tree, tokenizer, tmp_path):
    source = tmp_path / "source"
    for number in range(4):
        write_records(source / f"{number}.jsonl", texts(20_000, start=15_000 * number))
        write_records(source / f"{number}.parquet", texts(5000, start=15_000 * number + 3))
    prepare([str(source)], tokenizer=tokenizer, output=tmp_path / "whole", shard_tokens=40_000)
    command = [*COMMAND, "--input", str(source), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    draw, kills = random.Random(2), 0
    partial = tmp_path / "out.partial"
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60  # to start
        before = len(content(partial)) if partial.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if partial.exists() and len(content(partial)) != before:
                    break
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, 1.5) if kills < 6 else 300)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break
        process.kill()
        process.wait()
        kills += 1
    assert content(tmp_path / "out", leave_out={"provenance.json"}) == content(
        tmp_path / "whole", leave_out={"provenance.json"}
    )
    assert kills >= 3


# --- what goes wrong ---


def test_nothing_is_overwritten_unless_asked_and_only_prepared_data(tree, tokenizer, tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # an empty folder will do
    prepare([str(tree)], tokenizer=tokenizer, output=output)
    before = content(output)
    with pytest.raises(UserError, match="out: exists already"):
        prepare([str(tree)], tokenizer=tokenizer, output=output)
    assert content(output) == before
    prepare([str(tree / "package1")], tokenizer=tokenizer, output=output, overwrite=True)
    assert content(output) != before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"home: found no train/index\.json in it"):
        prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "home", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


def test_an_interrupted_run_spares_the_earlier_output(tree, tokenizer, tmp_path):
    prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        prepare(
            [str(tree)],
            tokenizer=tokenizer,
            output=tmp_path / "out",
            overwrite=True,
            bos="document",
            progress=stop_after("writing", 3),
        )
    assert content(tmp_path / "out") == before
    prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_input_is_one_line(tree, tokenizer, tmp_path):
    output = tmp_path / "out"
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "alone.txt").write_text("")
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "held.jsonl").write_text('{"text": "words"}\n7\n8\n')
    cases = [
        ("nowhere: no such file or folder", [str(tmp_path / "nowhere")], {}),
        (
            "found 1 empty, 1 not_utf8 in 2 files, expected text to train on",
            [str(tmp_path / "latin.txt"), str(tmp_path / "alone.txt")],
            {},
        ),
        ("none.jsonl: found nothing in 1 files, expected text", [str(tmp_path / "none.jsonl")], {}),
        ("found 1 empty, 1 not_utf8, 1 repeated, 62 too_short in 65 files", [str(tree)], {"min_tokens": 10**6}),
        (
            "found 1 held_out, 2 malformed in 1 files",
            [str(tmp_path / "held.jsonl")],
            {"holdout_fraction": 0.999999, "max_malformed": 2},
        ),
        ("shard_tokens 0: expected at least 1", [str(tree)], {"shard_tokens": 0}),
        ("min_tokens 0: expected at least 1", [str(tree)], {"min_tokens": 0}),
        ("max_tokens 4: expected at least min_tokens 5", [str(tree)], {"min_tokens": 5, "max_tokens": 4}),
        ("max_malformed -1: expected at least 0", [str(tree)], {"max_malformed": -1}),
        ("max_malformed nan: expected at least 0", [str(tree)], {"max_malformed": float("nan")}),
        ("bos always: expected one of none, document", [str(tree)], {"bos": "always"}),
        ("holdout_fraction 2: expected", [str(tree)], {"holdout_fraction": 2}),
    ]
    for message, inputs, options in cases:
        with pytest.raises(UserError, match=message) as caught:
            prepare(inputs, tokenizer=tokenizer, output=output, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="tokenizer: no such folder"):
        prepare([str(tree)], tokenizer=tmp_path / "tokenizer", output=output)
    for nameless in (".", "/", ""):
        with pytest.raises(UserError, match="found no name, expected the path of a folder to create"):
            prepare([str(tree)], tokenizer=tokenizer, output=nameless)
    assert not output.exists() and not (tmp_path / "out.partial").exists()


def test_a_tokenizer_without_an_end_of_text_is_refused_unless_none_is_wanted(tree, tokenizer, tmp_path):
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    config.pop("eos_token")
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names no eos_token, expected one"):
        prepare([str(tree)], tokenizer=tmp_path / "bare", output=tmp_path / "out")
    summary = prepare([str(tree)], tokenizer=tmp_path / "bare", output=tmp_path / "out", eos="none")
    assert summary["eos_token_id"] is None


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_malformed_records_are_counted_named_and_limited(workers, tokenizer, tmp_path):
    lines = as_lines(texts(400)).splitlines(keepends=True)
    for line in (9, 120, 301):
        lines[line] = b"{broken\n"
    lines.insert(50, b"\n")
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    arguments = {
        "inputs": [str(tmp_path / "a.jsonl")],
        "tokenizer": tokenizer,
        "output": tmp_path / "out",
        "engine": EngineSettings(workers=workers),
        **SMALL,
    }
    for limit in (0, 0.001, 2, 0.007):
        with pytest.raises(
            UserError,
            match=r"a\.jsonl:10: not JSON \(.*\): first of [123] malformed records in \d+, "
            rf"expected at most {limit:g} \(max_malformed\)$",
        ):
            prepare(**arguments, max_malformed=limit)
        assert not (tmp_path / "out").exists()
    for limit in (0.008, 3):
        summary = prepare(**arguments, max_malformed=limit, overwrite=True)  # resumes from what was tokenised
        assert summary["splits"]["train"]["left_out"]["malformed"] == 3
        assert [fault.partition(" (")[0].rpartition("/")[2] for fault in summary["malformed"]] == [
            "a.jsonl:10: not JSON",
            "a.jsonl:122: not JSON",
            "a.jsonl:303: not JSON",
        ]
    assert sum(totals["documents"] for totals in summary["splits"].values()) == 397


def test_the_command_says_what_was_done_or_one_line(tokenizer, tmp_path, capsys):
    write_records(tmp_path / "a.jsonl", [*texts(100), 7], field="body")
    command = [
        "data",
        "prepare",
        "--input",
        str(tmp_path / "a.jsonl"),
        "--tokenizer",
        str(tokenizer),
        "--output",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--text-field",
        "body",
        "--bos",
        "document",
        "--no-dedup",
    ]
    assert main.main(command) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "twotower: " in line]
    assert len(error) == 1 and "a.jsonl:101: field 'body' holds int, expected a string: first of 1" in error[0]
    assert main.main([*command, "--max-malformed", "1"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["splits"]["train"]["left_out"] == {"malformed": 1}
    assert "100%" in shown.err and "tokens/s" in shown.err


@contextlib.contextmanager
def largest_file(size):
    """Writes beyond `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 3000, 9000])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(size, mixed, tokenizer, expected, tmp_path):
    """The disk is full at every kind of file: request, parts, shards, index."""
    arguments = {"inputs": [str(mixed)], "tokenizer": tokenizer, "output": tmp_path / "out", **SMALL}
    with largest_file(size), pytest.raises((UserError, OSError)) as caught:
        prepare(**arguments)
    assert os.strerror(errno.EFBIG) in str(caught.value) and "\n" not in str(caught.value)
    assert "out.partial" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.*.partial"))
    prepare(**arguments)  # resumes when there is space
    assert content(tmp_path / "out") == expected[1]
