"""Text to prepare, in every form of input, and the shards as plain webdataset reads them."""

import gzip
import json

import webdataset

from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.tokenizer import train_tokenizer


def write_tree(root, count=60):
    """Python files of various lengths in nested folders, and files that must be skipped."""
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


def texts(count=200, *, start=0):
    """Different texts of one line to some hundred characters."""
    return [f"number {n}:" + f" value {n * n} of ünit {n % 7}\n" * (1 + n % 13) for n in range(start, start + count)]


def as_lines(values, *, field="text"):
    return "".join(json.dumps({"id": n, field: value}) + "\n" for n, value in enumerate(values)).encode()


def write_records(path, values, *, field="text"):
    """`values` as a file of records of the form that the name of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = __import__("pyarrow.parquet")
        table = pyarrow.table({"id": list(range(len(values))), field: values})
        pyarrow.parquet.write_table(table, path, row_group_size=30)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(as_lines(values, field=field)))
    elif path.suffix == ".zst":
        path.write_bytes(__import__("zstandard").compress(as_lines(values, field=field)))
    else:
        path.write_bytes(as_lines(values, field=field))
    return path


def prepare_chats(folder, turns, *, template, tokenizer, **settings):
    """Prepare conversations with a chat template. Returns the prepared folder."""
    (folder / "template.jinja").write_text(template)
    write_records(folder / "chats.jsonl", turns, field="messages")
    prepare(
        [str(folder / "chats.jsonl")],
        tokenizer=tokenizer,
        output=folder / "data",
        chat=True,
        chat_template=folder / "template.jinja",
        **settings,
    )
    return folder / "data"


def make_tokenizer(folder, samples):
    train_tokenizer(samples, vocab_size=320, output=folder)
    return folder


def read_samples(folder):
    """Every sample as plain webdataset reads it, in the order of the shards."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())


def content(folder, *, leave_out=()):
    """The bytes of every file under a folder, by relative name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }
