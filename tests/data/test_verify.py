"""`data verify`: every kind of damage is named, and sound data has no fault."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from helpers.corpora import make_tokenizer, read_samples, texts, write_records
from megatron_twotower.cli import main
from megatron_twotower.data import parts
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.shards import Corpus, Sample, checksum, write_index, write_shard
from megatron_twotower.data.verify import verify


@pytest.fixture
def data(prepared_blend, tmp_path):
    """A copy of the blend that a test may damage."""
    shutil.copytree(prepared_blend, tmp_path / "data")
    return tmp_path / "data"


def test_sound_data_has_no_fault(prepared_blend, capsys):
    shards = sum(len(list((prepared_blend / name).rglob("*.tar"))) for name in ("one", "two"))
    assert main.main(["data", "verify", str(prepared_blend / "blend.yaml"), "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert f"{shards} shards checked, 0 faults found" in shown.out and "twotower: " not in shown.err
    assert verify(str(prepared_blend / "one"), tokenizer=prepared_blend / "tokenizer", workers=2) == []
    assert verify(f"pipe:cat '{prepared_blend}/one/{{file}}'") == []


def test_the_corpora_of_a_blend_may_be_elsewhere(prepared_blend, tmp_path, capsys):
    """The option is like `data.folder` of a recipe."""
    blend = tmp_path / "blend.yaml"
    blend.write_bytes((prepared_blend / "blend.yaml").read_bytes())
    common = [str(blend), "--folder", str(prepared_blend)]
    assert main.main(["data", "verify", *common, "--workers", "1"]) == 0
    assert main.main(["data", "inspect", *common, "--picture", str(tmp_path / "p.png"), "--samples", "1"]) == 0
    assert main.main(["data", "verify", str(blend), "--workers", "1"]) == 2
    assert f"{tmp_path}/one/summary.json" in capsys.readouterr().err


def test_a_repaired_shard_has_no_fault(data):
    shard = data / "one" / "train" / "shard-00001.tar"
    whole = shard.read_bytes()
    flip(shard)
    assert len(verify(str(data / "one"))) == 1
    shard.write_bytes(whole)
    assert verify(str(data / "one")) == []


def rewrite(split, change):
    """Change the documents in the first shard of a split, and write an index that fits."""
    corpus = Corpus.open(split)
    documents = [corpus.document(number).copy() for number in range(corpus.documents)]
    about = [one["json"] for one in read_samples(split)]
    index = json.loads((split / "index.json").read_text())
    shards, arrays = [], []
    for number, shard in enumerate(corpus.shards):
        low, high = corpus.first_documents[number : number + 2].tolist()
        samples = [Sample(about[place]["name"], about[place]["bytes"], documents[place]) for place in range(low, high)]
        if number == 0:
            samples = change(samples)
        sha256, found = write_shard(split / shard.file, samples, first=low)
        size = (split / shard.file).stat().st_size
        shards.append(shard._replace(sha256=sha256, bytes=size))
        arrays.append(found)
    header = {key: value for key, value in index.items() if key not in ("shards", "arrays")}
    write_index(split, header=header, shards=shards, arrays=arrays)


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
    """Change an offset in the index, but keep its checksums right."""
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
    "missing in validation": (
        lambda data: (data / "one/validation/shard-00000.tar").unlink(),
        "validation/shard-00000",
    ),
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


def test_data_from_another_tokenizer_is_named(data, prepared_blend):
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


def as_older(prepared):
    """Make prepared data look as an older version wrote it: without a word on how ids were made."""
    for file in prepared.rglob("index.json"):
        index = json.loads(file.read_text())
        assert index.pop("exact_ids") is True
        file.write_text(json.dumps(index))


def test_older_data_with_other_ids_than_its_tokenizer_file_gives_is_named(prepared_blend, tmp_path, monkeypatch):
    """Older versions let transformers rebuild a tokenizer of some class names."""
    tokenizer = shutil.copytree(prepared_blend / "tokenizer", tmp_path / "tokenizer")
    file = tokenizer / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    write_records(tmp_path / "a.jsonl", [f"of 12345 and {text}" for text in texts(60)])
    options = {"tokenizer": tokenizer, "holdout_fraction": 0.2, "bos": "document"}
    prepare([str(tmp_path / "a.jsonl")], output=tmp_path / "new", **options)
    parts._encoder.cache_clear()
    monkeypatch.setattr(parts, "load_tokenizer", lambda folder: AutoTokenizer.from_pretrained(str(folder)))
    prepare([str(tmp_path / "a.jsonl")], output=tmp_path / "old", **options)
    parts._encoder.cache_clear()
    for name in ("new", "old"):
        as_older(tmp_path / name)
        assert not Corpus.open(tmp_path / name / "train").exact_ids
    assert verify(str(tmp_path / "new"), tokenizer=tokenizer) == []
    found = verify(str(tmp_path / "old"), tokenizer=tokenizer)
    shards = sorted((tmp_path / "old").rglob("*.tar"))
    assert len(shards) >= 2 and sorted(line.partition(": ")[0] for line in found) == list(map(str, shards))
    assert all(f"are not those of {tmp_path}/old/tokenizer for its text" in line for line in found)
