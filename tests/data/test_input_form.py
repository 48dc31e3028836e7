"""What a file is: its content decides, and what is neither text nor records is refused by name."""

import bz2
import gzip
import json
import os

import pytest

from helpers.corpora import as_lines, texts, write_records
from megatron_twotower.common.errors import UserError
from megatron_twotower.data.documents import cut_units, find_documents, find_inputs, read_unit
from megatron_twotower.data.input_form import TEXT, Unreadable, find_form
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.record_formats import ARRAY, LINES, read_items

MARK = b"\xef\xbb\xbf"


def records(values=None, *, field="text"):
    return [{"id": number, field: text} for number, text in enumerate(texts(30) if values is None else values)]


def array(values=None, **options):
    return json.dumps(records(values, **options), **({"indent": 1} if values is None else {})).encode()


def read_texts(path, *, text_field="text"):
    """Every text of a file that is given as an input."""
    units = cut_units(
        find_documents([str(path)], text_field=text_field), holdout_fraction=0, text_field=text_field, unit_bytes=500
    )
    return [text for unit in units for _, text in read_unit(unit, text_field=text_field, advance=lambda _: None)]


@pytest.mark.parametrize(
    "name", ["a.json", "A.JSON", "a.JSONL", "a.NdJson", "a.txt", "a.md", "a", "a.log", "part-00000"]
)
@pytest.mark.parametrize("content", [as_lines(texts(30)), MARK + array(), array()], ids=["lines", "marked", "array"])
def test_records_are_records_under_any_name(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == texts(30)


@pytest.mark.parametrize("name", ["a.JSONL.GZ", "a.json.gz", "a.ndjson.gz", "a.Json.Zst", "a.ndjson.zst"])
@pytest.mark.parametrize("content", [as_lines(texts(30)), array()], ids=["lines", "array"])
def test_so_are_compressed_ones(name, content, tmp_path):
    compress = gzip.compress if name.lower().endswith("gz") else pytest.importorskip("zstandard").compress
    (tmp_path / name).write_bytes(compress(content))
    assert read_texts(tmp_path / name) == texts(30)


def test_parquet_may_be_in_upper_case(tmp_path):
    write_records(tmp_path / "a.parquet", texts(30)).rename(tmp_path / "A.PARQUET")
    assert read_texts(tmp_path / "A.PARQUET") == texts(30)


FORMS = {
    "one record": ("a.txt", b'{"text": "x"}', LINES),
    "one object": ("a.txt", b'{"name": "x"}', TEXT),
    "two objects": ("a.txt", b'{"name": "x"}\n{"name": "y"}\n', LINES),
    "blank lines first": ("a.txt", b'\n\n{"text": "x"}\n\n{"text": "y"}', LINES),
    "a brace": ("a.txt", b"{ is a brace\n", TEXT),
    "an object in prose": ("a.md", b'{"text": "x"}\nis a record.\n', TEXT),
    "a program": ("a.py", b"[{'a': 1}, None]\n", TEXT),
    "a list of others": ("a.txt", b"[1, 2]", TEXT),
    "a list of objects": ("a.py", b'[{"a": 1}]', TEXT),
    "text": ("a.txt", b"words", TEXT),
    "nothing": ("a.txt", b"", TEXT),
    "no JSON": ("a.json", b"words", Unreadable("found something else, expected JSON lines or one array of objects")),
    "an object": (
        "a.json",
        b'{\n "text": "x"\n}',
        Unreadable("found one JSON object over several lines, expected JSON lines or one array of objects"),
    ),
    "a list": (
        "a.json",
        b'["a"]',
        Unreadable("found a JSON array of other values than objects, expected JSON lines or one array of objects"),
    ),
    "a damaged first line": ("a.json", b'{"text": "x\n{"text": "y"}\n', LINES),
    "lists in lines": ("a.jsonl", b'["text"]\n', LINES),
    "gzip": ("a.txt", gzip.compress(b"x"), Unreadable("found gzip data, expected a name in .jsonl.gz or .json.gz")),
    "gzip under a suffix of its own": (
        "a.txt.gz",
        gzip.compress(b"x"),
        Unreadable("found gzip data, expected a name in .jsonl.gz or .json.gz"),
    ),
    "gzip as lines": (
        "a.jsonl",
        gzip.compress(b"x"),
        Unreadable("found gzip data, expected a name in .jsonl.gz or .json.gz"),
    ),
    "bzip2": (
        "a.jsonl.bz2",
        bz2.compress(b"x"),
        Unreadable("found bzip2 data, expected text, records (also in gzip or zstd) or parquet"),
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_form_is_found(case, tmp_path):
    name, content, expected = FORMS[case]
    (tmp_path / name).write_bytes(content)
    assert find_form(tmp_path / name, text_field="text") == expected
    if isinstance(expected, Unreadable):
        with pytest.raises(UserError, match=f"{name}: found "):
            find_documents([str(tmp_path / name)])


def test_parquet_under_another_name_is_refused(tmp_path):
    write_records(tmp_path / "a.parquet", texts(3)).rename(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt: found parquet data, expected a name in \.parquet"):
        find_documents([str(tmp_path / "a.txt")])


def test_what_is_passed_over_in_a_folder_is_counted_and_named(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for name, content in {
        "part-0.json": as_lines(texts(3)),
        "part-1.JSON": array(texts(3)),
        "notes.TXT": b"words",
        "package.json": b'{\n "name": "x"\n}',
        "ids.json": b"[1, 2]",
        "other.json": b'[{"body": "x"}]',
        "a.csv": b"a,b",
        "sub/b.CSV": b"a,b",
        "LICENSE": b"words",
        "z.txt": gzip.compress(b"words"),
        ".git/config.txt": b"x",
        "sub/__pycache__/c.py": b"x",
    }.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    elsewhere.mkdir()
    (data / "more").symlink_to(elsewhere)
    (data / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = find_inputs([str(data)])
    assert {document.name: document.form for document in found.documents} == {
        "part-0.json": LINES,
        "part-1.JSON": ARRAY,
        "notes.TXT": TEXT,
    }
    assert found.passed_over.counts == {
        ".json without records with 'text'": 3,
        ".csv": 2,
        "without suffix": 1,
        ".txt of gzip data": 1,
        "hidden folder": 1,
        "__pycache__": 1,
        "link to a folder": 1,
        "no file": 1,
    }
    names = [".git/", "LICENSE", "a.csv", "gone.txt", "ids.json", "more/", "other.json", "package.json"]
    assert found.passed_over.first == [*names, "sub/__pycache__/", "sub/b.CSV"]
    assert str(found.passed_over).endswith("sub/b.CSV, ...)")
    # With another field other files are the records; files with a suffix asked for are text.
    assert [each.name for each in find_documents([str(data)], text_field="body") if each.is_records] == ["other.json"]
    asked = find_documents([str(data)], suffixes=[".json"])
    assert {each.name: each.form for each in asked}["package.json"] == TEXT
    assert {each.name: each.form for each in asked}["part-0.json"] == LINES


def test_the_summary_says_what_was_passed_over(small_tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    write_records(tmp_path / "data" / "a.jsonl", texts(20))
    (tmp_path / "data" / "b.csv").write_text("x")
    summary = prepare([str(tmp_path / "data")], tokenizer=small_tokenizer, output=tmp_path / "out", holdout_fraction=0)
    assert summary["passed_over"] == {"counts": {".csv": 1}, "first": ["b.csv"]}
    (tmp_path / "data" / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"data: no files found there, expected .*; passed over: 1 \.csv \(b\.csv\)"):
        find_documents([str(tmp_path / "data")])


def test_names_that_are_not_utf8_are_shown_as_escapes(tmp_path):
    for name in (b"\xff.txt", b"\xfe.csv"):
        (tmp_path / os.fsdecode(name)).write_text("words")
    found = find_inputs([str(tmp_path)])
    assert len(found.documents) == 1
    assert str(found.passed_over) == "1 .csv (\\udcfe.csv)"


def test_a_file_of_records_that_is_none_is_refused_in_a_folder_too(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match=r"a\.jsonl: found gzip data"):
        find_documents([str(tmp_path)])


# --- arrays ---

VALUES = [{"text": 'a "quoted"\n\\ é日🙂', "n": [1.5e-7, -3, None]}, 12, {}, [], "", True, {"text": "x" * 300}]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 16])
def test_an_array_is_read_in_pieces_of_any_size(piece, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_twotower.data.record_formats._BYTES_A_READ", piece)
    for text in (json.dumps(VALUES), json.dumps(VALUES, indent=2, ensure_ascii=False), " [ ] ", "[1.5e-7]"):
        (tmp_path / "a.json").write_bytes(MARK + text.encode() + b"\n\n")
        counted = []
        assert list(read_items(tmp_path / "a.json", ARRAY, advance=counted.append)) == json.loads(text)
        assert sum(counted) == (tmp_path / "a.json").stat().st_size


@pytest.mark.parametrize("piece", [1, 1 << 16])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b"', "after 1 values"),
        (b'[{"text": "a"}', "after 1 values: it ends"),
        (b'[{"text": "a"},]', "after 1 values: Expecting value"),
        (b'[{"text": "a"} {"text": "b"}]', "after 1 values: found '{', expected , or ]"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', "after 1 values: found '\\[' after its end"),
        (b'[{"text": "a\xff"}]', "after 0 values: not UTF-8"),
    ],
)
def test_a_damaged_array_is_named_in_one_line(content, reason, piece, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_twotower.data.record_formats._BYTES_A_READ", piece)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: not a JSON array \({reason}") as caught:
        list(read_items(tmp_path / "a.json", ARRAY))
    assert "\n" not in str(caught.value)


def test_a_damaged_array_ends_a_preparation_in_one_line(small_tokenizer, tmp_path):
    for content in (array(texts(9))[:-40], b'[{"text": ' + b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json: not a JSON array"):
            prepare([str(tmp_path / "a.json")], tokenizer=small_tokenizer, output=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").exists()


# --- parquet ---


def test_columns_of_one_name_are_refused_where_they_matter(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    one, two = pyarrow.array(["a", "b"]), pyarrow.array([1, 2])
    parquet.write_table(pyarrow.table([one, one, two], names=["text", "text", "id"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: found 2 columns 'text', expected one"):
        read_texts(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table([two, one, two], names=["id", "text", "id"]), tmp_path / "b.parquet")
    assert read_texts(tmp_path / "b.parquet") == ["a", "b"]
    pairs = pyarrow.array([[("a", "b")], []], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    parquet.write_table(pyarrow.table([pairs], names=["text"]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: column 'text' holds map<string, string.*>, expected strings"):
        read_texts(tmp_path / "c.parquet")
    parquet.write_table(pyarrow.table([one.dictionary_encode()], names=["text"]), tmp_path / "d.parquet")
    assert read_texts(tmp_path / "d.parquet") == ["a", "b"]
