"""Shards: which documents, where their tokens lie, and what happens when something is wrong."""

import itertools
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megatron_twotower import shards
from megatron_twotower.records import UserError
from megatron_twotower.shards import Corpus, Document, find_documents, prepare, read_text, split_documents
from megatron_twotower.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer

END = 2


def write_tree(root, count=60):
    """Python files of various lengths in nested folders, and everything that must be passed over."""
    for number in range(count):
        path = root / f"package{number % 5}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {number}\n" + f"def function_{number}(x):\n    return x + {number}\n" * (1 + number % 17))
    (root / "notes.txt").write_text("Text with the word <mask> and </s> in it, and ünïcode 日本.\n")
    (root / "guide.md").write_text("# Guide\r\n\r\nLine breaks stay.\r\n")
    (root / "copy.py").write_text((root / "package0" / "module0.py").read_text())
    (root / "empty.py").write_text("")
    (root / "latin.py").write_bytes("# é\n".encode("latin-1"))
    (root / "picture.png").write_bytes(b"\x89PNG")
    for hidden in (".git", "__pycache__", "site-packages/other"):
        (root / hidden).mkdir(parents=True)
        (root / hidden / "hidden.py").write_text("hidden = True\n")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def tokenizer(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    train_tokenizer([path.read_text() for path in sorted(tree.glob("package*/*.py"))], vocab_size=320, output=folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tree, tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "prepared"
    summary = prepare([str(tree)], tokenizer=tokenizer, output=output, holdout_fraction=0.2, shard_tokens=1500)
    return output, summary


def read_samples(folder):
    """Every sample as plain webdataset reads it, in the order of the shards."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode())


# --- which documents ----------------------------------------------------------------------------------------------


def test_a_folder_gives_its_text_files_by_relative_name(tree):
    names = [document.name for document in find_documents([str(tree)])]
    assert names == sorted(names)
    assert {"copy.py", "guide.md", "notes.txt", "package3/module8.py"} <= set(names)
    assert len(names) == 60 + 5
    assert not any("hidden" in name or "picture" in name for name in names)


def test_a_file_reached_twice_counts_once(tree):
    file = tree / "package3" / "module8.py"
    whole = find_documents([str(tree)])
    assert find_documents([str(tree), str(file), str(file.parent), str(tree)]) == whole
    first = find_documents([str(file), str(tree)])
    assert first[0] == Document("module8.py", file)
    assert len(first) == len(whole)


def test_the_standard_library_is_that_of_the_interpreter():
    documents = {document.name: document.path for document in find_documents(["python-stdlib"])}
    assert documents["argparse.py"] == Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    assert "json/decoder.py" in documents
    assert len(documents) > 400
    assert all(name.endswith(".py") for name in documents)
    assert not any("site-packages" in name or "__pycache__" in name for name in documents)


def test_text_is_read_as_it_is_and_only_as_utf8(tree):
    assert read_text(Document("guide.md", tree / "guide.md")) == "# Guide\r\n\r\nLine breaks stay.\r\n"
    assert read_text(Document("latin.py", tree / "latin.py")) is None
    with pytest.raises(UserError, match=r"gone\.py: cannot be read"):
        read_text(Document("gone.py", tree / "gone.py"))


def test_the_split_depends_on_the_name_alone():
    documents = [Document(f"folder/{number}.py", Path(f"/a/{number}")) for number in range(4000)]
    splits = split_documents(documents, holdout_fraction=0.1)
    held = {document.name for document in splits["validation"]}
    assert held.isdisjoint(document.name for document in splits["train"])
    assert len(splits["train"]) + len(splits["validation"]) == 4000
    assert 330 < len(held) < 470  # binomial, 3.7 standard deviations
    part = [Document(document.name, Path("/elsewhere")) for document in reversed(documents[1000:3000])]
    again = split_documents(part, holdout_fraction=0.1)
    assert {document.name for document in again["validation"]} == held & {document.name for document in part}
    assert [d.name for d in again["train"]] == [d.name for d in splits["train"] if d.name in {p.name for p in part}]


def test_neighbours_are_not_of_one_package():
    documents = [Document(f"{package}/{number}.py", Path("x")) for package in range(20) for number in range(50)]
    names = [document.name for document in split_documents(documents, holdout_fraction=0)["train"]]
    same = sum(a.split("/")[0] == b.split("/")[0] for a, b in itertools.pairwise(names))
    assert same < 100  # 50 expected; 980 in sorted order


def test_few_documents_are_still_split_and_a_name_never_twice():
    two = [Document("a.py", Path("a")), Document("b.py", Path("b"))]
    for fraction in (1e-9, 0.999999):
        splits = split_documents(two, holdout_fraction=fraction)
        assert len(splits["train"]) == len(splits["validation"]) == 1
    same = [Document("a.py", Path(str(number))) for number in range(3)]
    assert split_documents(same, holdout_fraction=0.5) == {"train": same, "validation": []}
    for fraction in (0.01, 0.3, 0.9):
        splits = split_documents([*same, *two], holdout_fraction=fraction)
        names = [{document.name for document in documents} for documents in splits.values()]
        assert names[0] and names[1] and names[0].isdisjoint(names[1])
    assert split_documents(two, holdout_fraction=0)["validation"] == []
    for fraction in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"holdout_fraction {fraction}: expected"):
            split_documents(two, holdout_fraction=fraction)


# --- preparing ----------------------------------------------------------------------------------------------------


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
    """Else validation would score a text that was trained on."""
    (tmp_path / "tree").mkdir()
    for number in range(30):
        (tmp_path / "tree" / f"{number}.txt").write_text("the same words\n")
    (tmp_path / "tree" / "other.txt").write_text("other words\n")
    summary = prepare([str(tmp_path / "tree")], tokenizer=tokenizer, output=tmp_path / "out", holdout_fraction=0.3)
    texts = {
        split: {sample["tokens.npy"].tobytes() for sample in read_samples(tmp_path / "out" / split)}
        for split in ("train", "validation")
        if split in summary["splits"]
    }
    assert len(texts["train"] | texts["validation"]) == 2
    assert texts["train"].isdisjoint(texts["validation"])


def test_shards_hold_whole_documents_up_to_their_size(prepared):
    output, summary = prepared
    index = json.loads((output / "train" / "index.json").read_text())
    sizes = [sum(shard["tokens"]) for shard in index["shards"]]
    assert len(sizes) > 2
    assert max(sizes) <= 1500 and min(sizes[:-1]) > 1500 - max(max(shard["tokens"]) for shard in index["shards"])
    assert sum(sizes) == summary["splits"]["train"]["tokens"]


def test_the_same_documents_give_the_same_bytes(tree, tokenizer, prepared, tmp_path):
    output, summary = prepared
    elsewhere = write_tree(tmp_path / "elsewhere")
    again = prepare(
        [str(elsewhere)], tokenizer=tokenizer, output=tmp_path / "again", holdout_fraction=0.2, shard_tokens=1500
    )
    assert again == summary
    files = sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (output / file).read_bytes(), file


def test_the_tokenizer_goes_with_the_data(tokenizer, prepared):
    output, summary = prepared
    assert tokenizer_fingerprint(output / "tokenizer") == tokenizer_fingerprint(tokenizer)
    assert summary["tokenizer_fingerprint"] == tokenizer_fingerprint(tokenizer)
    assert load_tokenizer(output / "tokenizer").mask_token_id == 3


def test_progress_reaches_every_document(tree, tokenizer, tmp_path):
    calls = []
    prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls == [(number, 65) for number in range(1, 66)]


def test_a_large_vocabulary_takes_four_bytes_a_token(tree, tokenizer, tmp_path):
    file = tokenizer / "tokenizer.json"
    large = json.loads(file.read_text())
    large["added_tokens"].append({**large["added_tokens"][0], "id": 70_000, "content": "<far>", "special": True})
    large["model"]["vocab"]["<far>"] = 70_000
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(large))
    (tmp_path / "large" / "tokenizer_config.json").write_bytes((tokenizer / "tokenizer_config.json").read_bytes())
    summary = prepare([str(tree)], tokenizer=tmp_path / "large", output=tmp_path / "out")
    assert summary["vocab_size"] == 70_001
    assert {sample["tokens.npy"].dtype for sample in read_samples(tmp_path / "out" / "train")} == {np.dtype("uint32")}
    corpus = Corpus.open(tmp_path / "out" / "train")
    expected = np.concatenate([sample["tokens.npy"] for sample in read_samples(tmp_path / "out" / "train")])
    assert (corpus.tokens(0, corpus.total_tokens) == expected).all()


def test_nothing_is_overwritten_unless_asked_and_only_prepared_data(tree, tokenizer, tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # an empty folder will do
    prepare([str(tree)], tokenizer=tokenizer, output=output)
    before = (output / "train" / "index.json").read_bytes()
    with pytest.raises(UserError, match="out: exists already"):
        prepare([str(tree)], tokenizer=tokenizer, output=output)
    assert (output / "train" / "index.json").read_bytes() == before
    prepare([str(tree / "package1")], tokenizer=tokenizer, output=output, overwrite=True)
    assert (output / "train" / "index.json").read_bytes() != before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"home: holds no train/index\.json"):
        prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "home", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


def test_a_failure_leaves_no_output_and_spares_the_earlier_one(tree, tokenizer, tmp_path):
    def stop(done, total):
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []
    prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "out")
    before = (tmp_path / "out" / "summary.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "out", overwrite=True, progress=stop)
    assert (tmp_path / "out" / "summary.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out.partial").mkdir()  # what a killed run leaves
    (tmp_path / "out.partial" / "train").mkdir()
    prepare([str(tree)], tokenizer=tokenizer, output=tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_input_is_one_line(tree, tokenizer, tmp_path):
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "alone.txt").write_text("")
    cases = [
        ("nowhere: no such file or folder", [str(tmp_path / "nowhere")], {}),
        (r"empty: no files found there, expected some of \.md, \.py, \.txt", [str(tmp_path / "empty")], {}),
        ("no input given", [], {}),
        ("none of 2 files left to train on", [str(tmp_path / "latin.txt"), str(tmp_path / "alone.txt")], {}),
        ("shard_tokens 0: expected at least 1", [str(tree)], {"shard_tokens": 0}),
        ("holdout_fraction 2: expected", [str(tree)], {"holdout_fraction": 2}),
    ]
    for message, inputs, options in cases:
        with pytest.raises(UserError, match=message) as caught:
            prepare(inputs, tokenizer=tokenizer, output=output, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="tokenizer: no such folder"):
        prepare([str(tree)], tokenizer=tmp_path / "tokenizer", output=output)
    assert not output.exists() and not (tmp_path / "out.partial").exists()


# --- reading ------------------------------------------------------------------------------------------------------


def test_any_stretch_of_the_stream_can_be_read(prepared, monkeypatch):
    output, summary = prepared
    samples = read_samples(output / "train")
    stream = np.concatenate([sample["tokens.npy"] for sample in samples]).astype(np.int64)
    corpus = Corpus.open(output / "train", verify=True)
    totals = summary["splits"]["train"]
    assert (corpus.total_tokens, corpus.total_bytes) == (totals["tokens"], totals["bytes"])
    assert (corpus.total_characters, corpus.documents) == (totals["characters"], totals["documents"])
    assert (corpus.vocab_size, corpus.tokenizer_fingerprint) == (320, summary["tokenizer_fingerprint"])
    assert corpus.total_tokens == len(stream)
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)  # maps are dropped and made again
    generator = np.random.default_rng(0)
    stretches = [(0, len(stream)), (0, 0), (len(stream), 0), (len(stream) - 1, 1), (0, 1)]
    for start in generator.integers(0, len(stream), 200).tolist():
        stretches.append((start, int(generator.integers(0, min(700, len(stream) - start) + 1))))
    for start, count in stretches:
        tokens = corpus.tokens(start, count)
        assert tokens.dtype == np.int64
        assert (tokens == stream[start : start + count]).all() and len(tokens) == count
    for number, sample in enumerate(samples):
        assert (corpus.document(number) == sample["tokens.npy"]).all()
    for start, count in ((-1, 2), (len(stream), 1), (0, len(stream) + 1), (3, -1)):
        with pytest.raises(AssertionError):
            corpus.tokens(start, count)


def test_a_document_cannot_be_written_through(prepared):
    document = Corpus.open(prepared[0] / "train").document(0)
    with pytest.raises(ValueError, match="read-only"):
        document[0] = 1


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


def test_a_changed_byte_is_found_on_request(damaged):
    shard = damaged / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    Corpus.open(damaged)
    with pytest.raises(UserError, match=r"shard-00000\.tar: found sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        Corpus.open(damaged, verify=True)


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
            changed(index, shards=[{**first, "offsets": first["offsets"][:-1]}, *others]),
            changed(index, shards=[{**first, "offsets": [10**9] * len(first["offsets"])}, *others]),
            changed(index, tokens=index["tokens"] + 1),
            changed(index, dtype="no such type"),
            changed(index, shards=None),
        ],
        "no key 'vocab_size'": [json.dumps({key: value for key, value in index.items() if key != "vocab_size"})],
        "version 99, expected 1": [changed(index, version=99)],
    }
    for message, texts in contents.items():
        for text in texts:
            file.write_text(text)
            with pytest.raises(UserError, match=rf"index\.json: .*{message}") as caught:
                Corpus.open(damaged)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"nowhere/index\.json: not found"):
        Corpus.open(tmp_path / "nowhere")


def test_a_split_without_a_readable_document_opens_empty(tokenizer, tmp_path):
    (tmp_path / "tree").mkdir()
    names = ("a.txt", "b.txt")
    held = split_documents([Document(name, Path(name)) for name in names], holdout_fraction=0.01)["validation"][0].name
    for name in names:
        (tmp_path / "tree" / name).write_text("" if name == held else "words\n")
    prepare([str(tmp_path / "tree")], tokenizer=tokenizer, output=tmp_path / "out", holdout_fraction=0.01)
    corpus = Corpus.open(tmp_path / "out" / "validation")
    assert (corpus.total_tokens, corpus.documents, len(corpus.tokens(0, 0))) == (0, 0, 0)
