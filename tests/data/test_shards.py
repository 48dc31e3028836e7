"""Shards: where their tokens are, how fast they open, and what happens when something is wrong."""

import hashlib
import json
import re
import threading
import time

import numpy as np
import pytest
import webdataset

from helpers.corpora import make_tokenizer, read_samples, write_tree
from megatron_twotower.common.errors import UserError
from megatron_twotower.data import shards
from megatron_twotower.data.documents import Document, split_documents
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.shards import Corpus, Sample, Shard, ShardArrays, array_members, write_index, write_shard


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tree = write_tree(folder / "tree")
    tokenizer = make_tokenizer(folder / "tokenizer", [path.read_text() for path in sorted(tree.glob("package*/*.py"))])
    summary = prepare([str(tree)], tokenizer=tokenizer, output=folder / "out", holdout_fraction=0.2, shard_tokens=1500)
    return folder / "out", summary


# --- writing ---


def test_a_shard_is_written_and_found_again(tmp_path):
    samples = [Sample(f"name {n}", 10 * n, np.arange(n, 3 * n, dtype=np.uint32)) for n in range(1, 40)]
    path = tmp_path / "shard.tar"
    sha256, (offsets, lengths, scored) = write_shard(path, samples, first=1000)
    assert scored is None
    assert sha256 == shards.checksum(path)
    data = path.read_bytes()
    for sample, offset, length in zip(samples, offsets.tolist(), lengths.tolist(), strict=True):
        assert (np.frombuffer(data, np.uint32, count=length, offset=offset) == sample.tokens).all()
    found = list(array_members(path))
    assert found == [
        (f"{1000 + n:09d}", offset, (len(sample.tokens), np.dtype(np.uint32)))
        for n, (sample, offset) in enumerate(zip(samples, offsets.tolist(), strict=True))
    ]
    read = read_samples(tmp_path)
    assert [sample["json"] for sample in read] == [
        {"name": sample.name, "tokens": len(sample.tokens), "bytes": sample.bytes} for sample in samples
    ]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("count", [0, 1, 8, 40])
def test_a_shard_has_the_bytes_that_webdataset_writes(scored, count, tmp_path):
    samples = [
        Sample(f"näme {n}", n**9, np.arange(n, 70 * n, dtype=np.uint16), np.arange(69 * n) % 3 == 0 if scored else None)
        for n in range(1, count + 1)
    ]
    with webdataset.TarWriter(str(tmp_path / "expected.tar"), encoder=False, mtime=0) as writer:
        for number, sample in enumerate(samples, start=123_456_700):
            arrays = {"tokens.npy": sample.tokens, **({"scored.npy": sample.scored} if scored else {})}
            members = {}
            for name, array in arrays.items():
                np.save(tmp_path / "array.npy", array)
                members[name] = (tmp_path / "array.npy").read_bytes()
            about = {"name": sample.name, "tokens": len(sample.tokens), "bytes": sample.bytes}
            writer.write({"__key__": str(number), "json": json.dumps(about).encode(), **members})
    sha256, found = write_shard(tmp_path / "shard.tar", samples, first=123_456_700)
    data = (tmp_path / "shard.tar").read_bytes()
    assert data == (tmp_path / "expected.tar").read_bytes() and sha256 == hashlib.sha256(data).hexdigest()
    for suffix, offsets in (("tokens.npy", found.offsets), ("scored.npy", found.scored)):
        expected = [offset for _, offset, _ in array_members(tmp_path / "shard.tar", suffix)]
        assert ([] if offsets is None else offsets.tolist()) == expected


# --- reading ---


def test_any_window_of_the_stream_can_be_read(prepared, monkeypatch):
    output, summary = prepared
    samples = read_samples(output / "train")
    stream = np.concatenate([sample["tokens.npy"] for sample in samples]).astype(np.int64)
    corpus = Corpus.open(output / "train")
    assert [corpus.check_shard(number) for number in range(len(corpus.shards))] == [None] * len(corpus.shards)
    totals = summary["splits"]["train"]
    assert (corpus.total_tokens, corpus.total_bytes) == (totals["tokens"], totals["bytes"])
    assert (corpus.total_characters, corpus.documents) == (totals["characters"], totals["documents"])
    assert (corpus.vocab_size, corpus.tokenizer_fingerprint) == (320, summary["tokenizer_fingerprint"])
    assert corpus.total_tokens == len(stream)
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)  # maps are dropped and made again
    generator = np.random.default_rng(0)
    windows = [(0, len(stream)), (0, 0), (len(stream), 0), (len(stream) - 1, 1), (0, 1)]
    for start in generator.integers(0, len(stream), 200).tolist():
        windows.append((start, int(generator.integers(0, min(700, len(stream) - start) + 1))))
    for start, count in windows:
        tokens = corpus.tokens(start, count)
        assert tokens.dtype == np.int64
        assert (tokens == stream[start : start + count]).all() and len(tokens) == count
    for number, sample in enumerate(samples):
        assert (corpus.document(number) == sample["tokens.npy"]).all()
    for start, count in ((-1, 2), (len(stream), 1), (0, len(stream) + 1), (3, -1)):
        with pytest.raises(AssertionError):
            corpus.tokens(start, count)


