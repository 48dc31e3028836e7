"""The benchmark of the loader at a very small size: all readers read the same tokens."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from rich.console import Console

from megatron_twotower.bench import data as bench_data
from megatron_twotower.bench.data import DataOptions, random_corpus, run
from megatron_twotower.data.dataset import SequenceDataset, global_batch
from megatron_twotower.data.packing import Packing
from megatron_twotower.data.shards import Corpus

SMALL = DataOptions(
    tokens=30_000, length=128, batch=2, seconds=0.01, rounds=1, shards=20, documents=2000, recipe="tiny"
)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(bench_data, "_SHARD_TOKENS", 10_000)


def test_it_measures_every_reader_and_writes_what_it_prints(tmp_path, tiny_backbone):
    console = Console(record=True, width=120)
    options = dataclasses.replace(SMALL, backbone=tiny_backbone)
    run(tmp_path / "results.json", options=options, console=console)
    results = json.loads((tmp_path / "results.json").read_text())
    rates = results["tokens_per_second"]
    assert len(rates) == 10 and min(rates.values()) > 0
    assert rates["training, tiny"] < rates["ours, documents apart, with noise"]
    text = console.export_text()
    for name, rate in rates.items():
        assert name in text and f"{rate:,}" in text
    start = results["start_up"]
    assert (start["shards"], start["documents"]) == (20, 40_000)
    assert "20 shards, 40,000 documents" in text


def test_what_is_compared_reads_the_same_tokens(tmp_path):
    corpus = random_corpus(tmp_path / "corpus", tokens=SMALL.tokens)
    stream = corpus.tokens(0, corpus.total_tokens)
    whole = corpus.total_tokens // SMALL.length
    plain = bench_data._cut(bench_data._webdataset_documents(corpus), SMALL.length)
    for number in range(whole):
        assert (next(plain) == stream[number * SMALL.length : (number + 1) * SMALL.length]).all()
    dataset = SequenceDataset(corpus, sequence_length=SMALL.length, seed=0)
    batch = global_batch(dataset, first=0, count=whole)
    assert (batch.tokens[batch.samples.argsort()].flatten().numpy() == stream[: whole * SMALL.length]).all()


def test_memory_of_an_open_corpus_does_not_grow_with_its_documents(tmp_path):
    """Nor does that of a worker that reads it: a hundred times the documents, in as many shards."""
    sizes = []
    for documents in (20, 2000):
        folder = tmp_path / str(documents)
        bench_data._write_large(folder, shards=100, per_shard=documents, tokens=100)
        Corpus.open(folder)  # what is imported and cached on the way
        tracemalloc.start()
        corpus = Corpus.open(folder)
        packing = Packing.of(corpus.starts, alignment=16)
        dataset = SequenceDataset(corpus, sequence_length=128, seed=0, packing=packing)
        _, numbers = dataset.locate(np.array([10**9]))
        packing.window(int(numbers[0]) * 128, 128)
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    small, large = sizes
    # One sum of 8 bytes for each 512 documents remains.
    assert large - small < 200_000 * 8 / 512 + 10_000
