"""The command `bench data`: throughput of the loader, and start-up of a large corpus.

All readers read the same tokens in one process of one thread, alternating, from a warm page cache:
the loader of this package (with packing and noise), plain webdataset and Megatron Core's datasets.
Each result is a median in tokens per second. In the same rounds, steps of a small recipe run on
that one core, on random tokens of the recipe's shape, to show what share of training the loader
takes. Corpora of random ids are made in a temporary folder.
"""

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console

from megatron_twotower.bench import training_steps
from megatron_twotower.bench.measure import process_memory_bytes, torch_threads
from megatron_twotower.common.files import write_file
from megatron_twotower.common.tables import plain_table
from megatron_twotower.config.recipes import load_recipe, recipes_folder
from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.data.dataset import SequenceDataset, global_batch
from megatron_twotower.data.order import Shuffle
from megatron_twotower.data.packing import Packing
from megatron_twotower.data.shards import INDEX_VERSION, Corpus, Sample, Shard, ShardArrays, write_index, write_shard
from megatron_twotower.mcore import parallel
from megatron_twotower.train.noise import corrupt
from megatron_twotower.types import Batch

VOCABULARY = 131_072
_END_OF_TEXT, _SEED = 2, 0
_SHARD_TOKENS = 1_000_000
TRAINING, PLAIN = "training, {recipe}", "webdataset, plain"

# Reads or processes some sequences and returns their number of tokens.
Reader = Callable[[], int]


@dataclass(frozen=True)
class DataOptions:
    """What to measure.

    Attributes:
        tokens: The size of the corpus.
        length: Tokens per sequence.
        batch: Sequences per read.
        block: Block size in tokens, for document boundaries and noise.
        seconds: Duration of one reader in one round, roughly.
        rounds: Counted rounds.
        shards: Shards of the corpus for start-up, of which only the index is read.
        documents: Documents per shard of that corpus.
        recipe: The recipe to train.
        backbone: The folder of its backbone; the shipped one if `None`.
    """

    tokens: int = 32_000_000
    length: int = 8192
    batch: int = 4
    block: int = 16
    seconds: float = 1.0
    rounds: int = 5
    shards: int = 100_000
    documents: int = 1000
    recipe: str = "quickstart"
    backbone: Path | None = None


def run(output: Path, *, options: DataOptions = DataOptions(), console: Console | None = None) -> None:
    """Measure, print a table, and write the results to the JSON file `output`."""
    with tempfile.TemporaryDirectory(prefix="twotower-bench-") as folder, torch_threads(1):
        results = measure_data(Path(folder), options)
    _print(results, console or Console())
    write_file(output, json.dumps(results, indent=1) + "\n")


def measure_data(folder: Path, options: DataOptions) -> dict[str, Any]:
    """All results.

    Args:
        folder: An empty folder for the corpora.
    """
    corpus = random_corpus(folder / "corpus", tokens=options.tokens)
    readers = _own_readers(corpus, options)
    readers[PLAIN] = _sequence_reader(_cut(_webdataset_documents(corpus), options.length), options.length)
    readers |= _megatron_readers(corpus, folder / "megatron", options)
    readers[TRAINING.format(recipe=options.recipe)] = _training(options)
    try:
        rates = {name: round(rate) for name, rate in _tokens_per_second(readers, options).items()}
    finally:
        parallel.shutdown()
    return {
        "length": options.length,
        "recipe": options.recipe,
        "tokens": corpus.total_tokens,
        "documents": corpus.documents,
        "tokens_per_second": rates,
        "start_up": measure_start_up(folder / "large", options),
    }


# --- corpora ---


def random_corpus(folder: Path, *, tokens: int) -> Corpus:
    """Write and open a corpus of documents of random ids, each with an end-of-text id.

    Lengths are log-normal, with a median of 450 and a mean of 1,000 tokens.
    """
    rng = np.random.default_rng(_SEED)
    folder.mkdir(parents=True)
    shards: list[Shard] = []
    arrays: list[ShardArrays] = []
    documents = total = 0
    while total < tokens:
        samples = _random_samples(rng, first=documents)
        path = folder / f"shard-{len(shards):05d}.tar"
        sha256, found = write_shard(path, samples, first=documents)
        shards.append(Shard(path.name, path.stat().st_size, sha256, len(samples), int(found.lengths.sum())))
        arrays.append(found)
        documents, total = documents + len(samples), total + shards[-1].tokens
    write_index(folder, header=_header(documents, total), shards=shards, arrays=arrays)
    return Corpus.open(folder)


