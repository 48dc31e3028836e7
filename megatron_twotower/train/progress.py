"""Where a run is: steps done, sequences consumed, and the sums since the last log record."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_twotower.common import device
from megatron_twotower.mcore import parallel


@dataclass
class Progress:
    """Where a run stands: optimizer steps done, sequences consumed by all ranks, and the sums since the last log.

    updates: optimizer steps that were not skipped. nonfinite: steps skipped since the last log;
    in_a_row: up to now.
    sequences: consumed by all ranks since the last log. skipped: this rank's in damaged shards,
    since the last log.
    """

    step: int = 0
    cursor: int = 0
    updates: int = 0
    nonfinite: int = 0
    in_a_row: int = 0
    sums: Tensor | None = None
    expert_tokens: Tensor | None = None
    since: float = field(default_factory=time.perf_counter)
    sequences: int = 0
    skipped: int = 0


def window(progress: Progress, groups: ProcessGroupCollection) -> dict[str, Any]:
    """The sums since the last record, over all ranks, as plain numbers."""

    sums, tokens = progress.sums, progress.expert_tokens
    return {
        "sums": None if sums is None else parallel.sum_over_stages(sums.double(), groups).tolist(),
        "expert_tokens": None if tokens is None else parallel.sum_over_ranks(tokens.double()).tolist(),
        "sequences": progress.sequences,
        "skipped": skipped_by_all(progress, groups),
        "nonfinite": progress.nonfinite,
        "in_a_row": progress.in_a_row,
    }


def skipped_by_all(progress: Progress, groups: ProcessGroupCollection) -> int:
    """Sequences in damaged shards since the last record, over all ranks."""
    counted = torch.tensor([float(progress.skipped)], dtype=torch.float64, device=device.device())
    return int(parallel.sum_over_data_parallel(counted, groups).item())


def resumed(step: int, cursor: int, updates: int, saved: dict[str, Any], groups: ProcessGroupCollection) -> Progress:
    """Progress as it was saved; the window's sums go on where they are counted once, all others start from zero."""

    def part(values: Any, *, here: bool) -> Tensor | None:
        if values is None:
            return None
        whole = torch.tensor(values, dtype=torch.float64, device=device.device())
        return whole if here else torch.zeros_like(whole)

    sums = part(saved["sums"], here=groups.dp_cp.rank() == groups.pp.rank() == 0)
    tokens = part(saved["expert_tokens"], here=parallel.is_main())
    skipped = saved["skipped"] if groups.dp_cp.rank() == 0 else 0
    return Progress(
        step,
        cursor,
        updates,
        saved["nonfinite"],
        saved["in_a_row"],
        sums,
        tokens,
        sequences=saved["sequences"],
        skipped=skipped,
    )
