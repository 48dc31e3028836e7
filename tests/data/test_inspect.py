"""`data inspect`: what is shown of prepared data."""

import numpy as np
import pytest

from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.data import inspect as data_inspect
from megatron_twotower.data.inspect import decoded_blocks, evenly_spaced, inspect, text_histogram
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import load_tokenizer


def test_inspect_shows_counts_lengths_and_samples_and_draws_the_lengths(prepared_blend, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    picture = tmp_path / "lengths.png"
    inspect(str(prepared_blend / "one"), split="train", samples=2, block_size=8, picture=picture)
    shown = capsys.readouterr().out
    corpus = Corpus.open(prepared_blend / "one" / "train")
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


def test_inspect_of_a_blend_shows_every_corpus_once(prepared_blend, tmp_path, capsys):
    inspect(
        str(prepared_blend / "blend.yaml"), split="validation", samples=1, block_size=16, picture=tmp_path / "p.png"
    )
    shown = capsys.readouterr().out
    assert "first" in shown and "second" in shown and shown.count("\ndocument 0: ") == 2
    assert (tmp_path / "p.png").is_file()


def test_boundaries_fall_where_blocks_of_the_stream_meet(prepared_blend):
    corpus = Corpus.open(prepared_blend / "one" / "train")
    opened = load_tokenizer(prepared_blend / "tokenizer")
    for size in (1, 5, 16):
        for number in range(20):
            ids, start = corpus.document(number).tolist(), int(corpus.starts[number])
            expected = [ids[:1]]
            for place, one in enumerate(ids[1:], start=1):
                if (start + place) % size:
                    expected[-1].append(one)
                else:
                    expected.append([one])
            shown = decoded_blocks(corpus, number, block_size=size, tokenizer=opened).plain
            pieces = [opened.decode(piece) for piece in expected]
            assert shown.removesuffix(" …") == "|".join(pieces[:12])
            assert shown.endswith(" …") == (len(pieces) > 12)
    ids = corpus.document(0)[:4].tolist()
    assert decoded_blocks(corpus, 0, block_size=4, tokenizer=None).plain.startswith(" ".join(map(str, ids)) + "|")


def test_the_share_of_straddling_blocks_and_of_padding(prepared_blend):
    corpus = Corpus.open(prepared_blend / "one" / "train")
    for size in (1, 8, 64):
        numbers = np.repeat(np.arange(corpus.documents), np.diff(corpus.starts))
        blocks = [numbers[at : at + size] for at in range(0, len(numbers), size)]
        share = np.mean([block[0] != block[-1] for block in blocks])
        padded = sum(-(-length // size) * size for length in np.diff(corpus.starts).tolist())
        text = data_inspect._blocks(corpus, size)
        assert f"{100 * share:.2f}% contain a document boundary" in text
        assert f"padding is {100 * (padded - len(numbers)) / padded:.2f}%" in text


def test_a_histogram_in_text():
    lines = text_histogram([0, 2, 0, 4, 0], [1, 2, 4, 8, 16, 32]).splitlines()
    assert [line.split()[:3] for line in lines] == [["2", "to", "3"], ["4", "to", "7"], ["8", "to", "15"]]
    assert [line.count("█") for line in lines] == [20, 0, 40]
    assert text_histogram([0, 0], [1, 2, 4]) == "no documents"


def test_samples_are_evenly_spaced():
    assert evenly_spaced(100, 4) == [0, 25, 50, 75]
    assert evenly_spaced(2, 5) == [0, 1] and evenly_spaced(0, 3) == [] and evenly_spaced(5, 0) == []


def test_a_wrong_path_is_one_line(tmp_path, capsys):
    for command in (["inspect", str(tmp_path)], ["verify", str(tmp_path)], ["inspect", str(tmp_path / "no.yaml")]):
        assert main.main(["data", *command]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path) in error and error.count("\n") == 1
    with pytest.raises(UserError, match="block_size 0: expected at least 1"):
        inspect(str(tmp_path), split="train", samples=1, block_size=0, picture=tmp_path / "p.png")
