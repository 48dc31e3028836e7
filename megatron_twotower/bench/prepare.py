"""The command `bench prepare`: one core from text to shards, and a corpus of very many documents.

The same JSON lines, made of Python's standard library, go through every way, with one thread:

- `tokenizers` alone: a loaded tokenizer encodes texts that are in memory into lists of ids, which
  are forgotten. It is called in several manners; the fastest is the limit;
- `data prepare`, from the lines to the finished folder, deduplication and checksums included;
- Megatron-LM's way, as its tools/preprocess_data.py does it: a document at a time is parsed and
  encoded, and Megatron Core's builder writes .bin and .idx;
- datatrove's tokeniser pipeline (JSON lines to its .ds files), if it is installed.

All ways must make the same ids.

Each way runs in a process of its own: `tokenizers` makes several small objects for each token,
and a heap in which another way has left gaps makes that slower. CPU time is counted, so that other
processes count less; but they still slow this one down, by up to a half, for seconds or minutes. So
no two ways are compared unless one directly follows the other: `tokenizers` alone in small batches
runs before and after every other way. The mean of both, divided by the way's own time, is its
share. Shares are medians of rounds, and rates are shares of the median rate of `tokenizers` alone.

Then `data prepare` with one and with two worker processes, by the clock.

Last, the stage that decides on documents, alone and with one worker, over parts that are made up:
random digests, of which one in a hundred is repeated, and random lengths. Three sizes show how time
and memory grow.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import megatron_twotower.mcore  # noqa: F401  # before Megatron Core
from megatron_twotower.bench.measure import in_process_of_its_own, process_memory_bytes
from megatron_twotower.bench.results import report
from megatron_twotower.common.engines import EngineSettings
from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.machine import machine
from megatron_twotower.common.progress import CorpusProgress
from megatron_twotower.common.tables import plain_table
from megatron_twotower.common.workers import local_engine
from megatron_twotower.config.recipes import recipes_folder
from megatron_twotower.data.documents import (
    STANDARD_LIBRARY,
    TRAIN,
    VALIDATION,
    Document,
    Unit,
    find_documents,
    read_text,
)
from megatron_twotower.data.parts import ONE_THREAD_CHARACTERS, RECORD, part_path
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.selection import Rules, select
from megatron_twotower.data.shards import Corpus
from megatron_twotower.data.tokenizer import TOKENIZER_FILE, load_tokenizer, text_encoder

BATCHES, SINGLE = "tokenizers alone, small batches", "tokenizers alone, by document"
OFFSETS = "tokenizers alone, as datatrove calls it"
OURS, MEGATRON, DATATROVE = "data prepare", "Megatron-LM's way", "datatrove"
_END_OF_TEXT = "</s>"

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class Way:
    """A way from texts to ids.

    Attributes:
        work: What is measured. It may write files in a folder that does not exist.
        ids: Reads what `work` has written there: the ids of all texts, each with an end of text.
    """

    work: Callable[[Path], Any]
    ids: Callable[[Path], np.ndarray]


@dataclass(frozen=True)
class PrepareOptions:
    """What to measure.

    Attributes:
        megabytes: Characters of text, in millions, at most.
        rounds: Counted rounds, after one that is not counted, and in which the ids are compared.
        tokenizer: Hugging Face tokenizer folder; that of the shipped backbone if `None`.
        unit_bytes: Input that a worker of the scaling measurement reads at a time.
        documents: Documents of the largest made-up corpus.
    """

    megabytes: float = 16.0
    rounds: int = 5
    tokenizer: Path | None = None
    unit_bytes: int = 1 << 20
    documents: int = 1_000_000


def run(output: Path, *, options: PrepareOptions = PrepareOptions(), console: Console | None = None) -> None:
    """Measure, print a table, and write `output`/prepare.json."""
    with tempfile.TemporaryDirectory(prefix="twotower-bench-") as folder, _one_thread():
        results = measure(Path(folder), options)
    _print(results, output, console or Console())


def measure(folder: Path, options: PrepareOptions) -> dict[str, Any]:
    """All results.

    Args:
        folder: An empty folder for text and results.
    """
    tokenizer = options.tokenizer or recipes_folder() / "backbones" / "small"
    texts = list(_texts(options.megabytes * 1e6))
    source = folder / "text" / "text.jsonl"
    source.parent.mkdir()
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = functools.partial(Job, source=source, tokenizer=tokenizer, target=folder / "out")
    alone = functools.partial(in_process_of_its_own, preload=__name__)
    tokens = _same_ids({name: alone(_made, job(name)) for name in _names()}) - len(texts)
    seconds, shares = _shares(_names(), options.rounds, lambda name: alone(_cpu_seconds, job(name)))
    limit = max(shares[name] for name in (BATCHES, SINGLE, OFFSETS))
    return {
        "characters": sum(map(len, texts)),
        "documents": len(texts),
        "tokens": tokens,
        "tokens_per_cpu_second": {name: round(share * tokens / seconds) for name, share in shares.items()},
        "of_the_limit": {name: round(share / limit, 3) for name, share in shares.items()},
        "machine": machine(),
        "selection": [measure_selection(folder / "selection", options.documents // part) for part in (10, 3, 1)],
        "seconds_by_workers": _scaling(source, tokenizer, folder / "scaling", options),
    }


@dataclass(frozen=True)
class Job:
    """A way and what it works on, for a process of its own.

    Attributes:
        way: The name of the way.
        source: The texts, as JSON lines.
        tokenizer: Hugging Face tokenizer folder.
        target: A folder that does not exist, for what the way writes; it is removed.
    """

    way: str
    source: Path
    tokenizer: Path
    target: Path


def _way(job: Job) -> Way:
    with open(job.source, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return _ways(texts, job.source, job.tokenizer)[job.way]


def _made(job: Job) -> tuple[int, str]:
    """The number of ids that a way makes, and their digest."""
    way = _way(job)
    way.work(job.target)
    ids = way.ids(job.target)
    shutil.rmtree(job.target, ignore_errors=True)
    return len(ids), hashlib.sha256(ids.astype(np.int64).tobytes()).hexdigest()


def _cpu_seconds(job: Job) -> float:
    way = _way(job)
    began = time.process_time()
    way.work(job.target)
    seconds = time.process_time() - began
    shutil.rmtree(job.target, ignore_errors=True)
    return seconds


def _same_ids(made: Mapping[str, tuple[int, str]]) -> int:
    """Refuse ways that make other ids than the first one. Returns the number of ids."""
    for name, found in made.items():
        require(found == made[BATCHES], f"{name}: found other ids, expected those of {BATCHES}")
    return made[BATCHES][0]


def _shares(names: Sequence[str], rounds: int, cpu_seconds: Callable[[str], float]) -> tuple[float, dict[str, float]]:
    """The median CPU seconds of `BATCHES`, and how fast each way is as a share of it."""
    others = [name for name in names if name != BATCHES]
    found: dict[str, list[float]] = {name: [] for name in others}
    alone = [cpu_seconds(BATCHES)]
    for number in range(rounds):
        at = number % len(others)
        for name in others[at:] + others[:at]:
            own = cpu_seconds(name)
            alone.append(cpu_seconds(BATCHES))
            found[name].append((alone[-2] + alone[-1]) / 2 / own)
    return statistics.median(alone), {BATCHES: 1.0} | {name: statistics.median(each) for name, each in found.items()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for the tokenizer, here and in workers."""
    names = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _texts(characters: float) -> Iterator[str]:
    seen = set()
    for document in find_documents([STANDARD_LIBRARY]):
        if (text := read_text(document)) and characters > 0 and text not in seen:
            seen.add(text)
            characters -= len(text)
            yield text


