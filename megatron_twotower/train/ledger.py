"""The ledger: which samples every step consumed, written by each data-parallel rank, and its audit.

A line of `ledger/rank-00000.jsonl` is one step of one rank: the start of the process that took the
step (a time, the same on all ranks), the step, and (epoch, sample) of each sequence. A step that a
killed run took and a resumed run took again has two lines: the later start counts, and the earlier
one is a lost step.
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
from megatron_twotower.types import Batch


def open_ledger(run: Path, *, rank: int) -> IO[str]:
    """Open the ledger file of a data-parallel rank at its end.

    Each line is in the file once it is written.
    """
    path = run / LEDGER_FOLDER / f"rank-{rank:05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            cut_off = written.read() != b"\n"
    stream = path.open("a", buffering=1)
    if cut_off:
        stream.write("\n")  # after a line of a process that was killed while it wrote
    return stream


def ledger_line(batches: Sequence[Batch], *, start: int, step: int) -> str:
    """Return the line of one step of one rank.

    Args:
        batches: The micro-batches of the step on this rank.
        start: The start of the process, in nanoseconds since 1970.
        step: The optimizer step, counted from 1.
    """
    samples = [
        [epoch, sample]
        for batch in batches
        for epoch, sample in zip(batch.epochs.tolist(), batch.samples.tolist(), strict=True)
    ]
    return json.dumps({"start": start, "step": step, "samples": samples}) + "\n"


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        steps: Steps taken, each counted once.
        lost_steps: Steps that a killed run took and a resumed run took again.
        repeated: Samples of an epoch that were consumed more than once.
        skipped: Samples that were due and were not consumed.
    """

    steps: int
    lost_steps: int
    repeated: int
    skipped: int


def audit(run: Path, due: Iterable[tuple[int, int]], *, last_step: int) -> Audit:
    """Compare the ledger with what was due.

    Args:
        run: The run folder.
        due: (epoch, sample) of every sequence that the steps up to `last_step` should consume.
        last_step: Later steps in the ledger are ignored.
    """
    files = sorted((run / LEDGER_FOLDER).glob("rank-*.jsonl"))
    lines = [line for path in files for line in path.read_text().split("\n")]
    entries = [found for line in lines if (found := _parse(line)) and found["step"] <= last_step]
    last: dict[int, int] = {}
    for entry in entries:
        last[entry["step"]] = max(entry["start"], last.get(entry["step"], 0))
    taken = Counter(
        (epoch, sample)
        for entry in entries
        if entry["start"] == last[entry["step"]]
        for epoch, sample in entry["samples"]
    )
    lost = {(entry["step"], entry["start"]) for entry in entries if entry["start"] != last[entry["step"]]}
    expected = Counter(due)
    return Audit(len(last), len(lost), (taken - expected).total(), (expected - taken).total())


def _parse(line: str) -> dict | None:
    """Return a line as a mapping; None for a line that a kill cut off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def ledger_writer(
    run: Path, config: RunConfig, groups: ProcessGroupCollection
) -> Callable[[Sequence[Batch], int], None]:
    """Return a function that writes this rank's line for a step.

    It writes nothing without `train.ledger`, and on ranks whose samples another rank writes.
    """
    start = parallel.broadcast_from_main(time.time_ns())
    if not config.train.ledger or groups.tp.rank() or groups.cp.rank() or groups.pp.rank():
        return lambda batches, step: None
    stream = open_ledger(run, rank=groups.dp.rank())

    def write(batches: Sequence[Batch], step: int) -> None:
        stream.write(ledger_line(batches, start=start, step=step))

    return write


def nonfinite_batch_writer(run: Path) -> Callable[[Sequence[Batch], int], str]:
    """Return a function that writes this rank's micro-batches of a step to the run folder.

    It returns the name of the file.
    """

    def write(batches: Sequence[Batch], step: int) -> str:
        folder = run / NONFINITE_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"step-{step:08d}-rank-{parallel.rank():05d}.pt"
        torch.save([dataclasses.asdict(batch) for batch in batches], file)
        return str(file)

    return write
