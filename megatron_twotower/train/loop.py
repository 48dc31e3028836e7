"""The training loop: one optimizer step, validation, and the loop around them. Knows no file format."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_twotower.common import device
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.phases import Phase, phase_number
from megatron_twotower.config.schema import NoiseConfig, RunConfig
from megatron_twotower.data.dataset import skipped_sequences
from megatron_twotower.mcore import parallel
from megatron_twotower.model.towers import rows_between_stages
from megatron_twotower.train.losses import autoregressive_loss, masked_diffusion_loss
from megatron_twotower.train.metrics import Metrics, peak_memory_gib
from megatron_twotower.train.noise import corrupt
from megatron_twotower.train.optimizer import guarded_step
from megatron_twotower.train.progress import Progress, skipped_by_all
from megatron_twotower.types import Batch, LossReport

# The noise of validation has its own stream under the run's seed.
VALIDATION_STREAM = 0x5EED


@dataclass(frozen=True)
class Trainer:
    """What one rank trains with."""

    config: RunConfig
    model: parallel.ModelChunks
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    groups: ProcessGroupCollection
    phases: tuple[Phase, ...]

    def at(self, cursor: int) -> "Trainer":
        """The same with the noise of the phase that the sequence at `cursor` belongs to."""
        phase = self.phases[phase_number(self.phases, cursor)]
        return dataclasses.replace(self, config=dataclasses.replace(self.config, noise=phase.noise))


@dataclass(frozen=True)
class Hooks:
    """What the loop is given: where figures go, how state is kept, and when to stop early.

    save: begins to save the state. saved: looks whether a save under way is done, or waits for it,
    and records it.
    beat: a sign of life, with what the loop is at. consumed: told the micro-batches of every step,
    and the step.
    keep_batch: keeps the micro-batches of a step that could not be used, and says where.
    tokens_by_corpus: what the run has read of each corpus at a cursor; None with one corpus.
    """

    metrics: Metrics
    save: Callable[[Progress], None]
    saved: Callable[..., None]
    stop_requested: Callable[[], bool]
    beat: Callable[[str], None]
    consumed: Callable[[Sequence[Batch], int], None]
    keep_batch: Callable[[Sequence[Batch], int], str]
    tokens_by_corpus: Callable[[int], dict[str, int]] | None = None


def ar_forward(
    chunk: Any, batch: Batch, config: RunConfig, groups: ProcessGroupCollection, _: Tensor | None
) -> tuple[Tensor, LossReport | None]:
    batch = batch.to(device.device())
    hidden, tower = chunk(batch.tokens, batch.documents, batch.padding), chunk.module.tower
    return hidden, autoregressive_loss(tower, hidden, batch, groups) if tower.stage.last else None


def two_tower_forward(
    chunk: Any, batch: Batch, config: RunConfig, groups: ProcessGroupCollection, times: Tensor | None
) -> tuple[Tensor, LossReport | None]:
    seed = config.seed if times is None else config.seed ^ VALIDATION_STREAM
    noisy = corrupt(batch, config.noise, seed=seed, times=times).to(device.device())
    hidden, tower = chunk(noisy), chunk.module.tower
    return hidden, masked_diffusion_loss(tower, hidden, noisy, config.noise, groups) if tower.stage.last else None


# What a model chunk gives: what travels on to the next stage; or, on the last, final hidden states
# and their loss.
OBJECTIVES = {"ar": ar_forward, "two_tower": two_tower_forward}


def _packed(report: LossReport) -> Tensor:
    """(2 + 2k,) float64: total, count, bucket sums, bucket counts."""
    head = torch.stack([report.total.detach().double(), report.count.double()])
    return torch.cat([head, report.bucket_sums.double(), report.bucket_counts.double()])


def _buckets(config: RunConfig) -> int:
    return config.noise.report_buckets if config.objective == "two_tower" else 1


def forward_backward(trainer: Trainer, batches: Sequence[tuple[Batch, Tensor | None]], *, forward_only: bool) -> Tensor:
    """Run the micro-batches through Megatron's schedule.

    Returns:
        this rank's packed sums, zero on stages before the last.
    """
    config, objective = trainer.config, OBJECTIVES[trainer.config.objective]
    megatron = trainer.model.config

    def step(iterator: Iterator[tuple[Batch, Tensor | None]], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch, times = next(iterator)
        output, report = objective(chunk, batch, config, trainer.groups, times)

        def loss(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert report is not None, "Megatron asks the last stage alone"
            return total, report.count, _packed(report)

        return output if report is None else report.total, loss

    first, times = batches[0]
    rows = rows_between_stages(
        config,
        sequences=len(first.tokens),
        times=times,
        ranks=trainer.groups.tp.size() if megatron.sequence_parallel else 1,
    )
    reports = parallel.run_forward_backward(
        step, batches, trainer.model, rows_between_stages=rows, groups=trainer.groups, forward_only=forward_only
    )
    nothing = torch.zeros(2 + 2 * _buckets(config), dtype=torch.float64, device=device.device())
    return torch.stack([nothing, *reports]).sum(0)


@dataclass(frozen=True)
class Step:
    """What one optimizer step gave: this rank's packed sums, the gradient norm of all, whether it was taken."""

    sums: Tensor
    norm: float
    taken: bool


