"""Inspect and verify: what is shown of prepared data, and every kind of damage named."""

import json
import shutil

import numpy as np
import pytest

from helpers.corpora import make_tokenizer, read_samples, texts, write_records
from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.data import inspect as data_inspect
from megatron_twotower.data.inspect import inspect, roots, sample, spread, text_histogram, verify
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.shards import Corpus, checksum, write_index, write_shard
from megatron_twotower.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two prepared folders, `one` and `two`, of one tokenizer, and a blend of them."""
    folder = tmp_path_factory.mktemp("inspect")
    make_tokenizer(folder / "tokenizer", texts())
    for number, name in enumerate(("one", "two")):
        write_records(folder / f"{name}.jsonl", texts(200, start=300 * number))
        prepare(
            [str(folder / f"{name}.jsonl")],
            tokenizer=folder / "tokenizer",
            output=folder / name,
            holdout_fraction=0.2,
            shard_tokens=2000,
            bos="document",
        )
    (folder / "blend.yaml").write_text(
        "corpora:\n  first: {folder: one}\n  second: {folder: two}\n"
        "mixtures:\n  breadth: {first: 3, second: 1}\n  quality: {second: 1}\n"
    )
    return folder


@pytest.fixture
def data(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    return tmp_path / "data"


# --- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_shows_counts_lengths_samples_and_draws(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    picture = tmp_path / "lengths.png"
    inspect(str(whole / "one"), split="train", samples=2, block_size=8, picture=picture)
    shown = capsys.readouterr().out
    corpus = Corpus.open(whole / "one" / "train")
    for text in (
        f"{corpus.documents:,}",
        f"{corpus.total_tokens:,}",
        "BOS 1, EOS 2",
        corpus.tokenizer_fingerprint[:12],
        "blocks of 8 tokens: ",
        "document 0: one.jsonl:",
        f"{picture}: the lengths as a picture",
    ):
        assert text in shown
    assert shown.count("\ndocument ") == 2 and "|" in shown and "█" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_of_a_blend_shows_every_corpus_once(whole, tmp_path, capsys):
    inspect(str(whole / "blend.yaml"), split="validation", samples=1, block_size=16, picture=tmp_path / "p.png")
    shown = capsys.readouterr().out
    assert "first" in shown and "second" in shown and shown.count("\ndocument 0: ") == 2
    assert (tmp_path / "p.png").is_file()


def test_boundaries_fall_where_blocks_of_the_stream_meet(whole):
    corpus = Corpus.open(whole / "one" / "train")
    opened = load_tokenizer(whole / "tokenizer")
    for size in (1, 5, 16):
        for number in range(20):
            ids, start = corpus.document(number).tolist(), int(corpus.starts[number])
            expected = [ids[:1]]
            for place, one in enumerate(ids[1:], start=1):
                if (start + place) % size:
                    expected[-1].append(one)
                else:
                    expected.append([one])
            shown = sample(corpus, number, block_size=size, tokenizer=opened).plain
            pieces = [opened.decode(piece) for piece in expected]
            assert shown.removesuffix(" …") == "|".join(pieces[:12])
            assert shown.endswith(" …") == (len(pieces) > 12)
    ids = corpus.document(0)[:4].tolist()
    assert sample(corpus, 0, block_size=4, tokenizer=None).plain.startswith(" ".join(map(str, ids)) + "|")


def test_the_share_of_straddling_blocks_and_of_padding(whole):
    corpus = Corpus.open(whole / "one" / "train")
    for size in (1, 8, 64):
        numbers = np.repeat(np.arange(corpus.documents), np.diff(corpus.starts))
        blocks = [numbers[at : at + size] for at in range(0, len(numbers), size)]
        share = np.mean([block[0] != block[-1] for block in blocks])
        padded = sum(-(-length // size) * size for length in np.diff(corpus.starts).tolist())
        text = data_inspect._blocks(corpus, size)
        assert f"{100 * share:.2f}% hold a boundary" in text
        assert f"padding is {100 * (padded - len(numbers)) / padded:.2f}%" in text


def test_a_histogram_in_text():
    lines = text_histogram([0, 2, 0, 4, 0], [1, 2, 4, 8, 16, 32]).splitlines()
    assert [line.split()[:3] for line in lines] == [["2", "to", "3"], ["4", "to", "7"], ["8", "to", "15"]]
    assert [line.count("█") for line in lines] == [20, 0, 40]
    assert text_histogram([0, 0], [1, 2, 4]) == "no documents"


def test_samples_are_spread_over_all():
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(2, 5) == [0, 1] and spread(0, 3) == [] and spread(5, 0) == []


def test_what_is_no_data_is_one_line(tmp_path, capsys):
    for command in (["inspect", str(tmp_path)], ["verify", str(tmp_path)], ["inspect", str(tmp_path / "no.yaml")]):
        assert main.main(["data", *command]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path) in error and error.count("\n") == 1
    with pytest.raises(UserError, match="block_size 0: expected at least 1"):
        inspect(str(tmp_path), split="train", samples=1, block_size=0, picture=tmp_path / "p.png")


# --- verify -------------------------------------------------------------------------------------------------------


def test_whole_data_has_no_fault(whole, capsys):
    shards = sum(len(list((whole / name).rglob("*.tar"))) for name in ("one", "two"))
    assert main.main(["data", "verify", str(whole / "blend.yaml"), "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert f"{shards} shards checked, 0 faults found" in shown.out and "twotower: " not in shown.err
    assert verify(str(whole / "one"), tokenizer=whole / "tokenizer", workers=2) == []
    assert verify(f"pipe:cat '{whole}/one/{{file}}'") == []


def test_the_roots_of_a_blend_and_of_a_folder(whole):
    assert roots(str(whole / "one")) == {"one": str(whole / "one")}
    assert roots(str(whole / "blend.yaml")) == {"first": str(whole / "one"), "second": str(whole / "two")}
    with pytest.raises(UserError, match=r"one: found no \.yaml with --folder x, expected a blend file"):
        roots(str(whole / "one"), folder="x")


def test_the_corpora_of_a_blend_may_be_elsewhere(whole, tmp_path, capsys):
    """As with `data.folder` of a recipe."""
    blend = tmp_path / "blend.yaml"
    blend.write_bytes((whole / "blend.yaml").read_bytes())
    common = [str(blend), "--folder", str(whole)]
    assert main.main(["data", "verify", *common, "--workers", "1"]) == 0
    assert main.main(["data", "inspect", *common, "--picture", str(tmp_path / "p.png"), "--samples", "1"]) == 0
    assert main.main(["data", "verify", str(blend), "--workers", "1"]) == 2
    assert f"{tmp_path}/one/summary.json" in capsys.readouterr().err


def test_what_was_mended_is_a_fault_no_more(data):
    shard = data / "one" / "train" / "shard-00001.tar"
    whole = shard.read_bytes()
    flip(shard)
    assert len(verify(str(data / "one"))) == 1
    shard.write_bytes(whole)
    assert verify(str(data / "one")) == []


def rewrite(split, change):
    """Write the first shard of a split again, its documents changed, and an index that agrees with it."""
    corpus = Corpus.open(split)
    documents = [corpus.document(number).copy() for number in range(corpus.documents)]
    about = [one["json"] for one in read_samples(split)]
    index = json.loads((split / "index.json").read_text())
    shards, arrays = [], []
    for number, shard in enumerate(corpus.shards):
        low, high = corpus.first_documents[number : number + 2].tolist()
        samples = [inspect_samples(about[place], documents[place]) for place in range(low, high)]
        if number == 0:
            samples = change(samples)
        sha256, offsets, lengths = write_shard(split / shard.file, samples, first=low)
        size = (split / shard.file).stat().st_size
        shards.append(shard._replace(sha256=sha256, bytes=size))
        arrays.append((offsets, lengths))
    header = {key: value for key, value in index.items() if key not in ("shards", "arrays")}
    write_index(split, header=header, shards=shards, arrays=arrays)


def inspect_samples(about, tokens):
    from megatron_twotower.data.shards import Sample

    return Sample(about["name"], about["bytes"], tokens)


def with_id(place, value):
    def change(samples):
        samples[3].tokens[place] = value
        return samples

    return change


def flip(path, place=-3000):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def other_index(data):
    """An index whose offsets are off by one document, its own checksums right."""
    split = data / "one" / "train"
    index = json.loads((split / "index.json").read_text())
    offsets = np.load(split / "offsets.npy")
    offsets[2] += 512
    np.save(split / "offsets.npy", offsets)
    index["arrays"]["offsets.npy"] = checksum(split / "offsets.npy")
    (split / "index.json").write_text(json.dumps(index))


def no_tar(data):
    split = data / "one" / "train"
    index = json.loads((split / "index.json").read_text())
    (split / "shard-00001.tar").write_bytes(b"x" * index["shards"][1]["bytes"])
    index["shards"][1]["sha256"] = checksum(split / "shard-00001.tar")
    (split / "index.json").write_text(json.dumps(index))


def change_summary(data):
    summary = json.loads((data / "one" / "summary.json").read_text())
    summary["splits"]["train"]["tokens"] += 1
    (data / "one" / "summary.json").write_text(json.dumps(summary))


def spaced_tokenizer(data):
    file = data / "one" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + " ")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


DAMAGE = {
    "flipped": (lambda data: flip(data / "one/train/shard-00001.tar"), "train/shard-00001.tar: found sha256"),
    "truncated": (lambda data: truncate(data / "one/train/shard-00002.tar"), "shard-00002.tar: found "),
    "missing": (lambda data: (data / "one/train/shard-00000.tar").unlink(), "shard-00000.tar: found no such file"),
    "held out, missing": (lambda data: (data / "one/validation/shard-00000.tar").unlink(), "validation/shard-00000"),
    "no split": (lambda data: shutil.rmtree(data / "one/validation"), "validation/index.json: not found"),
    "no summary": (lambda data: (data / "one/summary.json").unlink(), "summary.json: not a summary"),
    "totals": (change_summary, "train/index.json: found documents, tokens, bytes, characters"),
    "array": (lambda data: flip(data / "one/train/offsets.npy", -9), "offsets.npy: found sha256"),
    "index against tar": (other_index, "shard-00000.tar: found (document, offset, (tokens, dtype)) ('000000002', "),
    "no tar": (no_tar, "shard-00001.tar: not a tar of token arrays"),
    "too large an id": (
        lambda data: rewrite(data / "one/train", with_id(2, 320)),
        "shard-00000.tar: found id 320 in document 3, expected less than 320",
    ),
    "no EOS": (
        lambda data: rewrite(data / "one/train", with_id(-1, 7)),
        "shard-00000.tar: found id 7 where document 3 has its EOS, expected 2",
    ),
    "no BOS": (
        lambda data: rewrite(data / "one/train", with_id(0, 7)),
        "shard-00000.tar: found id 7 where document 3 has its BOS, expected 1",
    ),
    "own tokenizer": (spaced_tokenizer, "train: found tokens of tokenizer "),
    "no tokenizer": (lambda data: shutil.rmtree(data / "one/tokenizer"), "one/tokenizer: no such folder"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_status_is_2(damage, data, capsys):
    change, expected = DAMAGE[damage]
    change(data)
    assert main.main(["data", "verify", str(data / "blend.yaml"), "--workers", "1"]) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("twotower: ")]
    assert any(expected in line for line in lines), lines
    assert all(line.startswith(f"twotower: {data / 'one'}") for line in lines)
    assert f"{len(lines)} faults found" in shown.out
    assert 1 <= len(lines) <= 4


def test_every_damaged_shard_is_named_whatever_the_workers(data):
    for number in (0, 2, 3):
        flip(data / "two" / "train" / f"shard-{number:05d}.tar")
    alone = verify(str(data / "two"))
    assert [line.partition(":")[0][-15:] for line in alone] == [f"shard-{number:05d}.tar" for number in (0, 2, 3)]
    assert verify(str(data / "two"), workers=2) == alone


def test_data_of_another_tokenizer_is_told(data, whole):
    other = make_tokenizer(data / "other", texts(20))
    assert all(
        "expected those of" in line and str(other) in line for line in verify(str(data / "one"), tokenizer=other)
    )
    assert len(verify(str(data / "one"), tokenizer=other)) == 2
    write_records(data / "three.jsonl", texts(50))
    shutil.rmtree(data / "two")
    prepare([str(data / "three.jsonl")], tokenizer=other, output=data / "two")
    problems = verify(str(data / "blend.yaml"))
    assert problems and all(line.startswith(str(data / "two")) for line in problems)