def test_the_shard_of_every_position_is_known(prepared):
    corpus = Corpus.open(prepared[0] / "train")
    expected = np.repeat(np.arange(len(corpus.shards)), [shard.tokens for shard in corpus.shards])
    assert [corpus.shard_of(position) for position in range(corpus.total_tokens)] == expected.tolist()
    with pytest.raises(AssertionError):
        corpus.shard_of(corpus.total_tokens)


def test_threads_may_share_a_corpus(prepared, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 1)
    corpus = Corpus.open(prepared[0] / "train", verify_shards=True)
    stream = corpus.tokens(0, corpus.total_tokens)
    wrong = []

    def read(seed):
        generator = np.random.default_rng(seed)
        for start in generator.integers(0, len(stream) - 500, 300).tolist():
            if not np.array_equal(corpus.tokens(start, 500), stream[start : start + 500]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_document_cannot_be_written_through(prepared):
    document = Corpus.open(prepared[0] / "train").document(0)
    with pytest.raises(ValueError, match="read-only"):
        document[0] = 1


def test_a_split_without_a_readable_document_opens_empty(prepared, tmp_path):
    (tmp_path / "tree").mkdir()
    names = ("a.txt", "b.txt")
    held = split_documents([Document(name, tmp_path) for name in names], holdout_fraction=0.01)["validation"][0].name
    for name in names:
        (tmp_path / "tree" / name).write_text("" if name == held else "words\n")
    tokenizer = prepared[0] / "tokenizer"
    prepare([str(tmp_path / "tree")], tokenizer=tokenizer, output=tmp_path / "out", holdout_fraction=0.01)
    corpus = Corpus.open(tmp_path / "out" / "validation")
    assert (corpus.total_tokens, corpus.documents, len(corpus.tokens(0, 0))) == (0, 0, 0)


HEADER = {
    "version": 2,
    "vocab_size": 100,
    "tokenizer_fingerprint": "0",
    "holdout_fraction": 0,
    "dtype": "uint32",
    "bos_token_id": None,
    "eos_token_id": 2,
    "left_out": {},
}


def simulate(folder, *, count, documents, tokens):
    """Write the index of `count` shards of equal documents, without the shards."""
    folder.mkdir()
    rows = [
        Shard(f"shard-{n:05d}.tar", documents * (4 * tokens + 1536), f"{n:064x}", documents, documents * tokens)
        for n in range(count)
    ]
    places = np.arange(documents, dtype=np.int64) * (4 * tokens + 1536) + 1536
    lengths = np.full(documents, tokens, dtype=np.int64)
    total = count * documents
    totals = {"documents": total, "tokens": total * tokens, "bytes": 4 * total * tokens, "characters": total * tokens}
    write_index(folder, header={**HEADER, **totals}, shards=rows, arrays=(ShardArrays(places, lengths) for _ in rows))


def test_a_hundred_thousand_shards_open_at_once(tmp_path):
    """Ten million documents, simulated: neither the shards nor the arrays are read."""
    simulate(tmp_path / "train", count=100_000, documents=100, tokens=10_000)
    started = time.monotonic()
    corpus = Corpus.open(tmp_path / "train", damaged="skip")
    seconds = time.monotonic() - started
    assert seconds < 60  # seconds, measured; a minute would mean that something grows with the documents
    assert corpus.documents == 10_000_000 and corpus.total_tokens == 10**11
    assert corpus.shard_of(10**11 - 1) == 99_999 and corpus.shard_of(10**6 - 1) == 0
    assert corpus.starts.base is not None and not corpus.starts.flags.owndata  # a memory map
    assert "expected a shard of 4153600 bytes" in corpus.check_shard(70_000)
    with pytest.raises(UserError, match=r"shard-00000\.tar: found no such file"):
        Corpus.open(tmp_path / "train")


# --- damage ---


@pytest.fixture
def damaged(prepared, tmp_path):
    """A copy of the prepared training split to damage."""
    folder = tmp_path / "train"
    folder.mkdir()
    for path in (prepared[0] / "train").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_truncated_shard_is_named_with_its_sizes(damaged):
    shard = damaged / "shard-00001.tar"
    whole = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"shard-00001\.tar: found 1000 bytes, expected {whole}"):
        Corpus.open(damaged)