def _random_samples(rng: np.random.Generator, *, first: int) -> list[Sample]:
    samples: list[Sample] = []
    total = 0
    while total < _SHARD_TOKENS:
        length = int(np.clip(rng.lognormal(6.1, 1.26), 2, _SHARD_TOKENS))
        ids = rng.integers(4, VOCABULARY, length, dtype=np.uint32)
        ids[-1] = _END_OF_TEXT
        samples.append(Sample(f"document {first + len(samples)}", 0, ids))
        total += length
    return samples


def _write_large(folder: Path, *, shards: int, per_shard: int, tokens: int) -> None:
    """Write an index, and shards of the right size without content (sparse files).

    Args:
        per_shard: Documents per shard.
        tokens: Tokens per document.
    """
    folder.mkdir(parents=True)
    size, documents = per_shard * tokens * 4, shards * per_shard
    rows = [Shard(f"shard-{number:06d}.tar", size, "0" * 64, per_shard, per_shard * tokens) for number in range(shards)]
    arrays = ShardArrays(np.arange(per_shard) * tokens * 4, np.full(per_shard, tokens))
    write_index(folder, header=_header(documents, documents * tokens), shards=rows, arrays=(arrays for _ in rows))
    for row in rows:
        with open(folder / row.file, "wb") as stream:
            stream.truncate(size)


def _header(documents: int, tokens: int) -> dict[str, Any]:
    return {
        "version": INDEX_VERSION,
        "vocab_size": VOCABULARY,
        "tokenizer_fingerprint": "none",
        "dtype": "uint32",
        "documents": documents,
        "tokens": tokens,
        "bytes": 0,
        "characters": 0,
        "bos_token_id": None,
        "eos_token_id": _END_OF_TEXT,
    }


# --- readers ---