# --- the ways ---


def _names() -> tuple[str, ...]:
    """The names of `_ways`, in its order."""
    installed = importlib.util.find_spec("datatrove") is not None
    return (BATCHES, SINGLE, OFFSETS, OURS, MEGATRON, *((DATATROVE,) if installed else ()))


def _ways(texts: Sequence[str], source: Path, tokenizer: Path) -> dict[str, Way]:
    """The ways, that to which the others are compared first."""
    file = tokenizer / TOKENIZER_FILE
    encode, with_end, end = text_encoder(load_tokenizer(tokenizer)), _with_end(file), _end(file)
    small = list(_batches(texts, ONE_THREAD_CHARACTERS))

    def datatroves(batch: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in with_end.encode_batch(list(batch))]

    def alone(encode: Encode, batches: Sequence[Sequence[str]], *added: int) -> Way:
        return Way(lambda target: _encode_all(encode, batches), lambda target: _in_memory(encode, batches, added))

    return {
        BATCHES: alone(encode, small, end),
        SINGLE: alone(encode, [[text] for text in texts], end),
        OFFSETS: alone(datatroves, [texts]),
        OURS: Way(lambda target: _ours(source, tokenizer, target), _our_ids),
        MEGATRON: Way(
            lambda target: _megatron(source, file, target), lambda target: np.fromfile(target / "text.bin", np.uint16)
        ),
        DATATROVE: Way(lambda target: _datatrove(source, file, target), _datatrove_ids),
    }


