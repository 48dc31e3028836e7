"""What the data side costs: reading, packing and noise against training, webdataset and Megatron's datasets; start-up.

All ways read the same tokens in one process of one thread, in turns, from a warm page cache, and
each figure is the median of its turns: tokens of sequences of `length` per second. Beside them, in
the same turns, the steps of a small recipe on that one core, random tokens in its own shape.
Corpora of random ids are made for it in a temporary folder; nothing of it says anything about a
model.
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
from rich.table import Table

from megatron_twotower.bench import step as bench_step
from megatron_twotower.bench.measure import torch_threads
from megatron_twotower.config.recipes import load_recipe, recipes_folder
from megatron_twotower.config.schema import NoiseConfig
from megatron_twotower.data.dataset import SequenceDataset, global_batch
from megatron_twotower.data.order import Shuffle
from megatron_twotower.data.packing import Packing
from megatron_twotower.data.shards import INDEX_VERSION, Corpus, Sample, Shard, write_index, write_shard
from megatron_twotower.mcore import parallel
from megatron_twotower.train.noise import corrupt
from megatron_twotower.types import Batch

VOCABULARY = 131_072
_END, _SEED = 2, 0
_SHARD_TOKENS = 1_000_000
TRAINING, PLAIN = "training, {recipe}", "webdataset, plain"

# Reads some sequences and says how many tokens they have.
Turn = Callable[[], int]


@dataclass(frozen=True)
class Settings:
    """tokens: of the corpus. length: of a sequence. batch: sequences read at a time. block: for boundaries and noise.

    seconds: of a turn, about. turns: of each way. shards, documents: of the corpus whose index
    alone is opened, the documents per shard. recipe, backbone: what is trained, from which folder;
    the backbone that is shipped if None.
    """

    tokens: int = 32_000_000
    length: int = 8192
    batch: int = 4
    block: int = 16
    seconds: float = 1.0
    turns: int = 5
    shards: int = 100_000
    documents: int = 1000
    recipe: str = "quickstart"
    backbone: Path | None = None


def run(output: Path | None = None, *, settings: Settings = Settings(), console: Console | None = None) -> None:
    """Measure, print a table, and write the figures as JSON to `output` where it is given."""
    with tempfile.TemporaryDirectory(prefix="twotower-bench-") as folder, torch_threads(1):
        figures = measure(Path(folder), settings)
    _print(figures, console or Console())
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


def measure(folder: Path, settings: Settings) -> dict[str, Any]:
    """All figures, by name; tokens per second where it does not say otherwise."""
    corpus = random_corpus(folder / "corpus", tokens=settings.tokens)
    ways = _our_ways(corpus, settings)
    ways[PLAIN] = _taking(_cut(_webdataset_documents(corpus), settings.length), settings.length)
    ways |= _megatron_ways(corpus, folder / "megatron", settings)
    ways[TRAINING.format(recipe=settings.recipe)] = _training(settings)
    try:
        rates = {name: round(rate) for name, rate in _in_turns(ways, settings).items()}
    finally:
        parallel.shutdown()
    return {
        "length": settings.length,
        "recipe": settings.recipe,
        "tokens": corpus.total_tokens,
        "documents": corpus.documents,
        "tokens_per_second": rates,
        "start_up": start_up(folder / "large", settings),
    }


def random_corpus(folder: Path, *, tokens: int) -> Corpus:
    """Documents of random ids, log-normal in length (median 450, mean 1,000 tokens), each with an end-of-text id."""
    draw = np.random.default_rng(_SEED)
    folder.mkdir(parents=True)
    shards: list[Shard] = []
    arrays: list[tuple[np.ndarray, np.ndarray]] = []
    documents = total = 0
    while total < tokens:
        samples = _random_samples(draw, first=documents)
        path = folder / f"shard-{len(shards):05d}.tar"
        sha256, offsets, lengths = write_shard(path, samples, first=documents)
        shards.append(Shard(path.name, path.stat().st_size, sha256, len(samples), int(lengths.sum())))
        arrays.append((offsets, lengths))
        documents, total = documents + len(samples), total + shards[-1].tokens
    write_index(folder, header=_header(documents, total), shards=shards, arrays=arrays)
    return Corpus.open(folder)


def _random_samples(draw: np.random.Generator, *, first: int) -> list[Sample]:
    samples: list[Sample] = []
    held = 0
    while held < _SHARD_TOKENS:
        length = int(np.clip(draw.lognormal(6.1, 1.26), 2, _SHARD_TOKENS))
        ids = draw.integers(4, VOCABULARY, length, dtype=np.uint32)
        ids[-1] = _END
        samples.append(Sample(f"document {first + len(samples)}", 0, ids))
        held += length
    return samples


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
        "eos_token_id": _END,
    }


# --- the ways to read ---------------------------------------------------------------------------------------------


def _our_ways(corpus: Corpus, settings: Settings) -> dict[str, Turn]:
    noise = NoiseConfig(block_size_tokens=settings.block)
    packing = Packing.of(corpus.starts, alignment=settings.block)

    def dataset(shuffle: Shuffle, packing: Packing | None) -> SequenceDataset:
        return SequenceDataset(corpus, sequence_length=settings.length, seed=_SEED, shuffle=shuffle, packing=packing)

    windows = Shuffle("windowed", _SHARD_TOKENS // settings.length or 1, 8)
    sources = {
        "ours": dataset(Shuffle(), None),
        "ours, in windows": dataset(windows, None),
        "ours, documents apart": dataset(Shuffle(), packing),
    }
    ways: dict[str, Turn] = {name: _reading(source, settings, lambda batch: None) for name, source in sources.items()}
    for name in ("ours", "ours, documents apart"):
        ways[f"{name}, with noise"] = _reading(sources[name], settings, lambda batch: corrupt(batch, noise, seed=_SEED))
    ways["noise alone"] = _noise_alone(global_batch(sources["ours"], first=0, count=settings.batch), noise)
    return ways


def _reading(source: SequenceDataset, settings: Settings, then: Callable[[Batch], Any]) -> Turn:
    position = 0

    def turn() -> int:
        nonlocal position
        batch = global_batch(source, first=position, count=settings.batch)
        then(batch)
        position += settings.batch
        return batch.tokens.numel()

    return turn


def _noise_alone(batch: Batch, noise: NoiseConfig) -> Turn:
    def turn() -> int:
        corrupt(batch, noise, seed=_SEED)
        return batch.tokens.numel()

    return turn


def _training(settings: Settings) -> Turn:
    """Optimizer steps of the recipe, as the trainer takes them, on the noise of the recipe."""
    backbone = settings.backbone or recipes_folder() / "backbones" / "small"
    config = load_recipe(settings.recipe, [f"init.backbone={backbone}", "parallel.threads_per_rank=1"])
    parts = bench_step.trainer_of(config, parallel.initialise(config))
    batch = bench_step.random_batch(config, length=config.data.sequence_length_tokens)
    case = bench_step.step_case(settings.recipe, parts, batch)

    def turn() -> int:
        case.run()
        return batch.tokens.numel()

    return turn


def _taking(sequences: Iterator[np.ndarray], length: int) -> Turn:
    def turn() -> int:
        next(sequences)
        return length

    return turn


def _cut(documents: Iterator[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Documents joined and cut into sequences, in the order they come: what one writes around a reader of documents."""
    held: list[np.ndarray] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document)
        if size >= length:
            joined = np.concatenate(held).astype(np.int64)
            whole = size // length * length
            yield from joined[:whole].reshape(-1, length)
            held, size = [joined[whole:]], size - whole