def _own_readers(corpus: Corpus, options: DataOptions) -> dict[str, Reader]:
    noise = NoiseConfig(block_size_tokens=options.block)
    packing = Packing.of(corpus.starts, alignment=options.block)

    def dataset(shuffle: Shuffle, packing: Packing | None) -> SequenceDataset:
        return SequenceDataset(corpus, sequence_length=options.length, seed=_SEED, shuffle=shuffle, packing=packing)

    windows = Shuffle("windowed", _SHARD_TOKENS // options.length or 1, 8)
    sources = {
        "ours": dataset(Shuffle(), None),
        "ours, in windows": dataset(windows, None),
        "ours, documents apart": dataset(Shuffle(), packing),
    }

    def add_noise(batch: Batch) -> None:
        corrupt(batch, noise, seed=_SEED)

    readers: dict[str, Reader] = {
        name: _batch_reader(source, options, lambda batch: None) for name, source in sources.items()
    }
    for name in ("ours", "ours, documents apart"):
        readers[f"{name}, with noise"] = _batch_reader(sources[name], options, add_noise)
    batch = global_batch(sources["ours"], first=0, count=options.batch)
    readers["noise alone"] = _on_batch(batch, lambda: add_noise(batch))
    return readers


def _batch_reader(source: SequenceDataset, options: DataOptions, process: Callable[[Batch], Any]) -> Reader:
    position = 0

    def read() -> int:
        nonlocal position
        batch = global_batch(source, first=position, count=options.batch)
        process(batch)
        position += options.batch
        return batch.tokens.numel()

    return read


def _on_batch(batch: Batch, work: Callable[[], Any]) -> Reader:
    def run() -> int:
        work()
        return batch.tokens.numel()

    return run


def _training(options: DataOptions) -> Reader:
    """Optimizer steps of the recipe as the trainer takes them, noise included."""
    backbone = options.backbone or recipes_folder() / "backbones" / "small"
    config = load_recipe(options.recipe, [f"init.backbone={backbone}", "parallel.threads_per_rank=1"])
    trainer = training_steps.build_trainer(config, parallel.initialise(config))
    batch = training_steps.random_batch(config, length=config.data.sequence_length_tokens)
    return _on_batch(batch, training_steps.step_case(options.recipe, trainer, batch).run)


def _sequence_reader(sequences: Iterator[np.ndarray], length: int) -> Reader:
    def read() -> int:
        next(sequences)
        return length

    return read


def _cut(documents: Iterator[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Documents joined in the order they come and cut into sequences.

    This is what users of a reader of documents write around it.
    """
    pending: list[np.ndarray] = []
    size = 0
    for document in documents:
        pending.append(document)
        size += len(document)
        if size >= length:
            joined = np.concatenate(pending).astype(np.int64)
            complete = size // length * length
            yield from joined[:complete].reshape(-1, length)
            pending, size = [joined[complete:]], size - complete


def _webdataset_documents(corpus: Corpus) -> Iterator[np.ndarray]:
    import webdataset

    urls = [str(corpus.local_shard(number)) for number in range(len(corpus.shards))]
    while True:
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            yield sample["tokens.npy"]


def _megatron_readers(corpus: Corpus, folder: Path, options: DataOptions) -> dict[str, Reader]:
    """Megatron Core's indexed dataset, by document, and its GPT dataset, shuffled and packed."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    folder.mkdir()
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.int32)
    for number in range(corpus.documents):
        builder.add_item(torch.from_numpy(corpus.document(number).astype(np.int32)))
        builder.end_document()
    builder.finalize(str(folder / "text.idx"))
    indexed = IndexedDataset(str(folder / "text"), mmap=True)
    tokenizer = SimpleNamespace(vocab_size=VOCABULARY, eod=_END_OF_TEXT, pad=0, unique_identifiers={"ids": "random"})
    config = GPTDatasetConfig(
        random_seed=_SEED,
        sequence_length=options.length,
        path_to_cache=str(folder / "cache"),
        split="1",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    samples = (corpus.total_tokens - 1) // options.length
    dataset = GPTDataset(
        indexed, str(folder / "text"), np.arange(corpus.documents, dtype=np.int32), samples, Split.train, config
    )
    sequences = (sample["tokens"] for sample in _endless(dataset))
    return {
        "Megatron, indexed dataset": _sequence_reader(_cut(_endless(indexed), options.length), options.length),
        "Megatron, GPT dataset": _sequence_reader(sequences, options.length),
    }


def _endless(dataset: Any) -> Iterator[Any]:
    while True:
        for number in range(len(dataset)):
            yield dataset[number]


# --- measuring ---


def _tokens_per_second(readers: dict[str, Reader], options: DataOptions) -> dict[str, float]:
    """The median rate of each reader over alternating rounds; a first round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(options.rounds + 1):
        for name, read in readers.items():
            started, tokens = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - started) < options.seconds:
                tokens += read()
            rates[name].append(tokens / elapsed)
    return {name: statistics.median(found[1:]) for name, found in rates.items()}


def measure_start_up(folder: Path, options: DataOptions) -> dict[str, float]:
    """Open a corpus of very many shards and find the sequence at position 10^9 of a run over it.

    Returns:
        The size of the corpus, the seconds of each step, and the memory of the result in MiB.
    """
    shards, per_shard = options.shards, options.documents
    _write_large(folder, shards=shards, per_shard=per_shard, tokens=1000)
    results: dict[str, float] = {"shards": shards, "documents": shards * per_shard}
    memory = process_memory_bytes("RssAnon")
    started = time.perf_counter()
    corpus = Corpus.open(folder)
    results["open, every shard looked for"] = time.perf_counter() - started
    started = time.perf_counter()
    Corpus.open(folder, damaged="skip")
    results["open, shards looked for later"] = time.perf_counter() - started
    started = time.perf_counter()
    packing = Packing.of(corpus.starts, alignment=32)
    results["sum the documents, kept apart"] = time.perf_counter() - started
    dataset = SequenceDataset(corpus, sequence_length=options.length, seed=_SEED, packing=packing)
    started = time.perf_counter()
    _, numbers = dataset.locate(np.array([10**9]))
    packing.window(int(numbers[0]) * options.length, options.length)
    results["find sample 10^9"] = time.perf_counter() - started
    mebibytes = (process_memory_bytes("RssAnon") - memory) / 2**20
    return {name: round(value, 6) for name, value in results.items()} | {"MiB": round(mebibytes, 1)}


def _print(results: dict[str, Any], console: Console) -> None:
    rates = results["tokens_per_second"]
    plain, training = rates[PLAIN], rates[TRAINING.format(recipe=results["recipe"])]
    table = plain_table(
        f"reading {results['tokens']:,} tokens in sequences of {results['length']}, one core",
        ("reader", "tokens/s", "of webdataset", "of training"),
        [(name, f"{rate:,}", f"{rate / plain:.1f} x", f"{rate / training:,.0f} x") for name, rate in rates.items()],
        left=1,
    )
    console.print(table)
    start = results["start_up"]
    head = f"{start['shards']:,.0f} shards, {start['documents']:,.0f} documents, {start['MiB']:.0f} MiB in memory:"
    console.print(head, highlight=False)
    for name, value in start.items():
        if name not in ("shards", "documents", "MiB"):
            console.print(f"  {name:32} {value:9.4f} s", highlight=False)