def train_step(trainer: Trainer, batches: list[Batch]) -> Step:
    """One optimizer step on this rank's micro-batches of a global batch.

    Where the loss or a gradient is not finite, on any rank, nothing that trains changes, on all of
    them.
    """
    trainer.model.train()
    trainer.model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    # Megatron moves the selection biases of its routers with the gradients' reduction, before any
    # step can be judged.
    named = [item for chunk in trainer.model.chunks for item in chunk.named_buffers()]
    biases = [(buffer, buffer.clone()) for name, buffer in named if name.endswith("expert_bias")]
    sums = forward_backward(trainer, [(batch, None) for batch in batches], forward_only=False)
    taken, norm = guarded_step(trainer.optimizer, unusable=parallel.any_rank_flag(~sums[0].isfinite()))
    if not taken:
        for buffer, before in biases:
            buffer.copy_(before)
    trainer.schedule.step(1)
    return Step(sums, norm, taken)


def validation_times(count: int, noise: NoiseConfig) -> Tensor:
    """Noise levels that cover the range evenly, one per validation sequence: (count,) float32."""
    fractions = (torch.arange(count) + 0.5) / count
    return noise.time_min + fractions * (noise.time_max - noise.time_min)


@torch.no_grad()
def validate(trainer: Trainer, batches: list[Batch]) -> dict[str, Any]:
    """Loss on fixed sequences at fixed noise: the same figure on any layout.

    Args:
        batches: this rank's micro-batches; `positions` count the validation sequences from 0.
    """
    trainer.model.eval()
    noise = trainer.config.noise
    times = validation_times(trainer.config.train.validation_sequences, noise)
    timed = [(batch, times[batch.positions].unsqueeze(-1)) for batch in batches]
    sums = parallel.sum_over_stages(forward_backward(trainer, timed, forward_only=True), trainer.groups)
    buckets = _figures(sums, _buckets(trainer.config))
    return {"loss": buckets["loss"], "loss_by_noise": buckets["loss_by_noise"], "tokens": buckets["scored_tokens"]}


def _figures(sums: Tensor, buckets: int) -> dict[str, Any]:
    """Means from globally summed sums: the trained loss, and the unweighted loss by noise level."""
    values = sums.tolist()
    total, count, by_level, scored = values[0], values[1], values[2 : 2 + buckets], values[2 + buckets :]
    names = [f"{i / buckets:.1f}-{(i + 1) / buckets:.1f}" for i in range(buckets)]
    by_noise = {name: s / n for name, s, n in zip(names, by_level, scored, strict=True) if n}
    figures = {"loss": total / count if count else math.nan, "scored_tokens": int(sum(scored))}
    return figures | {"loss_by_noise": by_noise if buckets > 1 else {}}


def _data_figures(trainer: Trainer, progress: Progress, hooks: Hooks) -> dict[str, Any]:
    """What was read: the phase, the tokens of each corpus so far, and the sequences skipped since the last record."""
    figures: dict[str, Any] = {}
    if trainer.config.phases:
        figures["phase"] = trainer.phases[phase_number(trainer.phases, progress.cursor - 1)].name
    if hooks.tokens_by_corpus is not None:
        figures["tokens_by_corpus"] = hooks.tokens_by_corpus(progress.cursor)
    if progress.nonfinite:
        figures["nonfinite_steps"] = progress.nonfinite
    if trainer.config.data.damaged_shards == "skip":
        figures["skipped_sequences"] = skipped_by_all(progress, trainer.groups)
    return figures