def _webdataset_documents(corpus: Corpus) -> Iterator[np.ndarray]:
    import webdataset

    urls = [str(corpus.local_shard(number)) for number in range(len(corpus.shards))]
    while True:
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            yield sample["tokens.npy"]


def _megatron_ways(corpus: Corpus, folder: Path, settings: Settings) -> dict[str, Turn]:
    """Megatron Core's indexed dataset, document by document, and its GPT dataset over it, shuffled and packed."""
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
    tokenizer = SimpleNamespace(vocab_size=VOCABULARY, eod=_END, pad=0, unique_identifiers={"ids": "random"})
    config = GPTDatasetConfig(
        random_seed=_SEED,
        sequence_length=settings.length,
        path_to_cache=str(folder / "cache"),
        split="1",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    samples = (corpus.total_tokens - 1) // settings.length
    dataset = GPTDataset(
        indexed, str(folder / "text"), np.arange(corpus.documents, dtype=np.int32), samples, Split.train, config
    )
    return {
        "Megatron, indexed dataset": _taking(_cut(_endless(indexed), settings.length), settings.length),
        "Megatron, GPT dataset": _taking((sample["tokens"] for sample in _endless(dataset)), settings.length),
    }


def _endless(dataset: Any) -> Iterator[Any]:
    while True:
        for number in range(len(dataset)):
            yield dataset[number]


# --- measuring ----------------------------------------------------------------------------------------------------


def _in_turns(ways: dict[str, Turn], settings: Settings) -> dict[str, float]:
    """Median tokens per second of each way, all of them in turn, after one round that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings.turns + 1):
        for name, turn in ways.items():
            started, tokens = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - started) < settings.seconds:
                tokens += turn()
            rates[name].append(tokens / elapsed)
    return {name: statistics.median(found[1:]) for name, found in rates.items()}


def start_up(folder: Path, settings: Settings) -> dict[str, float]:
    """Seconds to open a corpus of very many shards and to know the sequence at position 10^9 of a run over it, and the
    memory that takes, in MiB."""
    shards, per_shard, tokens = settings.shards, settings.documents, 1000
    _write_large(folder, shards=shards, per_shard=per_shard, tokens=tokens)
    seconds: dict[str, float] = {"shards": shards, "documents": shards * per_shard}
    before = _own_memory_mib()
    started = time.perf_counter()
    corpus = Corpus.open(folder)
    seconds["open, every shard looked for"] = time.perf_counter() - started
    started = time.perf_counter()
    Corpus.open(folder, damaged="skip")
    seconds["open, shards looked for later"] = time.perf_counter() - started
    started = time.perf_counter()
    packing = Packing.of(corpus.starts, alignment=32)
    seconds["sum the documents, kept apart"] = time.perf_counter() - started
    dataset = SequenceDataset(corpus, sequence_length=settings.length, seed=_SEED, packing=packing)
    started = time.perf_counter()
    _, numbers = dataset.locate(np.array([10**9]))
    packing.window(int(numbers[0]) * settings.length, settings.length)
    seconds["find sample 10^9"] = time.perf_counter() - started
    return {name: round(value, 6) for name, value in seconds.items()} | {"MiB": round(_own_memory_mib() - before, 1)}


def _own_memory_mib() -> float:
    """Memory that is this process's own, without mapped files; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


def _write_large(folder: Path, *, shards: int, per_shard: int, tokens: int) -> None:
    """An index, and shards that are nothing but holes of the right size."""
    folder.mkdir(parents=True)
    size, documents = per_shard * tokens * 4, shards * per_shard
    rows = [Shard(f"shard-{number:06d}.tar", size, "0" * 64, per_shard, per_shard * tokens) for number in range(shards)]
    arrays = (np.arange(per_shard) * tokens * 4, np.full(per_shard, tokens))
    write_index(folder, header=_header(documents, documents * tokens), shards=rows, arrays=(arrays for _ in rows))
    for row in rows:
        with open(folder / row.file, "wb") as stream:
            stream.truncate(size)


def _print(figures: dict[str, Any], console: Console) -> None:
    rates = figures["tokens_per_second"]
    training = TRAINING.format(recipe=figures["recipe"])
    table = Table(title=f"reading {figures['tokens']:,} tokens in sequences of {figures['length']}, one core")
    table.add_column("way")
    for column in ("tokens/s", "of webdataset", "of training"):
        table.add_column(column, justify="right")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,}", f"{rate / rates[PLAIN]:.1f} x", f"{rate / rates[training]:,.0f} x")
    console.print(table)
    start = figures["start_up"]
    head = f"{start['shards']:,.0f} shards, {start['documents']:,.0f} documents, held in {start['MiB']:.0f} MiB:"
    console.print(head, highlight=False)
    for name, value in start.items():
        if name not in ("shards", "documents", "MiB"):
            console.print(f"  {name:32} {value:9.4f} s", highlight=False)
