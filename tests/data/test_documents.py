"""Documents: which files are found and held out; every record is read once, for any units."""

import gzip
import itertools
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from helpers.corpora import as_lines, texts, write_records, write_tree
from megatron_twotower.common.errors import UserError
from megatron_twotower.data.documents import (
    Document,
    cut_units,
    find_documents,
    find_inputs,
    held_out,
    read_text,
    read_unit,
    split_documents,
    training_texts,
)
from megatron_twotower.data.record_formats import Fault

FORMATS = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.ndjson", "a.parquet")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


def units_of(path, *, unit_bytes=1 << 20, text_field="text"):
    return cut_units(find_documents([str(path)]), holdout_fraction=0, text_field=text_field, unit_bytes=unit_bytes)


def read(units, *, text_field="text"):
    """What each unit gives, and the bytes of input it counted."""
    counted = []
    items = [list(read_unit(unit, text_field=text_field, advance=counted.append)) for unit in units]
    return items, sum(counted)


# --- which files ---


def test_a_folder_gives_its_text_files_by_relative_name(tree):
    names = [document.name for document in find_documents([str(tree)])]
    assert names == sorted(names)
    assert {"copy.py", "guide.md", "notes.txt", "package3/module8.py"} <= set(names)
    assert len(names) == 60 + 5
    assert not any("hidden" in name or "picture" in name for name in names)


def test_a_folder_gives_its_files_of_records_and_the_suffixes_asked_for(tmp_path):
    for name in (*FORMATS, "b.json", "c.rs", "c.py"):
        (tmp_path / name).write_bytes(b"")
    assert [document.name for document in find_documents([str(tmp_path)])] == sorted([*FORMATS, "c.py"])
    found = find_documents([str(tmp_path)], suffixes=[".rs"])
    assert [document.name for document in found if not document.is_records] == ["c.rs"]


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


def test_input_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        ([str(tmp_path / "nowhere")], "nowhere: no such file or folder"),
        ([str(tmp_path / "empty")], r"empty: no files found there, expected some of \.md, \.py, \.txt, \.jsonl"),
        ([], "no input given"),
    ):
        with pytest.raises(UserError, match=message):
            find_documents(inputs)


def test_text_is_read_as_it_is_and_only_as_utf8(tree):
    assert read_text(Document("guide.md", tree / "guide.md")) == "# Guide\r\n\r\nLine breaks stay.\r\n"
    assert read_text(Document("latin.py", tree / "latin.py")) is None
    with pytest.raises(UserError, match=r"gone\.py: cannot be read"):
        read_text(Document("gone.py", tree / "gone.py"))


# --- which are held out ---


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


def test_a_record_is_held_out_by_its_text():
    held = [text for text in texts(4000) if held_out(text, 0.1)]
    assert 330 < len(held) < 470
    assert set(held) < {text for text in texts(4000) if held_out(text, 0.2)}


# --- units ---


def test_units_stand_in_the_order_in_which_the_first_copy_of_a_text_is_the_held_out_one(tree, tmp_path):
    records = write_records(tmp_path / "b.jsonl", texts())
    units = cut_units(
        find_documents([str(tree), str(records)]), holdout_fraction=0.3, text_field="text", unit_bytes=2000
    )
    splits = [unit.split for unit in units]
    assert [name for name, _ in itertools.groupby(splits)] == ["validation", None, "train"]
    files = [document for unit in units if unit.split for document in unit.files]
    assert sorted(files, key=lambda document: document.name) == find_documents([str(tree)])
    assert all(unit.size <= 2000 or len(unit.files) == 1 for unit in units)
    assert sum(unit.size for unit in units) == sum(document.path.stat().st_size for document in files) + (
        records.stat().st_size
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_record_is_read_once_and_in_order(name, tmp_path):
    expected = texts()
    path = write_records(tmp_path / name, expected, field="body")
    units = units_of(path, text_field="body")
    items, counted = read(units, text_field="body")
    assert [item for unit in items for item in unit] == list(enumerate(expected))
    assert counted >= 0.9 * sum(unit.size for unit in units)


@pytest.mark.parametrize("unit_bytes", [1, 2, 99, 1000, 5000, 10**6])
def test_a_line_belongs_to_the_unit_it_starts_in(unit_bytes, tmp_path):
    expected = texts(40)
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(expected).replace(b"\n", b"\n\n", 7).removesuffix(b"\n"))
    units = units_of(path, unit_bytes=unit_bytes)
    items, counted = read(units)
    assert [text for unit in items for _, text in unit if text is not None] == expected
    assert counted == path.stat().st_size
    for unit in items:
        assert [number for number, _ in unit] == list(range(len(unit)))  # blank lines count too
    assert sum(map(len, items)) == 47


def test_row_groups_are_cut_in_units(tmp_path):
    expected = texts(200)
    path = write_records(tmp_path / "a.parquet", expected)
    whole, cut = units_of(path), units_of(path, unit_bytes=3000)
    assert (len(whole), (whole[0].begin, whole[0].end)) == (1, (0, 7))
    assert len(cut) > 2 and [unit.begin for unit in cut[1:]] == [unit.end for unit in cut[:-1]]
    assert [text for unit in read(cut)[0] for _, text in unit] == expected