def _encode_all(encode: Encode, batches: Iterable[Sequence[str]]) -> None:
    for batch in batches:
        encode(batch)


def _in_memory(encode: Encode, batches: Iterable[Sequence[str]], added: Sequence[int]) -> np.ndarray:
    every = ((*ids, *added) for batch in batches for ids in encode(batch))
    return np.fromiter(chain.from_iterable(every), dtype=np.uint16)


def _batches(texts: Sequence[str], characters: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= characters:
            yield batch
            batch = []
    if batch:
        yield batch


def _end(file: Path) -> int:
    found = Tokenizer.from_file(str(file)).token_to_id(_END_OF_TEXT)
    if found is None:
        raise UserError(f"{file}: found no token {_END_OF_TEXT!r}, expected one that ends a text")
    return found


def _plain(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _with_end(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing(single="$A <EOS>", special_tokens=[("<EOS>", _end(file))], pair=None)
    return tokenizer


def _ours(source: Path, tokenizer: Path, target: Path) -> None:
    prepare([str(source)], tokenizer=tokenizer, output=target, holdout_fraction=0.0)


def _our_ids(target: Path) -> np.ndarray:
    corpus = Corpus.open(target / TRAIN)
    return corpus.tokens(0, corpus.total_tokens)


def _megatron(source: Path, file: Path, target: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    target.mkdir()
    tokenizer = _plain(file)
    end = _end(file)
    builder = IndexedDatasetBuilder(str(target / "text.bin"), dtype=np.uint16)
    with open(source, encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            ids.append(end)
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(target / "text.idx"))


def _datatrove(source: Path, file: Path, target: Path) -> None:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()
    steps = [
        JsonlReader(str(source.parent)),
        DocumentTokenizer(
            str(target / "data"),
            tokenizer_name_or_path=str(file),
            eos_token=_END_OF_TEXT,
            shuffle_documents=False,
            save_filename="text",
        ),
    ]
    with contextlib.redirect_stderr(io.StringIO()):
        LocalPipelineExecutor(pipeline=steps, tasks=1, workers=1, logging_dir=str(target / "logs")).run()
    logger.remove()


def _datatrove_ids(target: Path) -> np.ndarray:
    (file,) = (target / "data").glob("*.ds")
    return np.fromfile(file, dtype=np.uint16)


# --- workers ---


def _scaling(source: Path, tokenizer: Path, target: Path, options: PrepareOptions) -> dict[str, float]:
    """Seconds by the clock for a million tokens, with one and with two worker processes.

    The shortest of all rounds: other work on the machine only makes them longer.
    """
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for workers, seconds in found.items():
            seconds.append(_seconds(source, tokenizer, target, workers, unit_bytes=options.unit_bytes))
    return {str(workers): round(min(seconds), 3) for workers, seconds in found.items()}


def _seconds(source: Path, tokenizer: Path, target: Path, workers: int, *, unit_bytes: int) -> float:
    """Seconds by the clock for a million tokens of the tokenising stage.

    Workers start and import before the first of their results, which is where the clock starts.
    """
    times: list[tuple[float, int]] = []

    def note(progress: CorpusProgress) -> None:
        if progress.stage == "tokenising" and progress.tokens:
            times.append((time.perf_counter(), progress.tokens))

    prepare(
        [str(source)],
        tokenizer=tokenizer,
        output=target,
        holdout_fraction=0.0,
        unit_bytes=unit_bytes,
        engine=EngineSettings(workers=workers),
        progress=note,
    )
    shutil.rmtree(target)
    (began, first), (ended, last) = times[0], times[-1]
    return (ended - began) / max(last - first, 1) * 1e6


# --- deciding ---

_DOCUMENTS_A_PART = 2000  # 8 MiB of text
_TOKENS_A_SHARD = 10_000_000


def measure_selection(folder: Path, documents: int) -> dict[str, float]:
    """Decide on a made-up corpus.

    Args:
        folder: Does not exist, and is removed.

    Returns:
        documents, shards, seconds by the clock and of CPU time, and by how many MiB the memory of
        this process (without mapped files) had grown at most.
    """
    (folder / "parts").mkdir(parents=True)
    counts = [min(_DOCUMENTS_A_PART, documents - at) for at in range(0, documents, _DOCUMENTS_A_PART)]
    for part, count in enumerate(counts):
        _write_part(folder, part, count)
    document = Document("text.jsonl", folder / "text.jsonl")
    units = [Unit((document,), None, part, part + 1, 1) for part in range(len(counts))]
    part_counts = [{"documents": count, "lines": count, "left_out": {}} for count in counts]
    clock, cpu = time.perf_counter(), time.process_time()
    with local_engine(1) as engine, _PeakMemory() as peak:
        selection = select(
            folder,
            units,
            part_counts,
            rules=Rules(holdout_fraction=0.01, deduplicate=True, min_tokens=1, max_tokens=None),
            shard_tokens=_TOKENS_A_SHARD,
            added_ids=1,
            engine=engine,
        )
    results = {
        "documents": documents,
        "shards": len(selection.shards),
        "repeated": selection.left_out[TRAIN]["repeated"] + selection.left_out[VALIDATION]["repeated"],
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_mib": round(peak.grown / 2**20, 1),
    }
    shutil.rmtree(folder)
    return results


def _write_part(folder: Path, part: int, count: int) -> None:
    rng = np.random.default_rng(part)
    records = np.zeros(count, dtype=RECORD)
    records["digest"] = rng.integers(0, 1 << 64, (count, 2), dtype=np.uint64)
    records["digest"][::100] = np.random.default_rng(part // 2).integers(0, 1 << 64, (1, 2), dtype=np.uint64)
    records["tokens"] = rng.integers(1, 2000, count)
    records["bytes"] = records["characters"] = 4 * records["tokens"]
    records.tofile(part_path(folder, part, ".records"))


class _PeakMemory:
    """How much the memory of this process grows while a block runs, seen twenty times a second."""

    def __enter__(self) -> "_PeakMemory":
        self.grown, self._begin, self._ended = 0, process_memory_bytes("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while True:
            self.grown = max(self.grown, process_memory_bytes("RssAnon") - self._begin)
            if self._ended.wait(0.05):
                return

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def _print(results: dict[str, Any], output: Path, console: Console) -> None:
    rates, shares = results["tokens_per_cpu_second"], results["of_the_limit"]
    table = plain_table(
        f"{results['characters']:,} characters in {results['documents']:,} documents, one core",
        ("way", "tokens/s of CPU time", "of the limit"),
        [(name, f"{rate:,}", f"{shares[name]:.2f}") for name, rate in rates.items()],
        left=1,
    )
    one, two = (results["seconds_by_workers"][workers] for workers in ("1", "2"))
    notes = [f"seconds for a million tokens, by the clock: one worker {one:.2f}, two {two:.2f} ({one / two:.2f} x)"]
    if DATATROVE not in rates:
        notes.append("datatrove is not installed and was left out")
    headings = ("documents", "shards", "seconds", "CPU seconds", "MiB at most")
    keys = ("documents", "shards", "seconds", "cpu_seconds", "peak_mib")
    rows = [[f"{row[key]:,}" for key in keys] for row in results["selection"]]
    deciding = plain_table("deciding on documents, one worker", headings, rows)
    report(output, "prepare", results, tables=[table, deciding], console=console, notes=notes)
