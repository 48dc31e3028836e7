"""The command `bench prepare`: one core from text to shards, and a corpus of very many documents.

The same JSON lines, made of Python's standard library, go through every way in every round, in this
process with one thread. Rates are tokens for each second of CPU time, so that other processes on
the machine count less; results are medians of rounds. The ways:

- `tokenizers` alone, which encodes texts that are in memory and forgets the ids: a document at a
  time, and in batches. The faster of the two in a round is the limit of that round;
- `data prepare`, from the lines to the finished folder, deduplication and checksums included;
- Megatron-LM's way, as its tools/preprocess_data.py does it: a document at a time is parsed and
  encoded, and Megatron Core's builder writes .bin and .idx;
- datatrove's tokeniser pipeline (JSON lines to its .ds files), if it is installed.

Then `data prepare` with one and with two worker processes, by the clock.

Last, the stage that decides on documents, alone and with one worker, over parts that are made up:
random digests, of which one in a hundred is repeated, and random lengths. Three sizes show how time
and memory grow.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer

import megatron_twotower.mcore  # noqa: F401  # before Megatron Core
from megatron_twotower.bench.measure import process_memory_bytes
from megatron_twotower.bench.results import report
from megatron_twotower.common.engines import EngineSettings
from megatron_twotower.common.errors import require
from megatron_twotower.common.machine import machine
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
from megatron_twotower.data.parts import BATCH_CHARACTERS, RECORD, part_path
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.selection import Rules, select
from megatron_twotower.data.tokenizer import TOKENIZER_FILE

SINGLE, BATCHES = "tokenizers alone, by document", "tokenizers alone, in batches"
OURS, MEGATRON, DATATROVE = "data prepare", "Megatron-LM's way", "datatrove"
_END_OF_TEXT = "</s>"

# Goes from the text to files in a folder that does not exist, and returns the number of tokens.
Way = Callable[[Path], int]


@dataclass(frozen=True)
class PrepareOptions:
    """What to measure.

    Attributes:
        megabytes: Characters of text, in millions, at most.
        rounds: Counted rounds, after one that is not counted.
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
    ways = _ways(texts, source, tokenizer)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {}
    for _ in range(options.rounds + 1):
        for name, way in ways.items():
            target = folder / "out"
            began = time.process_time()
            tokens[name] = way(target)
            rates[name].append(tokens[name] / (time.process_time() - began))
            shutil.rmtree(target, ignore_errors=True)
    limits = list(map(max, rates[SINGLE], rates[BATCHES]))
    shares = {name: [own / limit for own, limit in zip(found, limits, strict=True)] for name, found in rates.items()}
    return {
        "characters": sum(map(len, texts)),
        "documents": len(texts),
        "tokens": tokens,
        "tokens_per_cpu_second": {name: round(statistics.median(found[1:])) for name, found in rates.items()},
        "of_the_limit": {name: round(statistics.median(found[1:]), 3) for name, found in shares.items()},
        "machine": machine(),
        "selection": [measure_selection(folder / "selection", options.documents // part) for part in (10, 3, 1)],
        "seconds_by_workers": _scaling(source, tokenizer, folder / "scaling", options),
    }


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
    for document in find_documents([STANDARD_LIBRARY]):
        if (text := read_text(document)) and characters > 0:
            characters -= len(text)
            yield text


# --- the ways ---


def _ways(texts: list[str], source: Path, tokenizer: Path) -> dict[str, Way]:
    file = tokenizer / TOKENIZER_FILE
    found: dict[str, Way] = {
        SINGLE: lambda target: _alone(texts, file, characters=1),
        BATCHES: lambda target: _alone(texts, file, characters=BATCH_CHARACTERS),
        OURS: lambda target: _ours(source, tokenizer, target),
        MEGATRON: lambda target: _megatron(source, file, target),
    }
    if importlib.util.find_spec("datatrove") is not None:
        found[DATATROVE] = lambda target: _datatrove(source, file, target)
    return found


def _alone(texts: list[str], file: Path, *, characters: int) -> int:
    tokenizer, tokens = _plain(file), 0
    batch: list[str] = []
    size = 0
    for text in [*texts, ""]:
        if not text or size >= characters:
            tokens += sum(map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False)))
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    return tokens


def _plain(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _ours(source: Path, tokenizer: Path, target: Path) -> int:
    summary = prepare([str(source)], tokenizer=tokenizer, output=target, holdout_fraction=0.0)
    return int(summary["splits"]["train"]["tokens"])


def _megatron(source: Path, file: Path, target: Path) -> int:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    target.mkdir()
    tokenizer, tokens = _plain(file), 0
    end = tokenizer.token_to_id(_END_OF_TEXT)
    require(end is not None, f"{file}: found no token {_END_OF_TEXT!r}, expected one that ends a text")
    assert end is not None
    builder = IndexedDatasetBuilder(str(target / "text.bin"), dtype=np.uint16)
    with open(source, encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            ids.append(end)
            builder.add_document(torch.tensor(ids), [len(ids)])
            tokens += len(ids)
    builder.finalize(str(target / "text.idx"))
    return tokens


def _datatrove(source: Path, file: Path, target: Path) -> int:
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
    return sum(path.stat().st_size for path in (target / "data").glob("*.ds")) // 2


# --- workers ---


def _scaling(source: Path, tokenizer: Path, target: Path, options: PrepareOptions) -> dict[str, float]:
    """Seconds by the clock of the tokenising stage with one and with two worker processes.

    Workers start and import before the first of their results, which is where the clock starts.
    """
    found = {}
    for workers in (1, 2):
        times: list[tuple[float, int]] = []

        def note(progress: Any, times: list[tuple[float, int]] = times) -> None:
            if progress.stage == "tokenising" and progress.tokens:
                times.append((time.perf_counter(), progress.tokens))

        prepare(
            [str(source)],
            tokenizer=tokenizer,
            output=target,
            holdout_fraction=0.0,
            unit_bytes=options.unit_bytes,
            engine=EngineSettings(workers=workers),
            progress=note,
        )
        shutil.rmtree(target)
        (began, first), (ended, last) = times[0], times[-1]
        found[str(workers)] = (ended - began) / max(last - first, 1) * 1e6
    return {name: round(seconds, 3) for name, seconds in found.items()}


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
