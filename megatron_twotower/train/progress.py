"""How far a run is: steps done, sequences consumed, and the sums since the last log record."""

import time
from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_twotower.checkpoint.files import CheckpointState
from megatron_twotower.common import device
from megatron_twotower.mcore import parallel
from megatron_twotower.types import LogWindow


@dataclass
class TrainingProgress:
    """How far a run is, on one rank.

    The log window is the steps since the last log record.

    Attributes:
        step: Optimizer steps done, with skipped ones.
        cursor: Sequences consumed by all ranks.
        updates: Optimizer steps that were not skipped.
        consecutive_nonfinite: Steps that were not finite without interruption up to now.
        nonfinite: Steps of the log window that were skipped because they were not finite.
        unscored: Steps of the log window that were skipped because no position was scored.
        sequences: Sequences consumed by all ranks in the log window.
        sequences_before: Those of them that an earlier process consumed; their time is not known.
        damaged_sequences: Sequences in damaged shards that this rank skipped in the log window.
        sums: (2 + 2k,) float64 packed loss reports of this rank in the log window; None without a
            finite step.
        expert_tokens: (layers, experts) tokens of each expert on this rank in the log window; None
            as for `sums`, and without experts.
        window_started: Time at which the log window started, in seconds of `time.perf_counter`.
    """

    step: int = 0
    cursor: int = 0
    updates: int = 0
    consecutive_nonfinite: int = 0
    nonfinite: int = 0
    unscored: int = 0
    sequences: int = 0
    sequences_before: int = 0
    damaged_sequences: int = 0
    sums: Tensor | None = None
    expert_tokens: Tensor | None = None
    window_started: float = field(default_factory=time.perf_counter)

    def start_log_window(self) -> None:
        """Forget the sums of the log window that was just recorded."""
        self.sums = self.expert_tokens = None
        self.sequences = self.sequences_before = self.damaged_sequences = 0
        self.nonfinite = self.unscored = 0
        self.window_started = time.perf_counter()


def log_window(progress: TrainingProgress, groups: ProcessGroupCollection) -> LogWindow:
    """Sum the log window over all ranks, as plain numbers for a checkpoint."""
    sums, tokens = progress.sums, progress.expert_tokens
    return LogWindow(
        sums=None if sums is None else parallel.sum_over_stages(sums.double(), groups).tolist(),
        expert_tokens=None if tokens is None else parallel.sum_over_ranks(tokens.double()).tolist(),
        sequences=progress.sequences,
        skipped=damaged_on_all_ranks(progress, groups),
        nonfinite=progress.nonfinite,
        in_a_row=progress.consecutive_nonfinite,
        unscored=progress.unscored,
    )


def damaged_on_all_ranks(progress: TrainingProgress, groups: ProcessGroupCollection) -> int:
    """Return the sequences in damaged shards in the log window, over all ranks."""
    counted = torch.tensor([float(progress.damaged_sequences)], dtype=torch.float64, device=device.device())
    return int(parallel.sum_over_data_parallel(counted, groups).item())


def restore_progress(state: CheckpointState, groups: ProcessGroupCollection) -> TrainingProgress:
    """Return the progress of this rank at a checkpoint.

    The sums of the log window go to the one rank where they are counted once; all other ranks start
    from zero.
    """

    def tensor(values: list, *, here: bool) -> Tensor:
        total = torch.tensor(values, dtype=torch.float64, device=device.device())
        return total if here else torch.zeros_like(total)

    window, sums_here = state.window, groups.dp_cp.rank() == 0 and groups.pp.rank() == 0
    return TrainingProgress(
        step=state.step,
        cursor=state.cursor,
        updates=state.updates,
        consecutive_nonfinite=window.in_a_row,
        nonfinite=window.nonfinite,
        unscored=window.unscored,
        sequences=window.sequences,
        sequences_before=window.sequences,
        damaged_sequences=window.skipped if groups.dp.rank() == 0 else 0,
        sums=None if window.sums is None else tensor(window.sums, here=sums_here),
        expert_tokens=None if window.expert_tokens is None else tensor(window.expert_tokens, here=parallel.is_main()),
    )