def _record(trainer: Trainer, progress: Progress, norm: float, started: float) -> dict[str, Any]:
    """The figures since the last record, summed over ranks."""
    config, groups = trainer.config, trainer.groups
    sums = progress.sums
    if sums is None:  # every step since the last record was skipped
        sums = torch.zeros(2 + 2 * _buckets(config), dtype=torch.float64, device=device.device())
    figures = _figures(parallel.sum_over_stages(sums, groups), _buckets(config))
    load = {}
    if progress.expert_tokens is not None:
        tokens = parallel.sum_over_ranks(progress.expert_tokens.double())
        load = {"max_over_mean": (tokens.max(dim=1).values / tokens.mean(dim=1)).max().item()}
    now = time.perf_counter()
    length = config.data.sequence_length_tokens
    rate = progress.sequences * length / (now - progress.since)
    return {
        "kind": "train",
        "step": progress.step,
        **figures,
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "grad_norm": norm,
        "tokens": progress.cursor * length,
        "tokens_per_second": rate,
        "expert_load": load,
        "memory_gib": peak_memory_gib(),
        "seconds": now - started,
    }


def _advance(trainer: Trainer, progress: Progress, batches: list[Batch], cursor: int, step: Step) -> None:
    """Count a step and what it gave. A skipped one has consumed its batch, and counts in no figure but its own."""
    progress.step += 1
    progress.sequences += cursor - progress.cursor
    progress.cursor = cursor
    progress.skipped += sum(map(skipped_sequences, batches))
    progress.nonfinite += not step.taken
    progress.in_a_row = 0 if step.taken else progress.in_a_row + 1
    if not step.taken:
        return
    progress.updates += 1
    progress.sums = step.sums if progress.sums is None else progress.sums + step.sums
    tokens = trainer.model.expert_tokens
    if tokens is not None:
        progress.expert_tokens = tokens if progress.expert_tokens is None else progress.expert_tokens + tokens


def _check_finite(progress: Progress, step: Step, batches: list[Batch], limit: int, hooks: Hooks) -> None:
    """
    Raises:
        UserError: too many steps in a row had a loss or gradients that are not finite.
    """
    if progress.in_a_row >= limit:
        raise UserError(
            f"step {progress.step}: the loss or its gradients are not finite, {progress.in_a_row} steps in a row "
            f"(gradient norm {step.norm}); the batch is in {hooks.keep_batch(batches, progress.step)}"
        )


def train(
    trainer: Trainer,
    progress: Progress,
    stream: Iterator[tuple[list[Batch], int]],
    validation: list[Batch],
    hooks: Hooks,
) -> bool:
    """Train from where `progress` stands to the configured number of steps.

    Args:
        stream: this rank's micro-batches of each step, and the cursor after it.
        validation: this rank's validation micro-batches.

    Returns:
        True when all steps are done, False when stopped early on request, with the state saved.

    Raises: UserError: loss or gradients are not finite, too often in a row; all sequences of a
        record were in damaged shards; a checkpoint cannot be written.
    """
    settings, started = trainer.config.train, time.perf_counter()

    def due(every: int) -> bool:
        return bool(every) and (progress.step % every == 0 or progress.step == settings.steps)

    def validated() -> None:
        hooks.beat(f"validation after step {progress.step}")
        figures = validate(trainer.at(max(progress.cursor - 1, 0)), validation)
        hooks.metrics.log({"kind": "validation", "step": progress.step, **figures})
        progress.since = time.perf_counter()

    if progress.step == 0 and settings.validate_every_steps:
        validated()
    while progress.step < settings.steps:
        hooks.beat(f"reading step {progress.step + 1}")
        batches, cursor = next(stream)
        hooks.beat(f"step {progress.step + 1}")
        step = train_step(trainer.at(progress.cursor), batches)
        _advance(trainer, progress, batches, cursor, step)
        hooks.consumed(batches, progress.step)
        hooks.metrics.tick(progress.step)
        if due(settings.log_every_steps):
            record = _record(trainer, progress, step.norm, started) | _data_figures(trainer, progress, hooks)
            hooks.metrics.log(record)
            if record.get("skipped_sequences") == progress.sequences:
                raise UserError(
                    f"step {progress.step}: all {progress.sequences} sequences since the last record are in damaged "
                    "shards, expected some to train on (data.damaged_shards)"
                )
            progress.sums = progress.expert_tokens = None
            progress.sequences = progress.skipped = progress.nonfinite = 0
            progress.since = time.perf_counter()
        _check_finite(progress, step, batches, settings.stop_after_nonfinite, hooks)
        if due(settings.validate_every_steps):
            validated()
        stop = hooks.stop_requested()
        last = stop or progress.step == settings.steps
        if last or due(settings.checkpoint_every_steps):
            hooks.beat(f"saving after step {progress.step}")
            hooks.save(progress)
        hooks.saved(progress, wait=last)
        if stop:
            return progress.step == settings.steps
    return True
