"""Fixtures for tests of prepared data."""

import pytest

from helpers.corpora import make_tokenizer, texts, write_records
from megatron_twotower.data.prepare import prepare


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    """A tokenizer folder of 320 entries."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", texts())


@pytest.fixture
def work_folder(tmp_path):
    """A folder with the subfolders of OUTPUT.partial."""
    for name in ("parts", "shards", "data/train"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope="session")
def prepared_blend(tmp_path_factory):
    """Two prepared folders, `one` and `two`, of one tokenizer, and a blend of them.

    Tests must not change them.
    """
    folder = tmp_path_factory.mktemp("prepared")
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