def test_a_compressed_file_may_have_several_members(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    for suffix, compress in (("gz", gzip.compress), ("zst", zstandard.compress)):
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(b"".join(compress(as_lines([text])) for text in texts(30)))
        assert [text for unit in read(units_of(path))[0] for _, text in unit] == texts(30)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_marks_and_line_breaks_of_other_systems_are_skipped(name, tmp_path):
    """Byte order marks (also of an appended file), CRLF, blank lines and NUL characters."""
    expected = [*texts(30), "a\0b"]
    mark = b"\xef\xbb\xbf"
    lines = as_lines(expected).replace(b"\n", b"\r\n").splitlines(keepends=True)
    content = b"".join([mark, *lines[:10], b"\r\n", mark, *lines[10:], mark])
    path = tmp_path / name
    compress = {".gz": gzip.compress, ".zst": pytest.importorskip("zstandard").compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    items = [item for unit in read(units_of(path, unit_bytes=500))[0] for item in unit]
    assert [text for _, text in items if text is not None] == expected
    assert sum(text is None for _, text in items) == 2


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords\xef\xbb\xbf")
    assert read_text(Document("a.txt", tmp_path / "a.txt")) == "words\ufeff"


def test_a_very_long_line_is_one_record(tmp_path):
    expected = ["x" * 3_000_000, "short"]
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        path = write_records(tmp_path / name, expected)
        assert [text for unit in read(units_of(path, unit_bytes=1000))[0] for _, text in unit] == expected


def test_malformed_records_are_named(tmp_path):
    lines = {
        b'{"text": "good"}': None,
        b'{"text": "cut': "not JSON",
        b'{"other": "x"}': "no field 'text'",
        b'{"text": 7}': "field 'text' holds int, expected a string",
        b'["text"]': "a JSON list, expected an object",
        b'{"text": "\xff"}': "not UTF-8",
        b'{"text": "\\ud800"}': "unpaired surrogate",
        b"[" * 100_000: "not JSON",
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    ((first, *faults),), _ = read(units_of(path))
    assert first == (0, "good")
    for (number, fault), (place, reason) in zip(faults, list(enumerate(lines.values()))[1:], strict=True):
        assert number == place and isinstance(fault, Fault) and fault.malformed and reason in fault.reason
        assert "\n" not in fault.reason


def test_a_parquet_value_that_is_no_string_is_malformed_and_a_column_that_is_none_an_error(tmp_path):
    path = write_records(tmp_path / "a.parquet", ["one", None, "three"])
    ((one, two, three),), _ = read(units_of(path))
    assert (one, three) == ((0, "one"), (2, "three"))
    assert two[1] == Fault("column 'text' holds NoneType, expected a string", malformed=True)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'body', found id, text"):
        units_of(path, text_field="body")
    with pytest.raises(UserError, match=r"a\.parquet: column 'id' holds int64, expected strings"):
        units_of(path, text_field="id")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named_in_one_line(name, tmp_path):
    path = write_records(tmp_path / name, texts(5000))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2 : len(whole) // 2 + 200] = bytes(200)
    for damaged in (whole[: len(whole) // 2], whole[:-1], bytes(flipped), b"not what the name says"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name) as caught:
            read(units_of(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_package_that_is_missing_is_named(name, package, tmp_path, monkeypatch):
    path = write_records(tmp_path / name, texts(3))
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{name}: .* needs the package {package} \(pip install"):
        read(units_of(path))


def test_a_tokenizer_is_trained_on_what_is_not_held_out(tree, tmp_path):
    write_records(tmp_path / "a.jsonl", [*texts(), 7])
    documents = find_documents([str(tree), str(tmp_path / "a.jsonl")])
    found = list(training_texts(documents, holdout_fraction=0.2, text_field="text"))
    files = split_documents(find_documents([str(tree)]), holdout_fraction=0.2)["train"]
    assert found[: -len(files) + 1] == [text for text in texts() if not held_out(text, 0.2)]
    assert found[-len(files) + 1 :] == [text for file in files if (text := read_text(file)) is not None]
    assert json.dumps(found)


def test_inputs_at_urls_are_read_like_files(tmp_path):
    """Lines in pieces, compressed lines, parquet and text files of a folder in memory."""
    pytest.importorskip("upath")
    import fsspec

    local = write_tree(tmp_path / "local", count=7)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        write_records(local / "records" / name, texts(100))
    memory = fsspec.filesystem("memory")
    memory.put(f"{local}/", "/bucket/texts/", recursive=True)

    def read(given):
        found = find_inputs([given])
        units = cut_units(found.documents, holdout_fraction=0.2, text_field="text", unit_bytes=2000)
        items = [list(read_unit(unit, text_field="text", advance=lambda _: None)) for unit in units]
        names = [[document.name for document in unit.files] for unit in units]
        return names, [(unit.split, unit.begin, unit.end, unit.size) for unit in units], items, found.passed_over

    assert read("memory://bucket/texts") == read(str(local))
    assert find_inputs(["memory://bucket/texts/records/a.jsonl"]).documents[0].name == "a.jsonl"
    with pytest.raises(UserError, match="memory://bucket/none: no such file or folder"):
        find_inputs(["memory://bucket/none"])
    with pytest.raises(UserError, match=r"nothing://a: needs a package that is not installed"):
        find_inputs(["nothing://a"])
