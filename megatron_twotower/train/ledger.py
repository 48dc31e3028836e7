"""Which samples every step consumed, written down by each data-parallel rank, and what the books say after a run.

A line of `ledger/rank-00000.jsonl` is one step of one rank: the start of the run it belongs to (a
time, the same on all ranks), the step, and (epoch, sample) of each sequence. A step that a killed
run took and a later one took again stands there twice: the later start counts, the earlier one is a
lost step.
"""

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_twotower.common.run_folder import LEDGER_FOLDER, NONFINITE_FOLDER
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.mcore import parallel
from megatron_twotower.train import ledger
from megatron_twotower.types import Batch


def open_ledger(run: Path, *, rank: int) -> IO[str]:
    """The book of a data-parallel rank, to be written on from its end. Each line is in the file once it is written."""
    (run / LEDGER_FOLDER).mkdir(parents=True, exist_ok=True)
    path = run / LEDGER_FOLDER / f"rank-{rank:05d}.jsonl"
    half = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            half = written.read() != b"\n"
    stream = path.open("a", buffering=1)
    if half:
        stream.write("\n")  # of a process that was killed while it wrote
    return stream


def entry(batches: Sequence[Batch], *, start: int, step: int) -> str:
    """The line of one step."""
    samples = [
        [epoch, sample]
        for batch in batches
        for epoch, sample in zip(batch.epochs.tolist(), batch.samples.tolist(), strict=True)
    ]
    return json.dumps({"start": start, "step": step, "samples": samples}) + "\n"


@dataclass(frozen=True)
class Audit:
    """steps: taken, each counted once. lost_steps: taken by a run that was cut off, and again later. repeated: samples
    of an epoch that were consumed more than once. skipped: samples that were due and were not
    consumed.
    """

    steps: int
    lost_steps: int
    repeated: int
    skipped: int


def audit(run: Path, due: Iterable[tuple[int, int]], *, last_step: int) -> Audit:
    """Compare the books with what was due.

    Args: due: (epoch, sample) of every sequence that the steps up to `last_step` should have
        consumed.
    """
    lines = [
        line for path in sorted((run / LEDGER_FOLDER).glob("rank-*.jsonl")) for line in path.read_text().split("\n")
    ]
    entries = [found for line in lines if (found := _parsed(line)) and found["step"] <= last_step]
    last: dict[int, int] = {}
    for found in entries:
        last[found["step"]] = max(found["start"], last.get(found["step"], 0))
    taken = Counter(
        (epoch, sample)
        for found in entries
        if found["start"] == last[found["step"]]
        for epoch, sample in found["samples"]
    )
    lost = {(found["step"], found["start"]) for found in entries if found["start"] != last[found["step"]]}
    expected = Counter(due)
    return Audit(len(last), len(lost), (taken - expected).total(), (expected - taken).total())


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # cut off by a kill


def ledger_writer(
    run: Path, config: RunConfig, groups: ProcessGroupCollection
) -> Callable[[Sequence[Batch], int], None]:
    """Writes this rank's line of the ledger for a step; nothing where none is asked for, or another rank has it."""
    start = parallel.broadcast_from_main(time.time_ns())
    if not config.train.ledger or groups.tp.rank() or groups.pp.rank():
        return lambda batches, step: None
    stream = ledger.open_ledger(run, rank=groups.dp_cp.rank())

    def write(batches: Sequence[Batch], step: int) -> None:
        stream.write(ledger.entry(batches, start=start, step=step))

    return write


def nonfinite_batch_writer(run: Path) -> Callable[[Sequence[Batch], int], str]:
    """Writes the micro-batches of a step that could not be used to the run folder, each rank its own."""

    def keep(batches: Sequence[Batch], step: int) -> str:
        folder = run / NONFINITE_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"step-{step:08d}-rank-{parallel.rank():05d}.pt"
        torch.save([dataclasses.asdict(batch) for batch in batches], file)
        return str(file)

    return keep