def test_a_missing_shard_is_named(damaged):
    (damaged / "shard-00002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00002\.tar: found no such file, expected a shard of \d+ bytes"):
        Corpus.open(damaged)


def flip(shard, place=5000):
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)


def test_a_changed_byte_is_found_on_request(damaged):
    flip(damaged / "shard-00000.tar")
    fault = r"shard-00000\.tar: found sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"
    Corpus.open(damaged).tokens(0, 10)
    assert re.search(fault, Corpus.open(damaged).check_shard(0))
    corpus = Corpus.open(damaged, verify_shards=True)
    with pytest.raises(UserError, match=fault):
        corpus.tokens(0, 10)
    position = int(corpus.first_tokens[1])
    assert len(corpus.tokens(position, 10)) == 10  # the next shard is whole


def test_damaged_shards_can_be_opened_around(damaged, monkeypatch):
    flip(damaged / "shard-00000.tar")
    (damaged / "shard-00002.tar").unlink()
    (damaged / "shard-00003.tar").write_bytes(b"")
    corpus = Corpus.open(damaged, damaged="skip")
    faults = [corpus.check_shard(number) for number in range(len(corpus.shards))]
    for number, text in ((0, "found sha256"), (2, "no such file"), (3, "found 0 bytes")):
        assert f"shard-{number:05d}.tar: " in faults[number] and text in faults[number] and "\n" not in faults[number]
    assert [number for number, fault in enumerate(faults) if fault] == [0, 2, 3]
    monkeypatch.setattr(shards, "checksum", None)  # remembered, not read again
    assert [corpus.check_shard(number) for number in range(len(corpus.shards))] == faults
    assert len(corpus.tokens(int(corpus.first_tokens[1]), 100)) == 100
    with pytest.raises(UserError, match=r"shard-00002\.tar: found no such file"):
        corpus.tokens(int(corpus.first_tokens[2]), 1)


def changed(index, **values):
    return json.dumps({**index, **values})


def test_a_wrong_index_is_one_line(damaged, tmp_path):
    file = damaged / "index.json"
    index = json.loads(file.read_text())
    first, *others = index["shards"]
    contents = {
        "not a valid index": [
            "{",
            "[]",
            "7",
            changed(index, shards=[{**first, "documents": first["documents"] + 1}, *others]),
            changed(index, shards=[{**first, "tokens": first["tokens"] + 1}, *others]),
            changed(index, shards=[{**first, "more": 1}, *others]),
            changed(index, tokens=index["tokens"] + 1),
            changed(index, documents=index["documents"] - 1),
            changed(index, dtype="no such type"),
            changed(index, shards=None),
            changed(index, arrays={}),
        ],
        "no key 'vocab_size'": [json.dumps({key: value for key, value in index.items() if key != "vocab_size"})],
        "version 1, expected 2 or 3; prepare the data again": [changed(index, version=1)],
    }
    for message, texts in contents.items():
        for text in texts:
            file.write_text(text)
            with pytest.raises(UserError, match=rf"index\.json: .*{message}") as caught:
                Corpus.open(damaged)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"nowhere/index\.json: not found"):
        Corpus.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["starts.npy", "offsets.npy"])
def test_a_wrong_array_is_one_line(name, damaged):
    file = damaged / name
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-8], b"text"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: ") as caught:
            Corpus.open(damaged)
        assert "\n" not in str(caught.value)
    for wrong in (np.zeros(4, dtype=np.int32), np.zeros((2, 2), dtype=np.int64)):
        np.save(file, wrong)
        with pytest.raises(UserError, match=rf"{name}: found .*, expected int64 in one dimension"):
            Corpus.open(damaged)
    file.unlink()
    with pytest.raises(UserError, match=rf"{name}: cannot be read"):
        Corpus.open(damaged)


def test_an_array_that_points_elsewhere_is_one_line(damaged):
    offsets, starts = (np.load(damaged / name) for name in ("offsets.npy", "starts.npy"))
    for number, offset in ((3, 10**9), (4, -8)):
        offsets[number] = offset
    np.save(damaged / "offsets.npy", offsets)
    corpus = Corpus.open(damaged)
    for number in (3, 4):
        with pytest.raises(
            UserError, match=rf"offsets\.npy: found values at {offsets[number]} to .*, expected at most"
        ):
            corpus.document(number)
    second = Corpus.open(damaged).shards[0].documents
    starts[second] += 1
    np.save(damaged / "starts.npy", starts)
    with pytest.raises(UserError, match=r"starts\.npy: does not agree with index\.json about shard-00000\.tar"):
        Corpus.open(damaged)
